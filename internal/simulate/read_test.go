package simulate

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

const header = "id,arrive_s,life_s,cpu_milli,mem_mib,project,service,class\n"

func TestReadTakesWhatTheFormatAllows(t *testing.T) {
	text := "\xef\xbb\xbfid,arrive_s,life_s,cpu_milli,mem_mib,colour,project,service,class\r\n" +
		"a,0,60.5,1500,1024,red,shop,web,batch\r\n\r\n" +
		"\"b,1\",1e1,,0,0,,,,\r\n" +
		" c ,10,0,250.2,0.5,,,,latency"
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	io.WriteString(w, text)
	w.Close()
	want := []Request{
		{ID: "a", Life: 60500, Need: Size{1500, 1 << 30}, Project: "shop", Service: "web", Class: ClassBatch},
		{ID: "b,1", Arrive: 10000, Life: -1, Need: Size{0, defaultMemory}, Class: ClassLatency},
		{ID: "c", Arrive: 10000, Need: Size{251, 1 << 19}, Class: ClassLatency},
	}
	for _, in := range []string{text, z.String()} {
		tr, err := Read(strings.NewReader(in), ReadOptions{Name: "x"})
		if err != nil {
			t.Fatal(err)
		}
		if fmt.Sprint(tr.Requests) != fmt.Sprint(want) {
			t.Errorf("got  %v\nwant %v", tr.Requests, want)
		}
		if tr.End() != 60500 {
			t.Errorf("ends at %d", tr.End())
		}
	}
}

func TestReadNamesTheLineOfWhatIsWrong(t *testing.T) {
	for _, x := range []struct{ name, in, want string }{
		{"empty", "", "the file is empty"},
		{"no header", "a,0,1,100,200\n", "line 1: the header lacks id, arrive_s"},
		{"a column is missing", "id,arrive_s,life_s,cpu_milli\n", "lacks mem_mib"},
		{"a column twice", "id,arrive_s,life_s,cpu_milli,mem_mib,id\n", "names \"id\" twice"},
		{"only a header", header, "no requests"},
		{"negative arrival", header + "a,-1,1,1,1,,,\n", "line 2: arrive_s \"-1\" is negative"},
		{"negative life", header + "a,1,-1,1,1,,,\n", "line 2: life_s \"-1\" is negative"},
		{"negative cpu", header + "a,1,1,-5,1,,,\n", "cpu_milli \"-5\" is negative"},
		{"NaN", header + "a,1,1,1,1,,,\nb,NaN,1,1,1,,,\n", "line 3: arrive_s \"NaN\""},
		{"infinite", header + "a,1,Inf,1,1,,,\n", "life_s \"Inf\""},
		{"huge", header + "a,1,1,1e300,1,,,\n", "too large"},
		{"huger", header + "a,1e999,1,1,1,,,\n", "\"1e999\" is too large"},
		{"huge memory", header + "a,1,1,1,9223372036854775807,,,\n", "too large"},
		{"no number", header + "a,one,1,1,1,,,\n", "\"one\" is not a number"},
		{"no id", header + ",1,1,1,1,,,\n", "the id is empty"},
		{"id of control characters", header + "a\x1b[2J,1,1,1,1,,,\n", "can't be printed"},
		{"id not UTF-8", header + "a\xff,1,1,1,1,,,\n", "can't be printed"},
		{"long id", header + strings.Repeat("a", 300) + ",1,1,1,1,,,\n", "300 bytes"},
		{"duplicate", header + "a,1,1,1,1,,,\nb,1,1,1,1,,,\na,1,1,1,1,,,\n", "line 4: id \"a\" is already that of line 2"},
		{"unordered", header + "a,9,1,1,1,,,\nb,8,1,1,1,,,\n", "line 3: \"b\" arrives at 8 s, before"},
		{"class", header + "a,1,1,1,1,,,urgent\n", "class \"urgent\""},
		{"fields", header + "a,1,1,1\n", "line 2: 4 fields, but the header has 8"},
		{"quotes", header + "\"a,1,1,1,1,,,\n", "line 2"},
		{"long line", header + strings.Repeat("a", 100000), "line 2: longer than"},
		{"cut gzip", "\x1f\x8b\x08\x00", "gzip"},
		{"too many", header + "a,1,1,1,1,,,\nb,1,1,1,1,,,\nc,1,1,1,1,,,\nd,1,1,1,1,,,\n", "line 5: more than 3 requests"},
	} {
		_, err := Read(strings.NewReader(x.in), ReadOptions{Name: "t.csv", MaxRequests: 3})
		if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), x.want) || !strings.HasPrefix(err.Error(), "t.csv") {
			t.Errorf("%s: got %v, want %q", x.name, err, x.want)
		}
	}
}

func TestABombIsAnError(t *testing.T) {
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	io.WriteString(w, header)
	for range 1000 {
		w.Write(make([]byte, 1<<16))
	}
	w.Close()
	if _, err := Read(&z, ReadOptions{}); err == nil || !strings.Contains(err.Error(), "line 2: longer than") {
		t.Errorf("got %v", err)
	}
}

