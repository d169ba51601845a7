package command

import (
	"github.com/spf13/cobra"

	"github.com/specql/mesh/cmd/specql/internal/report"
	"github.com/specql/mesh/pkg/client"
)

// maxBenchmark is how many services one benchmark compares.
const maxBenchmark = 20

func newBenchmark(s IO) *cobra.Command {
	var l loadFlags
	var names []string
	cmd := &cobra.Command{
		Use:   "benchmark --services A B C",
		Short: "Calls operations of several services one after the other, and compares them",
		Long: "Does what load-test does for each service in turn, with the same load, and prints the results side by side.\n" +
			"A service with several operations is written SERVICE.OPERATION. Each call gets an example of its operation's\n" +
			"input_schema as input, or --input, which all operations then have to take. Exit status 1 if no call of one succeeded.",
		Example: "  specql benchmark --services stripe.get_charge csv_processor ml_predictor --duration 20s --report report.html",
		Args:    cobra.NoArgs,
	}
	fs := cmd.Flags()
	fs.StringSliceVar(&names, "services", nil, "what to call, SERVICE or SERVICE.OPERATION: all words up to the next flag")
	l.register(fs)
	return withClient(s, cmd, func(cmd *cobra.Command, c *client.Client, _ *connection, out *output, _ []string) error {
		switch {
		case len(names) == 0:
			return misuse("--services is needed: the services to compare")
		case len(names) > maxBenchmark:
			return misuse("--services has %d names; at most %d are compared", len(names), maxBenchmark)
		}
		services, input, err := s.prepareCalls(cmd.Context(), c, &l)
		if err != nil {
			return err
		}
		var targets []*target
		seen := map[string]bool{}
		for _, name := range names {
			service, operation := splitTarget(services, name)
			t, err := findTarget(services, service, operation, "as SERVICE.OPERATION", input)
			if err != nil {
				return err
			}
			if seen[t.name()] {
				return misuse("--services has %s twice", t.name())
			}
			seen[t.name()] = true
			targets = append(targets, t)
		}
		s.warnOfCost(&l, targets...)
		var tests []report.Test
		for _, t := range targets {
			test, err := s.measure(cmd.Context(), c, &l, t)
			if err != nil {
				return err
			}
			tests = append(tests, test)
			if test.Result.Interrupted {
				break
			}
		}
		return s.printTests(out, &l, "specql benchmark", tests, true)
	})
}
