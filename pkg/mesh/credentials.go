// Package mesh builds the gRPC servers and clients of the system: mutual TLS with roles,
// errors that keep their code over the wire, panics that stay inside one call, metrics,
// health, reflection, load balancing and draining.
package mesh

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// RoleOrchestrator is the role that runners answer.
const RoleOrchestrator = "orchestrator"

// rolePrefix begins the URI in a certificate that says the role of its holder.
const rolePrefix = "spiffe://specql/"

// reloadAfter is how often files of certificates are looked at for a newer version.
const reloadAfter = 10 * time.Second

// Credentials are a certificate, its key and the CA that peers must come from. Made from
// files, they follow a change of the files without a restart.
type Credentials struct {
	load func() (*material, error) // nil: never changes
	stat func() string

	mu      sync.Mutex
	now     *material
	stamp   string
	checked time.Time
	log     *slog.Logger // nil: nobody is told
	failed  string       // what was told last of files that cannot be used
}

// material is one version of the certificate, key and CA.
type material struct {
	certificate            *tls.Certificate // nil: none, for clients alone
	pool                   *x509.CertPool
	role                   string
	certPEM, keyPEM, caPEM []byte
}

// LoadCredentials reads PEM files. cert and key may both be empty for a client that shows
// no certificate; ca is needed always.
func LoadCredentials(cert, key, ca string) (*Credentials, error) {
	if ca == "" {
		return nil, errors.New("the CA's certificate is needed (--tls-ca or SPECQL_TLS_CA); `specql certs DIR` makes one")
	}
	if (cert == "") != (key == "") {
		return nil, errors.New("a certificate needs its key and a key its certificate: give both --tls-cert and --tls-key, or neither")
	}
	files := []string{ca}
	if cert != "" {
		files = append(files, cert, key)
	}
	load := func() (*material, error) {
		pems := make([][]byte, 3)
		for i, name := range files {
			text, err := os.ReadFile(name) //nolint:gosec // the operator names the file
			if err != nil {
				return nil, fmt.Errorf("read certificates: %w", err)
			}
			pems[i] = text
		}
		m, err := newMaterial(pems[1], pems[2], pems[0])
		if err != nil {
			return nil, fmt.Errorf("certificates in %s: %w", strings.Join(files, ", "), err)
		}
		return m, nil
	}
	m, err := load()
	if err != nil {
		return nil, err
	}
	stat := func() string {
		var b strings.Builder
		for _, name := range files {
			if info, err := os.Stat(name); err == nil {
				fmt.Fprint(&b, info.ModTime().UnixNano(), info.Size(), ";")
			}
		}
		return b.String()
	}
	return &Credentials{load: load, stat: stat, now: m, stamp: stat(), checked: time.Now()}, nil
}

func newMaterial(certPEM, keyPEM, caPEM []byte) (*material, error) {
	m := &material{pool: x509.NewCertPool(), certPEM: certPEM, keyPEM: keyPEM, caPEM: caPEM}
	if !m.pool.AppendCertsFromPEM(caPEM) {
		return nil, errors.New("the CA's file holds no PEM certificate")
	}
	if len(certPEM) == 0 {
		return m, nil
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("certificate and key: %w", err)
	}
	if pair.Leaf == nil {
		if pair.Leaf, err = x509.ParseCertificate(pair.Certificate[0]); err != nil {
			return nil, fmt.Errorf("certificate: %w", err)
		}
	}
	m.certificate, m.role = &pair, roleOf(pair.Leaf)
	return m, nil
}

// current is the material to use now. A new version that cannot be read leaves the old one.
func (c *Credentials) current() *material {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.load == nil || time.Since(c.checked) < reloadAfter {
		return c.now
	}
	c.checked = time.Now()
	stamp := c.stat()
	if stamp == c.stamp {
		return c.now
	}
	m, err := c.load()
	switch {
	case err == nil:
		c.now, c.stamp, c.failed = m, stamp, ""
		c.tell(slog.LevelInfo, "the changed certificates are in use")
	case err.Error() != c.failed: // a pair may be half written at this moment: it is tried again
		c.failed = err.Error()
		c.tell(slog.LevelError, "the changed certificates cannot be used; those of before stay in use", slog.String("error", c.failed))
	}
	return c.now
}

// logTo has changes of the files told, unless they are told somewhere already.
func (c *Credentials) logTo(log *slog.Logger) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.log == nil {
		c.log = log
	}
}

func (c *Credentials) tell(level slog.Level, message string, attrs ...slog.Attr) {
	if c.log != nil {
		c.log.LogAttrs(context.Background(), level, message, attrs...)
	}
}

// Name is the role that the certificate says, or "" without one.
func (c *Credentials) Name() string {
	if c == nil {
		return ""
	}
	return c.current().role
}

// PEM gives the certificate, its key and the CA's certificate in PEM form.
func (c *Credentials) PEM() (cert, key, ca []byte) {
	m := c.current()
	return m.certPEM, m.keyPEM, m.caPEM
}

