"""bundle.jpeg: what jpeg.c makes of a JPEG is what Pillow makes of it, to the last bit, or Pillow makes it."""

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from bundle import jpeg, picture, resample
from bundle.golden import draw
from bundle.jpeg import SHRINKS, Jpegs, Unusual, compiled
from bundle.picture import PictureError, Resize, load
from bundle.resample import LIBRARY

ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def jpegs() -> Jpegs:
    try:
        Jpegs()
    except OSError:
        pytest.skip(f"no {LIBRARY.name}: a C compiler and bundle/compile.sh make it")
    except AttributeError:
        pytest.skip(f"{LIBRARY.name} has no jpeg.c in it: bundle/compile.sh needs libjpeg's headers for that")
    except Unusual:
        pytest.skip("this Pillow has no libjpeg of its own")
    found = compiled()
    assert found, "jpeg.c makes other pixels than Pillow"
    return found


def drawing(dice: random.Random, width: int, height: int) -> Image.Image:
    """Colours that change slowly, and noise on half of them."""
    noise = np.random.default_rng(dice.getrandbits(32))
    pixels = np.asarray(Image.fromarray(noise.integers(0, 256, (4, 4, 3), np.uint8)).resize((width, height)))
    return Image.fromarray(pixels ^ noise.integers(0, dice.choice([1, 64]), pixels.shape, np.uint8))


def encoded(image: Image.Image, **how: Any) -> bytes:
    ImageFile.MAXBLOCK = 1 << 22  # noise takes more than Pillow sets aside
    image.save(file := BytesIO(), "JPEG", **how)
    return file.getvalue()


def anything(dice: random.Random) -> bytes:
    """Of any size and kind that Pillow writes."""
    tall = (dice.randint(1, 60), dice.randint(1, 2000))
    size = dice.choice([tall, tall[::-1], *[(dice.randint(1, 700), dice.randint(1, 700))] * 4])
    how: dict[str, Any] = {"quality": dice.randint(1, 99), "subsampling": dice.randint(0, 2)}
    how |= {"progressive": dice.random() < 0.3, "optimize": dice.random() < 0.3}
    how |= {"restart_marker_blocks": dice.choice([0, 0, 0, 3])}
    if dice.random() < 0.2:
        how["exif"] = exif = Image.Exif()
        exif[ORIENTATION] = dice.choice([1, 1, 1, 3, 6])
    image = drawing(dice, *size)
    return encoded(image.convert("L") if dice.random() < 0.05 else image, **how)


def damaged(dice: random.Random, data: bytes) -> bytes:
    changed, kind = bytearray(data), dice.randrange(4)
    if kind == 0:
        del changed[dice.randrange(len(data)) :]
    elif kind == 1:
        del changed[-dice.randint(1, 40) :]
    else:
        for _ in range(dice.choice([1, 3, 20])):
            changed[dice.randrange(len(data) if kind == 2 else min(700, len(data)))] = dice.randrange(256)
    return bytes(changed)


def any_size(dice: random.Random) -> Resize:
    height, width = dice.choice([(224, 224), (dice.randint(1, 300), dice.randint(1, 300))])
    rule = dice.choice(["crop", "pad", "stretch"])
    shorter = max(height, width) + dice.randint(0, 60) if rule == "crop" else 0
    return Resize(height, width, rule, shorter, dice.choice(["bilinear", "bicubic", "lanczos"]))  # type: ignore[arg-type]


def outcome(data: bytes, to: Resize) -> bytes | str:
    try:
        return load(data, to).tobytes()
    except PictureError as exc:
        return repr(exc)


@pytest.mark.parametrize("change", [lambda _, data: data, damaged], ids=["whole", "damaged"])
def test_whatever_comes_is_what_pillow_makes_of_it(
    jpegs: Jpegs, monkeypatch: pytest.MonkeyPatch, change: Callable[[random.Random, bytes], bytes]
) -> None:
    dice, ways = random.Random(0), Counter[str]()

    class Counting(Jpegs):
        def resample(self, *how: Any) -> Any:
            pixels = super().resample(*how)
            ways[f"shrunk {how[1]}"] += 1
            return pixels

    counting = Counting()
    for _ in range(600):
        data, to = change(dice, anything(dice)), any_size(dice)
        monkeypatch.setattr(picture, "jpegs", counting)
        found = outcome(data, to)
        monkeypatch.setattr(picture, "jpegs", None)
        right = outcome(data, to)
        assert found == right, (to, data.hex())
        ways["pixels" if isinstance(right, bytes) else "refused"] += 1
    if change is damaged:
        assert min(ways["pixels"], ways["refused"], ways["shrunk 1"]) > 30, ways
    else:
        assert min(ways[f"shrunk {shrink}"] for shrink in (1, 2, 4)) > 10, ways
        assert sum(ways[f"shrunk {shrink}"] for shrink in SHRINKS) > ways["pixels"] / 2, ways


def rotated() -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return encoded(drawing(random.Random(0), 300, 200), exif=exif)


