package auth

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	"go.yaml.in/yaml/v4"
	"go.yaml.in/yaml/v4/plugin/loaderlimits"

	"github.com/specql/mesh/pkg/mesh"
)

// Bounds of a file of tokens.
const (
	maxTokenFile = 4 << 20
	maxTokens    = 10_000
	maxSubject   = 255
	maxTenants   = 1000
	maxDepth     = 8
)

// reloadAfter is how often the file is looked at for a newer version.
const reloadAfter = 2 * time.Second

// tokens are those of a file, which is followed when it changes.
type tokens struct {
	path string
	log  *slog.Logger

	mu      sync.RWMutex
	byHash  map[[sha256.Size]byte]*Caller
	stamp   string
	checked time.Time
}

func loadTokens(path string, log *slog.Logger) (*tokens, error) {
	t := &tokens{path: path, log: log, checked: time.Now(), stamp: stamp(path)}
	var err error
	if t.byHash, err = readTokens(path); err != nil {
		return nil, err
	}
	return t, nil
}

// find tells whose token it is that has a hash; nil for nobody's. The map is of hashes, so that
// the time it takes tells nothing of a token that could be used.
func (t *tokens) find(sum [sha256.Size]byte, now time.Time) *Caller {
	t.mu.RLock()
	fresh := time.Since(t.checked) < reloadAfter
	c := t.byHash[sum]
	t.mu.RUnlock()
	if !fresh {
		c = t.reload()[sum]
	}
	if c == nil || !c.expires.IsZero() && !now.Before(c.expires) {
		return nil
	}
	return c
}

// reload reads the file if it has changed. One that cannot be used leaves the old in force.
func (t *tokens) reload() map[[sha256.Size]byte]*Caller {
	t.mu.Lock()
	defer t.mu.Unlock()
	if time.Since(t.checked) < reloadAfter {
		return t.byHash
	}
	t.checked = time.Now()
	s := stamp(t.path)
	if s == t.stamp {
		return t.byHash
	}
	t.stamp = s
	byHash, err := readTokens(t.path)
	if err != nil {
		t.log.Error("the changed file of tokens cannot be used; the tokens of before stay in force", "error", err)
		return t.byHash
	}
	t.log.Info("the file of tokens has changed", "tokens", len(byHash))
	t.byHash = byHash
	return byHash
}

func stamp(path string) string {
	info, err := os.Stat(path)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprint(info.ModTime().UnixNano(), info.Size())
}

func readTokens(path string) (map[[sha256.Size]byte]*Caller, error) {
	f, err := os.Open(path) //nolint:gosec // the operator names the file
	if err != nil {
		return nil, fmt.Errorf("the file of tokens: %w", err)
	}
	defer func() { _ = f.Close() }()
	text, err := io.ReadAll(io.LimitReader(f, maxTokenFile+1))
	if err != nil {
		return nil, fmt.Errorf("the file of tokens: %w", err)
	}
	if len(text) > maxTokenFile {
		return nil, fmt.Errorf("the file of tokens %s has more than %d MiB", path, maxTokenFile>>20)
	}
	byHash, err := parseTokens(text)
	if err != nil {
		return nil, fmt.Errorf("the file of tokens %s: %w", path, err)
	}
	return byHash, nil
}

// parseTokens reads a YAML list of tokens. Values are told in no error: one may be a token.
func parseTokens(text []byte) (byHash map[[sha256.Size]byte]*Caller, err error) {
	defer func() {
		if recover() != nil {
			byHash, err = nil, errors.New("this is not YAML")
		}
	}()
	byHash = map[[sha256.Size]byte]*Caller{}
	loader, err := yaml.NewLoader(bytes.NewReader(text), yaml.WithPlugin(loaderlimits.New(loaderlimits.DepthValue(maxDepth))))
	if err != nil {
		return nil, errors.New("this is not YAML")
	}
	var document yaml.Node
	if err := loader.Load(&document); errors.Is(err, io.EOF) {
		return byHash, nil
	} else if err != nil {
		line := 1
		if failed, ok := errors.AsType[*yaml.LoadError](err); ok {
			line = max(line, failed.Mark.Line)
		}
		return nil, fmt.Errorf("line %d: this is not YAML", line)
	}
	list := &document
	if list.Kind == yaml.DocumentNode {
		if len(list.Content) == 0 {
			return byHash, nil
		}
		list = list.Content[0]
	}
	if list.Kind == yaml.ScalarNode && list.Tag == "!!null" {
		return byHash, nil
	}
	if list.Kind != yaml.SequenceNode {
		return nil, fmt.Errorf("line %d: the file is a list; `specql token` makes an entry of it", list.Line)
	}
	if len(list.Content) > maxTokens {
		return nil, fmt.Errorf("%d tokens; at most %d are taken", len(list.Content), maxTokens)
	}
	var wrong []error
	lines := map[[sha256.Size]byte]int{}
	for _, entry := range list.Content {
		sum, c, err := parseToken(entry)
		if err == nil && lines[sum] > 0 {
			err = fmt.Errorf("line %d: the token of line %d once more", entry.Line, lines[sum])
		}
		if err != nil {
			if wrong = append(wrong, err); len(wrong) == 20 {
				break
			}
			continue
		}
		byHash[sum], lines[sum] = c, entry.Line
	}
	return byHash, errors.Join(wrong...)
}

