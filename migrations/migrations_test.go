package migrations_test

import (
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/migrations"
)

func TestSchema(t *testing.T) {
	t.Parallel()
	statements, err := migrations.Statements(migrations.SQL)
	require.NoError(t, err)
	require.Greater(t, len(statements), 1)
	defined := map[string]bool{}
	for _, s := range statements {
		require.NotContains(t, s, "\n\\", "no commands of psql")
		// A second definition would be taken back for a moment whenever the file is run on a database in use.
		if m := definition.FindStringSubmatch(s); m != nil {
			require.False(t, defined[m[1]], "%s is defined twice: change its one definition", m[1])
			defined[m[1]] = true
		}
	}
	require.NotEmpty(t, defined)
	versions, err := migrations.Versions()
	require.NoError(t, err)
	require.Equal(t, migrations.Version{Number: 1, Name: "001_multi_execution"}, versions[0])
}

var definition = regexp.MustCompile(`(?m)^CREATE (?:OR REPLACE )?(?:VIEW|FUNCTION|PROCEDURE|TRIGGER|TABLE)(?: IF NOT EXISTS)? ((?:jobs\.)?\w+(?: (?:BEFORE|AFTER) [A-Z ]+ ON [\w.]+)?)`)

// TestOneFile: psql -f 001_multi_execution.sql is all that a database needs, so there is no second file.
func TestOneFile(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("*.sql")
	require.NoError(t, err)
	require.Equal(t, []string{"001_multi_execution.sql"}, files,
		"a change to the schema goes into 001_multi_execution.sql, which a database of any earlier version must bear (CONTRIBUTING.md, Changes to the schema)")
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
	f.Add("\f ;")
	f.Fuzz(func(t *testing.T, text string) {
		statements, err := migrations.Statements(text)
		if err != nil {
			return
		}
		for _, s := range statements {
			require.Contains(t, text, s)
			require.NotEmpty(t, strings.Trim(s, " \t\n\r\f\v"))
		}
	})
}
