// Package timerslack lets the kernel be a little late with a process's timers.
package timerslack

import "time"

// Variable in the environment says that nothing is to be done, whatever its value is.
const Variable = "SPECQL_TIMER_SLACK"

// Services is how late the timers of a service may be: nothing that it waits for is told in smaller parts.
const Services = 500 * time.Microsecond

// Allow lets the timers of this process be up to d late, in place of the kernel's 0.05 ms. Go's runtime has a thread that looks after the others
// every 20 µs for as long as system calls take longer than that, as writes to sockets do where a receiver is on the
// same machine; these wake-ups alone are a tenth of what a busy service does. That thread is there before main is, and has the slack of what
// began it: so the program is executed anew, once, as the same process. Where that cannot be done it goes on as it is.
//
// Call it first in main. Programs that the process starts would inherit the slack: it is for those that start none.
func Allow(d time.Duration) { allow(d) }
