package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"

	v1 "tandem/api/tandem/v1"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

type bidi = connect.BidiStreamForClient[v1.StreamInput, v1.StreamOutput]

// session is one attached process: this terminal on one side, a stream on the other.
type session struct {
	a     *app
	st    *bidi
	tty   bool
	stdin bool
	// forward sends SIGINT and SIGTERM on as signals instead of ending the command.
	forward bool
	mu      sync.Mutex // one sender at a time
}

func (s *session) send(m *v1.StreamInput) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.st.Send(m)
}

// run pumps until the process ends and returns its exit code.
func (s *session) run(ctx context.Context) (int, error) {
	defer s.st.CloseResponse()
	restore := s.rawTerminal()
	defer restore()
	if s.stdin {
		go s.pumpStdin()
	}
	stop := s.watchSignals(ctx)
	defer stop()
	for {
		m, err := s.st.Receive()
		if errors.Is(err, io.EOF) {
			return 0, nil
		}
		if err != nil {
			return 1, err
		}
		switch k := m.GetKind().(type) {
		case *v1.StreamOutput_Stdout:
			if _, err := s.a.env.Stdout.Write(k.Stdout); err != nil {
				return 1, err
			}
		case *v1.StreamOutput_Stderr:
			if _, err := s.a.env.Stderr.Write(k.Stderr); err != nil {
				return 1, err
			}
		case *v1.StreamOutput_ExitCode:
			return int(k.ExitCode), nil
		}
	}
}

func (s *session) pumpStdin() {
	buf := make([]byte, 32<<10)
	for {
		n, err := s.a.env.Stdin.Read(buf)
		if n > 0 {
			if s.send(&v1.StreamInput{Kind: &v1.StreamInput_Stdin{Stdin: append([]byte(nil), buf[:n]...)}}) != nil {
				return
			}
		}
		if err != nil {
			s.send(&v1.StreamInput{Kind: &v1.StreamInput_CloseStdin{CloseStdin: true}})
			return
		}
	}
}

func (s *session) watchSignals(ctx context.Context) func() {
	if s.tty {
		s.sendWindow()
	}
	ch := make(chan os.Signal, 4)
	if s.tty {
		signal.Notify(ch, syscall.SIGWINCH)
	}
	if s.forward && !s.tty {
		signal.Notify(ch, syscall.SIGINT, syscall.SIGTERM)
	}
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case sig := <-ch:
				switch sig {
				case syscall.SIGWINCH:
					s.sendWindow()
				case syscall.SIGINT:
					s.send(&v1.StreamInput{Kind: &v1.StreamInput_Signal{Signal: "INT"}})
				default:
					s.send(&v1.StreamInput{Kind: &v1.StreamInput_Signal{Signal: "TERM"}})
				}
			}
		}
	}()
	return func() { signal.Stop(ch); cancel() }
}

func (s *session) sendWindow() {
	if w := windowOf(s.a.env.Stdin); w != nil {
		s.send(&v1.StreamInput{Kind: &v1.StreamInput_Resize{Resize: w}})
	}
}

func windowOf(r any) *v1.WindowSize {
	f, ok := r.(*os.File)
	if !ok {
		return nil
	}
	cols, rows, err := term.GetSize(int(f.Fd()))
	if err != nil {
		return nil
	}
	return &v1.WindowSize{Rows: uint32(rows), Columns: uint32(cols)}
}

func (s *session) rawTerminal() func() {
	f, ok := s.a.env.Stdin.(*os.File)
	if !s.tty || !ok || !term.IsTerminal(int(f.Fd())) {
		return func() {}
	}
	old, err := term.MakeRaw(int(f.Fd()))
	if err != nil {
		return func() {}
	}
	return func() { term.Restore(int(f.Fd()), old) }
}

func (a *app) stdinIsTerminal() bool {
	f, ok := a.env.Stdin.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// findOne resolves a word to a container: its name or id, or a service of the
// project here (its first running replica).
func (a *app) findOne(ctx context.Context, word string) (string, error) {
	project, err := a.projectName(ctx)
	if err != nil || project == "" {
		return word, err
	}
	api, err := a.api()
	if err != nil {
		return "", err
	}
	res, err := api.containers().List(ctx, connect.NewRequest(&v1.ListContainersRequest{Project: project, All: true, Services: []string{word}}))
	if err != nil {
		return "", err
	}
	best := ""
	for _, c := range res.Msg.GetContainers() {
		if c.GetService() != word || c.GetOneOff() {
			continue
		}
		if c.GetStatus().GetState() == v1.ContainerState_CONTAINER_STATE_RUNNING {
			return c.GetMeta().GetId(), nil
		}
		best = c.GetMeta().GetId()
	}
	if best == "" {
		best = word
	}
	return best, nil
}

func (a *app) exec() *cobra.Command {
	var env []string
	var user, dir string
	var tty, stdin, noTTY, privileged bool
	c := &cobra.Command{
		Use:   "exec CONTAINER|SERVICE COMMAND [ARG...]",
		Short: "Run a command in a running container",
		Args:  cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			api, id, err := a.named(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			t := tty && !noTTY
			spec := &v1.ExecSpec{ContainerId: id, Args: args[1:], Env: env, User: user, WorkingDir: dir, Tty: t, Stdin: stdin || t, Privileged: privileged}
			if t {
				spec.Window = windowOf(a.env.Stdin)
			}
			st := api.containers().Exec(cmd.Context())
			if err := st.Send(&v1.StreamInput{Kind: &v1.StreamInput_Exec{Exec: spec}}); err != nil {
				if _, rerr := st.Receive(); rerr != nil {
					return rerr
				}
				return err
			}
			s := &session{a: a, st: st, tty: t, stdin: stdin || t, forward: true}
			code, err := s.run(cmd.Context())
			if err != nil {
				return err
			}
			if code != 0 {
				return &exitError{code: code}
			}
			return nil
		},
	}
	f := c.Flags()
	f.SetInterspersed(false)
	f.StringArrayVarP(&env, "env", "e", nil, "variable NAME=VALUE")
	f.StringVarP(&user, "user", "u", "", "user[:group]")
	f.StringVarP(&dir, "workdir", "w", "", "working directory")
	f.BoolVarP(&tty, "tty", "t", false, "give it a terminal")
	f.BoolVarP(&noTTY, "no-tty", "T", false, "no terminal")
	f.BoolVarP(&stdin, "interactive", "i", false, "connect standard input")
	f.BoolVar(&privileged, "privileged", false, "with all capabilities")
	return c
}

func (a *app) attach() *cobra.Command {
	var noStdin, logs bool
	c := &cobra.Command{
		Use: "attach CONTAINER", Short: "Connect to a container's main process", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			code, err := a.attachTo(cmd.Context(), args[0], !noStdin, logs)
			if err == nil && code != 0 {
				return &exitError{code: code}
			}
			return err
		},
	}
	c.Flags().BoolVar(&noStdin, "no-stdin", false, "only output")
	c.Flags().BoolVar(&logs, "logs", false, "what it printed so far first")
	return c
}

