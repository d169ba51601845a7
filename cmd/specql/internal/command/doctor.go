package command

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/specql/mesh/cmd/specql/internal/jsonform"
	"github.com/specql/mesh/cmd/specql/internal/local"
	"github.com/specql/mesh/cmd/specql/internal/terminal"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/mesh"
	"github.com/specql/mesh/services/orchestrator/schema"
)

const (
	// doctorPatience bounds each question.
	doctorPatience = 10 * time.Second
	// maxSkew is how far clocks may be apart. Leases and certificates bear that much.
	maxSkew = 2 * time.Second
	// expiresSoon is when a certificate is worth a word.
	expiresSoon = 30 * 24 * time.Hour
)

// finding is one thing that was looked at.
type finding struct {
	group, name string
	// status is ok, note, warning or error.
	status  string
	message string
	mend    string
}

// diagnosis gathers findings.
type diagnosis struct{ findings []finding }

func (d *diagnosis) add(group, name, status, mend, format string, args ...any) {
	d.findings = append(d.findings, finding{group: group, name: name, status: status, mend: mend, message: fmt.Sprintf(format, args...)})
}

func (d *diagnosis) healthy() bool {
	return !slices.ContainsFunc(d.findings, func(f finding) bool { return f.status == "error" })
}

// doctor is what the flags say.
type doctor struct {
	conn     connection
	db       database
	certs    string
	registry string
	env      string
}

func newDoctor(s IO) *cobra.Command {
	var d doctor
	var out output
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Looks at this machine and this mesh, and says what to mend",
		Long: "Looks at this machine (kernel, ways of isolating jobs, Docker engine), at the mesh at --address (runners, their isolation,\n" +
			"clocks, certificate), at the database (--database: versions, schema, rights, clock), at certificates (--certs DIR, or\n" +
			"--tls-cert, --tls-key and --ca) and at the registry (--registry, which the mesh's runners check, too). It changes\n" +
			"nothing. Without a mesh it looks at the machine. Whatever is amiss has its mend. Exit status 1 if there is an error;\n" +
			"warnings are things that work less well than they could.",
		Example: "  specql doctor\n  specql doctor --address orchestrator.example.org:7350 --certs certs --tls-cert certs/client.crt --tls-key certs/client.key --ca certs/ca.crt",
		Args:    cobra.NoArgs,
	}
	fs := cmd.Flags()
	d.conn.register(fs)
	d.db.register(fs)
	fs.StringVar(&d.certs, "certs", "", "folder of certificates to look at, as specql certs makes it")
	fs.StringVar(&d.registry, "registry", "", "the service registry; registry/service_registry.yaml if it is there, else the one that the mesh has in force")
	fs.StringVar(&d.env, "env", "", "the overlay of the registry (SPECQL_ENV)")
	out.register(fs)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := out.check(); err != nil {
			return err
		}
		if err := s.bind(fs); err != nil {
			return err
		}
		found, err := during(s, "looking around", func() (*diagnosis, error) { return d.look(cmd.Context(), s, fs.Changed("address")) })
		if err != nil {
			return err
		}
		return s.diagnosed(&out, found)
	}
	return cmd
}

func (d *doctor) look(ctx context.Context, s IO, wanted bool) (*diagnosis, error) {
	found := &diagnosis{}
	d.machine(ctx, found)
	reached, err := d.mesh(ctx, s, found, wanted)
	if err != nil {
		return nil, err
	}
	d.db.url = cmp.Or(d.db.url, s.getenv("DATABASE_URL"))
	if d.db.url != "" {
		if err := checkDatabaseURL(d.db.url); err != nil {
			return nil, err
		}
		d.database(ctx, found)
	}
	d.certificates(found)
	return found, d.registryFile(ctx, s, found, reached)
}

// machine looks at what this machine can do for jobs.
func (*doctor) machine(ctx context.Context, found *diagnosis) {
	const group = "machine"
	kernel := ""
	if text, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		kernel = ", kernel " + strings.TrimSpace(string(text))
	}
	found.add(group, "system", "ok", "", "%s/%s%s, %s", runtime.GOOS, runtime.GOARCH, kernel, count(runtime.NumCPU(), "CPU"))
	if runtime.GOOS != "linux" {
		found.add(group, "shell jobs", "warning", "run the shell runner on Linux", "shell jobs are isolated on Linux alone")
	}
	runners, closeRunners, err := local.BuiltIn(slog.New(slog.DiscardHandler))
	if err != nil {
		found.add(group, "runners", "error", "see the message", "the runners do not start here: %v", err)
		return
	}
	defer closeRunners()
	ctx, cancel := context.WithTimeout(ctx, doctorPatience)
	defer cancel()
	for _, r := range runners {
		described, err := r.Describe(ctx)
		if err != nil || len(described.Types) == 0 {
			found.add(group, "runners", "error", "see the message", "a runner cannot say what it does: %v", err)
			continue
		}
		kind := described.Types[0].Name
		if kind != "shell" && kind != "docker" { // the others' depends on how their own process was started
			continue
		}
		for _, f := range described.Isolation {
			found.isolation(group, kind+": "+f.Name, f.Available, f.Detail)
		}
	}
}

