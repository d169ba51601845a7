package serverlessrunner

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials/stscreds"
	"github.com/aws/aws-sdk-go-v2/service/lambda"
	"github.com/aws/aws-sdk-go-v2/service/lambda/types"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/specql/mesh/pkg/fault"
)

// maxCached bounds the clients and tokens that are kept, of each kind.
const maxCached = 256

// awsClients keeps credentials by region and role, so that a role is assumed once for many calls.
type awsClients struct {
	mu          sync.Mutex
	base        *aws.Config
	credentials map[string]aws.CredentialsProvider
}

func (a *awsClients) provider(ctx context.Context, c Config) (aws.CredentialsProvider, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.base == nil {
		// Reads the environment and the shared files; the network is used later, by Retrieve.
		cfg, err := config.LoadDefaultConfig(ctx)
		if err != nil {
			return nil, fault.Wrap(err, fault.Validation, "the AWS configuration of the runner cannot be read: %v", clip(err.Error(), 300))
		}
		a.base = &cfg
	}
	role := c.AuthConfig.RoleARN
	if role == "" {
		return a.base.Credentials, nil
	}
	key := c.Region + " " + role
	if p := a.credentials[key]; p != nil {
		return p, nil
	}
	client := sts.NewFromConfig(*a.base, func(o *sts.Options) { o.Region = c.Region })
	p := aws.NewCredentialsCache(stscreds.NewAssumeRoleProvider(client, role, func(o *stscreds.AssumeRoleOptions) {
		o.RoleSessionName = "specql-serverless-runner"
	}))
	if a.credentials == nil || len(a.credentials) >= maxCached {
		a.credentials = make(map[string]aws.CredentialsProvider)
	}
	a.credentials[key] = p
	return p, nil
}

// awsCredentials gets the keys of a call and masks them.
func (r *Runner) awsCredentials(ctx context.Context, c *call) (aws.Credentials, error) {
	p, err := r.aws.provider(ctx, c.config)
	if err != nil {
		return aws.Credentials{}, err
	}
	var keys aws.Credentials
	if p == nil {
		err = errors.New("no provider of credentials")
	} else {
		keys, err = p.Retrieve(ctx)
	}
	if err != nil {
		return aws.Credentials{}, credentialsFault(err, c.config)
	}
	c.sink.Secret(keys.SecretAccessKey)
	c.sink.Secret(keys.SessionToken)
	return keys, nil
}

func credentialsFault(err error, c Config) error {
	var (
		api  smithy.APIError
		send *smithyhttp.RequestSendError
	)
	switch {
	case errors.As(err, &api) && c.AuthConfig.RoleARN != "":
		code := fault.RemoteError
		if api.ErrorFault() == smithy.FaultServer || strings.HasPrefix(api.ErrorCode(), "Throttl") {
			code = fault.Unavailable
		}
		return fault.Wrap(err, code, "AWS does not let the runner assume %s: %s: %s", c.AuthConfig.RoleARN, api.ErrorCode(), clip(api.ErrorMessage(), 300))
	case errors.As(err, &send) && c.AuthConfig.RoleARN != "":
		return fault.Wrap(err, fault.Unavailable, "AWS STS cannot be reached to assume %s", c.AuthConfig.RoleARN)
	default:
		return fault.Wrap(err, fault.Validation,
			"the runner has no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY where it starts, or give its machine a role")
	}
}

// lambda gives the client of a call.
func (r *Runner) lambda(ctx context.Context, c *call) (*lambda.Client, error) {
	if c.aws != nil {
		return c.aws, nil
	}
	keys, err := r.awsCredentials(ctx, c)
	if err != nil {
		return nil, err
	}
	o := lambda.Options{
		Region:      c.config.Region,
		Credentials: aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) { return keys, nil }),
		HTTPClient:  r.client(c),
		// The orchestrator retries, so that each attempt is seen in the journal.
		Retryer:      aws.NopRetryer{},
		BaseEndpoint: aws.String(strings.TrimSuffix(c.target.url.String(), "/")),
	}
	c.aws = lambda.New(o)
	return c.aws, nil
}

