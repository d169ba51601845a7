package api

import (
	"errors"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

func TestADatabaseThatIsAwayIsUnavailable(t *testing.T) {
	t.Parallel()
	f, ok := fault.As(unavailable(fmt.Errorf("read run 1: %w: connection to db:5432 refused", store.ErrUnavailable)))
	require.True(t, ok)
	require.Equal(t, fault.Unavailable, f.Code)
	require.NotContains(t, f.Message, "5432", "what the database is reached by is the log's business")
	other := errors.New("read run 1: something else")
	require.Equal(t, other, unavailable(other))
	said := fault.Wrap(store.ErrUnavailable, fault.Internal, "said already")
	require.Equal(t, error(said), unavailable(said))
	require.NoError(t, unavailable(nil))
}