func (d *diagnosis) isolation(group, name string, available bool, detail string) {
	if available {
		d.add(group, name, "ok", "", "%s", cmp.Or(detail, "available"))
		return
	}
	d.add(group, name, "warning", "jobs run without it; start the runner with --require-isolation to have it refuse to", "not available: %s", cmp.Or(detail, "it did not say why"))
}

// mesh looks at the orchestrator and its runners, and says whether it answers.
func (d *doctor) mesh(ctx context.Context, s IO, found *diagnosis, wanted bool) (bool, error) {
	const group = "mesh"
	c, err := d.conn.dial(s)
	if err != nil {
		if exit, ok := errors.AsType[*exitError](err); ok {
			return false, exit
		}
		found.add(group, "orchestrator", "error", "look at --address, --ca, --tls-cert and --tls-key", "%v", err)
		return false, nil
	}
	defer func() { _ = c.Close() }()
	ctx, cancel := context.WithTimeout(ctx, doctorPatience)
	defer cancel()
	var server peer.Peer
	asked := time.Now()
	res, err := c.Registry().ListRunners(ctx, &specqlv1.ListRunnersRequest{}, grpc.Peer(&server))
	took := time.Since(asked)
	if err != nil {
		f := fault.From(fault.FromError(err))
		switch text := d.conn.explain(f).Error(); {
		case f.Code == fault.Unavailable && !wanted && !strings.HasPrefix(text, "a server answers"):
			found.add(group, "orchestrator", "note", "start one with `specql dev`, or name another with --address", "no mesh answers at %s: only this machine was looked at", d.conn.address)
		case f.Code == fault.Unavailable:
			found.add(group, "orchestrator", "error", "see that it runs and is reached from here, and that --ca, --tls-cert and --tls-key are those of its mesh", "%s", strings.ReplaceAll(text, "\n", "; "))
		default:
			found.add(group, "orchestrator", "error", "give --token of somebody who may look", "it answers, and refuses: %s", f.Message)
		}
		return false, nil
	}
	found.add(group, "orchestrator", "ok", "", "answers at %s in %s", d.conn.address, took.Round(time.Millisecond/10))
	if info, ok := server.AuthInfo.(credentials.TLSInfo); ok && len(info.State.PeerCertificates) > 0 {
		found.validity(group, "orchestrator's certificate", info.State.PeerCertificates[0])
	}
	// The runners are asked in between, which may take long: the clock is read at the end.
	if at := res.GetNow(); at != nil {
		found.clock(group, "orchestrator's clock", at.AsTime().Sub(asked.Add(took/2)), took/2)
	}
	if len(res.GetRunners()) == 0 {
		found.add(group, "runners", "error", "start the orchestrator with --runner TYPE=ADDRESS", "the orchestrator has no runner")
	}
	for _, r := range res.GetRunners() {
		d.runner(found, r, res.GetNow(), took)
	}
	return true, nil
}

func (*doctor) runner(found *diagnosis, r *specqlv1.Runner, now *timestamppb.Timestamp, took time.Duration) {
	const group = "mesh"
	name := r.GetExecutionType() + " runner"
	if !r.GetReachable() {
		found.add(group, name, "error", "see that it runs at this address and that both certificates are of one CA", "not reached at %s: %s", r.GetAddress(), r.GetError())
		return
	}
	d := r.GetDescription()
	found.add(group, name, "ok", "", "%s %s at %s, %d of %d jobs", d.GetName(), cmp.Or(d.GetVersion(), "of no version"), r.GetAddress(), d.GetInFlight(), d.GetCapacity())
	if at := d.GetNow(); at != nil && now != nil {
		found.clock(group, name+"'s clock", at.AsTime().Sub(now.AsTime())+took/2, took/2)
	}
	for _, f := range d.GetIsolation() {
		found.isolation(group, name+": "+f.GetName(), f.GetAvailable(), f.GetDetail())
	}
}

// clock judges how far a clock is ahead, give or take what is not known.
func (d *diagnosis) clock(group, name string, skew, uncertain time.Duration) {
	status, mend := "ok", ""
	if skew.Abs()-uncertain > maxSkew {
		status, mend = "error", "let both machines keep their time by NTP (chrony or systemd-timesyncd)"
	}
	if skew.Abs() <= uncertain {
		d.add(group, name, status, mend, "the same as here, give or take %s", uncertain.Round(time.Millisecond))
		return
	}
	where := "ahead of"
	if skew < 0 {
		where = "behind"
	}
	d.add(group, name, status, mend, "%s %s this machine's, give or take %s", skew.Abs().Round(time.Millisecond), where, uncertain.Round(time.Millisecond))
}

