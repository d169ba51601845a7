package sqlite

import (
	"testing"

	"github.com/specql/mesh/services/orchestrator/internal/store/storetest"
)

func BenchmarkTakes(b *testing.B) { storetest.BenchmarkTakes(b, openTest(b), nil) }
