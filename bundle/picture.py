"""Picture bytes -> uint8 [H, W, 3]: the only decode and resize in Kennel.

Training, evaluation and the gateway all call `load`, so what was measured is what is served.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bundle.jpeg import SHRINKS, Unusual, jpegs
from bundle.resample import Box, Size, resample

Pixels = NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# 64 megapixels take 10 MB to decode from a JPEG (190 if progressive), 250 MB from a PNG, up to 1 GB
# where transparent or rotated (measured, 224x224 wanted); phones make 12 to 50 megapixels.
MAX_PIXELS = 64_000_000

# EXIF tag 0x0112 -> what brings the picture upright (CIPA DC-008, section 4.6.4 A).
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(ValueError):
    """The bytes cannot become pixels; the message says why and what would be right."""


class NotAPicture(PictureError):
    """Not one of FORMATS."""


class BrokenPicture(PictureError):
    """One of FORMATS, but cut off or damaged."""


class TooManyPixels(PictureError):
    """More pixels than the limit; found from the header, before anything is decoded."""


@dataclass(frozen=True)
class Resize:
    """How a picture of any size becomes `height` x `width` pixels.

    crop: the shorter side is scaled to `shorter_side`, then the centre is cut out;
    pad: the whole picture is fitted in, the rest filled with grey; stretch: both sides are scaled.
    """

    height: int
    width: int
    rule: Literal["crop", "pad", "stretch"] = "crop"
    shorter_side: int = 0  # crop only
    filter: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1 or max(self.height, self.width) > 1446:
            # 1446 x 1446 x 3 bytes is the largest square that TorchServe's request limit lets through.
            raise ValueError(f"height and width must be 1 to 1446, not {self.height} and {self.width}")
        if self.rule == "crop" and self.shorter_side < max(self.height, self.width):
            raise ValueError(f"shorter_side {self.shorter_side} is less than the crop of {self.height}x{self.width}")
        if self.rule != "crop" and self.shorter_side:
            raise ValueError("shorter_side belongs to the rule 'crop'")


def load(data: bytes, to: Resize, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode and resize -> uint8 [to.height, to.width, 3], RGB, upright.

    Raises NotAPicture, BrokenPicture or TooManyPixels.
    """
    if jpegs:
        with suppress(Unusual):
            width, height = jpegs.size(data)
            if width * height <= min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels):
                shrink = _shrink(width, height, to)
                return _resize(partial(jpegs.resample, data, shrink), (0, 0, width / shrink, height / shrink), to)
    image, box = _decode(data, to, max_pixels)
    return _resize(partial(resample, image), box, to)