func (d *doctor) database(ctx context.Context, found *diagnosis) {
	const group = "database"
	ctx, cancel := context.WithTimeout(ctx, doctorPatience)
	defer cancel()
	info, err := schema.Inspect(ctx, d.db.url)
	if err != nil {
		found.add(group, "server", "error", "see that it runs, and that the URL's host, role and database are right", "%v", d.db.hide(err))
		return
	}
	found.add(group, "server", "ok", "", "PostgreSQL %s", info.Server)
	found.clock(group, "clock", info.Skew, info.Uncertain)
	problems, err := schema.Validate(ctx, d.db.url)
	switch {
	case err != nil:
		found.add(group, "schema", "error", "see the message", "%v", d.db.hide(err))
	case len(problems) == 0:
		found.add(group, "schema", "ok", "", "version %d, as this program needs it", info.Schema)
	}
	for _, p := range first(problems) {
		found.add(group, "schema", "error", p.Mend, "%s", d.db.hideIn(p.What))
	}
	if info.Schema == 0 {
		return
	}
	problems, err = schema.CheckPermissions(ctx, d.db.url)
	switch {
	case err != nil:
		found.add(group, "rights", "error", "see the message", "%v", d.db.hide(err))
	case len(problems) == 0:
		found.add(group, "rights", "ok", "", "the role may do all that the orchestrator has to")
	}
	for _, p := range first(problems) {
		found.add(group, "rights", "error", p.Mend, "%s", d.db.hideIn(p.What))
	}
}

// first are so many problems that a page holds them; validate-schema and check-permissions show all.
func first(problems []schema.Problem) []schema.Problem { return problems[:min(len(problems), 20)] }

// certificates looks at the files of the flags.
func (d *doctor) certificates(found *diagnosis) {
	const group = "certificates"
	if d.conn.cert != "" {
		found.pair(group, d.conn.cert, d.conn.key, d.conn.ca, "")
	}
	if d.certs == "" {
		return
	}
	caFile, _ := pair(d.certs, authorityName)
	ca, err := readCertificate(caFile)
	if err != nil {
		found.add(group, caFile, "error", "make certificates with `specql certs "+d.certs+"`", "%v", err)
		return
	}
	found.validity(group, caFile, ca)
	files, err := filepath.Glob(filepath.Join(d.certs, "*.crt"))
	if err != nil {
		found.add(group, d.certs, "error", "name a folder without wildcards", "%v", err)
	}
	for _, file := range files {
		if file == caFile {
			continue
		}
		key := strings.TrimSuffix(file, ".crt") + ".key"
		found.pair(group, file, key, caFile, strings.TrimSuffix(filepath.Base(file), ".crt"))
	}
}

