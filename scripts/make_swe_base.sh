#!/bin/sh
# Make the container image that the tests of the SWE suites build their miniature repositories on, without pulling: a
# Debian made by debootstrap, with git, Python and pytest. Does nothing when the image is there. The system is kept as
# a tar in ~/.cache/plt-eval, so that a machine makes it once.
#
#     scripts/make_swe_base.sh [IMAGE]
set -eu

image=${1:-plt-eval-swe-base:latest}
if docker image inspect "$image" >/dev/null 2>&1; then
    exit 0
fi
cache=${XDG_CACHE_HOME:-$HOME/.cache}/plt-eval
kept=$cache/swe-base-bookworm-1.tar
if [ ! -f "$kept" ]; then
    root=$(mktemp -d)
    trap 'rm -rf "$root"' EXIT
    mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
    debootstrap --variant=minbase --include=git,python3,python3-pytest,ca-certificates,procps \
        bookworm "$root" "$mirror" >"$root.log" 2>&1 || { tail -20 "$root.log"; exit 1; }
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root.log"
    mkdir -p "$cache"
    tar -C "$root" --exclude=./dev/* -cf "$kept.$$" .
    mv "$kept.$$" "$kept"
fi
docker import --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' "$kept" "$image" >/dev/null
