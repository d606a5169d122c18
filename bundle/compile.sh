#!/bin/sh
# resample.c -> build/resample.so beside bundle/, with $CC or cc.
set -eu
cd "$(dirname "$0")/.."
mkdir -p build
# Without fused multiply-add, which rounds once where Pillow rounds twice.
"${CC:-cc}" -O3 -ffp-contract=off -fPIC -shared -o build/resample.so bundle/resample.c -lm
