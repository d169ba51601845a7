package main

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

type transcodeJob struct {
	// VideoBase64 is uncompressed video in the form YUV4MPEG2 (.y4m), with 8 bits, in colour (4:2:0) or mono.
	VideoBase64 string `json:"video_base64"`
	Width       int    `json:"width"`
	Height      int    `json:"height"`
	// Format of the result; this program knows y4m alone, FFmpeg knows more.
	Format string `json:"format"`
}

type transcoded struct {
	VideoBase64    string `json:"video_base64"`
	Frames         int    `json:"frames"`
	Width          int    `json:"width"`
	Height         int    `json:"height"`
	OriginalWidth  int    `json:"original_width"`
	OriginalHeight int    `json:"original_height"`
	Format         string `json:"format"`
	OriginalSize   int    `json:"original_size"`
	NewSize        int    `json:"new_size"`
}

const (
	maxSide      = 3840
	maxNewPixels = 64 << 20 // of all frames together
)

// y4m is the header of a video: its size, the other parameters as they came, and whether it has colour.
type y4m struct {
	width, height int
	parameters    []string
	colour        bool
}

func transcode(job transcodeJob, progress io.Writer) (any, error) {
	if job.Format != "" && job.Format != "y4m" {
		return nil, fmt.Errorf("the format %q needs FFmpeg: build docker/video-processing; here there is y4m", job.Format)
	}
	if job.Width < 2 || job.Height < 2 || job.Width > maxSide || job.Height > maxSide {
		return nil, fmt.Errorf("width and height must be 2 to %d", maxSide)
	}
	raw, err := decode("video_base64", job.VideoBase64)
	if err != nil {
		return nil, err
	}
	header, rest, err := parseHeader(raw)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	_, _ = fmt.Fprintf(&out, "YUV4MPEG2 W%d H%d %s\n", job.Width, job.Height, strings.Join(header.parameters, " "))
	frames := 0
	for len(rest) > 0 {
		line, after, ok := bytes.Cut(rest, []byte("\n"))
		if !ok || !bytes.HasPrefix(line, []byte("FRAME")) {
			return nil, fmt.Errorf("frame %d: damaged", frames)
		}
		if frames++; frames*job.Width*job.Height > maxNewPixels {
			return nil, fmt.Errorf("more than %d pixels", maxNewPixels)
		}
		out.WriteString("FRAME\n")
		if rest, err = header.frame(&out, after, job.Width, job.Height); err != nil {
			return nil, fmt.Errorf("frame %d: %w", frames-1, err)
		}
	}
	_, _ = fmt.Fprintf(progress, "%d frames, %dx%d -> %dx%d\n", frames, header.width, header.height, job.Width, job.Height)
	return transcoded{
		VideoBase64: base64.StdEncoding.EncodeToString(out.Bytes()), Frames: frames, Width: job.Width, Height: job.Height,
		OriginalWidth: header.width, OriginalHeight: header.height, Format: "y4m", OriginalSize: len(raw), NewSize: out.Len(),
	}, nil
}

func parseHeader(raw []byte) (y4m, []byte, error) {
	line, rest, ok := bytes.Cut(raw, []byte("\n"))
	fields := strings.Fields(string(line))
	if !ok || len(fields) == 0 || fields[0] != "YUV4MPEG2" {
		return y4m{}, nil, errors.New("the video is not YUV4MPEG2")
	}
	h := y4m{colour: true}
	for _, field := range fields[1:] {
		var err error
		switch value := field[1:]; field[0] {
		case 'W':
			h.width, err = strconv.Atoi(value)
		case 'H':
			h.height, err = strconv.Atoi(value)
		case 'C':
			h.colour = value != "mono"
			if h.colour && (!strings.HasPrefix(value, "420") || strings.HasPrefix(value, "420p1")) {
				return y4m{}, nil, fmt.Errorf("the colour space %q is neither 420 nor mono with 8 bits", value)
			}
			h.parameters = append(h.parameters, field)
		default:
			h.parameters = append(h.parameters, field)
		}
		if err != nil {
			return y4m{}, nil, fmt.Errorf("the video's size is not a number: %w", err)
		}
	}
	if h.width < 1 || h.height < 1 || h.width > maxSide || h.height > maxSide {
		return y4m{}, nil, fmt.Errorf("the video's width and height must be 1 to %d", maxSide)
	}
	return h, rest, nil
}

// frame scales the planes of one frame and gives what follows it.
func (h y4m) frame(out *bytes.Buffer, raw []byte, width, height int) ([]byte, error) {
	planes := [][4]int{{h.width, h.height, width, height}}
	if h.colour {
		half := [4]int{(h.width + 1) / 2, (h.height + 1) / 2, (width + 1) / 2, (height + 1) / 2}
		planes = append(planes, half, half)
	}
	for _, p := range planes {
		size := p[0] * p[1]
		if len(raw) < size {
			return nil, errors.New("its end is missing")
		}
		out.Write(scale(raw[:size], p[0], p[1], p[2], p[3]))
		raw = raw[size:]
	}
	return raw, nil
}

// scale takes the mean of the samples that fall together.
func scale(plane []byte, width, height, newWidth, newHeight int) []byte {
	out := make([]byte, 0, newWidth*newHeight)
	for y := range newHeight {
		y0, y1 := span(y, height, newHeight)
		for x := range newWidth {
			x0, x1 := span(x, width, newWidth)
			sum, n := 0, (y1-y0)*(x1-x0)
			for i := y0; i < y1; i++ {
				for _, v := range plane[i*width+x0 : i*width+x1] {
					sum += int(v)
				}
			}
			out = append(out, byte((sum+n/2)/n)) //nolint:gosec // a mean of bytes is a byte
		}
	}
	return out
}

// span is the old samples that a new one covers.
func span(i, old, now int) (from, to int) {
	from = i * old / now
	return from, max((i+1)*old/now, from+1)
}