func TestImporters(t *testing.T) {
	azure := "id,arrive_s,batch,vcpu,mem_gib,life_s,censored\n2,103,2,1,0.75,928,0\n1,78,1,8,14.0,30,1\n"
	tr, err := Read(strings.NewReader(azure), ReadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	want := []Request{
		{ID: "1", Arrive: 78000, Life: 30000, Need: Size{8000, 14 << 30}, Class: ClassLatency, customer: "batch-1"},
		{ID: "2", Arrive: 103000, Life: 928000, Need: Size{1000, 768 << 20}, Class: ClassLatency, customer: "batch-2"},
	}
	if fmt.Sprint(tr.Requests) != fmt.Sprint(want) || tr.End() != 103000 {
		t.Errorf("azure: got %v until %d", tr.Requests, tr.End())
	}
	openb := "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,scheduled_time\n" +
		"p-1,12500,57344,0,0,,LS,Running,10644355,10644932,10644358\np-0,4000,1024,1,1000,,BE,Running,0,12537496,0\n"
	tr, err = Read(strings.NewReader(openb), ReadOptions{Format: FormatOpenB})
	if err != nil {
		t.Fatal(err)
	}
	want = []Request{
		{ID: "p-1", Life: -1, Need: Size{12500, 56 << 30}, Class: ClassLatency},
		{ID: "p-0", Life: -1, Need: Size{4000, 1 << 30}, Class: ClassBatch},
	}
	if fmt.Sprint(tr.Requests) != fmt.Sprint(want) || tr.End() != 3600000 {
		t.Errorf("openb: got %v until %d", tr.Requests, tr.End())
	}
	if _, err := Read(strings.NewReader(openb), ReadOptions{Format: FormatAzure}); err == nil || !strings.Contains(err.Error(), "lacks id, arrive_s, batch") {
		t.Errorf("openb read as azure2017: %v", err)
	}
	if _, err := Read(strings.NewReader(openb), ReadOptions{Format: "csv"}); err == nil || !strings.Contains(err.Error(), "not one of") {
		t.Errorf("format csv: %v", err)
	}
}

func TestHosts(t *testing.T) {
	for _, x := range []struct {
		in   string
		want Pool
		err  string
	}{
		{in: "96c,256g*auto", want: Pool{Size: Size{96000, 256 << 30}}},
		{in: "1.5c,512m*12", want: Pool{Size: Size{1500, 512 << 20}, Count: 12}},
		{in: "4C, 8GiB", want: Pool{Size: Size{4000, 8 << 30}, Count: 1}},
		{in: "4c", err: "a CPU and a memory size are needed"},
		{in: "4,8g", err: "the CPU ends in c"},
		{in: "0c,8g", err: "needs CPU and memory"},
		{in: "-4c,8g", err: "negative"},
		{in: "nanc,8g", err: "number"},
		{in: "4c,8g*0", err: "a number of hosts or auto"},
		{in: "4c,8g*1.5", err: "a number of hosts or auto"},
		{in: "1e99c,8g", err: "too large"},
	} {
		p, err := ParsePool(x.in)
		if x.err == "" && (err != nil || p != x.want) || x.err != "" && (err == nil || !strings.Contains(err.Error(), x.err)) {
			t.Errorf("%q: got %v, %v", x.in, p, err)
		}
	}
	list, err := ReadHosts(strings.NewReader("sn,cpu_milli,memory_mib,gpu,model\nn-1,32000,1024,0,\nn-2,64000,2048,2,P100\n"), "n.csv")
	if err != nil || fmt.Sprint(list) != fmt.Sprint([]Pool{{Size: Size{32000, 1 << 30}, Count: 1, ID: "n-1"}, {Size: Size{64000, 2 << 30}, Count: 1, ID: "n-2"}}) {
		t.Errorf("got %v, %v", list, err)
	}
	if _, err := ReadHosts(strings.NewReader("id,cpu_milli,mem_mib\na,1,1\na,1,1\n"), "n.csv"); err == nil || !strings.Contains(err.Error(), "n.csv: line 3: host \"a\" is already on line 2") {
		t.Errorf("got %v", err)
	}
}

func TestZipfIsAZipfLaw(t *testing.T) {
	tr := &Trace{}
	for i := range 20000 {
		tr.Requests = append(tr.Requests, Request{ID: fmt.Sprint(i), Service: fmt.Sprintf("s-%d", i)})
	}
	if err := tr.Zipf(50); err != nil {
		t.Fatal(err)
	}
	n := map[string]int{}
	for _, q := range tr.Requests {
		n[q.Project]++
	}
	// The first of 50 gets 1 / (1 + 1/2 + ... + 1/50) = 22.2 %, the second half of it.
	if len(n) != 50 || n["p-1"] < 4200 || n["p-1"] > 4700 || n["p-2"] < 2000 || n["p-2"] > 2450 {
		t.Errorf("%d projects, the first with %d, the second with %d", len(n), n["p-1"], n["p-2"])
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte(header + "a,0,1,100,100,p,s,batch\nb,1,,100,100,,,\n"))
	f.Add([]byte("id,arrive_s,batch,vcpu,mem_gib,life_s,censored\n1,78,1,8,14.0,30,0\n"))
	f.Add([]byte("name,cpu_milli,memory_mib,qos\na,1,1,BE\n"))
	f.Add([]byte(header + "a,NaN,-1,1e300,0x1p-2,\"\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		tr, err := Read(bytes.NewReader(in), ReadOptions{MaxRequests: 1000})
		if err != nil {
			if !errors.Is(err, errdefs.ErrInvalidArgument) {
				t.Fatalf("an error of no class: %v", err)
			}
			return
		}
		seen := map[string]bool{}
		for i, q := range tr.Requests {
			if q.ID == "" || seen[q.ID] || q.Arrive < 0 || q.Arrive > maxTime || q.Life > maxTime || q.Need.CPU < 0 || q.Need.Memory <= 0 ||
				q.Need.CPU > maxCPU || q.Need.Memory > maxMemory || i > 0 && q.Arrive < tr.Requests[i-1].Arrive || tr.End() < 0 {
				t.Fatalf("accepted %+v", q)
			}
			seen[q.ID] = true
		}
	})
}
