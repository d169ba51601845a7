package mesh

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"time"

	"google.golang.org/grpc/credentials"
)

// handshakes logs the callers that were turned away before there was a call to log: most
// often a certificate that is missing, too old or of another CA.
type handshakes struct {
	credentials.TransportCredentials
	log     *slog.Logger
	denials *denials
}

func (h handshakes) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	out, info, err := h.TransportCredentials.ServerHandshake(conn)
	if err != nil && !errors.Is(err, io.EOF) { // a probe connects and says nothing
		omitted, tell := h.denials.tell(time.Now())
		if !tell {
			return out, info, err
		}
		if omitted > 0 {
			h.log.Warn("more calls were refused than are logged", "omitted", omitted)
		}
		h.log.Warn("a caller was refused", "remote", conn.RemoteAddr().String(), "error", err.Error())
	}
	return out, info, err
}

func (h handshakes) Clone() credentials.TransportCredentials {
	return handshakes{h.TransportCredentials.Clone(), h.log, h.denials}
}
