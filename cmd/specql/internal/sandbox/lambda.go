package sandbox

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"image"
	"image/color"
	_ "image/jpeg" // decodes JPEG
	"image/png"
	"io"
	"math"
	"net/http"
	"runtime"
	"strings"
	"time"
)

// newLambda answers Lambda's Invoke in its wire format. The function resizes an image.
func newLambda() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /2015-03-31/functions/{name}/invocations", invoke)
	return mux
}

const lambdaMemoryMB = 1024

func invoke(w http.ResponseWriter, r *http.Request) {
	id := newUUID()
	w.Header().Set("X-Amzn-Requestid", id)
	if !signed(r) {
		lambdaError(w, http.StatusForbidden, "MissingAuthenticationTokenException", "Missing Authentication Token")
		return
	}
	payload, err := io.ReadAll(r.Body)
	if err != nil {
		lambdaError(w, http.StatusRequestEntityTooLarge, "RequestTooLargeException", "Request must be smaller than 6291456 bytes for the InvokeFunction operation")
		return
	}
	if r.Header.Get("X-Amz-Invocation-Type") == "Event" {
		w.WriteHeader(http.StatusAccepted)
		return
	}
	start := time.Now()
	out, err := resize(payload)
	took := time.Since(start)
	w.Header().Set("X-Amz-Executed-Version", "$LATEST")
	w.Header().Set("Content-Type", "application/json")
	if r.Header.Get("X-Amz-Log-Type") == "Tail" {
		w.Header().Set("X-Amz-Log-Result", base64.StdEncoding.EncodeToString([]byte(report(id, took))))
	}
	if err != nil {
		w.Header().Set("X-Amz-Function-Error", "Unhandled")
		out = map[string]any{"errorType": "ValueError", "errorMessage": err.Error()}
	}
	_ = json.NewEncoder(w).Encode(out)
}

// report is the line with which Lambda ends a log: the time of the work, measured, billed by
// the millisecond, and the memory that the process holds.
func report(id string, took time.Duration) string {
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	ms := float64(took) / float64(time.Millisecond)
	return fmt.Sprintf("START RequestId: %s Version: $LATEST\nEND RequestId: %s\n"+
		"REPORT RequestId: %s\tDuration: %.2f ms\tBilled Duration: %d ms\tMemory Size: %d MB\tMax Memory Used: %d MB\t\n",
		id, id, id, ms, int(math.Ceil(ms)), lambdaMemoryMB, memory.Sys>>20)
}

func lambdaError(w http.ResponseWriter, status int, kind, message string) {
	w.Header().Set("X-Amzn-Errortype", kind)
	answer(w, status, map[string]any{"Type": "User", "Message": message})
}

const maxSide = 4096

// resize makes a picture smaller or larger: the one in image_base64 or in a data: URL, else one
// drawn for the purpose, since the sandbox opens no other URL.
func resize(payload []byte) (map[string]any, error) {
	var in struct {
		Image    string `json:"image_base64"`
		ImageURL string `json:"image_url"`
		Width    int    `json:"width"`
		Height   int    `json:"height"`
	}
	if err := json.Unmarshal(payload, &in); err != nil {
		return nil, fmt.Errorf("the event is not what the function takes: %w", err)
	}
	if in.Width < 1 || in.Height < 1 || in.Width > maxSide || in.Height > maxSide {
		return nil, fmt.Errorf("width and height must be 1 to %d", maxSide)
	}
	if _, data, ok := strings.Cut(in.ImageURL, ";base64,"); ok && in.Image == "" {
		in.Image = data
	}
	original, err := picture(in.Image)
	if err != nil {
		return nil, err
	}
	source, _, err := decode(original)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := png.Encode(&b, scale(source, in.Width, in.Height)); err != nil {
		return nil, err
	}
	encoded := base64.StdEncoding.EncodeToString(b.Bytes())
	return map[string]any{
		"resized_url": "data:image/png;base64," + encoded, "content_type": "image/png",
		"width": in.Width, "height": in.Height, "original_size": len(original), "new_size": b.Len(), "livemode": false,
	}, nil
}

func picture(encoded string) ([]byte, error) {
	if encoded != "" {
		raw, err := base64.StdEncoding.DecodeString(encoded)
		if err != nil {
			return nil, errors.New("the image is not base64")
		}
		return raw, nil
	}
	img := image.NewRGBA(image.Rect(0, 0, 640, 480))
	for y := range 480 {
		for x := range 640 {
			img.Set(x, y, color.RGBA{R: uint8(x * 255 / 640), G: uint8(y * 255 / 480), B: uint8((x ^ y) & 255), A: 255})
		}
	}
	var b bytes.Buffer
	err := png.Encode(&b, img)
	return b.Bytes(), err
}

func decode(raw []byte) (image.Image, string, error) {
	// The size is checked before the pixels are: a small file may unfold to gigabytes.
	c, _, err := image.DecodeConfig(bytes.NewReader(raw))
	if err != nil {
		return nil, "", fmt.Errorf("image: %w", err)
	}
	if c.Width > maxSide || c.Height > maxSide {
		return nil, "", fmt.Errorf("image: larger than %d by %d", maxSide, maxSide)
	}
	return image.Decode(bytes.NewReader(raw))
}

// scale takes the mean of the pixels that fall together.
func scale(src image.Image, width, height int) image.Image {
	b := src.Bounds()
	out := image.NewRGBA(image.Rect(0, 0, width, height))
	for y := range height {
		y0, y1 := b.Min.Y+y*b.Dy()/height, b.Min.Y+(y+1)*b.Dy()/height
		for x := range width {
			x0, x1 := b.Min.X+x*b.Dx()/width, b.Min.X+(x+1)*b.Dx()/width
			out.Set(x, y, mean(src, x0, y0, max(x1, x0+1), max(y1, y0+1)))
		}
	}
	return out
}

func mean(src image.Image, x0, y0, x1, y1 int) color.Color {
	var r, g, b, a, n uint64
	for y := y0; y < y1; y++ {
		for x := x0; x < x1; x++ {
			pr, pg, pb, pa := src.At(x, y).RGBA()
			r, g, b, a, n = r+uint64(pr), g+uint64(pg), b+uint64(pb), a+uint64(pa), n+1
		}
	}
	return color.RGBA64{R: uint16(r / n), G: uint16(g / n), B: uint16(b / n), A: uint16(a / n)} //nolint:gosec // a mean of 16 bits fits
}

func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
