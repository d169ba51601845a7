package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/gentype"
	"k8s.io/client-go/rest"

	"github.com/specql/mesh/pkg/fault"
)

const (
	// callTimeout bounds a call to the API server that is to be quick.
	callTimeout = 30 * time.Second
	userAgent   = "specql-docker-runner"
	// Calls to the API server in a second, and at once.
	callRate, callBurst = 100, 200
)

var listOne = metav1.ListOptions{Limit: 1}

// api is the part of the API of a cluster that the runner uses, in one namespace. The whole
// clientset of client-go knows every kind of object that there is, and takes memory for it.
type api struct {
	namespace string
	core      *rest.RESTClient
	http      *http.Client
	params    runtime.ParameterCodec

	jobs    *gentype.ClientWithList[*batchv1.Job, *batchv1.JobList]
	pods    *gentype.ClientWithList[*corev1.Pod, *corev1.PodList]
	secrets *gentype.Client[*corev1.Secret]
	leases  *gentype.ClientWithList[*coordinationv1.Lease, *coordinationv1.LeaseList]
}

func newAPI(config *rest.Config, namespace string) (*api, error) {
	if config == nil {
		return nil, errors.New("it is not known where the API of the cluster is")
	}
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, batchv1.AddToScheme, coordinationv1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, fmt.Errorf("kinds of objects: %w", err)
		}
	}
	codecs := serializer.NewCodecFactory(scheme)
	a := &api{namespace: namespace, params: runtime.NewParameterCodec(scheme)}
	shared := rest.CopyConfig(config)
	shared.UserAgent, shared.QPS, shared.Burst = userAgent, callRate, callBurst
	shared.ContentType = runtime.ContentTypeProtobuf
	shared.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	connection, err := rest.HTTPClientFor(shared)
	if err != nil {
		return nil, fmt.Errorf("the cluster's API: %w", err)
	}
	a.http = connection
	client := func(gv schema.GroupVersion, path string) (*rest.RESTClient, error) {
		c := rest.CopyConfig(shared)
		c.GroupVersion, c.APIPath, c.NegotiatedSerializer = &gv, path, codecs.WithoutConversion()
		made, err := rest.RESTClientForConfigAndClient(c, connection)
		if err != nil {
			return nil, fmt.Errorf("the cluster's API: %w", err)
		}
		return made, nil
	}
	if a.core, err = client(corev1.SchemeGroupVersion, "/api"); err != nil {
		return nil, err
	}
	batch, err := client(batchv1.SchemeGroupVersion, "/apis")
	if err != nil {
		return nil, err
	}
	coordination, err := client(coordinationv1.SchemeGroupVersion, "/apis")
	if err != nil {
		return nil, err
	}
	a.jobs = gentype.NewClientWithList("jobs", batch, a.params, namespace,
		func() *batchv1.Job { return &batchv1.Job{} }, func() *batchv1.JobList { return &batchv1.JobList{} }, gentype.PrefersProtobuf[*batchv1.Job]())
	a.pods = gentype.NewClientWithList("pods", a.core, a.params, namespace,
		func() *corev1.Pod { return &corev1.Pod{} }, func() *corev1.PodList { return &corev1.PodList{} }, gentype.PrefersProtobuf[*corev1.Pod]())
	a.secrets = gentype.NewClient("secrets", a.core, a.params, namespace, func() *corev1.Secret { return &corev1.Secret{} }, gentype.PrefersProtobuf[*corev1.Secret]())
	a.leases = gentype.NewClientWithList("leases", coordination, a.params, namespace,
		func() *coordinationv1.Lease { return &coordinationv1.Lease{} }, func() *coordinationv1.LeaseList { return &coordinationv1.LeaseList{} }, gentype.PrefersProtobuf[*coordinationv1.Lease]())
	return a, nil
}

// log follows what a pod's container writes, from its beginning.
func (a *api) log(ctx context.Context, pod, container string) (io.ReadCloser, error) {
	stream, err := a.core.Get().Namespace(a.namespace).Name(pod).Resource("pods").SubResource("log").
		VersionedParams(&corev1.PodLogOptions{Container: container, Follow: true}, a.params).Stream(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the log of a pod: %w", err)
	}
	return stream, nil
}

// fault says what an error of the API server means: nil for none.
func (a *api) fault(err error, doing string) error {
	if err == nil {
		return nil
	}
	if f, ok := fault.As(err); ok {
		return f
	}
	text := clip(err.Error())
	switch {
	case apierrors.IsForbidden(err) && strings.Contains(text, "exceeded quota"):
		return fault.Wrap(err, fault.Unavailable, "the quota of the namespace %s is used up: %s", a.namespace, text)
	case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
		return fault.Wrap(err, fault.Unavailable, "the runner may not %s in the namespace %s; give its service account the Role of the chart there: %s", doing, a.namespace, text)
	case apierrors.IsInvalid(err), apierrors.IsBadRequest(err):
		return fault.Wrap(err, fault.Validation, "the cluster does not take the Job: %s", text)
	case apierrors.IsNotFound(err):
		return fault.Wrap(err, fault.Unavailable, "%s: there is no namespace %s, or what was in it is gone: %s", doing, a.namespace, text)
	case apierrors.IsTooManyRequests(err), apierrors.IsServerTimeout(err), apierrors.IsTimeout(err), apierrors.ReasonForError(err) != metav1.StatusReasonUnknown:
		return fault.Wrap(err, fault.Unavailable, "the API server of the cluster could not %s: %s", doing, text)
	}
	var status apierrors.APIStatus
	if errors.As(err, &status) && status.Status().Code < http.StatusInternalServerError && status.Status().Code >= http.StatusBadRequest {
		return fault.Wrap(err, fault.Internal, "%s: %s", doing, text)
	}
	return fault.Wrap(err, fault.Unavailable, "the API server of the cluster does not answer (%s): %s; look at --kubeconfig, and whether network policies let the runner reach it", doing, text)
}

// clip shortens text of others for a message.
func clip(s string) string {
	const most = 600
	if len(s) <= most {
		return strings.ToValidUTF8(s, "�")
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}
