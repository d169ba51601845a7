package sandbox

import (
	"crypto/md5" //nolint:gosec // an ETag of S3 is an MD5
	"encoding/hex"
	"encoding/xml"
	"io"
	"net/http"
	"strconv"
	"strings"
)

// s3 keeps objects by path in memory: PUT, GET, HEAD and DELETE with the headers of S3.
type s3 struct{ objects memory[object] }

type object struct {
	body        []byte
	contentType string
}

func newS3() http.Handler { return &s3{} }

// keptObject bounds an object; the sandbox keeps them in memory.
const keptObject = 1 << 20

// ServeHTTP implements http.Handler.
func (s *s3) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Amz-Request-Id", newID("s3"))
	if !signed(r) {
		s3Error(w, http.StatusForbidden, "AccessDenied", "Access Denied")
		return
	}
	bucket, key, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	if bucket == "" || key == "" {
		s3Error(w, http.StatusBadRequest, "InvalidRequest", "The sandbox keeps objects at /BUCKET/KEY.")
		return
	}
	o, found := s.objects.get(r.URL.Path)
	switch r.Method {
	case http.MethodPut:
		body, err := io.ReadAll(r.Body)
		if err != nil || len(body) > keptObject {
			s3Error(w, http.StatusBadRequest, "EntityTooLarge", "Your proposed upload exceeds the maximum allowed object size.")
			return
		}
		o = object{body: body, contentType: r.Header.Get("Content-Type")}
		s.objects.put(r.URL.Path, o)
		w.Header().Set("ETag", o.etag())
	case http.MethodGet, http.MethodHead:
		if !found {
			s3Error(w, http.StatusNotFound, "NoSuchKey", "The specified key does not exist.")
			return
		}
		w.Header().Set("ETag", o.etag())
		w.Header().Set("Content-Type", o.contentType)
		w.Header().Set("Content-Length", strconv.Itoa(len(o.body)))
		if r.Method == http.MethodGet {
			_, _ = w.Write(o.body)
		}
	case http.MethodDelete:
		s.objects.remove(r.URL.Path)
		w.WriteHeader(http.StatusNoContent)
	default:
		s3Error(w, http.StatusMethodNotAllowed, "MethodNotAllowed", "The specified method is not allowed against this resource.")
	}
}

func (o object) etag() string {
	sum := md5.Sum(o.body) //nolint:gosec // an ETag of S3 is an MD5
	return `"` + hex.EncodeToString(sum[:]) + `"`
}

// signed says whether a request has a signature of version 4. The sandbox knows no keys and
// so cannot check it.
func signed(r *http.Request) bool {
	h := r.Header.Get("Authorization")
	return strings.HasPrefix(h, "AWS4-HMAC-SHA256 ") && strings.Contains(h, "Signature=") && strings.Contains(h, "SignedHeaders=")
}

func s3Error(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(status)
	_ = xml.NewEncoder(w).Encode(struct {
		XMLName xml.Name `xml:"Error"`
		Code    string
		Message string
	}{Code: code, Message: message})
}