// roleSuffix ends the DNS name in a certificate that says the role, for makers of certificates that know no URIs,
// such as Helm's. Nobody can own a name below .invalid (RFC 2606).
const roleSuffix = ".role.specql.invalid"

// roleOf is the role in a certificate, or "".
func roleOf(cert *x509.Certificate) string {
	for _, u := range cert.URIs {
		if role, ok := strings.CutPrefix(u.String(), rolePrefix); ok && validRole(role) {
			return role
		}
	}
	for _, name := range cert.DNSNames {
		if role, ok := strings.CutSuffix(name, roleSuffix); ok && validRole(role) {
			return role
		}
	}
	return ""
}

func roleURI(role string) (*url.URL, error) {
	if !validRole(role) {
		return nil, fmt.Errorf("%q is no role: use up to 63 small letters, digits and hyphens", role)
	}
	return &url.URL{Scheme: "spiffe", Host: "specql", Path: "/" + role}, nil
}

func validRole(role string) bool {
	if role == "" || len(role) > 63 {
		return false
	}
	return strings.Trim(role, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

// serverTLS asks callers for a certificate of the CA.
func (c *Credentials) serverTLS(optional bool) *tls.Config {
	auth := tls.RequireAndVerifyClientCert
	if optional {
		auth = tls.VerifyClientCertIfGiven
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			m := c.current()
			if m.certificate == nil {
				return nil, errors.New("the server has no certificate")
			}
			return &tls.Config{
				MinVersion:   tls.VersionTLS13,
				NextProtos:   []string{"h2"},
				Certificates: []tls.Certificate{*m.certificate},
				ClientCAs:    m.pool,
				ClientAuth:   auth,
				// A session that is resumed would bring a certificate that an older CA vouched for.
				SessionTicketsDisabled: true,
			}, nil
		},
	}
}

// clientCredentials look at the files of certificates for each connection: the CA that was read when
// the client was made may have been replaced since.
type clientCredentials struct {
	credentials.TransportCredentials
	c          *Credentials
	serverRole string
}

func newClientCredentials(c *Credentials, serverRole string) credentials.TransportCredentials {
	return clientCredentials{credentials.NewTLS(c.clientTLS(serverRole)), c, serverRole}
}

// ClientHandshake implements [credentials.TransportCredentials].
func (t clientCredentials) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return credentials.NewTLS(t.c.clientTLS(t.serverRole)).ClientHandshake(ctx, authority, conn)
}

// Clone implements [credentials.TransportCredentials].
func (t clientCredentials) Clone() credentials.TransportCredentials {
	return clientCredentials{t.TransportCredentials.Clone(), t.c, t.serverRole}
}

// clientTLS shows the certificate and takes only a server of the CA: one with the role, or,
// where the role is empty, one whose certificate has the name dialled. It is for one connection.
func (c *Credentials) clientTLS(serverRole string) *tls.Config {
	m := c.current()
	config := &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: m.pool}
	if m.certificate != nil {
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return c.current().certificate, nil
		}
	}
	if serverRole == "" {
		return config
	}
	// Replicas are reached by addresses that no certificate can list, so the role in the
	// certificate takes the place of the host's name. The chain is checked all the same.
	config.InsecureSkipVerify = true //nolint:gosec // VerifyConnection takes its place
	config.VerifyConnection = func(state tls.ConnectionState) error {
		if len(state.PeerCertificates) == 0 {
			return errors.New("the server shows no certificate")
		}
		intermediates := x509.NewCertPool()
		for _, cert := range state.PeerCertificates[1:] {
			intermediates.AddCert(cert)
		}
		leaf := state.PeerCertificates[0]
		if _, err := leaf.Verify(x509.VerifyOptions{
			Roots: c.current().pool, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		}); err != nil {
			return fmt.Errorf("the server's certificate: %w", err)
		}
		if role := roleOf(leaf); role != serverRole {
			return fmt.Errorf("the server's certificate says %q, not %q", role, serverRole)
		}
		return nil
	}
	return config
}

// VerifyRole is for [tls.Config.VerifyConnection] of clients that check the name that they dial. It refuses a server
// whose certificate says another role: certificates of one mesh often have names in common, so that a name does not tell
// one service from another. A certificate that says no role is of somebody who gives none, and the name is all there is.
func VerifyRole(role string) func(tls.ConnectionState) error {
	return func(state tls.ConnectionState) error {
		if len(state.PeerCertificates) == 0 {
			return errors.New("the server shows no certificate")
		}
		if says := roleOf(state.PeerCertificates[0]); says != "" && says != role {
			return fmt.Errorf("the server's certificate says %q, not %q", says, role)
		}
		return nil
	}
}

// PeerRole is the role of the caller by its certificate, or "" without one.
func PeerRole(ctx context.Context) string {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return ""
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.VerifiedChains) == 0 || len(info.State.PeerCertificates) == 0 {
		return ""
	}
	return roleOf(info.State.PeerCertificates[0])
}
