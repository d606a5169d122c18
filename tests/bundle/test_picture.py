"""bundle.picture: what every kind of file becomes, what is refused, and what it costs."""

import ctypes
import random
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bundle.golden import draw
from bundle.picture import BrokenPicture, NotAPicture, PictureError, Resize, TooManyPixels, decode, load, resize

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"
DRAWN = Image.fromarray(draw(1, 12, 16, seed=3)[0]).resize((64, 48), Image.Resampling.BICUBIC)
TO = Resize(24, 40, "pad")
FINE = {"quality": 95, "subsampling": 0}
ORIENTATION = 0x0112
FILTERS: tuple[Any, ...] = ("bilinear", "bicubic", "lanczos")

# One file of every kind: the format, the mode it is saved in, how, and how far (mean, of 255) it may be off.
KINDS: dict[str, tuple[str, str, dict[str, Any], float]] = {
    "jpeg": ("JPEG", "RGB", FINE, 2),
    "jpeg progressive": ("JPEG", "RGB", {**FINE, "progressive": True}, 2),
    "jpeg grey": ("JPEG", "L", FINE, 2),
    "jpeg cmyk": ("JPEG", "CMYK", FINE, 2),
    "jpeg of a phone (mpo)": ("MPO", "RGB", {**FINE, "save_all": True, "append_images": [DRAWN.rotate(90)]}, 2),
    "png": ("PNG", "RGB", {}, 0),
    "png animated": ("PNG", "RGB", {"save_all": True, "append_images": [DRAWN.rotate(90)]}, 0),
    "png rgba": ("PNG", "RGBA", {}, 0),
    "png palette": ("PNG", "P", {}, 0),
    "png grey": ("PNG", "L", {}, 0),
    "png grey and alpha": ("PNG", "LA", {}, 0),
    "png 1 bit": ("PNG", "1", {}, 0),
    "png 16 bit": ("PNG", "I;16", {}, 0),
    "webp": ("WEBP", "RGB", {"quality": 95}, 5),
    "webp lossless": ("WEBP", "RGB", {"lossless": True}, 0),
    "webp alpha": ("WEBP", "RGBA", {"lossless": True}, 0),
    "webp animated": ("WEBP", "RGB", {"lossless": True, "save_all": True, "append_images": [DRAWN.rotate(90)]}, 0),
    "gif": ("GIF", "P", {}, 0),
    "gif animated": ("GIF", "P", {"save_all": True, "append_images": [DRAWN.rotate(90)]}, 0),
    "bmp": ("BMP", "RGB", {}, 0),
    "bmp alpha": ("BMP", "RGBA", {}, 0),
    "bmp palette": ("BMP", "P", {}, 0),
    "bmp 1 bit": ("BMP", "1", {}, 0),
    "tiff": ("TIFF", "RGB", {}, 0),
    "tiff alpha": ("TIFF", "RGBA", {}, 0),
    "tiff grey": ("TIFF", "L", {}, 0),
    "tiff 16 bit": ("TIFF", "I;16", {}, 0),
    "tiff 16 bit big-endian": ("TIFF", "I;16B", {}, 0),
    "tiff 32 bit": ("TIFF", "I", {}, 0),
    "tiff cmyk": ("TIFF", "CMYK", {}, 0),
    "tiff lzw": ("TIFF", "RGB", {"compression": "tiff_lzw"}, 0),
    "tiff deflate": ("TIFF", "RGB", {"compression": "tiff_adobe_deflate"}, 0),
    "tiff packbits": ("TIFF", "RGB", {"compression": "packbits"}, 0),
    "tiff jpeg": ("TIFF", "RGB", {"compression": "jpeg", "quality": 95}, 4),
    "tiff fax": ("TIFF", "1", {"compression": "group4"}, 0),
    "tiff of pages": ("TIFF", "RGB", {"save_all": True, "append_images": [DRAWN.rotate(90)]}, 0),
}


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode.startswith("I"):
        grey = np.asarray(image.convert("L")).astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]) * 257
        return Image.frombytes(mode, image.size, grey.tobytes())
    return image.quantize(16) if mode == "P" else image.convert(mode)


def save(image: Image.Image, kind: str) -> bytes:
    format, mode, options, _ = KINDS[kind]
    return encode(in_mode(image, mode), format, **options)


@cache
def drawn(kind: str) -> bytes:
    return save(DRAWN, kind)


