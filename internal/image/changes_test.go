package image

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestChanges(t *testing.T) {
	cases := []struct {
		changes []string
		want    string // JSON of the configuration
	}{
		{[]string{`CMD ["a", "b c"]`}, `{"Cmd":["a","b c"]}`},
		{[]string{`cmd echo "hi" $X`}, `{"Cmd":["/bin/sh","-c","echo \"hi\" $X"]}`},
		{[]string{`CMD ["x"]`, `CMD []`}, `{}`},
		{[]string{`ENTRYPOINT ["/init"]`, "USER 1000:1000", "STOPSIGNAL SIGQUIT"}, `{"User":"1000:1000","Entrypoint":["/init"],"StopSignal":"SIGQUIT"}`},
		{[]string{`ENV A=1 B="two words" C=a\ b`, "ENV A=2", "ENV OLD form with blanks"}, `{"Env":["A=2","B=two words","C=a b","OLD=form with blanks"]}`},
		{[]string{"WORKDIR /a", "WORKDIR b", "WORKDIR c/d"}, `{"WorkingDir":"/a/b/c/d"}`},
		{[]string{"WORKDIR b"}, `{"WorkingDir":"/b"}`},
		{[]string{"EXPOSE 80 443/tcp 53/udp 8000-8002"}, `{"ExposedPorts":{"443/tcp":{},"53/udp":{},"80/tcp":{},"8000/tcp":{},"8001/tcp":{},"8002/tcp":{}}}`},
		{[]string{`LABEL a=b "c d"='e f'`}, `{"Labels":{"a":"b","c d":"e f"}}`},
		{[]string{`VOLUME ["/a", "/b c"]`, "VOLUME /d /e"}, `{"Volumes":{"/a":{},"/b c":{},"/d":{},"/e":{}}}`},
		{[]string{"HEALTHCHECK --interval=5s --timeout=1m --retries=3 --start-period=2s --start-interval=500ms CMD curl -f http://localhost/ || exit 1"},
			`{"Healthcheck":{"Test":["CMD-SHELL","curl -f http://localhost/ || exit 1"],"Interval":5000000000,"Timeout":60000000000,"StartPeriod":2000000000,"StartInterval":500000000,"Retries":3}}`},
		{[]string{`HEALTHCHECK CMD ["true"]`}, `{"Healthcheck":{"Test":["CMD","true"]}}`},
		{[]string{"HEALTHCHECK NONE"}, `{"Healthcheck":{"Test":["NONE"]}}`},
		{[]string{"# a comment", "", "ENV A=1 \\\n B=2"}, `{"Env":["A=1","B=2"]}`},
	}
	for _, c := range cases {
		var got runConfig
		if err := applyChanges(&got, c.changes); err != nil {
			t.Errorf("%q: %v", c.changes, err)
			continue
		}
		if b, _ := json.Marshal(got); strings.ReplaceAll(string(b), `\u0026`, "&") != c.want {
			t.Errorf("%q:\n got %s\nwant %s", c.changes, b, c.want)
		}
	}
	for _, bad := range []string{"RUN x", "FROM y", "ENV", "ENV A", "ENV A=1 B", `ENV A="x`, "EXPOSE 0", "EXPOSE 70000", "EXPOSE 9-1", "EXPOSE 80/xyz",
		"VOLUME relative", "WORKDIR a b", "STOPSIGNAL sig-nal!", "HEALTHCHECK CMD", "HEALTHCHECK --bad=1 CMD x", "HEALTHCHECK --interval=-1s CMD x", "HEALTHCHECK curl", "LABEL =x", "USER"} {
		if err := applyChanges(&runConfig{}, []string{bad}); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestReferences(t *testing.T) {
	digest := "sha256:" + strings.Repeat("a", 64)
	for ref, want := range map[string]string{
		"busybox": "docker.io/library/busybox:latest", "me/app:1": "docker.io/me/app:1", "localhost:5000/x": "localhost:5000/x:latest",
		"index.docker.io/library/a": "docker.io/library/a:latest", "a:1@" + digest: "docker.io/library/a@" + digest,
	} {
		if got, err := Normalize(ref); err != nil || got != want {
			t.Errorf("%s: %q, %v", ref, got, err)
		}
		if got, err := Normalize(Familiar(want)); err != nil || got != want {
			t.Errorf("%s shown as %s: %q, %v", want, Familiar(want), got, err)
		}
	}
	for _, bad := range []string{"", "UPPER", "a b", "a:", "a@sha256:short", "a@sha512:" + strings.Repeat("a", 128), "-x", strings.Repeat("a", 2000), "../x"} {
		if _, err := Normalize(bad); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestConfigs(t *testing.T) {
	img, err := parseConfig([]byte(`{"created":"2024-01-02T03:04:05.6Z","architecture":"amd64","os":"linux","config":{"Cmd":"one","Env":["A=1"],"Volumes":{"/b":{},"/a":{}},
		"Healthcheck":{"Test":["CMD","x"],"Interval":1000000000}},"rootfs":{"type":"layers","diff_ids":["sha256:` + strings.Repeat("1", 64) + `"]}}`))
	if err != nil || img.Config.Command[0] != "one" || img.Config.Volumes[0] != "/a" || img.Config.Healthcheck.Interval.AsDuration().Seconds() != 1 || img.CreatedAt.AsTime().Year() != 2024 {
		t.Errorf("%v, %v", img, err)
	}
	for what, bad := range map[string]string{
		"rubbish": "x", "list": "[]", "digest": `{"rootfs":{"diff_ids":["sha256:xyz"]}}`, "type": `{"rootfs":{"type":"magic"}}`, "zero byte": `{"config":{"Env":["a\u0000b"]}}`,
		"architecture": `{"architecture":"x y"}`, "windows": `{"os":"windows"}`, "negative time": `{"config":{"Healthcheck":{"Timeout":-5}}}`,
	} {
		if _, err := parseConfig([]byte(bad)); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
