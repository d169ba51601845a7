// Package config reads settings from flags and the environment. Every flag has a variable:
// --max-concurrency is SPECQL_MAX_CONCURRENCY. A flag on the command line wins.
package config

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/pflag"
)

// Variable is the environment variable of a flag.
func Variable(flag string) string {
	return "SPECQL_" + strings.ToUpper(strings.NewReplacer("-", "_", ".", "_").Replace(flag))
}

// Bind sets every flag of fs that the command line did not from its variable. Call it after
// fs was parsed. A variable that is set but empty counts as not set. A flag that takes a
// list takes a variable with commas. The error names flag and variable of every bad value.
func Bind(fs *pflag.FlagSet) error { return BindFrom(fs, os.LookupEnv) }

// BindFrom is [Bind] with another environment.
func BindFrom(fs *pflag.FlagSet, lookup func(string) (string, bool)) error {
	var errs []error
	fs.VisitAll(func(f *pflag.Flag) {
		if f.Changed || f.Name == "help" || f.Name == "version" {
			return
		}
		name := Variable(f.Name)
		value, set := lookup(name)
		if !set || value == "" {
			return
		}
		if err := fs.Set(f.Name, value); err != nil {
			errs = append(errs, fmt.Errorf("--%s from %s: %w", f.Name, name, err))
		}
	})
	return errors.Join(errs...)
}

// Require says which of the flags have no value, by flag and variable.
func Require(fs *pflag.FlagSet, names ...string) error {
	var errs []error
	for _, name := range names {
		if f := fs.Lookup(name); f == nil || f.Value.String() == "" || f.Value.String() == "[]" {
			errs = append(errs, fmt.Errorf("--%s or %s is needed", name, Variable(name)))
		}
	}
	return errors.Join(errs...)
}
