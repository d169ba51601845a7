package mesh

import (
	"errors"
	"io"
	"log/slog"
	"net"

	"google.golang.org/grpc/credentials"
)

// handshakes logs the callers that were turned away before there was a call to log: most
// often a certificate that is missing, too old or of another CA.
type handshakes struct {
	credentials.TransportCredentials
	log *slog.Logger
}

func (h handshakes) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	out, info, err := h.TransportCredentials.ServerHandshake(conn)
	if err != nil && !errors.Is(err, io.EOF) { // a probe connects and says nothing
		h.log.Warn("a caller was refused", "remote", conn.RemoteAddr().String(), "error", err.Error())
	}
	return out, info, err
}

func (h handshakes) Clone() credentials.TransportCredentials {
	return handshakes{h.TransportCredentials.Clone(), h.log}
}
