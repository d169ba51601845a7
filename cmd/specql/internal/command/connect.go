package command

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"github.com/specql/mesh/pkg/client"
	"github.com/specql/mesh/pkg/fault"
)

const defaultAddress = "127.0.0.1:7350"

// connection holds the flags of commands that talk to a server.
type connection struct {
	flags                  *pflag.FlagSet
	address, ca, cert, key string
	token, tenant          string
}

func (c *connection) register(fs *pflag.FlagSet) {
	c.flags = pflag.NewFlagSet("connection", pflag.ContinueOnError)
	c.flags.StringVar(&c.address, "address", defaultAddress, "the orchestrator's host:port (SPECQL_ADDRESS)")
	c.flags.StringVar(&c.ca, "ca", "", "PEM file of the CA to trust (SPECQL_CA)")
	c.flags.StringVar(&c.cert, "tls-cert", "", "PEM file of the certificate to show to the server; needs --ca (SPECQL_TLS_CERT)")
	c.flags.StringVar(&c.key, "tls-key", "", "PEM file of the certificate's key (SPECQL_TLS_KEY)")
	c.flags.StringVar(&c.token, "token", "", "bearer token; better kept in SPECQL_TOKEN than written here")
	c.flags.StringVar(&c.tenant, "tenant", "", "the tenant to work for (SPECQL_TENANT)")
	fs.AddFlagSet(c.flags)
}

// dial returns a client; the first call connects.
func (c *connection) dial(s IO) (*client.Client, error) {
	if err := s.bind(c.flags); err != nil {
		return nil, err
	}
	switch {
	case (c.cert == "") != (c.key == ""):
		return nil, misuse("--tls-cert and --tls-key go together: give both")
	case c.cert != "" && c.ca == "":
		return nil, misuse("--tls-cert needs --ca, the CA that the server's certificate is checked against")
	}
	opts := []client.Option{client.WithTracerProvider(s.tracing.Provider())}
	if c.cert != "" {
		opts = append(opts, client.WithCertificate(c.cert, c.key))
	}
	if c.ca != "" {
		opts = append(opts, client.WithCA(c.ca))
	}
	if c.token != "" {
		opts = append(opts, client.WithToken(c.token))
	}
	if c.tenant != "" {
		opts = append(opts, client.WithTenant(c.tenant))
	}
	return client.New(c.address, opts...)
}

// explain tells what to do where no server answers, and where one answers that speaks TLS in
// another way than the client.
func (c *connection) explain(err error) error {
	f, ok := fault.As(err)
	if !ok || f.Code != fault.Unavailable {
		return err
	}
	if mend := c.tlsMend(f.Message); mend != "" {
		return fmt.Errorf("a server answers at %s, but %s\n%s", c.address, mend, f.Message)
	}
	return fmt.Errorf("no server answers at %s: %s\nStart one with `specql dev` in another terminal, or name another with --address", c.address, f.Message)
}

// tlsMend says what is wrong with TLS where that is why a call did not get through, else "".
// The messages are those of gRPC and crypto/tls, which have no types on this side of a call.
func (c *connection) tlsMend(message string) string {
	has := func(texts ...string) bool {
		return slices.ContainsFunc(texts, func(t string) bool { return strings.Contains(message, t) })
	}
	switch {
	case has("first record does not look like a TLS handshake"):
		return "it speaks plaintext: leave out --ca, --tls-cert and --tls-key (plaintext is for loopback alone)"
	case has("the server's certificate says"):
		return "it is another service of the mesh, not the orchestrator: look at --address"
	case has("x509: certificate is valid for", "x509: certificate is not valid for any names"):
		return "its certificate has other names than the one in --address: reach it by one of them, such as localhost through kubectl port-forward, or have one made for this name (`specql certs --host`, or tls.extraHosts of the chart)"
	case has("x509:", "unknown certificate authority", "bad certificate"):
		return "its certificate and yours do not go together: give the CA that both come from as --ca"
	case has("certificate required"):
		return "it asks for a certificate: give --tls-cert and --tls-key next to --ca; `specql certs DIR` makes one"
	case c.ca == "" && has("tls:", "server preface"):
		return "it speaks TLS: give --ca, --tls-cert and --tls-key; `specql certs DIR` makes them"
	case c.ca != "" && c.cert == "" && has("tls:", "server preface", "broken pipe", "connection reset"):
		// With TLS 1.3 the server refuses after the client's side of the handshake is done, and
		// whether its reason arrives before the connection breaks is chance.
		return "it cut the connection off, and most often because it asks for a certificate: give --tls-cert and --tls-key next to --ca"
	case has("tls:", "server preface"):
		return "TLS did not come about: look at --ca, --tls-cert and --tls-key"
	}
	return ""
}

// maxInput is the bound of the API with room for the JSON's spaces.
const maxInput = 16 << 20

// readJSON reads a flag's value: JSON, @FILE, or - for standard input.
func (s IO) readJSON(flag, value string) (json.RawMessage, error) {
	raw := []byte(value)
	var err error
	switch {
	case value == "":
		return nil, nil
	case value == "-":
		raw, err = readBounded(s.In)
	case strings.HasPrefix(value, "@"):
		raw, err = readFile(value[1:])
	}
	if err != nil {
		return nil, misuse("--%s: %w", flag, err)
	}
	if !json.Valid(raw) {
		var syntax *json.SyntaxError
		var any any
		if err := json.Unmarshal(raw, &any); errors.As(err, &syntax) {
			return nil, misuse("--%s is not JSON: %w at byte %d", flag, err, syntax.Offset)
		}
		return nil, misuse("--%s is not JSON; write '{\"name\": \"value\"}', @FILE or -", flag)
	}
	return raw, nil
}

func readFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	return readBounded(f)
}

func readBounded(r io.Reader) ([]byte, error) {
	raw, err := io.ReadAll(io.LimitReader(r, maxInput+1))
	if err != nil {
		return nil, err
	}
	if len(raw) > maxInput {
		return nil, fmt.Errorf("more than %d MiB", maxInput>>20)
	}
	return raw, nil
}
