#!/usr/bin/env bash
# Makes a Python client from the protos, and has it start, watch and cancel runs of a `specql dev`.
set -euo pipefail
cd "$(dirname "$0")/../.."
# Debian's packages are of Debian's own Python, which need not be the first one.
python=
for candidate in ${PYTHON:-python3 /usr/bin/python3}; do
	if "$candidate" -c 'import grpc, google.protobuf' 2>/dev/null; then python=$candidate && break; fi
done
if [ -z "$python" ] || ! plugin=$(command -v grpc_python_plugin) || ! command -v protoc >/dev/null; then
	echo "test/python: protoc, its plugin for Python's gRPC, or Python's gRPC is missing. Install them with test/python/install.sh, that is" >&2
	echo "    apt-get install protobuf-compiler protobuf-compiler-grpc libprotobuf-dev python3-grpcio python3-protobuf" >&2
	exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mapfile -t protos < <(cd proto && find specql -name '*.proto' | sort)
protoc --experimental_allow_proto3_optional --plugin=protoc-gen-grpc_python="$plugin" -I proto --python_out="$work" --grpc_python_out="$work" "${protos[@]}"
go build -o "$work/specql-program" ./cmd/specql
PYTHONPATH="$work" SPECQL="$work/specql-program" "$python" test/python/client_test.py -v
