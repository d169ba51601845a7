package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

func parts(r *result) string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(r.CPU)) {
		out = append(out, fmt.Sprintf("%s %.3f", name, r.CPU[name]/float64(r.Steps)))
	}
	return strings.Join(out, ", ")
}

func (b *bench) report(dir string) error {
	raw, err := json.MarshalIndent(map[string]any{"floors": b.floors, "workloads": b.results}, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "results.json"), raw, 0o600)
}
