#!/bin/sh
# Make the container image that the slow tests of Terminal-Bench's official runners build their tasks on, without pulling: a
# Debian made by debootstrap, with tmux, asciinema, Python and pytest. Does nothing when the image is there.
#
#     scripts/make_terminal_base.sh [IMAGE]
set -eu

image=${1:-plt-eval-terminal-base:latest}
if docker image inspect "$image" >/dev/null 2>&1; then
    exit 0
fi
root=$(mktemp -d)
trap 'rm -rf "$root" "$root.log"' EXIT
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
debootstrap --variant=minbase --include=tmux,asciinema,python3,python3-pytest,ca-certificates,procps \
    bookworm "$root" "$mirror" >"$root.log" 2>&1 || { tail -20 "$root.log"; exit 1; }
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
tar -C "$root" --exclude=./dev/* -c . |
    docker import --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' - "$image" >/dev/null
