#!/usr/bin/env bash
# base.sh   debian:bookworm-slim for the local engine: pulled, or made from Debian's packages where no registry is reached
set -euo pipefail
docker=${DOCKER:-docker}
$docker image inspect debian:bookworm-slim >/dev/null 2>&1 && exit
timeout 60 $docker pull --quiet debian:bookworm-slim 2>/dev/null && exit
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
debootstrap --variant=minbase bookworm "$folder" >/dev/null
tar -C "$folder" -c . | $docker import - debian:bookworm-slim >/dev/null
