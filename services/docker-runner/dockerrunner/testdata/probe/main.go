// Command probe is the program of the tests' image.
//
//nolint:gosec,forbidigo // it does what it is told, in a container
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Println(`{"program":"probe"}`)
		return
	}
	if err := run(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(verb string, args []string) error {
	switch verb {
	case "echo-input":
		in, err := io.ReadAll(os.Stdin)
		if err != nil {
			return err
		}
		return show(map[string]any{"stdin": json.RawMessage(bytes.TrimSpace(in)), "same": os.Getenv("SPECQL_INPUT") == string(bytes.TrimSpace(in)), "args": args})
	case "count-input":
		n, err := io.Copy(io.Discard, os.Stdin)
		if err != nil {
			return err
		}
		_, has := os.LookupEnv("SPECQL_INPUT")
		return show(map[string]any{"bytes": n, "variable": has, "too_large": os.Getenv("SPECQL_INPUT_TOO_LARGE")})
	case "args":
		return show(map[string]any{"args": args})
	case "env":
		env := map[string]string{}
		for _, e := range os.Environ() {
			name, value, _ := strings.Cut(e, "=")
			env[name] = value
		}
		return show(env)
	case "lines":
		fmt.Println("first")
		fmt.Fprintln(os.Stderr, "second")
		fmt.Print("third without end")
		return nil
	case "last-line":
		fmt.Println("working")
		fmt.Println(`{"answer": 42}`)
		return nil
	case "text":
		fmt.Println("plain text")
		fmt.Fprintln(os.Stderr, "a remark")
		return nil
	case "binary":
		_, err := os.Stdout.Write([]byte{0xff, 0xfe, 'x', '\n', 0})
		return err
	case "exit":
		code, _ := strconv.Atoi(args[0])
		fmt.Fprintln(os.Stderr, "this went wrong")
		os.Exit(code)
	case "sleep":
		fmt.Println("sleeping")
		d, err := time.ParseDuration(args[0])
		if err != nil {
			return err
		}
		time.Sleep(d)
		return nil
	case "ignore-signals":
		// Children that would survive their parent, and a main process that reads nothing.
		for range 3 {
			c := exec.Command("/probe", "sleep", "1h")
			c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
			if err := c.Start(); err != nil {
				return err
			}
		}
		fmt.Println("sleeping")
		for { // select{} can pass for a deadlock
			time.Sleep(time.Hour)
		}
	case "burn":
		d, err := time.ParseDuration(args[0])
		if err != nil {
			return err
		}
		// Time of the CPU, whatever else the machine does.
		for used := time.Duration(0); used < d; {
			var u syscall.Rusage
			if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
				return err
			}
			used = time.Duration(u.Utime.Nano() + u.Stime.Nano())
		}
		return nil
	case "hog":
		n, _ := strconv.Atoi(args[0])
		var keep [][]byte
		for range n {
			b := bytes.Repeat([]byte{1}, 1<<20)
			keep = append(keep, b)
		}
		return show(map[string]any{"mb": len(keep)})
	case "hog-child":
		err := exec.Command("/probe", "hog", args[0]).Run()
		return show(map[string]any{"child": fmt.Sprint(err)})
	case "fork":
		n, _ := strconv.Atoi(args[0])
		started := 0
		var failed error
		for range n {
			c := exec.Command("/probe", "sleep", "1h")
			if failed = c.Start(); failed != nil {
				break
			}
			started++
		}
		return show(map[string]any{"started": started, "error": fmt.Sprint(failed)})
	case "status":
		f, err := os.Open("/proc/self/status")
		if err != nil {
			return err
		}
		out := map[string]string{"uid": strconv.Itoa(os.Getuid()), "pid": strconv.Itoa(os.Getpid())}
		for s := bufio.NewScanner(f); s.Scan(); {
			key, value, _ := strings.Cut(s.Text(), ":")
			out[key] = strings.TrimSpace(value)
		}
		out["hostname"], _ = os.Hostname()
		return show(out)
	case "attack":
		return attack(args)
	case "endless":
		return endless(args)
	case "try":
		return show(try(args))
	case "write":
		return os.WriteFile(args[0], []byte(args[1]), 0o644)
	case "write-latin1":
		return os.WriteFile(args[0], []byte("{\"a\":\"\xe9\"}"), 0o644)
	case "write-rename":
		if err := os.WriteFile(args[0]+".part", []byte(args[1]), 0o644); err != nil {
			return err
		}
		return os.Rename(args[0]+".part", args[0])
	case "write-deep":
		return os.WriteFile(args[0], []byte(strings.Repeat("[", 5000)+strings.Repeat("]", 5000)), 0o644)
	case "write-sparse":
		f, err := os.Create(args[0])
		if err != nil {
			return err
		}
		return f.Truncate(1 << 40)
	case "fill":
		f, err := os.Create(args[0])
		if err != nil {
			return err
		}
		n, err := io.Copy(f, zeros{})
		return show(map[string]any{"bytes": n, "error": fmt.Sprint(err)})
	case "write-mb":
		n, _ := strconv.Atoi(args[1])
		return os.WriteFile(args[0], bytes.Repeat([]byte("x"), n<<20), 0o644)
	case "symlink":
		return os.Symlink(args[0], args[1])
	case "fifo":
		return syscall.Mkfifo(args[0], 0o666)
	case "mkdir":
		return os.Mkdir(args[0], 0o755)
	case "flood":
		w := bufio.NewWriterSize(os.Stdout, 1<<16)
		for {
			if _, err := w.WriteString("0123456789abcdef\n"); err != nil {
				return err
			}
		}
	case "long-line":
		_, err := os.Stdout.Write(bytes.Repeat([]byte("x"), 100<<10))
		return err
	case "read":
		data, err := os.ReadFile(args[0])
		if err != nil {
			return err
		}
		return show(map[string]any{"text": string(data)})
	case "interfaces":
		all, err := net.Interfaces()
		if err != nil {
			return err
		}
		var names []string
		for _, i := range all {
			names = append(names, i.Name)
		}
		return show(map[string]any{"names": names})
	default:
		return fmt.Errorf("no such verb: %s", verb)
	}
	return nil
}

// try does what a container must not be able to do and tells how each ended.
func try(paths []string) map[string]string {
	out := map[string]string{
		"mount":       fmt.Sprint(syscall.Mount("none", "/tmp", "tmpfs", 0, "")),
		"sethostname": fmt.Sprint(syscall.Sethostname([]byte("x"))),
		"unshare":     fmt.Sprint(syscall.Unshare(syscall.CLONE_NEWUSER)),
		"ptrace":      fmt.Sprint(os.WriteFile("/proc/sys/kernel/core_pattern", []byte("x"), 0)),
		"mknod":       fmt.Sprint(syscall.Mknod("/tmp/sda", syscall.S_IFBLK|0o600, 8<<8)),
	}
	for _, p := range paths {
		out[p] = fmt.Sprint(os.WriteFile(filepath.Join(p, "x"), nil, 0o600))
	}
	return out
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func show(v any) error { return json.NewEncoder(os.Stdout).Encode(v) }
