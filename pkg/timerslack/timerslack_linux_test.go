package timerslack_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/specql/mesh/pkg/timerslack"
)

// child is what the program under test says of itself.
type child struct {
	PID   int
	Args  []string
	Slack []int
	Given string
}

func TestMain(m *testing.M) {
	if os.Getenv("TIMERSLACK_CHILD") == "" {
		os.Exit(m.Run())
	}
	timerslack.Allow(timerslack.Services)
	c := child{PID: os.Getpid(), Args: os.Args[1:], Given: os.Getenv("TIMERSLACK_CHILD")}
	threads := make(chan int)
	for range 3 {
		go func() {
			runtime.LockOSThread() // a thread of its own
			ns, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
			if err != nil {
				ns = -1
			}
			threads <- ns
		}()
	}
	for range 3 {
		c.Slack = append(c.Slack, <-threads)
	}
	text, err := json.Marshal(c)
	if err != nil {
		os.Exit(1)
	}
	fmt.Println(string(text))
}

func start(t *testing.T, env ...string) (c child, pid int) {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.CommandContext(t.Context(), self, "one", "two words") //nolint:gosec // this very program
	cmd.Env = append(os.Environ(), append(env, "TIMERSLACK_CHILD=given")...)
	out, err := cmd.Output()
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(out, &c), "%s", out)
	return c, cmd.Process.Pid
}

// The program goes on as the same process with the same arguments and environment, and all of its threads have the slack.
func TestAllow(t *testing.T) {
	t.Parallel()
	c, pid := start(t)
	slack := int(timerslack.Services)
	require.Equal(t, child{pid, []string{"one", "two words"}, []int{slack, slack, slack}, "given"}, c)
}

func TestTheVariableSaysThatNothingIsToBeDone(t *testing.T) {
	t.Parallel()
	own, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
	require.NoError(t, err)
	c, pid := start(t, timerslack.Variable+"=")
	require.Equal(t, child{pid, []string{"one", "two words"}, []int{own, own, own}, "given"}, c)
}
