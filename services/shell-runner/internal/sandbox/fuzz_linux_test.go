package sandbox

import (
	"encoding/binary"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// FuzzReceive reads messages of the socket between the runner and a launcher.
func FuzzReceive(f *testing.F) {
	message := func(body string) []byte {
		return append(binary.LittleEndian.AppendUint32(nil, uint32(len(body))), body...) //nolint:gosec // short
	}
	f.Add(message(`{"ready":true,"pid":-1,"ended":{"status":4294967295,"max_rss":-1}}`))
	f.Add(message(`{"path":"/bin/true","argv":[],"mounts":[{"target":"../.."}],"groups":-1}`))
	f.Add(binary.LittleEndian.AppendUint32(nil, maxMessage+1))
	f.Add([]byte{0, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, into := range []any{&reply{}, &spec{}} {
			pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			require.NoError(t, err)
			sent := make(chan struct{})
			go func() {
				defer close(sent)
				for rest := data; len(rest) > 0; {
					n, err := unix.SendmsgN(pair[0], rest, nil, nil, unix.MSG_NOSIGNAL)
					if err != nil {
						break
					}
					rest = rest[n:]
				}
				_ = unix.Shutdown(pair[0], unix.SHUT_WR)
			}()
			files, err := receive(pair[1], into)
			require.Empty(t, files)
			if len(data) < 4 {
				require.Error(t, err)
			}
			require.NoError(t, unix.Close(pair[1]))
			<-sent
			require.NoError(t, unix.Close(pair[0]))
		}
	})
}
