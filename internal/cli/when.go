package cli

import (
	"strconv"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
)

// parseWhen reads a time: RFC 3339, seconds since 1970, or a duration ago.
func parseWhen(s string) (*timestamppb.Timestamp, error) {
	if s == "" {
		return nil, nil
	}
	if d, err := time.ParseDuration(s); err == nil {
		return timestamppb.New(time.Now().Add(-d)), nil
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02"} {
		if t, err := time.Parse(layout, s); err == nil {
			return timestamppb.New(t), nil
		}
	}
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		return timestamppb.New(time.Unix(n, 0)), nil
	}
	return nil, usageError("%q is no time: give 2006-01-02T15:04:05Z, or a duration such as 10m", s)
}

func parseTail(s string) (int64, error) {
	if s == "all" || s == "" {
		return -1, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 {
		return 0, usageError("--tail %q: give a number, or all", s)
	}
	return n, nil
}
