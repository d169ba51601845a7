package runner_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/runner"
)

func TestCodeArguments(t *testing.T) {
	t.Parallel()
	// CODE marks what would be run; each argument with it must be found, and no other.
	for _, line := range []string{
		"sh -c CODE", "/bin/bash -c CODE name $1", "bash -lc CODE", "bash -e -x -c CODE a", "bash -ec CODE", "bash -c -x CODE",
		"bash -o pipefail -c CODE x", "bash -c -o pipefail CODE x", "bash -c -- CODE x", "bash --norc -c CODE", "dash +x -c CODE", "zsh -c CODE", "ksh93 -c CODE", "ash -c CODE",
		"sh script.sh -c x", "sh -e script.sh -c x", "sh", "sh -c", "sh -- -c x",
		"python3 -c CODE a", "python3.12 -I -c CODE", "python -W ignore -c CODE", "python -cCODE x", "python script.py -c x", "python -m mod run",
		"node -e CODE a", "node --eval CODE", "node --eval=CODE", "node -p CODE", "node --print CODE", "nodejs -r fs -e CODE", "node app.js -e x",
		"perl -e CODE a", "perl -ne CODE f", "perl -E CODE", "perl -w x.pl -e y", "perl -e CODE -e CODE", "ruby -e CODE", "ruby -rjson -e CODE", "perl -MCODE::strict -e CODE", "perl -i.bak -pe CODE f", "ruby -rsetCODE -e CODE", "ruby -ne CODE",
		"env sh -c CODE", "env A=b bash -c CODE", "/usr/bin/env -i python3 -c CODE", "timeout 5 sh -c CODE", "busybox sh -c CODE", "nice -n 5 perl -e CODE", "tini -- sh -c CODE",
		"grep -c x", "tool python -c x", "curl -e x", "", "echo sh",
	} {
		argv := strings.Fields(line)
		var want []int
		for i, arg := range argv {
			if strings.Contains(arg, "CODE") {
				want = append(want, i)
			}
		}
		require.Equal(t, want, runner.CodeArguments(argv), line)
	}
	require.Equal(t, []int{2}, runner.CodeArguments([]string{"env", "-S", "sh -c echo"}))
}

func FuzzCodeArguments(f *testing.F) {
	f.Add("env sh -c x")
	f.Add("bash -o")
	f.Fuzz(func(t *testing.T, line string) {
		argv := strings.Split(line, " ")
		for _, i := range runner.CodeArguments(argv) {
			require.Less(t, i, len(argv))
		}
	})
}
