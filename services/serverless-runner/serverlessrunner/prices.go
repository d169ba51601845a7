package serverlessrunner

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"math"
	"os"

	"go.yaml.in/yaml/v4"
)

//go:embed prices.yaml
var defaultPrices []byte

// maxPriceTable bounds a price table file, in bytes.
const maxPriceTable = 4 << 20

// PriceTable holds what functions cost, by provider, region and architecture.
type PriceTable struct {
	// Source and AsOf say where the prices are from.
	Source string `yaml:"source"`
	AsOf   string `yaml:"as_of"`
	// Providers: provider, region, architecture.
	Providers map[string]map[string]map[string]Price `yaml:"providers"`
}

// Price is what one invocation costs, in US dollars.
type Price struct {
	// GBSecond is the price of 1024 MB for one second.
	GBSecond float64 `yaml:"gb_second"`
	// Request is the price of one invocation.
	Request float64 `yaml:"request"`
	// RoundUpMS is what a billed duration is rounded up to, in milliseconds; 1 if absent.
	RoundUpMS float64 `yaml:"round_up_ms"`
}

// DefaultPrices is the table that comes with the runner.
func DefaultPrices() (*PriceTable, error) { return ParsePrices(defaultPrices) }

// LoadPrices reads a price table from a YAML or JSON file.
func LoadPrices(path string) (*PriceTable, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open the price table: %w", err)
	}
	defer func() { _ = f.Close() }()
	raw, err := io.ReadAll(io.LimitReader(f, maxPriceTable+1))
	if err != nil {
		return nil, fmt.Errorf("read the price table %s: %w", path, err)
	}
	t, err := ParsePrices(raw)
	if err != nil {
		return nil, fmt.Errorf("price table %s: %w", path, err)
	}
	return t, nil
}

// ParsePrices reads a price table, YAML or JSON. Unknown keys, unknown providers and
// prices that are not zero or more are errors.
func ParsePrices(raw []byte) (*PriceTable, error) {
	if len(raw) > maxPriceTable {
		return nil, fmt.Errorf("larger than %d bytes", maxPriceTable)
	}
	d := yaml.NewDecoder(bytes.NewReader(raw))
	d.KnownFields(true)
	t := &PriceTable{}
	if err := d.Decode(t); err != nil {
		return nil, fmt.Errorf("not a price table: %w", err)
	}
	if len(t.Providers) == 0 {
		return nil, errors.New("no prices: write providers: {aws: {REGION: {x86_64: {gb_second: …, request: …}}}}")
	}
	for provider, regions := range t.Providers {
		if !knownProvider(provider) {
			return nil, fmt.Errorf("providers.%s: unknown provider; write one of %v", clip(provider, 40), providers())
		}
		for region, architectures := range regions {
			for architecture, p := range architectures {
				for _, v := range []float64{p.GBSecond, p.Request, p.RoundUpMS} {
					if v < 0 || math.IsNaN(v) || math.IsInf(v, 0) {
						return nil, fmt.Errorf("providers.%s.%s.%s: %g is not a price", provider, clip(region, 40), clip(architecture, 40), v)
					}
				}
			}
		}
	}
	return t, nil
}

// find looks a price up.
func (t *PriceTable) find(provider, region, architecture string) (Price, bool) {
	p, ok := t.Providers[provider][region][architecture]
	return p, ok
}

// cost of one invocation in US dollars.
func (p Price) cost(billedMS, memoryMB float64) float64 {
	step := p.RoundUpMS
	if step == 0 {
		step = 1
	}
	billed := math.Ceil(billedMS/step) * step
	return p.Request + p.GBSecond*(billed/1000)*(memoryMB/1024)
}
