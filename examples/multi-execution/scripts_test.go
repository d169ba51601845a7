package multiexecution_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"image"
	"image/color"
	"image/png"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// script runs a script as the shell runner does: in its folder, the job on standard input.
func script(t *testing.T, folder, name string, job map[string]any) (result map[string]any, failure string) {
	t.Helper()
	in, err := json.Marshal(job)
	if err != nil {
		t.Fatal(err)
	}
	path, err := filepath.Abs(filepath.Join("shell", filepath.Base(folder), name))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "python3", path)
	cmd.Dir, cmd.Env, cmd.Stdin = folder, []string{"PATH=" + os.Getenv("PATH"), "PYTHONDONTWRITEBYTECODE=1"}, bytes.NewReader(in)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		if strings.Contains(errs.String(), "Traceback") {
			t.Errorf("%s fell over: %s", name, errs.String())
		}
		return nil, errs.String()
	}
	if err := json.Unmarshal(out.Bytes(), &result); err != nil {
		t.Fatalf("%s: %s: %v", name, out.String(), err)
	}
	return result, ""
}

// folder is an empty working folder named as the one of the examples.
func folder(t *testing.T, name string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), name)
	if err := os.Mkdir(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	return dir
}

func write(t *testing.T, dir, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestProcessCSV(t *testing.T) {
	dir := folder(t, "data-processing")
	write(t, dir, "in.csv", "\ufefforder_id,region,amount\n1,a,1.50\n2,b,\"2,000.25\"\n2,b,7\n3,a,NaN\n4,a,1.005\n5,a,-1\n6,a\n")
	write(t, dir, "empty.csv", "")
	result, failure := script(t, dir, "process_csv.py", map[string]any{"file": "in.csv", "output_file": "out.csv"})
	if failure != "" {
		t.Fatal(failure)
	}
	for name, want := range map[string]float64{"rows_read": 7, "rows_valid": 2, "rows_rejected": 5, "total_cents": 200175, "largest_cents": 200025} {
		if result[name] != want {
			t.Errorf("%s is %v, want %v", name, result[name], want)
		}
	}
	clean, err := os.ReadFile(filepath.Join(dir, "out.csv"))
	if want := "order_id,region,amount\r\n1,a,1.50\r\n2,b,\"2,000.25\"\r\n"; err != nil || string(clean) != want {
		t.Errorf("%v, the clean rows are %q", err, clean)
	}
	for _, job := range []map[string]any{
		{"file": "/etc/passwd"},
		{"file": "../../etc/passwd"},
		{"file": "none.csv"},
		{"file": "empty.csv"},
		{"file": "in.csv", "group_by": "country"},
		{"file": "in.csv", "output_file": "../out.csv"},
	} {
		if result, failure := script(t, dir, "process_csv.py", job); failure == "" {
			t.Errorf("%v was done: %v", job, result)
		}
	}
}

func TestResizeImage(t *testing.T) {
	dir := folder(t, "image-processing")
	rgba := image.NewNRGBA(image.Rect(0, 0, 8, 8))
	gray := image.NewGray(rgba.Rect)
	palette := image.NewPaletted(rgba.Rect, color.Palette{color.NRGBA{R: 200, A: 255}, color.NRGBA{B: 200, A: 255}})
	for y := range 8 {
		for x := range 8 {
			rgba.SetNRGBA(x, y, color.NRGBA{R: uint8(x / 4 * 200), G: uint8(y / 4 * 100), B: 7, A: uint8(255 - 100*(x/4))})
			gray.SetGray(x, y, color.Gray{Y: uint8(y / 4 * 250)})
			palette.SetColorIndex(x, y, uint8(x/4))
		}
	}
	for name, img := range map[string]image.Image{"rgba": rgba, "gray": gray, "palette": palette} {
		var b bytes.Buffer
		if err := png.Encode(&b, img); err != nil {
			t.Fatal(err)
		}
		job := map[string]any{"image_base64": base64.StdEncoding.EncodeToString(b.Bytes()), "width": 2, "height": 2}
		result, failure := script(t, dir, "resize_image.py", job)
		if name == "palette" && strings.Contains(failure, "8 bits") { // Go packs two colours into one bit
			continue
		}
		if failure != "" {
			t.Errorf("%s: %s", name, failure)
			continue
		}
		raw, err := base64.StdEncoding.DecodeString(result["image_base64"].(string))
		if err != nil {
			t.Fatal(err)
		}
		small, err := png.Decode(bytes.NewReader(raw))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for y := range 2 {
			for x := range 2 {
				want, got := color.NRGBAModel.Convert(img.At(4*x, 4*y)), color.NRGBAModel.Convert(small.At(x, y))
				if want != got {
					t.Errorf("%s at %d,%d: %v, want %v", name, x, y, got, want)
				}
			}
		}
	}
	// A header that promises far more pixels than there are.
	var b bytes.Buffer
	if err := png.Encode(&b, gray); err != nil {
		t.Fatal(err)
	}
	for _, job := range []map[string]any{
		{"image_base64": "aGVsbG8=", "width": 2, "height": 2},
		{"image_base64": base64.StdEncoding.EncodeToString(b.Bytes()[:40]), "width": 2, "height": 2},
		{"image_base64": base64.StdEncoding.EncodeToString(b.Bytes()), "width": 99999, "height": 2},
		{"file": "../../x.png", "width": 2, "height": 2},
		{"width": 2, "height": 2},
	} {
		if result, failure := script(t, dir, "resize_image.py", job); failure == "" {
			t.Errorf("%v was done: %v", job, result)
		}
	}
}

var startxref = regexp.MustCompile(`startxref\n(\d+)\n%%EOF\n$`)

func TestGeneratePDF(t *testing.T) {
	dir := folder(t, "report-generation")
	rows := make([]map[string]any, 100)
	for i := range rows {
		rows[i] = map[string]any{"name": "(a) \\ Ünïcode 漢", "sum": i, "paid": i%2 == 0, "note": nil}
	}
	result, failure := script(t, dir, "generate_pdf.py", map[string]any{"title": "Sales (all)", "rows": rows})
	if failure != "" {
		t.Fatal(failure)
	}
	if result["pages"] != 3.0 {
		t.Errorf("%v pages", result["pages"])
	}
	raw, err := base64.StdEncoding.DecodeString(result["pdf_base64"].(string))
	if err != nil {
		t.Fatal(err)
	}
	// The table of objects is where the end says, and each entry of it leads to its object.
	m := startxref.FindSubmatch(raw)
	if m == nil || !bytes.HasPrefix(raw, []byte("%PDF-1.4\n")) {
		t.Fatal("not a PDF")
	}
	at, err := strconv.Atoi(string(m[1]))
	if err != nil || !bytes.HasPrefix(raw[at:], []byte("xref\n0 ")) {
		t.Fatal("no table of objects")
	}
	for i, line := range strings.Split(string(raw[at:]), "\n")[3:] {
		if !strings.HasSuffix(line, " n ") {
			break
		}
		place, err := strconv.Atoi(line[:10])
		if err != nil || !bytes.HasPrefix(raw[place:], []byte(strconv.Itoa(i+1)+" 0 obj\n")) {
			t.Errorf("object %d is not where the table says", i+1)
		}
	}
	for _, job := range []map[string]any{
		{"title": "x", "rows": []any{}},
		{"title": "x", "rows": rows, "output_file": "/tmp/x.pdf"},
	} {
		if result, failure := script(t, dir, "generate_pdf.py", job); failure == "" {
			t.Errorf("%v was done: %v", job["title"], result)
		}
	}
}