def decode(data: bytes, to: Resize | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode -> upright RGB image; a JPEG is decoded no larger than `to` needs (DCT scaling).

    Raises NotAPicture, BrokenPicture or TooManyPixels.
    """
    return _decode(data, to, max_pixels)[0]


def resize(image: Image.Image, to: Resize) -> Pixels:
    """RGB image of any size -> uint8 [to.height, to.width, 3]."""
    return _resize(partial(resample, image), (0, 0, *image.size), to)


def _decode(data: bytes, to: Resize | None, max_pixels: int) -> tuple[Image.Image, Box]:
    """Upright RGB image and where in it the picture is: half of 375 pixels are 187.5 of 188."""
    try:
        image: Image.Image = Image.open(BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:  # Pillow's own limits, above ours
        raise TooManyPixels(f"the picture has more than {max_pixels:,} pixels: send a smaller one") from exc
    except MemoryError:
        raise
    except Exception as exc:  # what Pillow raises on damaged headers is not a closed set
        raise NotAPicture(_what_it_is(data)) from exc
    width, height = image.size
    if width * height > max_pixels:
        raise TooManyPixels(
            f"the picture has {width} x {height} = {width * height:,} pixels, "
            f"more than the limit of {max_pixels:,}: send a smaller one"
        )
    try:
        format, drafted = image.format, None
        if to:
            drafted = image.draft("RGB", _least(width, height, to))
        image.load()
        box_width, box_height = drafted[1][2:] if drafted else image.size
        orientation = _orientation(image)
        if orientation in _UPRIGHT:
            image = image.transpose(_UPRIGHT[orientation])
        if orientation >= 5:
            box_width, box_height = box_height, box_width
        # What was the top left corner is now at the right in 2, 3, 6, 7 and at the bottom in 3, 4, 7, 8.
        left = image.width - box_width if orientation in (2, 3, 6, 7) else 0
        top = image.height - box_height if orientation in (3, 4, 7, 8) else 0
        return _rgb(image), (left, top, left + box_width, top + box_height)
    except MemoryError:
        raise
    except PictureError:
        raise
    except Exception as exc:  # likewise for damaged bodies
        raise BrokenPicture(f"the {format} picture is cut off or damaged ({exc}): send the whole file") from exc


def _resize(resample: Callable[[Size, Image.Resampling, Box], Pixels], box: Box, to: Resize) -> Pixels:
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    filter = Image.Resampling[to.filter.upper()]
    if to.rule == "crop":
        # Only what the crop keeps is computed: the box is the crop in the source's coordinates.
        scale = _scale(width, height, to)
        box_width, box_height = min(width, to.width / scale), min(height, to.height / scale)
        left, top = left + (width - box_width) / 2, top + (height - box_height) / 2
        box = (left, top, min(right, left + box_width), min(bottom, top + box_height))
    elif to.rule == "pad":
        scale = _scale(width, height, to)
        inner_width, inner_height = max(1, round(width * scale)), max(1, round(height * scale))
        left, top = (to.width - inner_width) // 2, (to.height - inner_height) // 2
        pixels = np.full((to.height, to.width, 3), 128, np.uint8)
        pixels[top : top + inner_height, left : left + inner_width] = resample((inner_width, inner_height), filter, box)
        return pixels
    return resample((to.width, to.height), filter, box)


def _least(width: int, height: int, to: Resize) -> Size:
    """What a picture must be decoded to at least. Orientation may yet swap the sides: large enough for both."""
    scale = max(_scale(width, height, to), _scale(height, width, to))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _shrink(width: int, height: int, to: Resize) -> int:
    """Pillow's own choice, in Image.draft."""
    least_width, least_height = _least(width, height, to)
    return next(shrink for shrink in SHRINKS if shrink <= max(1, min(width // least_width, height // least_height)))


def _scale(width: float, height: float, to: Resize) -> float:
    if to.rule == "crop":
        return to.shorter_side / min(width, height)
    if to.rule == "pad":
        return min(to.width / width, to.height / height)
    return max(to.width / width, to.height / height)  # the side that shrinks least


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF does not make a picture unreadable: browsers show it too
        return 1
    return orientation if isinstance(orientation, int) and orientation in _UPRIGHT else 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey
        # From 65408 on it is 255; clipped there, adding 128 stays within 16 bits.
        grey = (np.asarray(image).clip(0, 65407).astype(np.uint16) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise NotAPicture("floating-point TIFF is not supported: send 8 or 16 bits a channel")
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy


def _what_it_is(data: bytes) -> str:
    """Why Pillow did not know these bytes, and what to send."""
    names = "JPEG, PNG, WebP, GIF, BMP or TIFF"
    start = data[:512].lstrip().lower()
    if not data:
        return f"the picture is empty (0 bytes): send a {names} file"
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc", b"avif"):
        return f"HEIC and AVIF are not supported: save the picture as JPEG, or send {names}"
    if b"<svg" in start or start.startswith(b"<?xml"):
        return f"SVG is a drawing, not a picture of pixels: export it as PNG, or send {names}"
    if data[:4] == b"%PDF":
        return f"PDF is a document: export the page as PNG, or send {names}"
    return f"these {len(data)} bytes are not a picture that can be read: send {names}"
