#!/usr/bin/env python3
"""Writes a PDF report with a table, with Python's standard library alone.

Reads JSON on stdin, writes JSON on stdout:

  in   title, subtitle (optional)
       rows          list of objects; the keys of the first are the columns
       output_file   where to write it, below the working directory; else it comes as pdf_base64
  out  pages, rows, bytes, sha256, and pdf_base64 or output_file
"""
import base64
import hashlib
import json
import pathlib
import sys
import zlib

WIDTH, HEIGHT, MARGIN = 595, 842, 56  # A4, in points
LINE = 18
MAX_ROWS = 10_000
MAX_COLUMNS = 8


def below(name):
    """A path below the working directory; anything else is refused."""
    here = pathlib.Path.cwd().resolve()
    path = (here / name).resolve()
    if here not in path.parents:
        sys.exit(f"{name!r} is not below the working directory")
    return path


def literal(text):
    """A string of a PDF, in the encoding that its standard fonts have."""
    raw = str(text).encode("cp1252", "replace")
    return b"(" + raw.replace(b"\\", b"\\\\").replace(b"(", b"\\(").replace(b")", b"\\)").replace(b"\r", b" ").replace(b"\n", b" ") + b")"


def text(x, y, size, content, bold=False):
    font = b"/F2" if bold else b"/F1"
    return b"BT %s %d Tf %d %d Td %s Tj ET\n" % (font, size, x, y, literal(content))


def line(y):
    return b"0.6 w %d %d m %d %d l S\n" % (MARGIN, y, WIDTH - MARGIN, y)


def shown(value):
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (dict, list)):
        return json.dumps(value)
    return str(value)


def label(name):
    return name.replace("_", " ").capitalize()


class Pages:
    """Lays a table out on as many pages as it takes."""

    def __init__(self, title, subtitle, columns):
        self.title, self.subtitle, self.columns = title, subtitle, columns
        self.done, self.current, self.y = [], b"", 0
        self.width = (WIDTH - 2 * MARGIN) // max(len(columns), 1)
        self.most = max(self.width // 6 - 1, 4)  # letters of a cell, in 10 point Helvetica
        self.new_page()

    def new_page(self):
        if self.current:
            self.done.append(self.current)
        self.y = HEIGHT - MARGIN - 20
        self.current = text(MARGIN, self.y, 20, self.title[:44], bold=True)
        if self.subtitle:
            self.y -= 22
            self.current += text(MARGIN, self.y, 11, self.subtitle[:90])
        self.y -= 34
        for i, name in enumerate(self.columns):
            self.current += text(MARGIN + i * self.width, self.y, 10, label(name)[: self.most], bold=True)
        self.y -= 6
        self.current += line(self.y)

    def row(self, values):
        if self.y - LINE < MARGIN + LINE:
            self.new_page()
        self.y -= LINE
        for i, value in enumerate(values):
            self.current += text(MARGIN + i * self.width, self.y, 10, shown(value)[: self.most])

    def finish(self):
        self.done.append(self.current)
        count = len(self.done)
        return [page + text(MARGIN, MARGIN - 20, 9, f"Page {i} of {count}") for i, page in enumerate(self.done, 1)]


def pdf(title, pages):
    """Puts pages together: the objects, the table of where each begins, the trailer."""
    count = len(pages)
    kids = b" ".join(b"%d 0 R" % (6 + 2 * i) for i in range(count))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Count %d /Kids [%s] >>" % (count, kids),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica-Bold /Encoding /WinAnsiEncoding >>",
        b"<< /Title %s /Producer (SpecQL example) >>" % literal(title),
    ]
    for i, page in enumerate(pages):
        packed = zlib.compress(page, 9)
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 %d %d] /Contents %d 0 R "
            b"/Resources << /Font << /F1 3 0 R /F2 4 0 R >> >> >>" % (WIDTH, HEIGHT, 7 + 2 * i)
        )
        objects.append(b"<< /Length %d /Filter /FlateDecode >>\nstream\n%s\nendstream" % (len(packed), packed))
    out, places = bytearray(b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n"), []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    for place in places:
        out += b"%010d 00000 n \n" % place
    out += b"trailer\n<< /Size %d /Root 1 0 R /Info 5 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start)
    return bytes(out)


def main():
    job = json.load(sys.stdin)
    rows = job["rows"]
    if not rows:
        sys.exit("rows is empty: there is nothing to report")
    if len(rows) > MAX_ROWS:
        sys.exit(f"more than {MAX_ROWS} rows")
    columns = list(rows[0])[:MAX_COLUMNS]
    pages = Pages(job["title"], job.get("subtitle") or "", columns)
    for row in rows:
        pages.row([row.get(name) for name in columns])
    finished = pages.finish()
    content = pdf(job["title"], finished)
    print(f"{len(rows)} rows on {len(finished)} pages, {len(content)} bytes", file=sys.stderr)
    result = {
        "pages": len(finished),
        "rows": len(rows),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    if job.get("output_file"):
        below(job["output_file"]).write_bytes(content)
        result["output_file"] = job["output_file"]
    else:
        result["pdf_base64"] = base64.b64encode(content).decode()
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
