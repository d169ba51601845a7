#!/usr/bin/env bash
# Makes the images of the services without a registry and without a Docker engine: static binaries onto nothing, as archives
# that `docker load`, `ctr images import` and `podman load` take. The shell runner's base comes from Debian's own packages.
#   deploy/docker/images.sh [NAME...]     all of: orchestrator http-runner docker-runner serverless-runner specql shell-runner
# OUT (.cache/images), VERSION (of git), REPOSITORY (specql), GOARCH, SHELL_PACKAGES (names of Debian's packages with commas), and
# BIN with binaries that were built before are taken from the environment. BASE is a root file system in a tar, in place of the shell runner's.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-.cache/images}
REPOSITORY=${REPOSITORY:-specql}
REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)
VERSION=${VERSION:-$(git describe --tags --always --dirty 2>/dev/null || echo devel)}
EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}
ARCH=${GOARCH:-$(go env GOARCH)}
USERID=65532
# What jobs of the shell runner find: Python with its whole library, and the CAs.
SHELL_PACKAGES=${SHELL_PACKAGES:-python3,ca-certificates}
ALL="orchestrator http-runner docker-runner serverless-runner specql shell-runner"
CERTIFICATES=${CERTIFICATES:-/etc/ssl/certs/ca-certificates.crt}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

packages() { # NAME: what a program is built of
  case $1 in
    specql) echo ./cmd/specql ;;
    *) echo "./services/$1" ;;
  esac
}

binaries() { # NAME DIR
  local b=$1 dir=$2 p
  if [ -n "${BIN:-}" ] && [ -x "$BIN/$b" ]; then
    cp "$BIN/$b" "$dir/$b"
    [ "$b" != docker-runner ] || [ ! -x "$BIN/shim" ] || cp "$BIN/shim" "$dir/shim"
    return
  fi
  CGO_ENABLED=0 GOOS=linux GOARCH=$ARCH go build -trimpath -ldflags "-s -w" -o "$dir/$b" "$(packages "$b")"
  if [ "$b" = docker-runner ]; then # the entry point of its Jobs on Kubernetes
    CGO_ENABLED=0 GOOS=linux GOARCH=$ARCH go build -trimpath -ldflags "-s -w" -o "$dir/shim" ./services/docker-runner/shim
  fi
}

# base is the shell runner's root file system: Debian without what is only for installing it, with Python.
base() { # DIR
  local tar=${BASE:-$OUT/base-shell-${SHELL_PACKAGES//,/-}-$ARCH.tar}
  if [ ! -e "$tar" ]; then
    command -v debootstrap >/dev/null || { echo "images.sh: the shell runner's base needs debootstrap (Debian's package), or BASE=ROOTFS.tar" >&2; exit 1; }
    echo "shell-runner: making its base (some minutes, once)" >&2
    local root=$work/base
    debootstrap --variant=minbase --include="$SHELL_PACKAGES" --arch="$(dpkg --print-architecture)" \
      "${DEBIAN_SUITE:-bookworm}" "$root" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}" >"$OUT/base-shell.log" 2>&1 ||
      { tail -5 "$OUT/base-shell.log" >&2; exit 1; }
    dpkg-query --admindir="$root/var/lib/dpkg" -W -f='${Package} ${Version} ${Architecture}\n' >"$work/packages.txt"
    mkdir -p "$root/usr/share/specql"; cp "$work/packages.txt" "$root/usr/share/specql/packages.txt"
    rm -rf "$root"/var/cache/* "$root"/var/lib/apt "$root"/var/lib/dpkg/info "$root"/var/log/* "$root"/usr/share/{doc,man,locale,info} \
      "$root"/usr/bin/{apt,apt-*,dpkg,dpkg-*,chsh,chfn,passwd,gpasswd,newgrp,su,mount,umount,chage,expiry} "$root"/dev/* "$root"/proc/* "$root"/sys/* "$root"/run/* "$root"/tmp/*
    find "$root" -xdev -type f -perm /6000 -exec chmod a-s {} +
    tar -C "$root" --numeric-owner -cf "$tar.new" . && mv "$tar.new" "$tar"
    rm -rf "$root"
  fi
  tar -C "$1" -xf "$tar"
}

label() { printf '"org.opencontainers.image.%s":"%s"' "$1" "$2"; }

image() { # NAME
  local name=$1 root=$work/$1 t=$work/$1.image file=$OUT/$1.tar
  mkdir -p "$root" "$t"
  if [ "$name" = shell-runner ]; then
    base "$root"
  else
    mkdir -p "$root"/{etc/ssl/certs,tmp}
    cp "$CERTIFICATES" "$root/etc/ssl/certs/ca-certificates.crt"
    printf 'root:x:0:0:root:/:/sbin/nologin\nnonroot:x:%s:%s:nonroot:/:/sbin/nologin\n' $USERID $USERID >"$root/etc/passwd"
    printf 'root:x:0:\nnonroot:x:%s:\n' $USERID >"$root/etc/group"
  fi
  mkdir -p "$root/tmp" "$root/usr/share/specql"; chmod 1777 "$root/tmp"
  binaries "$name" "$root"
  local list=/dev/null; [ ! -e "$root/usr/share/specql/packages.txt" ] || list=$root/usr/share/specql/packages.txt
  GOWORK=off go -C tools run ./sbom -name "$REPOSITORY/$name" -version "$VERSION" -packages "$list" "$root/$name" >"$root/usr/share/specql/sbom.cdx.json"
  cp "$root/usr/share/specql/sbom.cdx.json" "$OUT/$name.cdx.json"
  tar -C "$root" --sort=name --mtime="@$EPOCH" --owner=0 --group=0 --numeric-owner -cf "$t/layer.tar" .
  printf '{"architecture":"%s","os":"linux","created":"%s","config":{"User":"%s:%s","Entrypoint":["/%s"],"WorkingDir":"/","Env":["PATH=/usr/local/bin:/usr/bin:/bin"],"Labels":{%s,%s,%s,%s,%s,%s}},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]},"history":[{"created":"%s","created_by":"deploy/docker/images.sh"}]}' \
    "$ARCH" "$(date -u -d "@$EPOCH" +%Y-%m-%dT%H:%M:%SZ)" $USERID $USERID "$name" \
    "$(label title "specql-$name")" "$(label version "$VERSION")" "$(label revision "$REVISION")" "$(label source https://github.com/specql/mesh)" \
    "$(label licenses Apache-2.0)" "$(label created "$(date -u -d "@$EPOCH" +%Y-%m-%dT%H:%M:%SZ)")" \
    "$(sha256sum <"$t/layer.tar" | cut -d' ' -f1)" "$(date -u -d "@$EPOCH" +%Y-%m-%dT%H:%M:%SZ)" >"$t/config.json"
  printf '[{"Config":"config.json","RepoTags":["%s/%s:%s"],"Layers":["layer.tar"]}]' "$REPOSITORY" "$name" "$VERSION" >"$t/manifest.json"
  tar -C "$t" --sort=name --mtime="@$EPOCH" --owner=0 --group=0 --numeric-owner -cf "$file.new" manifest.json config.json layer.tar
  mv "$file.new" "$file"
  rm -rf "$root" "$t"
  echo "$REPOSITORY/$name:$VERSION  $(( $(stat -c %s "$file") >> 20 )) MiB  ${file#"$PWD"/}"
  if [ -n "${LOAD:-}" ]; then docker load -q -i "$file"; fi
}

for name in ${*:-$ALL}; do
  case " $ALL " in *" $name "*) image "$name" ;; *) echo "images.sh: there is no image $name; there are: $ALL" >&2; exit 2 ;; esac
done
