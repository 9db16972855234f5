# Tandem. `make demo` shows it, `make test` proves it, `make help` lists the rest.
SHELL       := /bin/bash
.DEFAULT_GOAL := help
VERSION     := $(shell cat VERSION)
BIN         := $(CURDIR)/bin
GOFLAGS_ALL := -trimpath
LDFLAGS     := -s -w -X main.version=$(VERSION)
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
VULNCHECK   := golang.org/x/vuln/cmd/govulncheck@v1.9.0
export CGO_ENABLED ?= 0

.PHONY: help deps build guest demo demo-clean test race lint vulncheck fuzz bench peers simulate install generate clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

deps: ## install what building and running need, from Debian
	@build/deps

build: deps ## tandem, tandem-guest and runc, into bin/
	@mkdir -p $(BIN)
	@build/step "building tandem" go build $(GOFLAGS_ALL) -ldflags "$(LDFLAGS)" -o $(BIN)/tandem ./cmd/tandem
	@build/step "building tandemd" go build $(GOFLAGS_ALL) -ldflags "$(LDFLAGS)" -o $(BIN)/tandemd ./cmd/tandemd
	@build/step "building tandem-guest" go build $(GOFLAGS_ALL) -ldflags "$(LDFLAGS)" -o $(BIN)/tandem-guest ./cmd/tandem-guest
	@build/step "building runc" build/make-runc $(BIN)/runc

guest: build ## the guest's kernel and initramfs, into bin/guest
	@build/step "making the guest" $(BIN)/tandem guest build --guest $(BIN)/tandem-guest --runc $(BIN)/runc --out $(BIN)/guest

demo: guest ## a Compose file becomes Apache and Tomcat in one real VM
	@examples/shop/demo up

demo-clean: ## remove all that the demo made
	@examples/shop/demo clean

test: guest ## unit, contract, simulation and end-to-end tests, real VMs included
	@build/test

race: guest ## the concurrent packages under the race detector
	@CGO_ENABLED=1 go test -race -timeout 15m ./internal/rpc/... ./internal/session/... ./internal/store/... ./internal/control/... ./internal/server/... ./internal/agent/... ./internal/planner/...

lint: ## format, vet, staticcheck
	@build/lint $(STATICCHECK)

vulncheck: ## known vulnerabilities in what is called (VULNDB=URL: another data base than Go's)
	@build/vulncheck $(VULNCHECK)

fuzz: ## every fuzz target for FUZZTIME (default 5m) each
	@build/fuzz

bench: guest ## the numbers of SPECIFICATION.md, side by side
	@bench/run

peers: ## decisions a second beside kube-scheduler's, 10,000 hosts (downloads Kubernetes)
	@cd bench/peers && go run .

simulate: ## Tandem beside one VM per container and Kubernetes, on a trace (TRACE=file.csv.gz)
	@bench/simulate

install: guest ## into /usr/local (DESTDIR goes before it)
	install -D -m 755 $(BIN)/tandem $(DESTDIR)/usr/local/bin/tandem
	install -D -m 755 $(BIN)/tandemd $(DESTDIR)/usr/local/lib/tandem/tandemd
	install -D -m 755 $(BIN)/tandem-guest $(DESTDIR)/usr/local/lib/tandem/tandem-guest
	install -D -m 755 $(BIN)/runc $(DESTDIR)/usr/local/lib/tandem/runc
	mkdir -p $(DESTDIR)/usr/local/lib/tandem/guest && cp -a $(BIN)/guest/. $(DESTDIR)/usr/local/lib/tandem/guest/
	install -D -m 644 -t $(DESTDIR)/etc/systemd/system build/tandem.service build/tandem-workloads.service

generate: ## Go code from the .proto files
	@api/generate.sh

clean: ## what make made here
	rm -rf $(BIN)
