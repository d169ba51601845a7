// Command wasm-runner is a custom runner: it adds the execution type wasm, which runs a
// WebAssembly program with its input on stdin and its output on stdout.
package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"
	"github.com/tetratelabs/wazero/sys"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

// Config is runner_config, Policy is security_policy. Operations have no keys of their own.
type (
	Config struct {
		Module   string  `json:"module" jsonschema:"pattern=^/,description=absolute path of the WebAssembly program (WASI preview 1)"`
		Function string  `json:"function,omitempty" jsonschema:"description=exported function to call; _start if absent"`
		Timeout  float64 `json:"timeout,omitempty" jsonschema:"exclusiveMinimum=0,description=seconds that an attempt may take"`
	}
	Policy struct {
		AllowedModules []string `json:"allowed_modules,omitempty" jsonschema:"description=absolute paths of the programs that may run"`
		ResourceLimits struct {
			MemoryMB uint32 `json:"memory_mb,omitempty" jsonschema:"minimum=1,maximum=4096,description=largest memory of the program; 64 if absent"`
		} `json:"resource_limits,omitzero"`
	}
)

// wasmRunner implements runner.JobRunner. Compiled programs are kept in the cache's folder.
type wasmRunner struct {
	cache wazero.CompilationCache
	dir   string
}

func main() { os.Exit(runner.Main("wasm-runner", build)) }

func build(context.Context, *runner.Env) (runner.JobRunner, error) {
	dir, err := os.MkdirTemp("", "wasm-runner-")
	if err != nil {
		return nil, err
	}
	cache, err := wazero.NewCompilationCacheWithDir(dir)
	return &wasmRunner{cache: cache, dir: dir}, err
}

func (w *wasmRunner) Close() error {
	return errors.Join(w.cache.Close(context.Background()), os.RemoveAll(w.dir))
}

func (w *wasmRunner) Describe(context.Context) (*runner.Description, error) {
	return &runner.Description{
		Name:      "wasm-runner",
		Types:     []runner.Type{{Name: "wasm", ConfigSchema: runner.SchemaOf[Config](), PolicySchema: runner.SchemaOf[Policy](), OperationSchema: runner.SchemaOf[struct{}]()}},
		Isolation: []runner.Feature{{Name: "webassembly", Available: true}},
	}, nil
}

func (w *wasmRunner) Validate(_ context.Context, s *runner.Service) ([]runner.Problem, error) {
	return runner.CheckService[Config, struct{}, Policy](s), nil
}

func (w *wasmRunner) Execute(ctx context.Context, job *runner.Job, sink runner.Sink) (*runner.Result, error) {
	config, err1 := runner.Decode[Config](job.Service.Config)
	policy, err2 := runner.Decode[Policy](job.Service.Policy)
	module, err3 := filepath.EvalSymlinks(config.Module) // its error names the path
	if err := errors.Join(err1, err2, err3); err != nil {
		return &runner.Result{Err: fault.Wrap(err, fault.Validation, "%v", err)}, nil
	}
	var checks runner.Checks
	if !slices.Contains(policy.AllowedModules, module) {
		denied := checks.Deny("allowed_modules", module, "add it: allowed_modules: [\""+module+"\"]")
		return &runner.Result{Err: denied, Security: checks.Context(runner.Digest(policy))}, nil
	}
	checks.Allow("allowed_modules", module)
	start := time.Now()
	output, peak, err := w.run(ctx, module, config, policy, []string{module, job.Operation.Name}, job.Input, sink)
	usage := &runnerv1.ResourceUsage{DurationSeconds: new(time.Since(start).Seconds()), PeakMemoryMb: peak, Source: "webassembly"}
	return &runner.Result{Output: output, Err: err, Usage: usage, Security: checks.Context(runner.Digest(policy), "webassembly")}, nil
}

// run carries the program out. The peak memory is in MiB, nil where it never ran.
func (w *wasmRunner) run(ctx context.Context, module string, c Config, p Policy, args []string, input []byte, sink runner.Sink) (output []byte, peak *float64, err error) {
	program, err := os.ReadFile(module)
	if err != nil {
		return nil, nil, fault.Wrap(err, fault.Validation, "%v", err)
	}
	memoryMB := cmp.Or(p.ResourceLimits.MemoryMB, 64)
	engine := wazero.NewRuntimeWithConfig(ctx, wazero.NewRuntimeConfig().WithCompilationCache(w.cache).WithCloseOnContextDone(true).WithMemoryLimitPages(memoryMB*16))
	defer func() { _ = engine.Close(context.WithoutCancel(ctx)) }()
	wasi_snapshot_preview1.MustInstantiate(ctx, engine)
	stdout, stderr := &bounded{limit: runner.MaxOutputBytes + 1}, &bounded{limit: runner.MaxLogBytes}
	sleep := func(ns int64) {
		nap, end := context.WithTimeout(ctx, time.Duration(ns))
		defer end()
		<-nap.Done()
	}
	// No file, no network, no variable of this machine is in reach; time is, and its passing.
	guest, err := engine.InstantiateWithConfig(ctx, program, wazero.NewModuleConfig().WithName("").WithArgs(args...).
		WithStdin(bytes.NewReader(input)).WithStdout(stdout).WithStderr(stderr).WithStartFunctions().WithSysWalltime().WithSysNanotime().WithNanosleep(sleep))
	if err != nil {
		return nil, nil, fault.Wrap(err, fault.Validation, "the module cannot be loaded with %d MiB of memory: %v", memoryMB, err)
	}
	function, memory := guest.ExportedFunction(cmp.Or(c.Function, "_start")), guest.Memory()
	if function == nil {
		return nil, nil, fault.New(fault.Validation, "the module exports no function %s", c.Function)
	}
	_, err = function.Call(ctx)
	if memory != nil {
		peak = new(float64(memory.Size()) / (1 << 20)) // it never shrinks
	}
	for line := range strings.Lines(stderr.String()) {
		sink.Log("stderr", strings.TrimRight(line, "\r\n"))
	}
	var exit *sys.ExitError
	switch {
	case ctx.Err() != nil:
		return nil, peak, nil // the kit says whether it was the time or a cancel
	case stdout.Len() == stdout.limit:
		return nil, peak, fault.New(fault.ResourceExceeded, "the output has more than the %d bytes allowed", runner.MaxOutputBytes)
	case err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 0):
		return nil, peak, fault.Wrap(err, fault.RemoteError, "the program failed: %v: %.1000s", err, stderr)
	case !json.Valid(stdout.Bytes()):
		return nil, peak, fault.New(fault.RemoteError, "the program wrote no JSON on stdout but %.1000q", stdout)
	}
	return stdout.Bytes(), peak, nil
}

// bounded keeps the start of what is written, up to a limit.
type bounded struct {
	bytes.Buffer
	limit int
}

func (b *bounded) Write(p []byte) (int, error) {
	b.Buffer.Write(p[:min(len(p), b.limit-b.Len())])
	return len(p), nil
}
