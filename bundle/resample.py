"""RGB image -> resized pixels: Pillow's, and in a sixth of its time where resample.c is compiled.

bundle/compile.sh compiles it: in images, and for `make run` where there is a C compiler. Without it, or where it would
make other pixels than Pillow (another version of that, another processor), Pillow does the work: what comes out is the
same to the last bit.
"""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Size = tuple[int, int]  # width, height
Box = tuple[float, float, float, float]  # left, top, right, bottom
# RGB image, size, bilinear, bicubic or Lanczos, the box in the image -> uint8 [height, width, 3]
Resample = Callable[[Image.Image, Size, Image.Resampling, Box], NDArray[np.uint8]]

BOX = ctypes.c_float * 4
LIBRARY = Path(__file__).parents[1] / "build" / "pixels.so"


def by_pillow(image: Image.Image, size: Size, filter: Image.Resampling, box: Box) -> NDArray[np.uint8]:
    """A Resample. Raises ValueError where the box is not within the image."""
    return np.asarray(image.resize(size, filter, box))


def compiled(library: Path = LIBRARY) -> Resample | None:
    """A Resample that calls resample.c; None where it is not compiled, or would make other pixels than Pillow."""
    try:
        function = ctypes.CDLL(str(library)).resample
    except OSError:
        return None
    integer, pointer = ctypes.c_int, ctypes.c_void_p
    function.argtypes = [pointer, *[integer] * 3, BOX, integer, integer, pointer]
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.argtypes, address.restype = [ctypes.py_object, ctypes.c_char_p], pointer

    def by_c(image: Image.Image, size: Size, filter: Image.Resampling, box: Box) -> NDArray[np.uint8]:
        if image.mode == "RGB":
            with suppress(ValueError):  # more than 16 MB, which Pillow keeps in several pieces
                _, array = image.__arrow_c_array__()  # no copy; holds the image's memory
                pixels = np.empty((size[1], size[0], 3), np.uint8)
                source = address(array, b"arrow_array")
                if not function(source, *image.size, filter, BOX(*box), *size, pixels.ctypes.data):
                    return pixels
        return by_pillow(image, size, filter, box)

    for width, height in ((97, 61), (31, 97)):  # the two orders of its passes; no multiples of a line's alignment
        noise = np.arange(height * width * 3, dtype=np.uint32) * 2654435761 >> 24  # Knuth's multiplicative hash
        image = Image.fromarray(noise.astype(np.uint8).reshape(height, width, 3))
        how = ((21, 19), Image.Resampling.BICUBIC, (1.25, 2.5, width - 0.75, height - 1.5))
        if not np.array_equal(by_c(image, *how), by_pillow(image, *how)):
            return None
    return by_c


resample: Resample = compiled() or by_pillow
