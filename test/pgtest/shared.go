package pgtest

import (
	"sync"
	"testing"
)

var shared struct {
	sync.Mutex
	cluster *Cluster
	err     error
}

// Shared is the one cluster of the process, started at its first use. TestMain ends it with Shutdown.
func Shared(tb testing.TB) *Cluster {
	tb.Helper()
	shared.Lock()
	defer shared.Unlock()
	if shared.cluster == nil && shared.err == nil {
		shared.cluster, shared.err = New("")
	}
	if shared.err != nil {
		tb.Fatal(shared.err)
	}
	return shared.cluster
}

// Database makes an empty database in the shared cluster and returns its URL.
func Database(tb testing.TB) string {
	tb.Helper()
	return Shared(tb).NewDatabase(tb)
}

// Shutdown ends the shared cluster, if there is one: for TestMain, after m.Run.
func Shutdown() error {
	shared.Lock()
	defer shared.Unlock()
	if shared.cluster == nil {
		return nil
	}
	err := shared.cluster.Close()
	shared.cluster, shared.err = nil, nil
	return err
}