// pair looks at a certificate and its key. Where name is that of a service, the certificate has to say so.
func (d *diagnosis) pair(group, certFile, keyFile, caFile, name string) {
	const renew = "make it anew with `specql certs DIR --force`"
	cert, err := readCertificate(certFile)
	if err != nil {
		d.add(group, certFile, "error", renew, "%v", err)
		return
	}
	loaded, err := mesh.LoadCredentials(certFile, keyFile, caFile)
	if err != nil {
		d.add(group, certFile, "error", renew, "%v", err)
		return
	}
	ca, err := readCertificate(caFile)
	if err == nil {
		pool := x509.NewCertPool()
		pool.AddCert(ca)
		// At a time when it holds: that it does not now is said by itself.
		_, err = cert.Verify(x509.VerifyOptions{Roots: pool, CurrentTime: cert.NotBefore.Add(time.Second), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	}
	if err != nil {
		d.add(group, certFile, "error", renew+", or bring back the CA that it comes from", "it does not come from the CA in %s: %v", caFile, err)
		return
	}
	switch role := loaded.Name(); {
	case role == "":
		d.add(group, certFile, "error", renew, "it says no role: it has no URI spiffe://specql/NAME")
	case name != "" && role != name && slices.Contains(certificateNames, name):
		d.add(group, certFile, "error", renew, "it says the role %s, and the file is that of %s", role, name)
	default:
		d.add(group, certFile, "ok", "", "role %s, from the CA in %s", role, caFile)
	}
	if info, err := os.Stat(keyFile); err == nil && info.Mode().Perm()&0o077 != 0 {
		d.add(group, keyFile, "warning", "chmod 600 "+keyFile, "others may read the key (mode %03o)", info.Mode().Perm())
	}
	d.validity(group, certFile, cert)
}

// validity judges the time in which a certificate holds.
func (d *diagnosis) validity(group, name string, cert *x509.Certificate) {
	const renew = "make it anew with `specql certs DIR --force`; services take it up without a restart"
	until := cert.NotAfter.UTC().Format(time.DateOnly)
	switch left := time.Until(cert.NotAfter); {
	case time.Now().Before(cert.NotBefore):
		d.add(group, name, "error", "see that this machine's clock is right; else "+renew, "holds from %s on only", cert.NotBefore.UTC().Format(time.RFC3339))
	case left <= 0:
		d.add(group, name, "error", renew, "expired on %s", until)
	case left < expiresSoon:
		d.add(group, name, "warning", renew, "expires on %s, in %s", until, count(int(left.Hours()/24), "day"))
	default:
		d.add(group, name, "ok", "", "holds until %s", until)
	}
}

func readCertificate(name string) (*x509.Certificate, error) {
	text, err := readFile(name)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, fmt.Errorf("%s holds no PEM certificate", name)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return cert, nil
}

// registryFile has the mesh check the registry, since only runners know their own environment.
func (d *doctor) registryFile(ctx context.Context, s IO, found *diagnosis, reached bool) error {
	const group = "registry"
	name := d.registry
	if name == "" {
		name = filepath.Join("registry", "service_registry.yaml")
		if _, err := os.Stat(name); errors.Is(err, fs.ErrNotExist) {
			name = ""
		}
	}
	if !reached {
		if name == "" {
			return nil
		}
		found.add(group, name, "note", "specql validate-config "+name+" needs no mesh", "not looked at: the variables that it names are read by the runners of a mesh, and none answers")
		return nil
	}
	req := &specqlv1.ValidateRegistryRequest{Env: d.env}
	if name == "" {
		name = "the one in force"
	} else {
		file, err := local.ReadFile(name)
		if err != nil {
			return misuse("--registry: %w", err)
		}
		req.Registry = &specqlv1.Document{Name: file.Name, Content: file.Content}
	}
	c, err := d.conn.dial(s)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	ctx, cancel := context.WithTimeout(ctx, doctorPatience)
	defer cancel()
	res, err := c.Registry().ValidateRegistry(ctx, req)
	if err != nil {
		f := fault.From(fault.FromError(err))
		found.add(group, name, "error", "see the message", "%s", f.Message)
		return nil
	}
	if len(res.GetProblems()) == 0 {
		found.add(group, name, "ok", "", "the mesh's runners find nothing amiss")
	}
	for _, p := range res.GetProblems() {
		status := "error"
		if p.GetWarning() {
			status = "warning"
		}
		found.add(group, fmt.Sprintf("%s:%d:%d", p.GetFile(), p.GetLine(), p.GetColumn()), status, p.GetMend(), "%s: %s", p.GetPath(), p.GetMessage())
	}
	return nil
}

// diagnosed prints what was found; an error among it is a failure.
func (s IO) diagnosed(out *output, d *diagnosis) error {
	if out.json() {
		list := make([]jsonform.Object, 0, len(d.findings))
		for _, f := range d.findings {
			list = append(list, jsonform.Object{
				{Name: "group", Value: f.group},
				{Name: "name", Value: f.name},
				{Name: "status", Value: f.status},
				{Name: "message", Value: f.message},
				{Name: "mend", Value: f.mend},
			})
		}
		if err := s.print(jsonform.Object{{Name: "healthy", Value: d.healthy()}, {Name: "checks", Value: list}}); err != nil {
			return err
		}
	} else if err := s.lines(d.lines(s.out()), ""); err != nil {
		return err
	}
	if !d.healthy() {
		return errShown
	}
	return nil
}

func (d *diagnosis) lines(screen terminal.Screen) []string {
	styles := map[string]terminal.Style{"ok": terminal.Green, "note": terminal.Dim, "warning": terminal.Yellow, "error": terminal.Red}
	var lines []string
	group := ""
	counts := map[string]int{}
	for _, f := range d.findings {
		if f.group != group {
			if group != "" {
				lines = append(lines, "")
			}
			group = f.group
			lines = append(lines, screen.Paint(terminal.Bold, group))
		}
		counts[f.status]++
		lines = append(lines, "  "+screen.Paint(styles[f.status], fmt.Sprintf("%-7s", f.status))+"  "+terminal.Clean(f.name)+": "+terminal.Clean(f.message))
		if f.mend != "" {
			lines = append(lines, "           "+terminal.Clean("mend: "+f.mend))
		}
	}
	summary, style := "nothing is amiss", terminal.Green
	if n := counts["warning"]; n > 0 {
		summary, style = count(n, "warning"), terminal.Yellow
	}
	if n := counts["error"]; n > 0 {
		summary, style = count(n, "error")+", "+count(counts["warning"], "warning"), terminal.Red
	}
	return append(lines, "", screen.Paint(style, summary))
}
