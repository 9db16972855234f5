package control

import (
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// clone copies a record of the cache before it is changed.
func clone[T proto.Message](m T) T { return proto.Clone(m).(T) }

func stamp(t time.Time) *timestamppb.Timestamp { return timestamppb.New(t) }