// invokeLambda invokes a Lambda function once.
func (r *Runner) invokeLambda(ctx context.Context, c *call) (json.RawMessage, error) {
	function, err := r.lambda(ctx, c)
	if err != nil {
		return nil, err
	}
	in := &lambda.InvokeInput{
		FunctionName:   aws.String(c.config.FunctionName),
		Payload:        c.job.Input,
		InvocationType: types.InvocationTypeEvent,
	}
	if c.config.Qualifier != "" {
		in.Qualifier = aws.String(c.config.Qualifier)
	}
	if c.config.InvocationType != invokeEvent {
		in.InvocationType = types.InvocationTypeRequestResponse
		in.LogType = types.LogTypeTail
		client, err := c.clientContext()
		if err != nil {
			return nil, err
		}
		in.ClientContext = aws.String(client)
	}
	c.invoked = true
	out, err := function.Invoke(ctx, in)
	if err != nil {
		return nil, c.lambdaFault(err)
	}
	return r.lambdaAnswer(c, out)
}

// maxClientContext bounds the client context in base64, in bytes.
const maxClientContext = 3583

// clientContext is what reaches the function beside its input: in the context object,
// client_context.custom. Lambda hands it over in synchronous invocations only.
func (c *call) clientContext() (string, error) {
	custom := map[string]string{"idempotency_key": c.job.IdempotencyKey}
	more := map[string]string{
		"operation": c.job.Operation.Name, "traceparent": c.traceparent, "correlation_id": c.job.CorrelationID,
		"run_id": c.job.RunID, "job_id": c.job.ID,
	}
	for k, v := range more {
		if v != "" {
			custom[k] = v
		}
	}
	for {
		raw, err := json.Marshal(map[string]any{"custom": custom})
		if err != nil {
			return "", fmt.Errorf("client context: %w", err)
		}
		encoded := base64.StdEncoding.EncodeToString(raw)
		if len(encoded) <= maxClientContext {
			return encoded, nil
		}
		if len(custom) == 1 {
			return "", fault.New(fault.Validation, "the idempotency key is too long for Lambda's client context of %d bytes", maxClientContext)
		}
		custom = map[string]string{"idempotency_key": c.job.IdempotencyKey}
	}
}

// lambdaAnswer reads what Lambda answered.
func (r *Runner) lambdaAnswer(c *call, out *lambda.InvokeOutput) (json.RawMessage, error) {
	c.usage.StatusCode = new(out.StatusCode)
	requestID, _ := awsmiddleware.GetRequestIDMetadata(out.ResultMetadata)
	if c.config.InvocationType == invokeEvent {
		return marshal(map[string]any{"status_code": out.StatusCode, "request_id": requestID})
	}
	c.usage.ResponseBytes = new(float64(len(out.Payload)))
	if v := aws.ToString(out.ExecutedVersion); v != "" {
		c.usage.ExecutedVersion = new(clip(v, 200))
	}
	rep, err := c.readTail(aws.ToString(out.LogResult), requestID)
	if err != nil {
		r.logger.Warn("a log tail could not be read", "error", err)
	}
	r.price(c, rep)
	if functionError := aws.ToString(out.FunctionError); functionError != "" {
		return nil, c.functionFault(functionError, out.Payload, rep)
	}
	if err := c.checkDeployedMemory(rep); err != nil {
		return nil, err
	}
	if len(out.Payload) > 0 && json.Valid(out.Payload) {
		return out.Payload, nil
	}
	return marshal(map[string]any{"body": strings.ToValidUTF8(string(out.Payload), "\uFFFD"), "status_code": out.StatusCode, "headers": map[string]string{}})
}

// readTail logs the tail and takes the report's figures.
func (c *call) readTail(encoded, requestID string) (*report, error) {
	tail, err := parseTail(encoded, requestID)
	if err != nil {
		return nil, fmt.Errorf("log tail: %w", err)
	}
	if tail.full {
		c.sink.Log("runner", "Lambda sends the last 4 KB of a log; earlier lines are in CloudWatch, request "+requestID)
	}
	for _, l := range tail.lines {
		stream := "stdout"
		if l.platform {
			stream = "runner"
		}
		c.sink.Log(stream, l.text)
	}
	if tail.report != nil {
		c.usage.BilledDurationMs = tail.report.billedMS
		c.usage.PeakMemoryMb = tail.report.maxUsedMB
	}
	return tail.report, nil
}

