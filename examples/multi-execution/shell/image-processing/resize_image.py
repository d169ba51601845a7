#!/usr/bin/env python3
"""Resizes a PNG image and writes it as small as PNG allows, with Python's standard library alone.

Reads JSON on stdin, writes JSON on stdout:

  in   file or image_base64   the image: PNG with 8 bits a channel, not interlaced
       width, height          of the new image, in pixels
       output_file            where to write it, below the working directory; else it comes as image_base64
  out  width, height, original_width, original_height, original_size, new_size (bytes),
       image_base64 or output_file
"""
import base64
import json
import pathlib
import struct
import sys
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
MAX_SIDE = 2048
MAX_PIXELS = 4_000_000


def below(name):
    """A path below the working directory; anything else is refused."""
    here = pathlib.Path.cwd().resolve()
    path = (here / name).resolve()
    if here not in path.parents:
        sys.exit(f"{name!r} is not below the working directory")
    return path


def chunks(data):
    if not data.startswith(SIGNATURE):
        sys.exit("the image is not a PNG")
    at = len(SIGNATURE)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        if len(body) != length or at + 12 + length > len(data):
            break
        (crc,) = struct.unpack_from(">I", data, at + 8 + length)
        if crc != zlib.crc32(kind + body):
            sys.exit("the image is damaged: a checksum is wrong")
        yield kind, body
        at += 12 + length


def paeth(left, up, corner):
    estimate = left + up - corner
    by_left, by_up, by_corner = abs(estimate - left), abs(estimate - up), abs(estimate - corner)
    if by_left <= by_up and by_left <= by_corner:
        return left
    return up if by_up <= by_corner else corner


def unfilter(kind, line, before, step):
    for i in range(len(line)):
        left = line[i - step] if i >= step else 0
        up = before[i]
        corner = before[i - step] if i >= step else 0
        if kind == 1:
            line[i] = (line[i] + left) & 255
        elif kind == 2:
            line[i] = (line[i] + up) & 255
        elif kind == 3:
            line[i] = (line[i] + (left + up) // 2) & 255
        elif kind == 4:
            line[i] = (line[i] + paeth(left, up, corner)) & 255
        elif kind != 0:
            sys.exit("the image is damaged: an unknown filter")


def decode(data):
    """Gives width, height and rows of RGBA bytes."""
    width = height = depth = colour = interlace = None
    palette, alpha, packed = b"", b"", b""
    for kind, body in chunks(data):
        if kind == b"IHDR" and len(body) == 13:
            width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", body)
        elif kind == b"PLTE":
            palette = body
        elif kind == b"tRNS":
            alpha = body
        elif kind == b"IDAT":
            packed += body
    if width is None or depth != 8 or colour not in CHANNELS or interlace:
        sys.exit("the image must be a PNG with 8 bits a channel that is not interlaced")
    if not 0 < width * height <= MAX_PIXELS:
        sys.exit(f"the image must have 1 to {MAX_PIXELS} pixels")
    step = CHANNELS[colour]
    stride = width * step
    wanted = (stride + 1) * height
    # A small file may unpack to gigabytes: no more is unpacked than the image has.
    raw = zlib.decompressobj().decompress(packed, wanted)
    if len(raw) != wanted:
        sys.exit("the image is damaged: pixels are missing")
    rows, before = [], bytearray(stride)
    for y in range(height):
        start = y * (stride + 1)
        line = bytearray(raw[start + 1 : start + 1 + stride])
        unfilter(raw[start], line, before, step)
        rows.append(rgba(line, colour, palette, alpha))
        before = line
    return width, height, rows


def rgba(line, colour, palette, alpha):
    if colour == 6:
        return bytes(line)
    out = bytearray()
    step = CHANNELS[colour]
    for i in range(0, len(line), step):
        if colour == 0:
            out += bytes((line[i], line[i], line[i], 255))
        elif colour == 4:
            out += bytes((line[i], line[i], line[i], line[i + 1]))
        elif colour == 2:
            out += bytes((line[i], line[i + 1], line[i + 2], 255))
        else:
            p = line[i]
            if 3 * p + 3 > len(palette):
                sys.exit("the image is damaged: a colour is missing")
            out += palette[3 * p : 3 * p + 3] + bytes((alpha[p] if p < len(alpha) else 255,))
    return bytes(out)


def spans(old, new):
    """The old pixels that each new one covers."""
    return [(i * old // new, max((i + 1) * old // new, i * old // new + 1)) for i in range(new)]


def scale(width, height, rows, new_width, new_height):
    """Takes the mean of the pixels that fall together, weighted by how opaque they are."""
    columns = spans(width, new_width)
    out = []
    for y0, y1 in spans(height, new_height):
        line = bytearray()
        for x0, x1 in columns:
            red = green = blue = opaque = 0
            for row in rows[y0:y1]:
                for i in range(4 * x0, 4 * x1, 4):
                    a = row[i + 3]
                    red += row[i] * a
                    green += row[i + 1] * a
                    blue += row[i + 2] * a
                    opaque += a
            count = (y1 - y0) * (x1 - x0)
            if opaque:
                line += bytes(((red + opaque // 2) // opaque, (green + opaque // 2) // opaque, (blue + opaque // 2) // opaque))
            else:
                line += b"\0\0\0"
            line.append((opaque + count // 2) // count)
        out.append(bytes(line))
    return out


def encode(width, height, rows):
    """Writes a PNG, without the alpha channel where nothing is transparent, each row with the filter that suits it."""
    opaque = all(row[i] == 255 for row in rows for i in range(3, len(row), 4))
    step = 3 if opaque else 4
    raw, before = bytearray(), bytes(width * step)
    for row in rows:
        if opaque:
            row = b"".join(row[i : i + 3] for i in range(0, len(row), 4))
        best = min((filtered(kind, row, before, step) for kind in range(5)), key=weight)
        raw += best
        before = row

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2 if opaque else 6, 0, 0, 0)
    return SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(raw), 9)) + chunk(b"IEND", b"")


def filtered(kind, row, before, step):
    out = bytearray((kind,))
    for i, value in enumerate(row):
        left = row[i - step] if i >= step else 0
        up = before[i]
        corner = before[i - step] if i >= step else 0
        guess = (0, left, up, (left + up) // 2, paeth(left, up, corner))[kind]
        out.append((value - guess) & 255)
    return out


def weight(line):
    return sum(min(v, 256 - v) for v in line[1:])


def main():
    job = json.load(sys.stdin)
    new_width, new_height = job["width"], job["height"]
    if not (1 <= new_width <= MAX_SIDE and 1 <= new_height <= MAX_SIDE):
        sys.exit(f"width and height must be 1 to {MAX_SIDE}")
    if job.get("image_base64"):
        original = base64.b64decode(job["image_base64"], validate=True)
    elif job.get("file"):
        path = below(job["file"])
        if not path.is_file():
            sys.exit(f"there is no file {job['file']!r} in the working directory")
        original = path.read_bytes()
    else:
        sys.exit("give file or image_base64")
    width, height, rows = decode(original)
    small = encode(new_width, new_height, scale(width, height, rows, new_width, new_height))
    print(f"{width}x{height}, {len(original)} bytes -> {new_width}x{new_height}, {len(small)} bytes", file=sys.stderr)
    result = {
        "width": new_width,
        "height": new_height,
        "original_width": width,
        "original_height": height,
        "original_size": len(original),
        "new_size": len(small),
    }
    if job.get("output_file"):
        below(job["output_file"]).write_bytes(small)
        result["output_file"] = job["output_file"]
    else:
        result["image_base64"] = base64.b64encode(small).decode()
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
