#!/usr/bin/env bash
# Installs what the test of the Python client needs, on Debian and Ubuntu, where it is not there yet.
set -euo pipefail
packages=(protobuf-compiler protobuf-compiler-grpc libprotobuf-dev python3-grpcio python3-protobuf)
dpkg -s "${packages[@]}" >/dev/null 2>&1 && exit 0
sudo=()
[ "$(id -u)" = 0 ] || sudo=(sudo)
"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -q
"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${packages[@]}"
