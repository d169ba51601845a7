package postgres

import (
	"context"
	"net"
	"time"
)

// A server that is gone without a word is noticed within silence: by keepalive where nothing is
// sent, by the bound on unacknowledged bytes where something is.
const silence = 15 * time.Second

// dial opens a connection that notices the death of the other side.
func dial(ctx context.Context, network, address string) (net.Conn, error) {
	d := &net.Dialer{
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: silence / 3, Interval: silence / 3, Count: 2},
		Control:         boundSilence,
	}
	return d.DialContext(ctx, network, address)
}
