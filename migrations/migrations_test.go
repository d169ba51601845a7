package migrations_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/migrations"
)

func TestFiles(t *testing.T) {
	t.Parallel()
	files, err := migrations.Files()
	require.NoError(t, err)
	require.NotEmpty(t, files)
	require.Equal(t, "001_multi_execution", files[0].Name)
	for _, f := range files {
		statements, err := migrations.Statements(f.SQL)
		require.NoError(t, err, f.Name)
		require.Greater(t, len(statements), 1, f.Name)
		for _, s := range statements {
			require.NotContains(t, s, "\n\\", "no commands of psql")
		}
	}
}

func TestStatements(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		text string
		want []string
	}{
		{"", nil},
		{" -- nothing; at all\n/* nor ; here */ ;;", nil},
		{"SELECT 1; SELECT 2;", []string{"SELECT 1", "SELECT 2"}},
		{"SELECT 'a;''b', \"c;\"\"d\";\nSELECT 2;", []string{"SELECT 'a;''b', \"c;\"\"d\"", "SELECT 2"}},
		{`SELECT E'a\';b', 'c\'; SELECT 2;`, []string{`SELECT E'a\';b', 'c\'`, "SELECT 2"}},
		{"DO $$ BEGIN; END $$; DO $a$ $$;$$ $b$ ; $a$;", []string{"DO $$ BEGIN; END $$", "DO $a$ $$;$$ $b$ ; $a$"}},
		{"SELECT $1, a$b$c; SELECT 2;", []string{"SELECT $1, a$b$c", "SELECT 2"}},
		{"SELECT /* a /* b; */ c; */ 1; SELECT 2 -- x;\n;", []string{"SELECT /* a /* b; */ c; */ 1", "SELECT 2 -- x;"}},
	} {
		got, err := migrations.Statements(test.text)
		require.NoError(t, err, test.text)
		require.Equal(t, test.want, got, test.text)
	}
	for text, want := range map[string]string{
		"SELECT 1":            "does not end with ;",
		"\n\nSELECT 'a;":      "line 3: the string does not end",
		"DO $a$ $$ $b$;":      "line 1: the string $a$ does not end",
		"SELECT \"a;":         "line 1: the name does not end",
		"SELECT 1; /* /* */;": "line 1: the comment does not end",
	} {
		_, err := migrations.Statements(text)
		require.ErrorContains(t, err, want, text)
	}
}

func FuzzStatements(f *testing.F) {
	f.Add("SELECT 'a' -- b\n; DO $x$ ; $x$;")
	f.Fuzz(func(t *testing.T, text string) {
		statements, err := migrations.Statements(text)
		if err != nil {
			return
		}
		for _, s := range statements {
			require.Contains(t, text, s)
			require.NotEmpty(t, strings.TrimSpace(s))
		}
	})
}
