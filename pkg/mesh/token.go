package mesh

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
)

// tokenPrefix lets people and scanners of secrets tell a token of the mesh when they see one.
const tokenPrefix = "specql_"

// TokenHashPrefix begins what [HashToken] gives.
const TokenHashPrefix = "sha256:"

// NewToken makes a bearer token of 256 random bits.
func NewToken() (string, error) {
	var raw [32]byte
	if _, err := rand.Read(raw[:]); err != nil {
		return "", fmt.Errorf("make a token: %w", err)
	}
	return tokenPrefix + base64.RawURLEncoding.EncodeToString(raw[:]), nil
}

// HashToken is the form in which a server keeps a token: sha256: and 64 hexadecimal digits. A
// fast hash is right for a token of [NewToken], which nobody can guess; it is wrong for a
// password, which somebody can.
func HashToken(token string) string {
	sum := sha256.Sum256([]byte(token))
	return TokenHashPrefix + hex.EncodeToString(sum[:])
}
