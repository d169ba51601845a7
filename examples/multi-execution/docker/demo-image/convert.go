package main

import (
	"encoding/base64"
	"errors"
	"fmt"
	"html"
	"io"
	"regexp"
	"strings"
	"unicode/utf8"
)

type convertJob struct {
	// Text is the document, or DocumentBase64 is.
	Text           string `json:"text"`
	DocumentBase64 string `json:"document_base64"`
	// From is txt or md, To is html; LibreOffice knows more.
	From string `json:"from"`
	To   string `json:"to"`
}

type converted struct {
	DocumentBase64 string `json:"document_base64"`
	Bytes          int    `json:"bytes"`
	From           string `json:"from"`
	To             string `json:"to"`
	MediaType      string `json:"media_type"`
}

func convert(job convertJob, progress io.Writer) (any, error) {
	text := job.Text
	if text == "" {
		raw, err := decode("document_base64", job.DocumentBase64)
		if err != nil {
			return nil, errors.New("give text or document_base64")
		}
		text = string(raw)
	}
	if !utf8.ValidString(text) {
		return nil, errors.New("the document is not text in UTF-8")
	}
	if job.To != "html" || job.From != "txt" && job.From != "md" {
		return nil, fmt.Errorf("%q to %q needs LibreOffice: build docker/document-conversion; here there is txt and md to html", job.From, job.To)
	}
	var body string
	if job.From == "md" {
		body = markdown(text)
	} else {
		body = plain(text)
	}
	page := "<!doctype html>\n<html>\n<head><meta charset=\"utf-8\"></head>\n<body>\n" + body + "</body>\n</html>\n"
	_, _ = fmt.Fprintf(progress, "%s of %d bytes -> html of %d bytes\n", job.From, len(text), len(page))
	return converted{
		DocumentBase64: base64.StdEncoding.EncodeToString([]byte(page)), Bytes: len(page), From: job.From, To: job.To, MediaType: "text/html",
	}, nil
}

// plain makes a paragraph of what stands between empty lines.
func plain(text string) string {
	var out strings.Builder
	for paragraph := range strings.SplitSeq(strings.ReplaceAll(text, "\r\n", "\n"), "\n\n") {
		if paragraph = strings.TrimSpace(paragraph); paragraph != "" {
			out.WriteString("<p>" + html.EscapeString(paragraph) + "</p>\n")
		}
	}
	return out.String()
}

// markdown knows headings, lists, paragraphs, code blocks, and in lines **bold**, *italic* and `code`.
func markdown(text string) string {
	m := &markdownWriter{}
	for line := range strings.SplitSeq(strings.ReplaceAll(text, "\r\n", "\n"), "\n") {
		m.line(line)
	}
	m.close()
	return m.out.String()
}

// markdownWriter keeps which block is open: p, ul or pre.
type markdownWriter struct {
	out  strings.Builder
	open string
}

func (m *markdownWriter) close() {
	if m.open == "pre" {
		m.out.WriteString("</code></pre>\n")
	} else if m.open != "" {
		m.out.WriteString("</" + m.open + ">\n")
	}
	m.open = ""
}

func (m *markdownWriter) begin(block, tag string) {
	if m.open != block {
		m.close()
		m.out.WriteString(tag)
		m.open = block
	}
}

func (m *markdownWriter) line(line string) {
	fence := strings.HasPrefix(line, "```")
	trimmed := strings.TrimSpace(line)
	level := len(trimmed) - len(strings.TrimLeft(trimmed, "#"))
	switch {
	case fence && m.open == "pre":
		m.close()
	case fence:
		m.begin("pre", "<pre><code>")
	case m.open == "pre":
		m.out.WriteString(html.EscapeString(line) + "\n")
	case trimmed == "":
		m.close()
	case level >= 1 && level <= 6 && strings.HasPrefix(trimmed[level:], " "):
		m.close()
		_, _ = fmt.Fprintf(&m.out, "<h%d>%s</h%d>\n", level, inline(strings.TrimSpace(trimmed[level:])), level)
	case strings.HasPrefix(trimmed, "- ") || strings.HasPrefix(trimmed, "* "):
		m.begin("ul", "<ul>\n")
		m.out.WriteString("<li>" + inline(trimmed[2:]) + "</li>\n")
	case m.open == "p":
		m.out.WriteString("\n" + inline(trimmed))
	default:
		m.begin("p", "<p>")
		m.out.WriteString(inline(trimmed))
	}
}

// inline escapes a line and puts tags for pairs of marks.
func inline(text string) string {
	text = html.EscapeString(text)
	for _, mark := range []struct{ pattern, tag string }{
		{"`([^`]+)`", "code"},
		{`\*\*([^\s*](?:[^*]*[^\s*])?)\*\*`, "strong"},
		{`\*([^\s*](?:[^*]*[^\s*])?)\*`, "em"},
	} {
		text = regexp.MustCompile(mark.pattern).ReplaceAllString(text, "<"+mark.tag+">$1</"+mark.tag+">")
	}
	return text
}
