"""Makes a report of three services with `specql benchmark` and sees that a browser shows its plots."""

import html
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PATIENCE = 120  # seconds
WIDTH = 1280  # pixels
PLOTS = 3  # latency, throughput over time, latency over time
COLOURS = {"http": (0x2F, 0x6F, 0xED), "shell": (0xE8, 0x71, 0x0A), "docker": (0x12, 0xA1, 0x50)}
IMAGE = "specql/demo:local"

REGISTRY = """
services:
  - name: web
    type: api
    category: test
    runner_config: {base_url: "URL"}
    security_policy: {allow_private_networks: true}
    operations: [{name: call, input_schema: {text: string, from: string, to: string}}]
  - name: script
    type: script
    category: test
    execution_type: shell
    runner_config: {working_directory: "DIR"}
    security_policy: {allowed_commands: ["/usr/bin/cat"], resource_limits: {memory_mb: 64}}
    operations: [{name: call, command: ["/usr/bin/cat"], input_schema: {text: string, from: string, to: string}}]
  - name: container
    type: container
    category: test
    execution_type: docker
    runner_config: {image: "IMAGE"}
    security_policy: {allowed_images: ["IMAGE"], resource_limits: {memory_mb: 256}}
    operations: [{name: convert_document, command: [convert], input_schema: {text: string, from: string, to: string}}]
"""

# Put into a copy of the report, whose own policy allows no scripts: writes the boxes of the plots into the page.
MEASURE = """<script>
document.body.dataset.boxes = JSON.stringify({
  height: document.documentElement.scrollHeight, width: document.documentElement.scrollWidth,
  svg: [...document.querySelectorAll("svg")].map(e => [e.getAttribute("class") || "", ...Object.values(e.getBoundingClientRect().toJSON()).slice(0, 4)]),
  outside: [...document.querySelectorAll("svg[role=img] text")].filter(e => {
    const t = e.getBoundingClientRect(), s = e.ownerSVGElement.getBoundingClientRect();
    return t.left < s.left || t.right > s.right || t.top < s.top || t.bottom > s.bottom }).map(e => e.textContent),
});
</script>"""


