// Package e2e runs the whole system from outside: the specql program in a process of its own, real HTTP servers, real
// scripts, real containers.
package e2e

import (
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}