// plaintext is what is said of a token in the file.
const plaintext = "a token must not be in this file, only its hash: write `hash: sha256:…`, and make the token anew, as others may have read it; `specql token` makes a token with its entry"

func parseToken(entry *yaml.Node) (sum [sha256.Size]byte, _ *Caller, _ error) {
	if entry.Kind != yaml.MappingNode {
		return sum, nil, fmt.Errorf("line %d: an entry has subject, role and hash", entry.Line)
	}
	c := &Caller{}
	tenants := false
	seen := map[string]bool{}
	for i := 0; i+1 < len(entry.Content); i += 2 {
		key, value := entry.Content[i].Value, entry.Content[i+1]
		var err error
		switch {
		case seen[key]:
			err = errors.New("is given twice")
		case key == "token":
			err = errors.New(plaintext)
		case key == "tenants" && value.Kind == yaml.SequenceNode:
			tenants = true
			if len(value.Content) == 0 || len(value.Content) > maxTenants {
				err = fmt.Errorf("has between 1 and %d names", maxTenants)
			}
			for _, n := range value.Content {
				err = errors.Join(err, c.add(n))
			}
		case !slices.Contains([]string{"subject", "role", "tenant", "tenants", "hash", "expires"}, key):
			err = errors.New("is no key of an entry; those are subject, role, tenant, tenants, hash and expires")
		case value.Kind != yaml.ScalarNode:
			err = errors.New("is no text")
		case key == "subject":
			if c.Subject = value.Value; !isSubject(c.Subject) {
				err = fmt.Errorf("has between 1 and %d bytes, of one line", maxSubject)
			}
		case key == "role":
			if c.Role, err = ParseRole(value.Value); err != nil {
				err = errors.New("is viewer, operator or admin")
			}
		case key == "tenant":
			tenants = true
			err = c.add(value)
		case key == "expires":
			c.expires, err = parseExpiry(value.Value)
		case key == "hash":
			digits, ok := strings.CutPrefix(value.Value, mesh.TokenHashPrefix)
			raw, bad := hex.DecodeString(digits)
			if !ok || bad != nil || len(raw) != sha256.Size {
				err = errors.New("is not sha256: and 64 hexadecimal digits; " + plaintext)
			}
			copy(sum[:], raw)
		default:
			err = errors.New("is a list of names") // tenants
		}
		if err != nil {
			return sum, nil, fmt.Errorf("line %d: %.40q: %w", entry.Content[i].Line, key, err)
		}
		seen[key] = true
	}
	switch {
	case !seen["subject"] || !seen["role"] || !seen["hash"]:
		return sum, nil, fmt.Errorf("line %d: an entry needs subject, role and hash", entry.Line)
	case seen["tenant"] && seen["tenants"]:
		return sum, nil, fmt.Errorf("line %d: give tenant or tenants", entry.Line)
	}
	c.belongs(tenants)
	return sum, c, nil
}

// isSubject tells what can be written down as a subject: one line of text.
func isSubject(text string) bool {
	return text != "" && len(text) <= maxSubject && !strings.ContainsFunc(text, func(r rune) bool { return unicode.IsControl(r) || r == '\uFFFD' })
}

// add makes the caller one of a tenant.
func (c *Caller) add(value *yaml.Node) error {
	if value.Kind == yaml.ScalarNode && value.Value == AllTenants {
		c.all = true
		return nil
	}
	if value.Kind != yaml.ScalarNode || CheckTenant(value.Value) != nil {
		return errors.New("a tenant has up to 128 letters, digits and . _ : @ -, with a letter or digit first; '*' is all")
	}
	c.belong(value.Value)
	return nil
}

// belong makes the caller one of a tenant, once: who is of several has to choose.
func (c *Caller) belong(tenant string) {
	if !slices.Contains(c.tenants, tenant) {
		c.tenants = append(c.tenants, tenant)
	}
}

// belongs says what a caller sees for whom no tenant is named: an admin all, others what
// belongs to no tenant.
func (c *Caller) belongs(named bool) {
	switch {
	case !named && c.Role == Admin:
		c.all = true
	case !named:
		c.tenants = []string{""}
	}
}

func parseExpiry(text string) (time.Time, error) {
	for _, layout := range []string{time.RFC3339, time.DateOnly} {
		if t, err := time.Parse(layout, text); err == nil {
			return t, nil
		}
	}
	return time.Time{}, errors.New("is no time such as 2027-01-31T00:00:00Z or 2027-01-31")
}
