package postgres

import (
	"context"
	"fmt"
	"os"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/specql/mesh/migrations"
	"github.com/specql/mesh/services/orchestrator/internal/store"
	"github.com/specql/mesh/services/orchestrator/internal/store/storetest"
	"github.com/specql/mesh/test/pgtest"
)

func TestMain(m *testing.M) {
	code := m.Run()
	if err := pgtest.Shutdown(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// testLogLines is small, so that the test of the bound is quick.
const testLogLines = 1000

// versions are the names of all that the schema went through.
func versions(t testing.TB) []string {
	t.Helper()
	all, err := migrations.Versions()
	require.NoError(t, err)
	names := make([]string, 0, len(all))
	for _, v := range all {
		names = append(names, v.Name)
	}
	return names
}

// ready makes a database with the schema in it.
func ready(t testing.TB) string {
	t.Helper()
	url := pgtest.Database(t)
	applied, err := Migrate(t.Context(), Options{URL: url})
	require.NoError(t, err)
	require.Equal(t, versions(t), applied)
	return url
}

func openAt(t testing.TB, url string) *Store {
	t.Helper()
	st, err := Open(t.Context(), Options{URL: url, MaxLogLines: testLogLines})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, st.Close()) })
	return st
}

func openTest(t testing.TB) *Store {
	t.Helper()
	return openAt(t, ready(t))
}

// run does statements past the store.
func run(t testing.TB, st *Store, statement string, args ...any) error {
	t.Helper()
	return st.with(t.Context(), func(ctx context.Context, c *pgx.Conn) error {
		_, err := c.Exec(ctx, statement, append([]any{pgx.QueryExecModeExec}, args...)...)
		return err
	})
}

func TestStore(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Store { return openTest(t) },
		storetest.RawSQL(func(t *testing.T, st store.Store, statement string) error { return run(t, st.(*Store), statement) }),
		storetest.MaxLogLines(testLogLines), storetest.ManyOwners())
}

func TestCrash(t *testing.T) {
	place := ""
	if !storetest.Crashing() {
		place = ready(t)
	}
	storetest.RunCrash(t, place, func(t *testing.T, place string) store.Store { return openAt(t, place) })
}
