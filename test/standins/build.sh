#!/bin/sh
# Builds every stand-in and tool into DIR: test/standins/build.sh DIR [NAME…]
# With names only those are built (lambda-resize, stripe-mock, …).
set -eu
dir=${1:?usage: build.sh DIR [NAME...]}
shift
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
cd "$(dirname "$0")"
# Tests of several packages may build at once.
if command -v flock >/dev/null; then
	exec 9>"$dir/.lock"
	flock 9
fi
export GOWORK=off GOFLAGS="${GOFLAGS:-} -buildvcs=false"
if [ $# -eq 0 ]; then
	set -- lambda-resize lambda-endpoint gcf-analysis azure-notify stripe-mock versitygw
fi
packages=
for name in "$@"; do
	case $name in
	stripe-mock) packages="$packages github.com/stripe/stripe-mock" ;;
	versitygw) packages="$packages github.com/versity/versitygw/cmd/versitygw" ;;
	lambda-resize | lambda-endpoint | gcf-analysis | azure-notify) packages="$packages ./$name" ;;
	*)
		echo "build.sh: unknown stand-in $name" >&2
		exit 2
		;;
	esac
done
# shellcheck disable=SC2086 # one word a package
go build -trimpath -o "$dir/" $packages
