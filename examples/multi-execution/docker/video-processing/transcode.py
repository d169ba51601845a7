"""Scales and re-encodes a video with FFmpeg.

    transcode.py transcode < job.json

  in   video_base64    anything that FFmpeg reads
       width, height   of the new video, in pixels
       format          y4m, mp4 or webm
  out  video_base64, frames, width, height, format, original_size, new_size (bytes)
"""
import base64
import json
import pathlib
import subprocess
import sys
import tempfile

CODECS = {
    "y4m": ["-f", "yuv4mpegpipe", "-strict", "-1"],
    "mp4": ["-f", "mp4", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-movflags", "+faststart"],
    "webm": ["-f", "webm", "-c:v", "libvpx-vp9", "-pix_fmt", "yuv420p"],
}


def transcode(job):
    form = job.get("format") or "y4m"
    if form not in CODECS:
        sys.exit(f"the format must be one of {', '.join(CODECS)}")
    width, height = int(job["width"]), int(job["height"])
    original = base64.b64decode(job["video_base64"], validate=True)
    with tempfile.TemporaryDirectory() as folder:
        source, target = pathlib.Path(folder, "in"), pathlib.Path(folder, "out")
        source.write_bytes(original)
        # Only files may be read: a playlist could name addresses and other files.
        command = ["ffmpeg", "-nostdin", "-loglevel", "error", "-protocol_whitelist", "file", "-i", str(source)]
        command += ["-vf", f"scale={width}:{height}", "-an", *CODECS[form], "-progress", "pipe:1", "-y", str(target)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
        if done.returncode:
            sys.exit(f"ffmpeg ended with {done.returncode}")
        frames = [int(line[6:]) for line in done.stdout.decode().splitlines() if line.startswith("frame=")]
        new = target.read_bytes()
    return {
        "video_base64": base64.b64encode(new).decode(),
        "frames": frames[-1] if frames else 0,
        "width": width,
        "height": height,
        "format": form,
        "original_size": len(original),
        "new_size": len(new),
    }


if __name__ == "__main__":
    if sys.argv[1:] != ["transcode"]:
        sys.exit("usage: transcode.py transcode < job.json")
    json.dump(transcode(json.load(sys.stdin)), sys.stdout)