func (a *app) attachTo(ctx context.Context, name string, stdin, logs bool) (int, error) {
	api, err := a.api()
	if err != nil {
		return 1, err
	}
	res, err := api.containers().Inspect(ctx, connect.NewRequest(&v1.ContainerRequest{Container: name, Project: a.project}))
	if err != nil {
		return 1, err
	}
	c := res.Msg
	st := api.containers().Attach(ctx)
	if err := st.Send(&v1.StreamInput{Kind: &v1.StreamInput_Attach{Attach: &v1.AttachSpec{ContainerId: c.GetMeta().GetId(), Stdin: stdin && c.GetSpec().GetStdinOpen(), Logs: logs}}}); err != nil {
		if _, rerr := st.Receive(); rerr != nil {
			return 1, rerr
		}
		return 1, err
	}
	s := &session{a: a, st: st, tty: c.GetSpec().GetTty() && a.stdinIsTerminal(), stdin: stdin && c.GetSpec().GetStdinOpen(), forward: true}
	return s.run(ctx)
}

func (a *app) logs() *cobra.Command {
	var follow, timestamps, noPrefix bool
	var tail, since, until string
	c := &cobra.Command{
		Use:   "logs [CONTAINER|SERVICE...]",
		Short: "Show what containers printed",
		RunE: func(cmd *cobra.Command, args []string) error {
			api, sel, err := a.prepare(cmd.Context(), args)
			if err != nil {
				return err
			}
			o := &v1.LogOptions{Follow: follow, Tail: -1}
			if o.Tail, err = parseTail(tail); err != nil {
				return err
			}
			if o.Since, err = parseWhen(since); err != nil {
				return err
			}
			if o.Until, err = parseWhen(until); err != nil {
				return err
			}
			st, err := api.containers().Logs(cmd.Context(), connect.NewRequest(&v1.LogsRequest{Selector: sel, Options: o}))
			if err != nil {
				return err
			}
			defer st.Close()
			prefix := !noPrefix && !(len(sel.Containers) == 1 && len(sel.Services) == 0)
			lp := &logPrinter{out: a.env.Stdout, err: a.env.Stderr, prefix: prefix, stamps: timestamps}
			for st.Receive() {
				if err := lp.print(st.Msg()); err != nil {
					return err
				}
			}
			return st.Err()
		},
	}
	f := c.Flags()
	f.BoolVarP(&follow, "follow", "f", false, "go on with new lines")
	f.StringVarP(&tail, "tail", "n", "all", "last lines of each container: a number or all")
	f.StringVar(&since, "since", "", "from this time (RFC 3339) or so long ago (10m)")
	f.StringVar(&until, "until", "", "up to this time or so long ago")
	f.BoolVarP(&timestamps, "timestamps", "t", false, "put the time before each line")
	f.BoolVar(&noPrefix, "no-log-prefix", false, "no container names")
	return c
}

// logPrinter writes entries; a line may come in parts.
type logPrinter struct {
	out, err       io.Writer
	prefix, stamps bool
	open           map[string]bool // container+stream has begun a line
}

func (p *logPrinter) print(e *v1.LogEntry) error {
	w := p.out
	if e.GetStream() == "stderr" && !p.prefix {
		w = p.err
	}
	if p.open == nil {
		p.open = map[string]bool{}
	}
	key := e.GetContainerId() + "/" + e.GetStream()
	head := ""
	if !p.open[key] {
		if p.prefix {
			head = fmt.Sprintf("%-16s | ", e.GetContainerName())
		}
		if p.stamps {
			head += e.GetTime().AsTime().Format("2006-01-02T15:04:05.000000000Z07:00") + " "
		}
	}
	line := e.GetLine()
	p.open[key] = len(line) == 0 || line[len(line)-1] != '\n'
	_, err := w.Write(append([]byte(head), line...))
	return err
}
