#!/bin/sh
# Regenerates the Go code of api/ from its .proto files (needs Debian's protobuf-compiler and libprotobuf-dev; the two
# plug-ins are built from go.mod's tool lines).
set -eu
cd "$(dirname "$0")/.."
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
go build -o "$bin/" google.golang.org/protobuf/cmd/protoc-gen-go connectrpc.com/connect/cmd/protoc-gen-connect-go
PATH="$bin:$PATH" protoc -I api --go_out=. --go_opt=module=tandem --connect-go_out=. --connect-go_opt=module=tandem api/tandem/v1/*.proto
