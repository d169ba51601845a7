package sandbox

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxMessage bounds a message: arguments, environment and paths.
const maxMessage = 16 << 20

// maxFiles is what the kernel passes in one message.
const maxFiles = 253

// ahead is what a launcher with name spaces gets first: the files through which its thread joins
// control groups.
type ahead struct {
	Groups int `json:"groups"`
}

// spec is a job as its launcher gets it. Descriptors come in the order: standard input, output
// and error, the control groups' files, the mounts that have one.
type spec struct {
	Path string   `json:"path"`
	Argv []string `json:"argv"`
	Env  []string `json:"env"`
	Dir  string   `json:"dir"`

	Groups  int     `json:"groups"` // how many files of control groups come
	Mounts  []mount `json:"mounts"`
	Links   []link  `json:"links"`
	Temp    *temp   `json:"temp,omitempty"`
	Network Network `json:"network"`
	Rules   []rule  `json:"rules"`
	Limits  []Limit `json:"limits"`
	ABI     int     `json:"abi"` // of Landlock; 0 for none
	// OwnNetwork has a launcher without name spaces make one for the network.
	OwnNetwork bool `json:"own_network"`
	// NoFilter leaves system calls alone.
	NoFilter bool `json:"no_filter"`
	// NoSockets refuses all sockets but local ones, where there is no name space for the network.
	NoSockets bool `json:"no_sockets"`
}

// mount is a directory or file of the machine in the job's tree.
type mount struct {
	Target string `json:"target"`
	// Source is a path of the machine's tree, for a launcher that sees it. Empty: a descriptor comes.
	Source   string `json:"source,omitempty"`
	File     bool   `json:"file,omitempty"`
	ReadOnly bool   `json:"read_only,omitempty"`
	NoExec   bool   `json:"no_exec,omitempty"`
	// Empty is a directory with nothing in it, on top of whatever was there.
	Empty bool `json:"empty,omitempty"`
}

// link is a symbolic link in the job's tree.
type link struct {
	At     string `json:"at"`
	Target string `json:"target"`
}

// temp is the job's place for temporary files: /tmp, /dev/shm and Home lie in it.
type temp struct {
	Home string `json:"home"`
	// Bytes is its size; 0 where a descriptor or Source gives a directory of the machine.
	Bytes  int64  `json:"bytes"`
	Source string `json:"source,omitempty"`
}

// rule is a Landlock rule.
type rule struct {
	Path   string `json:"path"`
	Access uint64 `json:"access"`
}

// Limit is a resource limit of the process.
type Limit struct {
	Which int    `json:"which"`
	Soft  uint64 `json:"soft"`
	Hard  uint64 `json:"hard"`
}

// reply is what a launcher says: that it is ready, that the program started or why not, and how
// the program ended.
type reply struct {
	// Ready is a launcher's word that it waits for a job, PID a stage's that it has started one.
	Ready bool          `json:"ready,omitempty"`
	PID   int           `json:"pid,omitempty"`
	Err   string        `json:"err,omitempty"`
	Errno syscall.Errno `json:"errno,omitempty"`
	Ended *ended        `json:"ended,omitempty"`
	// OwnPeak is the launcher's largest memory, in KiB.
	OwnPeak int64 `json:"own_peak,omitempty"`
}

type ended struct {
	Status   uint32 `json:"status"`
	Utime    int64  `json:"utime"` // nanoseconds
	Stime    int64  `json:"stime"`
	MaxRSS   int64  `json:"max_rss"`
	Inblock  int64  `json:"inblock"`
	Oublock  int64  `json:"oublock"`
	TempUsed int64  `json:"temp_used"` // bytes, where the place has a size
}

// send writes a message with descriptors to a stream socket.
func send(socket int, message any, files []int) error {
	body, err := json.Marshal(message)
	if err != nil {
		return fmt.Errorf("encode: %w", err)
	}
	if len(body) > maxMessage || len(files) > maxFiles {
		return errors.New("the job's description is too large")
	}
	data := append(binary.LittleEndian.AppendUint32(nil, uint32(len(body))), body...) //nolint:gosec // bounded above
	var rights []byte
	if len(files) > 0 {
		rights = unix.UnixRights(files...)
	}
	for len(data) > 0 {
		n, err := unix.SendmsgN(socket, data, rights, nil, unix.MSG_NOSIGNAL)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("send: %w", err)
		}
		data, rights = data[n:], nil
	}
	return nil
}

// receive reads a message and the descriptors that come with its beginning.
func receive(socket int, message any) ([]int, error) {
	var head [4]byte
	control := make([]byte, unix.CmsgSpace(4*maxFiles))
	var files []int
	got := 0
	for got < len(head) {
		n, controlN, _, _, err := unix.Recvmsg(socket, head[got:], control, unix.MSG_CMSG_CLOEXEC)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("receive: %w", err)
		}
		if n == 0 {
			return nil, io.EOF
		}
		got += n
		if controlN > 0 {
			messages, err := unix.ParseSocketControlMessage(control[:controlN])
			if err != nil {
				return nil, fmt.Errorf("receive: %w", err)
			}
			for i := range messages {
				fds, err := unix.ParseUnixRights(&messages[i])
				if err != nil {
					return nil, fmt.Errorf("receive: %w", err)
				}
				files = append(files, fds...)
			}
		}
	}
	size := binary.LittleEndian.Uint32(head[:])
	if size > maxMessage {
		return nil, errors.New("receive: the message is too large")
	}
	body := make([]byte, size)
	for at := 0; at < len(body); {
		n, err := unix.Read(socket, body[at:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("receive: %w", err)
		}
		if n == 0 {
			return nil, io.ErrUnexpectedEOF
		}
		at += n
	}
	if err := json.Unmarshal(body, message); err != nil {
		return nil, fmt.Errorf("receive: %w", err)
	}
	return files, nil
}