// price sets the cost where the report tells billed duration and memory size, and the table the price.
func (r *Runner) price(c *call, rep *report) {
	if rep == nil || rep.billedMS == nil || rep.memoryMB == nil {
		return
	}
	p, ok := r.prices.find(c.config.Provider, c.config.Region, c.config.Architecture)
	if !ok {
		return
	}
	c.costUSD = p.cost(*rep.billedMS, *rep.memoryMB)
	c.usage.CostUsd = new(c.costUSD)
}

// checkDeployedMemory holds what the function really is against the policy, once it is known.
func (c *call) checkDeployedMemory(rep *report) error {
	if rep == nil || rep.memoryMB == nil {
		return nil
	}
	size := int64(*rep.memoryMB)
	if want := c.config.MemoryMB; want != 0 && want != size {
		c.sink.Log("runner", fmt.Sprintf("the function has %d MB, runner_config.memory_mb says %d", size, want))
	}
	limit := c.policy.resourceLimits().MemoryMB
	if limit == 0 || size <= limit {
		return nil
	}
	f := c.checks.Deny("resource_limits.memory_mb", fmt.Sprintf("%d MB", size), fmt.Sprintf("the limit is %d MB", limit), c.policy.raisingMemory(size)...)
	f.Code = fault.ResourceExceeded
	f.Message = fmt.Sprintf("the function has %d MB of memory and resource_limits.memory_mb is %d%s; lower the function's memory or raise the limit", size, limit, peakText(rep))
	return f
}

func peakText(rep *report) string {
	if rep == nil || rep.maxUsedMB == nil {
		return ""
	}
	return fmt.Sprintf(" (peak %g MB)", *rep.maxUsedMB)
}

// functionFault turns an error of the function into a fault.
func (c *call) functionFault(kind string, payload []byte, rep *report) error {
	var e struct {
		ErrorMessage string          `json:"errorMessage"`
		ErrorType    string          `json:"errorType"`
		StackTrace   json.RawMessage `json:"stackTrace"`
	}
	if err := json.Unmarshal(payload, &e); err != nil || e.ErrorMessage == "" && e.ErrorType == "" {
		e.ErrorMessage = string(payload)
	}
	if len(e.StackTrace) > 0 && string(e.StackTrace) != "null" {
		c.sink.Log("stderr", clip(string(e.StackTrace), 8<<10))
	}
	message, errorType := clip(e.ErrorMessage, 2<<10), clip(e.ErrorType, 200)
	if isOutOfMemory(e.ErrorType, e.ErrorMessage, rep) {
		c.usage.OomKilled = new(true)
		limit := ""
		if rep != nil && rep.memoryMB != nil {
			limit = fmt.Sprintf(" of %g MB%s", *rep.memoryMB, peakText(rep))
		}
		return fault.New(fault.ResourceExceeded, "the function ran out of its memory%s: %s; give it more memory", limit, message)
	}
	if e.ErrorType == "Function.ResponseSizeTooLarge" {
		return fault.New(fault.ResourceExceeded, "the function's answer is larger than Lambda passes on: %s; let it store large results and answer with their place", message)
	}
	if e.ErrorType == "Sandbox.Timedout" || strings.Contains(e.ErrorMessage, "Task timed out after ") {
		return fault.New(fault.Timeout, "the function's own timeout at AWS ended it: %s", message)
	}
	if errorType != "" {
		errorType += ": "
	}
	return fault.New(fault.RemoteError, "the function failed (%s): %s%s", clip(kind, 40), errorType, message)
}

// isOutOfMemory tells a function that was killed for its memory from one that ended otherwise.
func isOutOfMemory(errorType, message string, rep *report) bool {
	const outOfMemory = "Runtime.OutOfMemory"
	if errorType == outOfMemory || rep != nil && rep.errorType == outOfMemory {
		return true
	}
	killed := errorType == "Runtime.ExitError" && strings.Contains(message, "signal: killed")
	return killed && rep != nil && rep.maxUsedMB != nil && rep.memoryMB != nil && *rep.maxUsedMB >= *rep.memoryMB
}

