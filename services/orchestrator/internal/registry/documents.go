// Package registry turns documents into a validated snapshot: services, entities, and a
// plan for every action. Snapshots are immutable and known by the digest of their documents;
// a run keeps the one that it began with.
package registry

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"sync"

	"github.com/specql/mesh/pkg/spec"
)

// Document is one file.
type Document struct {
	Name    string `json:"name"`
	Content string `json:"content"`
}

func (d Document) file() spec.File { return spec.File{Name: d.Name, Content: []byte(d.Content)} }

// Documents are everything that a snapshot is made from. Their JSON form is what the store
// keeps, with the variables that the registry used, so that it can be read anywhere, any time later.
type Documents struct {
	Registry Document   `json:"registry"`
	Entities []Document `json:"entities,omitempty"`
	// Alerts are a file of their own; its alerts go with those of the registry.
	Alerts Document `json:"alerts,omitzero"`
	Env    string   `json:"env,omitempty"`
	// Vars are the variables that ${NAME} named, and their values.
	Vars map[string]string `json:"vars,omitempty"`
}

// workflowDocuments are what a workflow of its own is made from.
type workflowDocuments struct {
	// Base is the digest of the registry that it began with.
	Base     string   `json:"base"`
	Workflow Document `json:"workflow"`
}

// FromFiles makes documents of files.
func FromFiles(reg spec.File, entities []spec.File, env string) Documents {
	d := Documents{Registry: Document{Name: reg.Name, Content: string(reg.Content)}, Env: env}
	for _, e := range entities {
		d.Entities = append(d.Entities, Document{Name: e.Name, Content: string(e.Content)})
	}
	return d
}

// encode gives the stored form and its digest.
func encode(v any) ([]byte, string, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, "", fmt.Errorf("encode documents: %w", err)
	}
	sum := sha256.Sum256(b)
	return b, hex.EncodeToString(sum[:]), nil
}

// lookup remembers which variables were used. Stored values go before the process's own, so
// that a snapshot read back is the one that was stored.
type lookup struct {
	mu     sync.Mutex
	stored map[string]string
	env    func(string) (string, bool)
	used   map[string]string
}

func newLookup(stored map[string]string, env func(string) (string, bool)) *lookup {
	return &lookup{stored: stored, env: env, used: map[string]string{}}
}

func (l *lookup) get(name string) (string, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	v, ok := l.stored[name]
	if !ok && l.env != nil {
		v, ok = l.env(name)
	}
	if ok {
		l.used[name] = v
	}
	return v, ok
}

func (l *lookup) vars() map[string]string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.used) == 0 {
		return nil
	}
	return maps.Clone(l.used)
}
