package sqlite

import (
	"testing"

	"github.com/specql/mesh/services/orchestrator/internal/store/storetest"
)

func BenchmarkSteps(b *testing.B) { storetest.BenchmarkSteps(b, openTest(b), nil) }
func BenchmarkTakes(b *testing.B) { storetest.BenchmarkTakes(b, openTest(b), nil) }
