package serverlessrunner

import (
	"context"
	"fmt"
	"net/url"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/lambda"
)

// target is what will be called: for AWS the address of the Lambda API, for Google the
// function's URL, for Azure the URL of the function's route.
func (c Config) target() (endpoint, error) {
	var given endpoint
	if c.Endpoint != "" {
		e, err := parseEndpoint(c.Endpoint)
		if err != nil {
			return endpoint{}, fmt.Errorf("runner_config.endpoint: %w", err)
		}
		given = e
	}
	switch c.Provider {
	case providerAWS:
		if given.url != nil {
			return given, nil
		}
		e, err := lambda.NewDefaultEndpointResolverV2().ResolveEndpoint(context.Background(), lambda.EndpointParameters{
			Region: aws.String(c.Region), UseFIPS: aws.Bool(false), UseDualStack: aws.Bool(false),
		})
		if err != nil {
			return endpoint{}, fmt.Errorf("runner_config.region: AWS has no Lambda in %s: %w", c.Region, err)
		}
		return endpoint{url: &e.URI}, nil
	case providerGCP:
		if given.url != nil {
			return given, nil
		}
		// The address of 1st generation functions; 2nd generation functions answer to it as well.
		return endpoint{url: &url.URL{
			Scheme: "https", Host: c.Region + "-" + c.Project + ".cloudfunctions.net", Path: "/" + c.FunctionName,
		}}, nil
	default:
		app := given.url
		if app == nil {
			app = &url.URL{Scheme: "https", Host: c.AppName + ".azurewebsites.net"}
		}
		// A path in the endpoint takes the place of the route prefix /api (routePrefix in host.json).
		route := "api"
		if app.Path != "" && app.Path != "/" {
			route = ""
		}
		return endpoint{url: app.JoinPath(route, c.FunctionName), loopback: given.loopback}, nil
	}
}
