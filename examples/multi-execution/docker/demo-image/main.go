// Command demo-image is the program of the image specql/demo:local, in which the Docker examples run on a
// developer's machine: small counterparts of TensorFlow, FFmpeg and LibreOffice that do real work on small data.
//
//	demo-image classify|transcode|convert < job.json
//
// The job is JSON on standard input, the result JSON on standard output, progress goes to standard error. Only the standard
// library is used, so that it compiles anywhere.
package main

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
)

// maxInput bounds a job, in bytes.
const maxInput = 16 << 20

func main() {
	if err := run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr); err != nil {
		_, _ = fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string, in io.Reader, out, progress io.Writer) error {
	if len(args) != 1 {
		return errors.New("usage: demo-image classify|transcode|convert < job.json")
	}
	raw, err := io.ReadAll(io.LimitReader(in, maxInput+1))
	if err != nil {
		return fmt.Errorf("read the job: %w", err)
	}
	if len(raw) > maxInput {
		return fmt.Errorf("the job is larger than %d MiB", maxInput>>20)
	}
	var result any
	switch args[0] {
	case "classify":
		result, err = work(raw, progress, classify)
	case "transcode":
		result, err = work(raw, progress, transcode)
	case "convert":
		result, err = work(raw, progress, convert)
	default:
		return fmt.Errorf("%q is none of classify, transcode, convert", args[0])
	}
	if err != nil {
		return fmt.Errorf("%s: %w", args[0], err)
	}
	return json.NewEncoder(out).Encode(result)
}

// work reads a job of one kind and does it.
func work[J any](raw []byte, progress io.Writer, do func(J, io.Writer) (any, error)) (any, error) {
	var job J
	if err := json.Unmarshal(raw, &job); err != nil {
		return nil, fmt.Errorf("the job is not what is expected: %w", err)
	}
	return do(job, progress)
}

func decode(name, text string) ([]byte, error) {
	if text == "" {
		return nil, fmt.Errorf("%s is empty", name)
	}
	raw, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return nil, fmt.Errorf("%s is not base64: %w", name, err)
	}
	return raw, nil
}