class Remote(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass


class Mesh:
    """A `specql dev` on ports of its own."""

    def __init__(self, folder, *args):
        self.process = subprocess.Popen(
            [os.environ["SPECQL"], "dev", "--listen", "127.0.0.1:0", "--console", "127.0.0.1:0", "--data", os.path.join(folder, "data"), *args],
            cwd=folder, stdout=subprocess.PIPE, text=True,
        )

    def __enter__(self):
        ready = self.process.stdout.readline()
        address = re.match(r"ready api=(\S+)", ready)
        if not address:
            self.process.wait(PATIENCE)
            sys.exit("specql dev says %r" % ready)
        return address.group(1)

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def pixels(path):
    """The rows of a PNG, as bytes, and how many bytes a pixel has."""
    with open(path, "rb") as f:
        data = f.read()
    assert data[:8] == b"\x89PNG\r\n\x1a\n", "no PNG"
    place, packed = 8, b""
    while place < len(data):
        size, kind = struct.unpack(">I4s", data[place : place + 8])
        body = data[place + 8 : place + 8 + size]
        if kind == b"IHDR":
            width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", body)
            assert depth == 8 and colour in (2, 6) and not interlace, "a PNG of another kind"
            n = {2: 3, 6: 4}[colour]
        elif kind == b"IDAT":
            packed += body
        place += 12 + size
    raw, rows, above = zlib.decompress(packed), [], bytes(width * n)
    for y in range(height):
        start = y * (width * n + 1)
        kind, row = raw[start], bytearray(raw[start + 1 : start + 1 + width * n])
        for i in range(len(row)) if kind else ():
            left, up = row[i - n] if i >= n else 0, above[i]
            corner = above[i - n] if i >= n else 0
            if kind == 1:
                guess = left
            elif kind == 2:
                guess = up
            elif kind == 3:
                guess = (left + up) // 2
            else:
                p = left + up - corner
                guess = min((abs(p - left), 0, left), (abs(p - up), 1, up), (abs(p - corner), 2, corner))[2]
            row[i] = (row[i] + guess) & 255
        above = bytes(row)
        rows.append(above)
    return rows, n


def browse(*args):
    with tempfile.TemporaryDirectory() as profile:
        return subprocess.run(
            [os.environ["BROWSER"], "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--user-data-dir=" + profile, *args],
            check=True, timeout=PATIENCE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        ).stdout


def report(file):
    """Runs the benchmark that writes the report."""
    remote = ThreadingHTTPServer(("127.0.0.1", 0), Remote)
    remote.daemon_threads = True
    threading.Thread(target=remote.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["docker", "image", "inspect", IMAGE], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
            with Mesh(folder):  # on the examples, it makes their image
                pass
        registry = os.path.join(folder, "registry.yaml")
        with open(registry, "w", encoding="utf-8") as f:
            f.write(REGISTRY.replace("URL", "http://127.0.0.1:%d" % remote.server_port).replace("DIR", folder).replace("IMAGE", IMAGE))
        with Mesh(folder, "--registry", registry) as address:
            subprocess.run(
                [os.environ["SPECQL"], "benchmark", "--services", "web", "script", "container", "--address", address, "--report", file,
                 "--duration", "4s", "--concurrency", "4", "--input", json.dumps({"text": "hello", "from": "txt", "to": "html"})],
                check=True, timeout=PATIENCE,
            )
    remote.shutdown()
    remote.server_close()


def main(folder):
    page, copy, picture = (os.path.join(folder, name) for name in ("report.html", "measured.html", "report.png"))
    report(page)
    with open(page, encoding="utf-8") as f:
        text = f.read()
    assert "<script" not in text and "http://" not in text and "https://" not in text, "the report loads something"
    with open(copy, "w", encoding="utf-8") as f:
        f.write(re.sub(r"<meta http-equiv=.Content-Security-Policy[^>]*>", "", text).replace("</body>", MEASURE + "</body>"))
    dom = browse("--window-size=%d,900" % WIDTH, "--dump-dom", "file://" + copy)
    boxes = json.loads(html.unescape(re.search(r'data-boxes="([^"]*)"', dom).group(1)))
    empty = [b for b in boxes["svg"] if b[3] < 1 or b[4] < 1]
    assert not empty, "drawings without a size: %s" % empty
    assert not boxes["outside"], "text that the plots cut off: %s" % boxes["outside"]
    assert boxes["width"] <= WIDTH, "the page is %d wide" % boxes["width"]
    plots = [b for b in boxes["svg"] if "bars" not in b[0]]
    bars = len(boxes["svg"]) - len(plots)
    assert len(plots) == PLOTS and bars > 0, "%d plots and %d bars" % (len(plots), bars)

    browse("--window-size=%d,%d" % (WIDTH, boxes["height"]), "--screenshot=" + picture, "file://" + page)
    rows, n = pixels(picture)
    for i, (_, x, y, width, height) in enumerate(plots):
        seen = dict.fromkeys(COLOURS, 0)
        for row in rows[int(y) : int(y + height)]:
            part = row[int(x) * n : int(x + width) * n]
            for name, colour in COLOURS.items():
                seen[name] += sum(part[at : at + 3] == bytes(colour) for at in range(0, len(part), n))
        print("plot %d: %dx%d, pixels of the curves: %s" % (i + 1, width, height, ", ".join("%s %d" % s for s in seen.items())))
        assert min(seen.values()) >= 20, "a curve is missing"
    print("%s: %dx%d, %d plots and %d bars are in it" % (os.path.relpath(picture), WIDTH, len(rows), len(plots), bars))


if __name__ == "__main__":
    main(sys.argv[1])
