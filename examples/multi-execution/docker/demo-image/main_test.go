package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"image"
	"image/color"
	"image/png"
	"strings"
	"testing"
)

// do runs the program as the container does and reads its result.
func do(t *testing.T, kind string, job map[string]any) map[string]any {
	t.Helper()
	raw, err := json.Marshal(job)
	if err != nil {
		t.Fatal(err)
	}
	var out, progress bytes.Buffer
	if err := run([]string{kind}, bytes.NewReader(raw), &out, &progress); err != nil {
		t.Fatal(err)
	}
	var result map[string]any
	if err := json.Unmarshal(out.Bytes(), &result); err != nil {
		t.Fatal(err)
	}
	return result
}

func picture(t *testing.T, at func(x, y int) color.Color) string {
	t.Helper()
	img := image.NewRGBA(image.Rect(0, 0, 32, 24))
	for y := range 24 {
		for x := range 32 {
			img.Set(x, y, at(x, y))
		}
	}
	var b bytes.Buffer
	if err := png.Encode(&b, img); err != nil {
		t.Fatal(err)
	}
	return base64.StdEncoding.EncodeToString(b.Bytes())
}

func TestClassify(t *testing.T) {
	for want, at := range map[string]func(x, y int) color.Color{
		"night":  func(_, _ int) color.Color { return color.RGBA{R: 10, G: 12, B: 40, A: 255} },
		"snow":   func(_, _ int) color.Color { return color.RGBA{R: 230, G: 235, B: 245, A: 255} },
		"sunset": func(_, y int) color.Color { return color.RGBA{R: uint8(230 - 4*y), G: uint8(150 - 4*y), B: 70, A: 255} },
	} {
		result := do(t, "classify", map[string]any{"image_base64": picture(t, at)})
		if result["label"] != want {
			t.Errorf("label %v, want %s: %v", result["label"], want, result["scores"])
		}
		sum := 0.0
		for _, score := range result["scores"].(map[string]any) {
			sum += score.(float64)
		}
		if sum < 0.999 || sum > 1.001 {
			t.Errorf("the scores of %s add up to %v", want, sum)
		}
	}
}

func TestTranscode(t *testing.T) {
	// A frame of four by four pixels in colour: its brightness, then two planes of two by two.
	frame := "FRAME\n" + strings.Repeat("\x00\x00\x80\x80", 4) + strings.Repeat("\x40", 4) + strings.Repeat("\xc0", 4)
	video := "YUV4MPEG2 W4 H4 F25:1 Ip C420jpeg\n" + frame + frame
	result := do(t, "transcode", map[string]any{"video_base64": base64.StdEncoding.EncodeToString([]byte(video)), "width": 2, "height": 2})
	raw, err := base64.StdEncoding.DecodeString(result["video_base64"].(string))
	if err != nil {
		t.Fatal(err)
	}
	small := "FRAME\n\x00\x80\x00\x80\x40\xc0"
	if want := "YUV4MPEG2 W2 H2 F25:1 Ip C420jpeg\n" + small + small; string(raw) != want {
		t.Errorf("got %q, want %q", raw, want)
	}
	if result["frames"] != 2.0 {
		t.Errorf("%v frames", result["frames"])
	}
}

func TestConvertEscapes(t *testing.T) {
	result := do(t, "convert", map[string]any{"text": "# A *b* & c\n\n- `<x>`\n- two\n\n```\n**raw** <y>\n```\na ** b", "from": "md", "to": "html"})
	raw, err := base64.StdEncoding.DecodeString(result["document_base64"].(string))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"<h1>A <em>b</em> &amp; c</h1>", "<ul>\n<li><code>&lt;x&gt;</code></li>\n<li>two</li>\n</ul>",
		"<pre><code>**raw** &lt;y&gt;\n</code></pre>", "<p>a ** b</p>",
	} {
		if !strings.Contains(string(raw), want) {
			t.Errorf("no %q in\n%s", want, raw)
		}
	}
}

func TestBadJobsAreRefused(t *testing.T) {
	huge := base64.StdEncoding.EncodeToString([]byte("YUV4MPEG2 W4 H4\nFRAME\n0123456789abcdef"))
	for _, c := range [][2]string{
		{"classify", `{}`},
		{"classify", `{"image_base64": "!"}`},
		{"classify", `{"image_base64": "aGVsbG8="}`},
		{"classify", `[]`},
		{"transcode", `{"video_base64": "aGVsbG8=", "width": 2, "height": 2}`},
		{"transcode", `{"video_base64": "` + huge + `", "width": 2, "height": 2}`}, // no colour planes
		{"transcode", `{"video_base64": "` + huge + `", "width": 1000000, "height": 2}`},
		{"transcode", `{"video_base64": "` + huge + `", "width": 2, "height": 2, "format": "mp4"}`},
		{"convert", `{"text": "a", "from": "docx", "to": "pdf"}`},
		{"convert", `{"from": "md", "to": "html"}`},
		{"dance", `{}`},
	} {
		var out, progress bytes.Buffer
		if err := run([]string{c[0]}, strings.NewReader(c[1]), &out, &progress); err == nil {
			t.Errorf("%s %s was done: %s", c[0], c[1], out.String())
		}
	}
}

func FuzzJobs(f *testing.F) {
	f.Add("transcode", `{"video_base64": "WVVWNE1QRUcyIFcyIEgyIEMKRlJBTUU=", "width": 2, "height": 2}`)
	f.Add("classify", `{"image_base64": "iVBORw0KGgo="}`)
	f.Add("convert", `{"text": "**a", "from": "md", "to": "html"}`)
	f.Fuzz(func(_ *testing.T, kind, job string) {
		var out, progress bytes.Buffer
		_ = run([]string{kind}, strings.NewReader(job), &out, &progress) // that it does not panic
	})
}