def several() -> bytes:
    images = [drawing(random.Random(i), 300, 200) for i in range(2)]
    images[0].save(file := BytesIO(), "MPO", save_all=True, append_images=images[1:])
    return file.getvalue()


PLAIN = encoded(drawing(random.Random(0), 300, 200))
XMP = b"\xff\xe1\x00\x40http://ns.adobe.com/xap/1.0/\0" + b'<x tiff:Orientation="6"/>'.ljust(33)


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff\xe0", PLAIN[:300], b"\0" + PLAIN),
        rotated(),
        several(),
        encoded(drawing(random.Random(0), 300, 200).convert("CMYK")),
        encoded(drawing(random.Random(0), 300, 200).convert("L")),
        PLAIN[:2] + XMP + PLAIN[2:],  # where Pillow finds an orientation too
        PLAIN[:2] + b"\0" + PLAIN[2:],  # what Pillow skips
    ],
    ids=["empty", "1 byte", "start", "marker", "header", "shifted", "rotated", "MPO", "CMYK", "grey", "XMP", "junk"],
)
def test_what_is_unusual_is_left_to_pillow(jpegs: Jpegs, data: bytes) -> None:
    with pytest.raises(Unusual):
        jpegs.size(data)


def test_an_upright_picture_of_a_camera_is_not_unusual(jpegs: Jpegs) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 1
    for tag in (0x010F, 0x0110):
        exif[tag] = "Kennel"
    assert jpegs.size(encoded(drawing(random.Random(0), 300, 200), exif=exif)) == (300, 200)


def test_what_is_cut_off_is_left_to_pillow(jpegs: Jpegs) -> None:
    how = (1, (224, 224), Image.Resampling.BICUBIC, (0.0, 0.0, 300.0, 100.0))  # the lower half is not needed
    jpegs.resample(PLAIN, *how)
    for end in range(len(PLAIN) - 40, len(PLAIN)):
        with pytest.raises(Unusual):
            jpegs.resample(PLAIN[:end], *how)


@pytest.mark.parametrize(
    "box", [(-1, 0, 20, 20), (0, 0, 301, 20), (0, 0, 20, 200.5), (5, 5, 5, 5), (0, 0, float("nan"), 9)]
)
def test_a_box_outside_the_picture_is_left_to_pillow(jpegs: Jpegs, box: tuple[float, float, float, float]) -> None:
    with pytest.raises(Unusual):
        jpegs.resample(PLAIN, 1, (20, 20), Image.Resampling.BICUBIC, box)


def test_every_thread_gets_its_own_pixels(jpegs: Jpegs) -> None:
    pictures = [encoded(drawing(random.Random(i), 300 + i, 200)) for i in range(16)]
    to = Resize(224, 224, shorter_side=256)
    alone = [load(data, to).tobytes() for data in pictures]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda data: load(data, to).tobytes(), pictures * 8)) == alone * 8


def test_it_is_what_the_bundle_uses(jpegs: Jpegs) -> None:
    assert isinstance(picture.jpegs, Jpegs)


@pytest.mark.parametrize(
    ("line", "other"),
    [("JCS_EXT_RGBX", "JCS_EXT_BGRX"), ("MARGIN = 32", "MARGIN = -8"), ("first[i] -= left", "first[i] -= 0")],
)
def test_a_library_that_makes_other_pixels_is_not_used(
    jpegs: Jpegs, build: Callable[..., Path], line: str, other: str
) -> None:
    assert compiled(build(jpeg=(line, other))) is None
    assert compiled(build())


def test_without_headers_pictures_are_still_resized(
    build: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headless = tmp_path / "cc"
    headless.write_text(f'#!/bin/sh\nfor flag; do [ "$flag" = -E ] && exit 1; done\nexec {shutil.which("cc")} "$@"\n')
    headless.chmod(0o755)
    monkeypatch.setenv("CC", str(headless))
    library = build()
    assert compiled(library) is None
    assert resample.compiled(library)


def test_without_a_library_or_its_own_libjpeg_pillow_does_it(
    jpegs: Jpegs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compiled(tmp_path / "pixels.so") is None
    monkeypatch.setattr(jpeg.PIL, "__file__", str(tmp_path / "PIL" / "__init__.py"))
    assert compiled() is None


@pytest.mark.measurement
def test_it_takes_less_than_nine_tenths_of_pillow_s_time(jpegs: Jpegs, monkeypatch: pytest.MonkeyPatch) -> None:
    data, to = encoded(Image.fromarray(draw(1, 400, 533, seed=1)[0])), Resize(224, 224, shorter_side=256)
    seconds: dict[Jpegs | None, list[float]] = {jpegs: [], None: []}
    for _ in range(200):
        for way, took in seconds.items():
            monkeypatch.setattr(picture, "jpegs", way)
            started = time.perf_counter()
            load(data, to)
            took.append(time.perf_counter() - started)
    ours, theirs = (sorted(took)[100] for took in seconds.values())
    print(f"\n{1000 * ours:.2f} ms, Pillow {1000 * theirs:.2f} ms")
    assert ours < 0.9 * theirs
