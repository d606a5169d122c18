"""JPEG -> resized pixels: Pillow's, and in two thirds of its time where jpeg.c is compiled.

bundle/compile.sh compiles it where libjpeg's headers are. It calls the very libjpeg-turbo that Pillow brings along;
where that has none of its own, or something is unusual about a JPEG, Pillow does the work: what comes out is the same
to the last bit.
"""

import ctypes
import os
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from bundle.resample import BOX, LIBRARY, Box, Size, by_pillow

SHRINKS = (8, 4, 2, 1)  # what JPEGs are decoded to a part of in less time


class Unusual(Exception):
    """Pillow should decode this one."""


class Jpegs:
    """jpeg.c."""

    def __init__(self, library: Path = LIBRARY) -> None:
        """Raises OSError or AttributeError where it is not compiled, Unusual where Pillow has no libjpeg of its own."""
        found = ctypes.CDLL(str(library))
        own = next(Path(PIL.__file__).parents[1].glob("pillow.libs/libjpeg-*.so*"), None)
        if not own or found.jpeg_use(os.fsencode(own)):
            raise Unusual
        self._size = ctypes.PyDLL(str(library)).jpeg_size  # a microsecond, not worth giving Python's lock away
        self._resample = found.jpeg_resample
        integer, size, pointer = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p
        self._found = integer * 2
        self._size.argtypes = [ctypes.c_char_p, size, self._found]
        self._resample.argtypes = [ctypes.c_char_p, size, integer, integer, BOX, integer, integer, pointer]

    def size(self, data: bytes) -> Size:
        """Width and height, from the header. Raises Unusual."""
        found = self._found()
        if self._size(data, len(data), found):
            raise Unusual
        width, height = found
        return width, height

    def resample(self, data: bytes, shrink: int, size: Size, filter: Image.Resampling, box: Box) -> NDArray[np.uint8]:
        """Decoded to a `shrink`-th of its size, then as a Resample -> uint8 [height, width, 3]. Raises Unusual."""
        pixels = np.empty((size[1], size[0], 3), np.uint8)
        if self._resample(data, len(data), shrink, filter, BOX(*box), *size, pixels.ctypes.data):
            raise Unusual
        return pixels


def compiled(library: Path = LIBRARY) -> Jpegs | None:
    """None where it is not compiled, or would make other pixels than Pillow."""
    try:
        jpegs = Jpegs(library)
        noise = np.arange(120 * 160 * 3, dtype=np.uint32) * 2654435761 >> 24  # Knuth's multiplicative hash
        Image.fromarray(noise.astype(np.uint8).reshape(120, 160, 3)).save(file := BytesIO(), "JPEG")
        how = ((21, 19), Image.Resampling.BICUBIC, (100.25, 62.5, 150.75, 110.5))  # rows and columns are left out
        same = np.array_equal(jpegs.resample(file.getvalue(), 1, *how), by_pillow(Image.open(file), *how))
        return jpegs if same else None
    except (OSError, AttributeError, Unusual):
        return None


jpegs = compiled()
