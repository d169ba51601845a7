package httprunner

import "sync"

// cache is a bounded map. When it is full, an arbitrary entry makes room: what it holds can be
// made again.
type cache[K comparable, V any] struct {
	mu      sync.Mutex
	most    int
	entries map[K]V
}

func newCache[K comparable, V any](most int) *cache[K, V] {
	return &cache[K, V]{most: most, entries: make(map[K]V)}
}

func (c *cache[K, V]) get(key K) (V, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	v, ok := c.entries[key]
	return v, ok
}

// getOrMake gives the entry of a key, made where it is missing. The function must be quick.
func (c *cache[K, V]) getOrMake(key K, build func() V) V {
	c.mu.Lock()
	defer c.mu.Unlock()
	if v, ok := c.entries[key]; ok {
		return v
	}
	if len(c.entries) >= c.most {
		for k := range c.entries {
			delete(c.entries, k)
			break
		}
	}
	v := build()
	c.entries[key] = v
	return v
}
