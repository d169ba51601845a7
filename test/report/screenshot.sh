#!/usr/bin/env bash
# Has `specql benchmark` write a report of an HTTP, a shell and a Docker service, and looks at it in a browser.
# The report and its picture are left in .cache/report.
set -euo pipefail
cd "$(dirname "$0")/../.."
browser=
for candidate in "${BROWSER:-}" chromium chromium-browser google-chrome; do
	if [ -n "$candidate" ] && command -v "$candidate" >/dev/null; then browser=$candidate && break; fi
done
if [ -z "$browser" ]; then
	echo "test/report: NO BROWSER. Install one with" >&2
	echo "    apt-get install chromium" >&2
	echo "or name one that is like Chromium in BROWSER." >&2
	exit 1
fi
if ! docker version >/dev/null 2>&1; then
	echo "test/report: NO DOCKER ENGINE answers: one of the three services is a container" >&2
	exit 1
fi
mkdir -p .cache/report
go build -o .cache/report/specql ./cmd/specql
SPECQL=$PWD/.cache/report/specql BROWSER=$browser python3 test/report/screenshot.py "$PWD/.cache/report"