// Server-side errors of Lambda that repeating does not mend: the function's own configuration is broken.
var brokenFunction = map[string]bool{
	"InvalidRuntimeException": true, "InvalidZipFileException": true, "InvalidSubnetIDException": true,
	"InvalidSecurityGroupIDException": true, "KMSDisabledException": true, "KMSAccessDeniedException": true,
	"KMSInvalidStateException": true, "KMSNotFoundException": true, "EC2AccessDeniedException": true,
	"EFSMountFailureException": true, "SubnetIPAddressLimitReachedException": true, "SnapStartException": true,
}

// States that pass by themselves.
var notReadyYet = map[string]bool{
	"ResourceNotReadyException": true, "ResourceConflictException": true, "SnapStartNotReadyException": true, "ENINotReadyException": true,
}

// lambdaFault turns an error of the Lambda API into a fault.
func (c *call) lambdaFault(err error) error {
	var answer *smithyhttp.ResponseError
	status := 0
	if errors.As(err, &answer) && answer.Response != nil && answer.Response.Response != nil {
		status = answer.HTTPStatusCode()
		c.usage.StatusCode = new(int32(status)) //nolint:gosec // three digits
	}
	if status >= 400 && status <= 499 || status == 0 && neverSent(err) {
		c.costUSD = 0 // the function did not run
	}
	if isRefused(err) {
		return err
	}
	if f, ok := fault.As(err); ok {
		return f
	}
	var api smithy.APIError
	code := ""
	f := fault.Wrap(err, fault.RemoteError, "Lambda answered %d with something that is not its format: %s", status, clip(err.Error(), 300))
	switch {
	case errors.As(err, &api):
		code = api.ErrorCode()
		f.Message = fmt.Sprintf("Lambda answered %d %s: %s%s", status, clip(code, 100), clip(api.ErrorMessage(), 2<<10), c.lambdaMend(code))
	case status == 0, status < 300 && isBroken(err):
		return connectionFault(err, c.target.url.Host)
	}
	switch {
	case status == 429 || code == "TooManyRequestsException":
		f.Code, f.Retryable = fault.RateLimited, true
		f.RetryAfter = lambdaRetryAfter(err, answer)
	case code == "RequestTooLargeException", code == "InvalidRequestContentException", code == "InvalidParameterValueException", code == "UnsupportedMediaTypeException":
		f.Code = fault.Validation
	case notReadyYet[code]:
		f.Code, f.Retryable = fault.Unavailable, true
	case brokenFunction[code]:
	case status == 503 || code == "EC2ThrottledException":
		f.Code, f.Retryable = fault.Unavailable, true
		f.RetryAfter = lambdaRetryAfter(err, answer)
	case status >= 500:
		f.Retryable = true
	}
	return f
}

// isBroken says whether a connection ended in the middle of an answer.
func isBroken(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) || errors.Is(err, io.ErrUnexpectedEOF)
}

func (c *call) lambdaMend(code string) string {
	switch code {
	case "ResourceNotFoundException":
		return fmt.Sprintf("; check that %s exists in %s", clip(c.config.FunctionName, 200), c.config.Region)
	case "AccessDeniedException":
		return "; give the runner lambda:InvokeFunction on it"
	case "UnrecognizedClientException", "InvalidSignatureException", "MissingAuthenticationTokenException", "ExpiredTokenException":
		return "; check the runner's AWS credentials and clock"
	}
	return ""
}

func lambdaRetryAfter(err error, answer *smithyhttp.ResponseError) time.Duration {
	if many, ok := errors.AsType[*types.TooManyRequestsException](err); ok {
		if d := retryAfter(aws.ToString(many.RetryAfterSeconds)); d > 0 {
			return d
		}
	}
	if answer == nil || answer.Response == nil {
		return 0
	}
	return retryAfter(answer.Response.Header.Get("Retry-After"))
}

func marshal(v any) (json.RawMessage, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("output: %w", err)
	}
	return raw, nil
}
