package tree

import "testing"

// FuzzPath splits and orders paths of steps as a server sends them.
func FuzzPath(f *testing.F) {
	f.Add("steps[4].items[2].do[0]", "steps[4]")
	f.Add("steps[-1]", "a[99999999999999999999].[")
	f.Fuzz(func(t *testing.T, a, b string) {
		for _, path := range []string{a, b} {
			for _, s := range parse(path) {
				_ = s.rank()
				if s.index < -1 {
					t.Fatalf("%q: the index %d", path, s.index)
				}
			}
		}
	})
}
