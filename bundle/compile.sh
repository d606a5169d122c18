#!/bin/sh
# resample.c, and jpeg.c where libjpeg-turbo's headers are, -> build/pixels.so beside bundle/, with $CC or cc, and $CFLAGS.
set -eu
cd "$(dirname "$0")/.."
mkdir -p build
source=bundle/resample.c
if printf '%s\n' '#include <stdio.h>' '#include <jpeglib.h>' '#ifndef JCS_EXTENSIONS' '#error' '#endif' |
  "${CC:-cc}" -E - >/dev/null 2>&1; then
  source=bundle/jpeg.c # which has all of the other
else
  echo "Without libjpeg-turbo's headers (libjpeg-dev): JPEGs are decoded by Pillow, which gives the same pixels 0.3 ms later"
fi
# Without fused multiply-add, which rounds once where Pillow rounds twice.
# shellcheck disable=SC2086 # several flags
"${CC:-cc}" -O3 -ffp-contract=off -fPIC -shared ${CFLAGS:-} -o build/pixels.so "$source" -lm -ldl
