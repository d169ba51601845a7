package local

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func write(t *testing.T, name, text string) {
	t.Helper()
	require.NoError(t, os.MkdirAll(filepath.Dir(name), 0o750))
	require.NoError(t, os.WriteFile(name, []byte(text), 0o600))
}

func TestLoad(t *testing.T) {
	t.Run("of the folder", func(t *testing.T) {
		t.Chdir(t.TempDir())
		write(t, registryFile, "services: []\ndevelopment: {services: []}\n")
		write(t, "entities/b.yaml", "entity: b")
		write(t, "entities/sub/a.yml", "entity: a")
		write(t, "entities/.hidden/c.yaml", "entity: c")
		write(t, "entities/readme.md", "no")
		d, err := Load("", "", "", ".specql")
		require.NoError(t, err)
		require.Equal(t, registryFile, d.Registry.Name)
		require.Empty(t, d.Examples)
		require.Equal(t, "development", d.Env, "an overlay of that name is used")
		require.Len(t, d.Entities, 2)
		require.Equal(t, filepath.Join("entities", "b.yaml"), d.Entities[0].Name)
		d, err = Load("", "", "production", ".specql")
		require.NoError(t, err)
		require.Equal(t, "production", d.Env)
		require.NoDirExists(t, ".specql", "loading leaves nothing behind")
	})
	t.Run("entities alone", func(t *testing.T) {
		t.Chdir(t.TempDir())
		write(t, "entities/b.yaml", "entity: b")
		_, err := Load("", "", "", ".specql")
		require.ErrorContains(t, err, "no registry")
	})
	t.Run("bundled", func(t *testing.T) {
		t.Setenv(examplesDir, "")
		t.Chdir(t.TempDir())
		d, err := Load("", "", "", ".specql")
		require.NoError(t, err)
		require.True(t, filepath.IsAbs(d.Examples))
		require.Equal(t, "development", d.Env)
		require.NotEmpty(t, d.Entities)
		require.FileExists(t, filepath.Join(d.Examples, "workflows", "demo.yaml"))
	})
	t.Run("a copy of the examples' registry", func(t *testing.T) {
		t.Setenv(examplesDir, "")
		t.Chdir(t.TempDir())
		d, err := Load("", "", "", ".specql")
		require.NoError(t, err)
		write(t, registryFile, string(d.Registry.Content))
		copied, err := Load("", "", "", ".specql")
		require.NoError(t, err)
		require.Equal(t, registryFile, copied.Registry.Name)
		require.Equal(t, d.Examples, copied.Examples)
		require.Len(t, copied.Entities, len(d.Entities), "the examples' entities come along")
	})
	t.Run("files that cannot be", func(t *testing.T) {
		dir := t.TempDir()
		_, err := Load(dir, "", "", dir)
		require.ErrorContains(t, err, "not a file")
		_, err = Load(filepath.Join(dir, "none.yaml"), "", "", dir)
		require.ErrorIs(t, err, os.ErrNotExist)
		big := filepath.Join(dir, "big.yaml")
		write(t, big, strings.Repeat("#", maxFile+1))
		_, err = Load(big, "", "", dir)
		require.ErrorContains(t, err, "larger than")
		write(t, filepath.Join(dir, "ok.yaml"), "services: []")
		_, err = Load(filepath.Join(dir, "ok.yaml"), filepath.Join(dir, "none"), "", dir)
		require.ErrorIs(t, err, os.ErrNotExist)
	})
}

func TestUnpack(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, unpack(fstest.MapFS{
		"a/run.py": {Data: []byte("#!/usr/bin/python3\n")}, "a/data.csv": {Data: []byte("x")},
	}, dir))
	info, err := os.Stat(filepath.Join(dir, "a", "run.py"))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o755), info.Mode().Perm())
	info, err = os.Stat(filepath.Join(dir, "a", "data.csv"))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o644), info.Mode().Perm())
}

// unset makes sure that a variable is not set, for the time of the test.
func unset(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		t.Setenv(name, "")
		require.NoError(t, os.Unsetenv(name))
	}
}

func TestPrepare(t *testing.T) {
	variables := []string{
		"SPECQL_EXAMPLES_STRIPE_URL", "SPECQL_EXAMPLES_SENDGRID_URL", "SPECQL_EXAMPLES_S3_URL", "SPECQL_EXAMPLES_LAMBDA_URL",
		"SPECQL_EXAMPLES_GCF_URL", "SPECQL_EXAMPLES_AZURE_URL", examplesDir,
	}
	secrets := []string{"STRIPE_API_KEY", "SENDGRID_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "GOOGLE_SERVICE_ACCOUNT_KEY", "AZURE_FUNCTION_KEY"}
	unset(t, append(variables, secrets...)...)
	t.Setenv("STRIPE_API_KEY", "sk_test_mine")
	t.Setenv("SPECQL_EXAMPLES_SENDGRID_URL", "http://127.0.0.1:9")
	t.Chdir(t.TempDir())
	d, err := Load("", "", "", "data")
	require.NoError(t, err)
	box, used, err := Prepare(d)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, box.Close()) })
	require.Len(t, used, 5, "one address was given")
	require.Equal(t, "sk_test_mine", os.Getenv("STRIPE_API_KEY"), "what is set is left alone")
	require.Equal(t, "http://127.0.0.1:9", os.Getenv("SPECQL_EXAMPLES_SENDGRID_URL"))
	require.Empty(t, os.Getenv("SENDGRID_API_KEY"), "no placeholder for a service that is not the sandbox's")
	require.Equal(t, d.Examples, os.Getenv(examplesDir))
	for _, name := range secrets[2:] {
		require.NotEmpty(t, os.Getenv(name), name)
	}
	require.True(t, json.Valid([]byte(os.Getenv("GOOGLE_SERVICE_ACCOUNT_KEY"))))

	none, used, err := Prepare(Documents{})
	require.NoError(t, err)
	require.Nil(t, none)
	require.Empty(t, used)
}

func TestCheckAddresses(t *testing.T) {
	ok := Options{Listen: "127.0.0.1:0", Console: "[::1]:0"}
	require.NoError(t, ok.CheckAddresses())
	for _, o := range []Options{
		{Listen: ":7350", Console: "127.0.0.1:0"},
		{Listen: "127.0.0.1:0", Console: "0.0.0.0:0"},
		{Listen: "127.0.0.1:0", Console: "127.0.0.1:0", Custom: map[string]string{"wasm": "192.0.2.1:9090"}},
	} {
		require.Error(t, o.CheckAddresses())
	}
}

func TestStatic(t *testing.T) {
	require.False(t, static([]byte("#!/bin/sh")))
	program, err := os.ReadFile("/bin/ls")
	require.NoError(t, err)
	require.False(t, static(program), "it has a loader")
}