def png(width: int, height: int, depth: int, colour: int, packed: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def zeros(megabytes: int) -> bytes:
    """zlib's stream of so many zeros, without making them: one flushed megabyte, repeated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x78\xda" + block * megabytes + b"\x03\x00" + struct.pack(">HH", (megabytes << 20) % 65521, 1)


def off(found: Any, expected: Any) -> float:
    """Mean difference; 255 where the shapes differ."""
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    return float(np.abs(found - expected).mean()) if found.shape == expected.shape else 255.0


def cost(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and megabytes of memory that this process needed more for a while."""

    def status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed must not serve here
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: proc(5)
    before, start = status("VmRSS"), time.process_time()
    call()
    return time.process_time() - start, status("VmHWM") - before


# What comes out


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_its_picture(kind: str) -> None:
    _, mode, _, tolerance = KINDS[kind]
    expected = in_mode(DRAWN, "L" if mode.startswith("I") else mode).convert("RGB")
    found = decode(drawn(kind))
    assert (found.mode, found.size) == ("RGB", DRAWN.size)
    assert off(found, expected) <= tolerance


@pytest.mark.parametrize("kind", [kind for kind, (_, mode, *_) in KINDS.items() if mode[0] not in "LI1"])
def test_known_colours_come_out_right(kind: str) -> None:
    for name in ("red", "lime", "blue", "white", "gray"):
        solid = Image.new("RGB", DRAWN.size, name)
        assert off(decode(save(solid, kind)), solid) <= 3, name


@pytest.mark.parametrize("kind", ["png 16 bit", "tiff 16 bit", "tiff 16 bit big-endian", "tiff 32 bit"])
def test_16_bits_of_grey_are_scaled_to_8(kind: str) -> None:
    format, mode, *_ = KINDS[kind]
    row = np.array([0, 128, 129, 32768, 65407, 65535], {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode])
    found = np.asarray(decode(encode(Image.frombytes(mode, (6, 1), row.tobytes()), format)))
    assert found[0].tolist() == [[grey] * 3 for grey in (0, 0, 1, 128, 255, 255)]


def test_16_bits_a_channel_are_scaled_to_8() -> None:
    row = b"\0" + struct.pack(">6H", 65535, 0, 0, 0, 0x8000, 65535)
    assert np.asarray(decode(png(2, 1, 16, 2, zlib.compress(row)))).tolist() == [[[255, 0, 0], [0, 128, 255]]]


@pytest.mark.parametrize("adobe", ["inverted", "inverted YCCK", "no marker"])
def test_cmyk_jpegs_as_printers_make_them_give_red(adobe: str) -> None:
    inks = (0, 255, 255, 0)  # cyan, magenta, yellow, black; Pillow writes them inverted, as Photoshop does
    if adobe == "inverted YCCK":
        inks = (255 - 179, 255 - 171, 255 - 1, 0)  # the first three as YCbCr (of JFIF, for red 0, green and blue 255)
    data = encode(Image.new("CMYK", (16, 16), inks), "JPEG", quality=95)
    marker = data.index(b"\xff\xee\x00\x0eAdobe")
    if adobe == "inverted YCCK":
        data = data[: marker + 15] + b"\x02" + data[marker + 16 :]
    if adobe == "no marker":
        data = data[:marker] + data[marker + 16 :]
    assert off(decode(data), Image.new("RGB", (16, 16), "red")) <= 3


@pytest.mark.parametrize(
    ("format", "options"),
    [("JPEG", FINE), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})],
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_out_upright(format: str, options: dict[str, Any], orientation: int) -> None:
    upright = np.asarray(DRAWN)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif, **options)
    assert off(decode(data), upright) <= 4
    assert off(load(data, TO), resize(DRAWN, TO)) <= 4


@pytest.mark.parametrize(
    ("format", "mode", "options"),
    [
        ("PNG", "RGBA", {}),
        ("PNG", "LA", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("WEBP", "RGBA", {"quality": 95}),
        ("TIFF", "RGBA", {}),
        ("TIFF", "LA", {}),
    ],
)
@pytest.mark.parametrize(("alpha", "expected"), [(0, 255), (128, 127), (255, 0)])
def test_alpha_is_composited_on_white(
    format: str, mode: str, options: dict[str, Any], alpha: int, expected: int
) -> None:
    image = Image.new("RGBA", (16, 16), (0, 0, 0, alpha)).convert(mode)
    assert off(decode(encode(image, format, **options)), np.full((16, 16, 3), expected)) <= 1


@pytest.mark.parametrize(
    ("format", "transparency", "expected"), [("GIF", 1, [0, 255]), ("PNG", 1, [0, 255]), ("PNG", b"\xff\x80", [0, 127])]
)
def test_transparent_palette_entries_are_composited_on_white(
    format: str, transparency: int | bytes, expected: list[int]
) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 0, 0, 0])
    image.putpixel((1, 0), 1)
    found = np.asarray(decode(encode(image, format, transparency=transparency, optimize=False)))
    assert found[0, :, 0].tolist() == expected


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_counts(format: str) -> None:
    red, blue, lime = (Image.new("RGB", (16, 16), name) for name in ("red", "blue", "lime"))
    assert off(decode(encode(red, format, save_all=True, append_images=[blue, lime])), red) <= 2


