package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
)

const (
	maxSync  = 6 << 20
	maxEvent = 1 << 20
)

// invokeAPI is POST /2015-03-31/functions/{name}/invocations.
type invokeAPI struct {
	auth      *authorizer
	functions map[string]*function
}

// ServeHTTP implements http.Handler.
func (a *invokeAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	requestID := newID()
	w.Header().Set("X-Amzn-RequestId", requestID)
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxSync))
	if err != nil {
		fail(w, http.StatusRequestEntityTooLarge, "RequestTooLargeException", fmt.Sprintf("Request must be smaller than %d bytes for the InvokeFunction operation", maxSync))
		return
	}
	if status, kind, message := a.auth.check(r, body); status != 0 {
		fail(w, status, kind, message)
		return
	}
	name, ok := strings.CutPrefix(r.URL.Path, "/2015-03-31/functions/")
	if asked, isConfiguration := strings.CutSuffix(name, "/configuration"); ok && isConfiguration && r.Method == http.MethodGet {
		a.configuration(w, asked, r.URL.Query().Get("Qualifier"))
		return
	}
	name, isInvoke := strings.CutSuffix(name, "/invocations")
	if !ok || !isInvoke || r.Method != http.MethodPost {
		fail(w, http.StatusNotFound, "UnknownOperationException", "")
		return
	}
	f, version := a.find(name, r.URL.Query().Get("Qualifier"))
	if f == nil {
		fail(w, http.StatusNotFound, "ResourceNotFoundException", "Function not found: arn:aws:lambda:"+a.auth.region+":000000000000:function:"+name)
		return
	}
	if len(body) > 0 && !json.Valid(body) {
		fail(w, http.StatusBadRequest, "InvalidRequestContentException", "Could not parse request body into json")
		return
	}
	in := invocation{id: requestID, payload: body, clientContext: decoded(r.Header.Get("X-Amz-Client-Context")), trace: r.Header.Get("X-Amzn-Trace-Id")}
	switch r.Header.Get("X-Amz-Invocation-Type") {
	case "", "RequestResponse":
		a.invoke(w, r, f, version, in)
	case "Event":
		a.event(w, f, in)
	case "DryRun":
		w.WriteHeader(http.StatusNoContent)
	default:
		fail(w, http.StatusBadRequest, "InvalidParameterValueException", "unknown invocation type")
	}
}

// configuration is GET /2015-03-31/functions/{name}/configuration.
func (a *invokeAPI) configuration(w http.ResponseWriter, name, qualifier string) {
	f, version := a.find(name, qualifier)
	if f == nil {
		fail(w, http.StatusNotFound, "ResourceNotFoundException", "Function not found: arn:aws:lambda:"+a.auth.region+":000000000000:function:"+name)
		return
	}
	answer(w, http.StatusOK, map[string]any{
		"FunctionName": f.options.name, "FunctionArn": "arn:aws:lambda:" + a.auth.region + ":000000000000:function:" + f.options.name,
		"MemorySize": f.options.memoryMB, "Timeout": int64(math.Ceil(f.options.timeout.Seconds())), "Version": version, "Architectures": []string{"x86_64"}, "State": "Active",
	})
}

// find takes a name, a partial or a whole ARN, with or without a qualifier.
func (a *invokeAPI) find(name, qualifier string) (*function, string) {
	if _, rest, ok := strings.Cut(name, "function:"); ok {
		name = rest
	}
	if n, q, ok := strings.Cut(name, ":"); ok {
		name, qualifier = n, q
	}
	f := a.functions[name]
	if f == nil {
		return nil, ""
	}
	switch qualifier {
	case "", "$LATEST":
		return f, "$LATEST"
	case f.options.alias, f.options.version:
		return f, f.options.version
	}
	return nil, ""
}

