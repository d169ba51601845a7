// Command lambda-resize is a Lambda function on aws-lambda-go: it resizes pictures.
//
// It is started by the Lambda service, or by lambda-endpoint in tests.
package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"image"
	"image/color"
	_ "image/gif"
	_ "image/jpeg"
	"image/png"
	"log"
	"os"
	"strings"
	"time"

	"github.com/aws/aws-lambda-go/lambda"
	"github.com/aws/aws-lambda-go/lambdacontext"
)

// Request asks for a picture in a size, in pixels.
type Request struct {
	// ImageURL is a data: URL. Any other URL, and none, stands for a picture that the function makes.
	ImageURL string `json:"image_url"`
	// ImageBase64 is the picture itself, in place of ImageURL.
	ImageBase64 string `json:"image_base64"`
	Width       int    `json:"width"`
	Height      int    `json:"height"`
	// Simulate makes the function misbehave: panic, exit, sleep (10 s), memory (64 MiB more).
	Simulate string `json:"simulate"`
}

// Response holds the picture as a data: URL, and sizes in bytes.
type Response struct {
	ResizedURL     string `json:"resized_url"`
	OriginalSize   int    `json:"original_size"`
	NewSize        int    `json:"new_size"`
	Width          int    `json:"width"`
	Height         int    `json:"height"`
	IdempotencyKey string `json:"idempotency_key,omitempty"`
	Operation      string `json:"operation,omitempty"`
}

const maxSide = 4096

func main() {
	log.SetFlags(0)
	lambda.Start(resize)
}

func resize(ctx context.Context, in Request) (*Response, error) {
	custom := map[string]string{}
	if lc, ok := lambdacontext.FromContext(ctx); ok {
		custom = lc.ClientContext.Custom
	}
	log.Printf("resize to %dx%d idempotency_key=%s traceparent=%s", in.Width, in.Height, custom["idempotency_key"], custom["traceparent"])
	if err := simulate(ctx, in.Simulate); err != nil {
		return nil, err
	}
	if in.Width < 1 || in.Height < 1 || in.Width > maxSide || in.Height > maxSide {
		return nil, fmt.Errorf("width and height must be 1 to %d pixels, got %dx%d", maxSide, in.Width, in.Height)
	}
	original, err := source(in)
	if err != nil {
		return nil, err
	}
	picture, _, err := image.Decode(bytes.NewReader(original))
	if err != nil {
		return nil, fmt.Errorf("decode the picture: %w", err)
	}
	var out bytes.Buffer
	if err := png.Encode(&out, scale(picture, in.Width, in.Height)); err != nil {
		return nil, fmt.Errorf("encode the picture: %w", err)
	}
	return &Response{
		ResizedURL:   "data:image/png;base64," + base64.StdEncoding.EncodeToString(out.Bytes()),
		OriginalSize: len(original), NewSize: out.Len(), Width: in.Width, Height: in.Height,
		IdempotencyKey: custom["idempotency_key"], Operation: custom["operation"],
	}, nil
}

var ballast []byte

func simulate(ctx context.Context, what string) error {
	switch what {
	case "":
	case "panic":
		panic("asked to panic")
	case "exit":
		os.Exit(3)
	case "sleep":
		select {
		case <-ctx.Done():
			// Lambda ends the function at its deadline whatever it does: so does this.
			select {}
		case <-time.After(10 * time.Second):
		}
	case "memory":
		ballast = bytes.Repeat([]byte("x"), 64<<20)
	default:
		return fmt.Errorf("simulate: %q is unknown", what)
	}
	return nil
}

func source(in Request) ([]byte, error) {
	text := in.ImageBase64
	if text == "" {
		if data, ok := strings.CutPrefix(in.ImageURL, "data:"); ok {
			_, encoded, found := strings.Cut(data, ";base64,")
			if !found {
				return nil, errors.New("image_url is a data: URL without base64")
			}
			text = encoded
		}
	}
	if text == "" {
		return made()
	}
	raw, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return nil, fmt.Errorf("the picture is not base64: %w", err)
	}
	return raw, nil
}

// made is a picture with two gradients.
func made() ([]byte, error) {
	m := image.NewRGBA(image.Rect(0, 0, 256, 256))
	for y := range 256 {
		for x := range 256 {
			m.Set(x, y, color.RGBA{R: uint8(x), G: uint8(y), B: uint8(x ^ y), A: 255})
		}
	}
	var b bytes.Buffer
	if err := png.Encode(&b, m); err != nil {
		return nil, fmt.Errorf("encode the picture: %w", err)
	}
	return b.Bytes(), nil
}

// scale averages the pixels of the source that each new pixel covers.
func scale(src image.Image, width, height int) image.Image {
	b := src.Bounds()
	dst := image.NewRGBA64(image.Rect(0, 0, width, height))
	for y := range height {
		y0, y1 := span(y, height, b.Dy())
		for x := range width {
			x0, x1 := span(x, width, b.Dx())
			var r, g, bl, a, n uint64
			for sy := y0; sy < y1; sy++ {
				for sx := x0; sx < x1; sx++ {
					pr, pg, pb, pa := src.At(b.Min.X+sx, b.Min.Y+sy).RGBA()
					r, g, bl, a, n = r+uint64(pr), g+uint64(pg), bl+uint64(pb), a+uint64(pa), n+1
				}
			}
			dst.SetRGBA64(x, y, color.RGBA64{R: uint16(r / n), G: uint16(g / n), B: uint16(bl / n), A: uint16(a / n)})
		}
	}
	return dst
}

func span(i, n, size int) (from, to int) {
	from = i * size / n
	return from, max((i+1)*size/n, from+1)
}
