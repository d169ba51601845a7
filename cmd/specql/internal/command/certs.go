package command

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/spf13/cobra"

	"github.com/specql/mesh/cmd/specql/internal/jsonform"
	"github.com/specql/mesh/cmd/specql/internal/terminal"
	"github.com/specql/mesh/pkg/mesh"
)

// certificateNames are the services of a mesh, and client for people and programs. A name is
// that of the files and the role in the certificate.
var certificateNames = []string{mesh.RoleOrchestrator, "http-runner", "shell-runner", "docker-runner", "serverless-runner", "client"}

// authorityName is the name of the CA's files.
const authorityName = "ca"

func newCerts(s IO) *cobra.Command {
	var (
		hosts []string
		force bool
		out   output
	)
	cmd := &cobra.Command{
		Use:   "certs DIR",
		Short: "Makes a CA and a certificate for each service and for clients",
		Long: "Makes a CA and a certificate for each of " + strings.Join(certificateNames, ", ") + "\n" +
			"in DIR: ca.crt and ca.key, NAME.crt and NAME.key. A CA that is there is used again, and certificates that are\n" +
			"there are kept. Certificates are for localhost, 127.0.0.1, ::1, the service's own name and each --host. They hold\n" +
			"for a year; make them anew with --force, and the services take them up without a restart. The CA holds for ten\n" +
			"years. Who has ca.key can make certificates: keep it apart from the services.",
		Example: "  specql certs certs\n  specql certs certs --host orchestrator.example.org --host 10.0.0.7 --force",
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := out.check(); err != nil {
				return err
			}
			for _, host := range hosts {
				if !validHost(host) {
					return misuse("--host %q is neither a name such as mesh.example.org nor an IP address", host)
				}
			}
			return certs(s, args[0], hosts, force, &out)
		},
	}
	cmd.Flags().StringSliceVar(&hosts, "host", nil, "a further name or IP address that services are reached by (repeatable, or with commas)")
	out.register(cmd.Flags())
	cmd.Flags().BoolVar(&force, "force", false, "make certificates that are there anew; the CA is kept")
	return cmd
}

var hostName = regexp.MustCompile(`^(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*$`)

func validHost(host string) bool {
	return net.ParseIP(host) != nil || len(host) <= 253 && hostName.MatchString(host)
}

func certs(s IO, dir string, hosts []string, force bool, out *output) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make the folder: %w", err)
	}
	old := map[string]bool{}
	for _, name := range certificateNames {
		there, err := hasPair(dir, name, force)
		if err != nil {
			return err
		}
		if there && !force {
			old[name] = true
		}
	}
	authority, made, err := authorityIn(dir, len(old) > 0)
	if err != nil {
		return err
	}
	pairs := []jsonform.Object{pairOf(made, dir, authorityName)}
	for _, name := range certificateNames {
		if !old[name] {
			issued, err := authority.Issue(name, append([]string{name}, hosts...)...)
			if err != nil {
				return err
			}
			cert, key, _ := issued.PEM()
			if err := writePair(dir, name, cert, key); err != nil {
				return err
			}
		}
		pairs = append(pairs, pairOf(!old[name], dir, name))
	}
	if len(old) > 0 {
		s.say("Certificates that were there are kept as they are; --force makes them anew.")
	}
	if out.json() {
		return s.print(jsonform.Object{{Name: "certificates", Value: pairs}})
	}
	lines := make([]string, 0, len(pairs))
	for _, p := range pairs {
		lines = append(lines, terminal.Clean(fmt.Sprintf("%s  %s  %s", p[1].Value, p[2].Value, p[3].Value)))
	}
	return s.lines(lines, "")
}

// pairOf says what became of a certificate and its key.
func pairOf(made bool, dir, name string) jsonform.Object {
	state := "kept"
	if made {
		state = "made"
	}
	cert, key := pair(dir, name)
	return jsonform.Object{{Name: "name", Value: name}, {Name: "state", Value: state}, {Name: "certificate", Value: cert}, {Name: "key", Value: key}}
}

// authorityIn is the CA in a folder, and whether it was made just now.
func authorityIn(dir string, certificates bool) (*mesh.Authority, bool, error) {
	there, err := hasPair(dir, authorityName, false)
	if err != nil {
		return nil, false, err
	}
	certFile, keyFile := pair(dir, authorityName)
	if !there {
		if certificates {
			return nil, false, misuse("%s holds certificates but no CA, and those of a new CA would not go with them: bring back %s and %s, or give --force", dir, certFile, keyFile)
		}
		authority, err := mesh.NewAuthority()
		if err != nil {
			return nil, false, err
		}
		cert, key := authority.PEM()
		return authority, true, writePair(dir, authorityName, cert, key)
	}
	cert, err := readFile(certFile)
	if err != nil {
		return nil, false, fmt.Errorf("the CA: %w", err)
	}
	key, err := readFile(keyFile)
	if err != nil {
		return nil, false, fmt.Errorf("the CA: %w", err)
	}
	authority, err := mesh.LoadAuthority(cert, key)
	if err != nil {
		return nil, false, misuse("%s, %s: %w", certFile, keyFile, err)
	}
	return authority, false, nil
}

func pair(dir, name string) (cert, key string) {
	return filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key")
}

// hasPair says whether both files are there; half a pair is an error, unless half is enough.
func hasPair(dir, name string, half bool) (bool, error) {
	var found, missing []string
	cert, key := pair(dir, name)
	for _, file := range []string{cert, key} {
		switch _, err := os.Lstat(file); {
		case err == nil:
			found = append(found, file)
		case errors.Is(err, fs.ErrNotExist):
			missing = append(missing, file)
		default:
			return false, fmt.Errorf("look at the folder: %w", err)
		}
	}
	if len(found) == 1 && !half {
		mend := "remove it, or give --force"
		if name == authorityName {
			mend = "bring the other back; if it is lost, remove this one and make everything anew with --force"
		}
		return false, misuse("%s is there without %s: %s", found[0], missing[0], mend)
	}
	return len(found) > 0, nil
}

// writePair writes a key for its owner alone and a certificate for everybody.
func writePair(dir, name string, cert, key []byte) error {
	certFile, keyFile := pair(dir, name)
	if err := writeFile(keyFile, key, 0o600); err != nil {
		return err
	}
	return writeFile(certFile, cert, 0o644)
}

// writeFile puts a whole file in the place of what was there, so that nobody reads half of one.
func writeFile(name string, content []byte, mode os.FileMode) (err error) {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*")
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("write %s: %w", name, err), os.Remove(f.Name()))
		}
	}()
	_, err = f.Write(content)
	if err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}