func (a *invokeAPI) invoke(w http.ResponseWriter, r *http.Request, f *function, version string, in invocation) {
	var e *environment
	select {
	case e = <-f.slots:
	default:
		w.Header().Set("Retry-After", "1")
		w.Header().Set("X-Amzn-Errortype", "TooManyRequestsException")
		answer(w, http.StatusTooManyRequests, map[string]string{
			"Reason": "ReservedFunctionConcurrentInvocationLimitExceeded", "Type": "User", "message": "Rate Exceeded.",
		})
		return
	}
	out := e.run(context.WithoutCancel(r.Context()), in) // a caller that hangs up does not end a function
	f.slots <- e
	h := w.Header()
	h.Set("X-Amz-Executed-Version", version)
	if out.functionError != "" {
		h.Set("X-Amz-Function-Error", out.functionError)
	}
	if r.Header.Get("X-Amz-Log-Type") == "Tail" {
		log := out.log
		log = log[max(0, len(log)-4096):]
		h.Set("X-Amz-Log-Result", base64.StdEncoding.EncodeToString(log))
	}
	h.Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	_, _ = w.Write(out.payload)
}

func (a *invokeAPI) event(w http.ResponseWriter, f *function, in invocation) {
	if len(in.payload) > maxEvent {
		fail(w, http.StatusRequestEntityTooLarge, "RequestTooLargeException", fmt.Sprintf("Request must be smaller than %d bytes for the InvokeFunction operation", maxEvent))
		return
	}
	in.clientContext = "" // Lambda does not hand it over in events
	go func() {
		e := <-f.slots
		e.run(context.Background(), in)
		f.slots <- e
	}()
	w.WriteHeader(http.StatusAccepted)
}

func decoded(b64 string) string {
	raw, err := base64.StdEncoding.DecodeString(b64)
	if err != nil {
		return ""
	}
	return string(raw)
}

func fail(w http.ResponseWriter, status int, kind, message string) {
	w.Header().Set("X-Amzn-Errortype", kind)
	answer(w, status, map[string]string{"Type": "User", "Message": message})
}

func answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}

// authorizer checks Signature Version 4.
type authorizer struct{ region, accessKey, secretKey string }

func (a *authorizer) check(r *http.Request, body []byte) (status int, kind, message string) {
	given := r.Header.Get("Authorization")
	rest, ok := strings.CutPrefix(given, "AWS4-HMAC-SHA256 ")
	if !ok {
		return http.StatusForbidden, "MissingAuthenticationTokenException", "Missing Authentication Token"
	}
	fields := map[string]string{}
	for part := range strings.SplitSeq(rest, ",") {
		k, v, _ := strings.Cut(strings.TrimSpace(part), "=")
		fields[k] = v
	}
	scope := strings.Split(fields["Credential"], "/")
	signed := fields["SignedHeaders"]
	if len(scope) != 5 || fields["Signature"] == "" || signed == "" {
		return http.StatusForbidden, "IncompleteSignatureException", "the Authorization header is incomplete"
	}
	if scope[2] != a.region || scope[3] != "lambda" {
		return http.StatusForbidden, "InvalidSignatureException", "Credential should be scoped to region " + a.region + " and service lambda"
	}
	if a.accessKey != "" && scope[0] != a.accessKey {
		return http.StatusForbidden, "UnrecognizedClientException", "The security token included in the request is invalid."
	}
	at, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
	if err != nil || time.Since(at).Abs() > 15*time.Minute {
		return http.StatusForbidden, "InvalidSignatureException", "Signature expired"
	}
	if a.secretKey == "" {
		return 0, "", ""
	}
	// Sign again what the caller says it signed.
	again := &http.Request{Method: r.Method, URL: r.URL, Host: r.Host, Header: http.Header{}, Body: io.NopCloser(bytes.NewReader(body))}
	again.URL.Scheme, again.URL.Host = "http", r.Host
	for name := range strings.SplitSeq(signed, ";") {
		switch name {
		case "host":
		case "content-length":
			again.ContentLength = r.ContentLength
		default:
			again.Header[http.CanonicalHeaderKey(name)] = r.Header.Values(name)
		}
	}
	sum := sha256.Sum256(body)
	keys := aws.Credentials{AccessKeyID: scope[0], SecretAccessKey: a.secretKey, SessionToken: r.Header.Get("X-Amz-Security-Token")}
	if err := v4.NewSigner().SignHTTP(r.Context(), keys, again, hex.EncodeToString(sum[:]), "lambda", a.region, at); err != nil || again.Header.Get("Authorization") != given {
		return http.StatusForbidden, "InvalidSignatureException", "The request signature we calculated does not match the signature you provided."
	}
	return 0, "", ""
}