# Resizing


@pytest.mark.parametrize("to", [Resize(30, 20, "crop", 33), Resize(20, 30, "pad"), Resize(7, 90, "stretch")])
def test_pixels_are_uint8_height_width_3_in_one_piece(to: Resize) -> None:
    for kind in KINDS:
        pixels = load(drawn(kind), to)
        assert (pixels.shape, str(pixels.dtype)) == ((to.height, to.width, 3), "uint8"), kind
        assert pixels.flags.c_contiguous, kind


@pytest.mark.parametrize("size", [(500, 250), (250, 500), (160, 160), (128, 512), (60, 30)])
@pytest.mark.parametrize("to", [Resize(224, 224, "crop", 256), Resize(96, 160, "crop", 160)])
def test_crop_is_the_centre_of_the_picture_scaled_to_the_shorter_side(size: tuple[int, int], to: Resize) -> None:
    image = Image.fromarray(draw(1, size[1], size[0], seed=5)[0])
    scale = to.shorter_side / min(size)
    whole = image.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BICUBIC)
    left, top = (whole.width - to.width) // 2, (whole.height - to.height) // 2
    assert off(resize(image, to), whole.crop((left, top, left + to.width, top + to.height))) < 0.6


def test_the_filter_is_the_one_asked_for() -> None:
    found = {name: resize(DRAWN, Resize(90, 90, "stretch", filter=name)) for name in FILTERS}
    for name, pixels in found.items():
        assert np.array_equal(pixels, np.asarray(DRAWN.resize((90, 90), Image.Resampling[name.upper()]))), name


@pytest.mark.parametrize(
    ("size", "to", "inner"),
    [
        ((100, 50), (32, 32), (slice(8, 24), slice(0, 32))),
        ((50, 100), (32, 32), (slice(0, 32), slice(8, 24))),
        ((10, 10), (20, 60), (slice(0, 20), slice(20, 40))),
        ((400, 100), (60, 20), (slice(27, 32), slice(0, 20))),
    ],
)
def test_pad_keeps_the_shape_and_fills_with_grey(
    size: tuple[int, int], to: tuple[int, int], inner: tuple[slice, slice]
) -> None:
    expected = np.full((*to, 3), 128, np.uint8)
    expected[inner] = 255
    assert np.array_equal(resize(Image.new("RGB", size, "white"), Resize(*to, "pad")), expected)


def test_stretch_shows_the_whole_picture() -> None:
    image = np.zeros((10, 1000, 3), np.uint8)
    image[5:, 500:] = 255
    expected = np.zeros((20, 20, 3), np.uint8)
    expected[10:, 10:] = 255
    assert off(resize(Image.fromarray(image), Resize(20, 20, "stretch", filter="bilinear")), expected) < 10


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_a_picture_one_pixel_wide_or_high_is_a_picture(size: tuple[int, int]) -> None:
    line = Image.new("RGB", size, (90, 90, 90))
    rules = (Resize(32, 32, "crop", 40), Resize(32, 32, "pad"), Resize(32, 32, "stretch"))
    for format, to in product(("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"), rules):
        pixels = load(encode(line, format), to)
        assert pixels.shape == (32, 32, 3)
        # Padded it is one line of these two, but never gone.
        assert off(pixels[15:17, 15:17], np.full((2, 2, 3), 90)) <= 20, (format, to)


@pytest.mark.parametrize(
    "bad",
    [
        {"height": 0, "width": 8, "shorter_side": 8},
        {"height": 8, "width": 1447, "rule": "pad"},
        {"height": 8, "width": 9, "shorter_side": 8},
        {"height": 8, "width": 8},
        {"height": 8, "width": 8, "rule": "pad", "shorter_side": 9},
    ],
)
def test_a_resize_that_cannot_be_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"height and width|shorter_side"):
        Resize(**bad)


def test_the_same_bytes_give_the_same_pixels_in_every_thread() -> None:
    files = [drawn(kind) for kind in KINDS]
    first = [load(data, TO).tobytes() for data in files]
    with ThreadPoolExecutor(4) as pool:
        again = [pixels.tobytes() for pixels in pool.map(lambda data: load(data, TO), files * 2)]
    assert again == first * 2


