package runner

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/url"
	"regexp"
	"sort"
	"strings"
	"sync"
	"unicode/utf8"
)

const (
	masked = "***"
	// shortestSecret: shorter values would make ordinary text unreadable.
	shortestSecret = 4
	// shortestLine is the shortest line of a secret of several lines that is masked by itself.
	shortestLine = 8
	maxForms     = 4096
)

// masker replaces secrets, in the forms in which they usually leave a program.
type masker struct {
	mu       sync.RWMutex
	forms    map[string]struct{}
	replacer *strings.Replacer // nil while there are no secrets
}

func (m *masker) add(secret string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.forms == nil {
		m.forms = map[string]struct{}{}
	}
	before := len(m.forms)
	for _, form := range formsOf(secret) {
		if len(m.forms) < maxForms {
			m.forms[form] = struct{}{}
		}
	}
	if len(m.forms) == before {
		return
	}
	forms := make([]string, 0, len(m.forms))
	for form := range m.forms {
		forms = append(forms, form)
	}
	// The longest first: a secret may begin with another one.
	sort.Slice(forms, func(i, j int) bool {
		if len(forms[i]) != len(forms[j]) {
			return len(forms[i]) > len(forms[j])
		}
		return forms[i] < forms[j]
	})
	pairs := make([]string, 0, 2*len(forms))
	for _, form := range forms {
		pairs = append(pairs, form, masked)
	}
	m.replacer = strings.NewReplacer(pairs...)
}

func formsOf(secret string) []string {
	var forms []string
	add := func(form string) {
		if len(form) >= shortestSecret {
			forms = append(forms, form)
		}
	}
	for _, plain := range []string{secret, strings.TrimSpace(secret)} {
		if len(plain) < shortestSecret {
			continue
		}
		add(plain)
		add(url.QueryEscape(plain))
		add(url.PathEscape(plain))
		add(hex.EncodeToString([]byte(plain)))
		// Without padding: that is how the padded form begins.
		add(base64.RawStdEncoding.EncodeToString([]byte(plain)))
		add(base64.RawURLEncoding.EncodeToString([]byte(plain)))
		var b strings.Builder
		e := json.NewEncoder(&b)
		if e.Encode(plain) == nil {
			text := strings.TrimSuffix(b.String(), "\n")
			add(text[1 : len(text)-1])
		}
		b.Reset()
		e.SetEscapeHTML(false)
		if e.Encode(plain) == nil {
			text := strings.TrimSuffix(b.String(), "\n")
			add(text[1 : len(text)-1])
		}
	}
	// A log has lines, so a key of several lines shows one at a time.
	for line := range strings.Lines(secret) {
		if line = strings.TrimSpace(line); len(line) >= shortestLine {
			add(line)
		}
	}
	return forms
}

func (m *masker) text(s string) string {
	m.mu.RLock()
	r := m.replacer
	m.mu.RUnlock()
	if r == nil || s == "" {
		return s
	}
	return r.Replace(s)
}

// unstorable are the escapes of what databases refuse: NUL, and half a surrogate pair.
var unstorable = regexp.MustCompile(`\\u(0000|[dD][89a-fA-F])`)

// value masks a JSON value inside its strings and numbers, so that it stays JSON. As in log
// lines, what no database stores becomes U+FFFD: NUL, and what is not UTF-8.
func (m *masker) value(raw json.RawMessage) (json.RawMessage, error) {
	m.mu.RLock()
	r := m.replacer
	m.mu.RUnlock()
	odd := !utf8.Valid(raw) || unstorable.Match(raw)
	if !odd {
		if r == nil {
			return raw, nil
		}
		if text := string(raw); !strings.Contains(text, `\`) && r.Replace(text) == text {
			return raw, nil // nothing there, and no escape that could hide it
		}
	}
	v, err := decodeAny(raw) // it replaces what is not UTF-8
	if err != nil {
		return nil, err
	}
	changed := odd
	v = maskAny(v, func(s string) string {
		out := s
		if r != nil {
			out = r.Replace(s)
		}
		out = strings.ReplaceAll(out, "\x00", "\uFFFD")
		changed = changed || out != s
		return out
	})
	if !changed {
		return raw, nil
	}
	// Escapes for HTML would make the output up to six times as large.
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

func maskAny(v any, mask func(string) string) any {
	switch v := v.(type) {
	case string:
		return mask(v)
	case json.Number:
		if s := mask(v.String()); s != v.String() {
			return s
		}
		return v
	case []any:
		for i := range v {
			v[i] = maskAny(v[i], mask)
		}
		return v
	case map[string]any:
		out := make(map[string]any, len(v))
		for key, value := range v {
			out[mask(key)] = maskAny(value, mask)
		}
		return out
	}
	return v
}
