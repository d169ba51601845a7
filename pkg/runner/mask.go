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
	// shortestInner is the shortest piece of base64 that is masked: shorter ones stand in other texts, too.
	shortestInner = 8
	maxForms      = 4096
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
	for _, form := range SecretForms(secret) {
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

// SecretForms gives the forms in which [Sink.Secret] finds a secret: as it is, escaped for URLs
// and JSON, in hexadecimal, in base64 wherever in an encoded text it stands, and the longer lines of
// several. A runner that shortens foreign text needs them, since half of a form is not found any more.
func SecretForms(secret string) []string {
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
		add(lowerEscapes(url.QueryEscape(plain)))
		add(lowerEscapes(url.PathEscape(plain)))
		add(hex.EncodeToString([]byte(plain)))
		add(strings.ToUpper(hex.EncodeToString([]byte(plain))))
		// Without padding: that is how the padded form begins.
		add(base64.RawStdEncoding.EncodeToString([]byte(plain)))
		add(base64.RawURLEncoding.EncodeToString([]byte(plain)))
		for _, inner := range innerBase64(plain) {
			add(inner)
		}
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

// lowerEscapes writes the escapes of a URL with small letters, which means the same.
func lowerEscapes(escaped string) string {
	b := []byte(escaped)
	for i := 0; i+2 < len(b); i++ {
		if b[i] == '%' {
			copy(b[i+1:i+3], bytes.ToLower(b[i+1:i+3]))
		}
	}
	return string(b)
}

// innerBase64 gives what base64 makes of a secret in the middle of a text, such as user:secret. By
// where it begins there are three ways; the letters that its neighbours decide, too, are left out.
func innerBase64(secret string) []string {
	var forms []string
	for before := range 3 {
		whole := base64.StdEncoding.EncodeToString([]byte(strings.Repeat("\x00", before) + secret))
		from, to := (8*before+5)/6, 8*(before+len(secret))/6
		if to-from >= shortestInner {
			forms = append(forms, whole[from:to], strings.NewReplacer("+", "-", "/", "_").Replace(whole[from:to]))
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