# Cost


def test_a_large_jpeg_costs_at_most_a_fifth_of_decoding_it_whole_and_is_nearly_the_same() -> None:
    image = Image.fromarray(draw(1, 150, 200, seed=1)[0]).resize((4000, 3000), Image.Resampling.BILINEAR)
    data = encode(image, "JPEG", quality=90)
    to = Resize(224, 224, "crop", 256)
    pixels: dict[str, Any] = {}
    small, whole = [], []
    for _ in range(2):
        small.append(cost(lambda: pixels.update(small=load(data, to)))[0])
        whole.append(cost(lambda: pixels.update(whole=resize(decode(data), to)))[0])
    assert min(small) < min(whole) / 5
    assert off(pixels["small"], pixels["whole"]) < 1


@pytest.mark.parametrize(
    "to",
    [
        Resize(13, 13, "crop", 14),
        Resize(8, 20, "crop", 20),
        Resize(80, 20, "pad"),
        Resize(20, 80, "pad"),
        Resize(20, 3, "stretch"),
    ],
)
@pytest.mark.parametrize("size", [(400, 100), (201, 199)])
def test_decoding_small_gives_nearly_the_pixels_of_decoding_whole(size: tuple[int, int], to: Resize) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1] // 20, size[0] // 20, 3), np.uint8)
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[ORIENTATION] = orientation
        data = encode(Image.fromarray(noise).resize(size), "JPEG", exif=exif, **FINE)
        assert off(load(data, to), resize(decode(data), to)) < 2, orientation


@pytest.mark.parametrize(("colour", "channels", "bytes_a_pixel"), [(2, 3, 6), (6, 4, 10)], ids=["rgb", "transparent"])
def test_decoding_keeps_no_needless_copies(colour: int, channels: int, bytes_a_pixel: int) -> None:
    side = 2000
    data = png(side, side, 8, colour, zeros(side * (side * channels + 1) // (1 << 20) + 1))
    assert cost(lambda: decode(data))[1] < bytes_a_pixel * side * side / (1 << 20)


def huge(format: str) -> bytes:
    """A small file that says it is enormous."""
    if format == "PNG":
        return png(30_000, 30_000, 1, 0, zeros(108))
    if format == "PNG of 100 megapixels":  # Pillow only warns
        return png(10_000, 10_000, 1, 0, zeros(12))
    data = encode(DRAWN, format)
    if format == "TIFF":
        for tag, side in ((256, 64), (257, 48)):
            data = data.replace(struct.pack("<HHII", tag, 4, 1, side), struct.pack("<HHII", tag, 4, 1, 30_000))
        return data
    at, field = {
        "JPEG": (data.find(b"\xff\xc0") + 5, struct.pack(">HH", 65_500, 65_500)),
        "WEBP": (26, struct.pack("<HH", 16_383, 16_383)),
        "GIF": (6, struct.pack("<HH", 65_535, 65_535)),
        "BMP": (18, struct.pack("<II", 30_000, 30_000)),
    }[format]
    return data[:at] + field + data[at + len(field) :]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "PNG of 100 megapixels", "WEBP", "GIF", "BMP", "TIFF"])
def test_too_many_pixels_are_refused_before_decoding(format: str) -> None:
    data = huge(format)
    assert len(data) < 150_000

    def refused() -> None:
        with pytest.raises(TooManyPixels, match="send a smaller one"):
            load(data, TO)

    seconds, megabytes = cost(refused)
    assert seconds < 0.1
    assert megabytes < 10


def test_the_limit_is_the_number_of_pixels() -> None:
    data = drawn("png")
    assert load(data, TO, max_pixels=48 * 64).shape == (24, 40, 3)
    with pytest.raises(TooManyPixels, match=r"64 x 48 = 3,072 pixels, more than the limit of 3,071: send"):
        load(data, TO, max_pixels=48 * 64 - 1)


