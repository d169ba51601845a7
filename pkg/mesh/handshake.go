package mesh

import (
	"context"
	"errors"
	"io"
	"net"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
)

// handshakes logs the callers that were turned away before there was a call to log: most
// often a certificate that is missing, too old or of another CA.
type handshakes struct {
	credentials.TransportCredentials
	denials *Denials
}

func (h handshakes) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	out, info, err := h.TransportCredentials.ServerHandshake(conn)
	if err != nil && !errors.Is(err, io.EOF) { // a probe connects and says nothing
		h.denials.Tell(context.Background(), "connect", conn.RemoteAddr().String(), "", &Denial{Code: codes.Unauthenticated, Rule: RuleHandshake, Message: err.Error()})
	}
	return out, info, err
}

func (h handshakes) Clone() credentials.TransportCredentials {
	return handshakes{h.TransportCredentials.Clone(), h.denials}
}