# What is refused


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty .0 bytes.: send a JPEG, PNG, WebP, GIF, BMP or TIFF"),
        (b"\0" * 100, "100 bytes are not a picture that can be read: send JPEG, PNG"),
        (b"Dear sir or madam", "17 bytes are not a picture that can be read: send JPEG, PNG"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG .*: export it as PNG"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- x -->\n<SVG/>', "SVG .*: export it as PNG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC and AVIF are not supported: save the picture as JPEG"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1", "HEIC and AVIF are not supported: save the picture as JPEG"),
        (encode(DRAWN, "AVIF"), "HEIC and AVIF are not supported: save the picture as JPEG"),
        (b"%PDF-1.7\n", "PDF .*: export the page as PNG"),
        (encode(DRAWN, "PDF"), "PDF .*: export the page as PNG"),
        (encode(DRAWN, "ICO"), "not a picture that can be read: send JPEG, PNG"),
        (encode(DRAWN, "JPEG2000"), "not a picture that can be read: send JPEG, PNG"),
        (encode(DRAWN.convert("F"), "TIFF"), "floating-point TIFF is not supported: send 8 or 16 bits"),
    ],
)
def test_what_is_not_a_picture_is_refused_with_what_would_be_right(data: bytes, message: str) -> None:
    with pytest.raises(NotAPicture, match=message):
        load(data, TO)


@pytest.mark.filterwarnings("ignore")  # Pillow's, about metadata
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_off_is_refused_or_still_a_picture(kind: str) -> None:
    data = drawn(kind)
    for length in {*range(0, len(data), len(data) // 12), len(data) - 1, 8, 30}:
        with suppress(NotAPicture, BrokenPicture):
            assert load(data[:length], TO).shape == (24, 40, 3)


def test_a_png_with_a_piece_of_wrong_length_is_broken() -> None:
    data = drawn("png")
    at = data.index(b"IDAT") - 4
    with pytest.raises(BrokenPicture, match=r"the PNG picture is cut off or damaged .*: send the whole file"):
        load(data[:at] + struct.pack(">I", 40) + data[at + 4 :], TO)


@pytest.mark.parametrize("kind", [kind for kind, (_, _, options, _) in KINDS.items() if "save_all" not in options])
def test_half_a_file_is_broken(kind: str) -> None:
    data = drawn(kind)
    with pytest.raises(
        PictureError, match=r"cut off or damaged .*: send the whole file|not a picture that can be read"
    ):
        load(data[: len(data) // 2], TO)


@pytest.mark.filterwarnings("ignore")  # Pillow's, about metadata
def test_no_damage_gives_anything_but_pixels_or_a_picture_error() -> None:
    dice = random.Random(0)
    files = [drawn(kind) for kind in KINDS]
    outcomes = set()
    for _ in range(400):
        data = bytearray(dice.choice(files))
        for _ in range(dice.choice((1, 2, 8))):
            at = dice.randrange(min(len(data), dice.choice((64, 1 << 20))))
            size = dice.randrange(1, 40)
            match dice.randrange(4):
                case 0:
                    data[at] ^= 1 << dice.randrange(8)
                case 1:
                    data[at : at + size] = dice.randbytes(size)
                case 2:
                    data[at:at] = data[at : at + size]
                case 3:
                    del data[at + 1 : at + size]
        try:
            assert load(bytes(data), TO).shape == (24, 40, 3)
            outcomes.add("read")
        except PictureError as exc:
            outcomes.add(type(exc).__name__)
    assert outcomes >= {"read", "NotAPicture", "BrokenPicture"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_does_not_make_a_picture_unreadable(format: str) -> None:
    dice = random.Random(0)
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010E] = 1, "a drawing"
    whole = exif.tobytes()
    for _ in range(40):
        keep = dice.randrange(len(whole))
        damaged = whole[:6] + (whole[6:keep] + dice.randbytes(dice.randrange(60)))[: 1 << 15]
        found = decode(encode(DRAWN, format, exif=damaged, quality=95))
        assert sorted(found.size) == sorted(DRAWN.size)
    assert off(decode(encode(DRAWN, format, exif=b"Exif\0\0no such thing", quality=95)), DRAWN) < 6


# The rest of the world


def test_the_bundle_package_needs_neither_torch_nor_flask() -> None:
    code = """if True:
        import importlib, pkgutil, sys, bundle
        for module in pkgutil.iter_modules(bundle.__path__, "bundle."):
            importlib.import_module(module.name)
        print(sorted({"torch", "flask", "onnxruntime", "grpc"} & set(sys.modules)), "bundle.picture" in sys.modules)
    """
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False, timeout=60
    )
    assert run.stdout == "[] True\n", run.stderr


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no photographs at {PHOTOS}")
def test_real_photographs_decoded_small_are_as_decoded_whole() -> None:
    to = Resize(112, 112, "crop", 128)
    paths = sorted(PHOTOS.rglob("*.JPEG"))[::8]
    assert paths
    for path in paths:
        data = path.read_bytes()
        assert off(load(data, to), resize(decode(data), to)) < 2.5, path.name
