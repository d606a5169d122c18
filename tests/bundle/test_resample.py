"""bundle.resample: what resample.c makes is what Pillow makes, to the last bit, or Pillow makes it."""

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bundle.golden import draw
from bundle.resample import LIBRARY, Resample, by_pillow, compiled, resample

FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)


@pytest.fixture(scope="module")
def by_c() -> Resample:
    if not LIBRARY.exists():
        pytest.skip(f"no {LIBRARY.name}: a C compiler and bundle/compile.sh make it")
    found = compiled()
    assert found, "resample.c makes other pixels than Pillow"
    return found


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise, whose sums leave 0 to 255 as often as they can."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 2, (height, width, 3), np.uint8) * 255)


def test_any_box_of_any_picture_in_any_size_is_pillow_s(by_c: Resample) -> None:
    dice = random.Random(0)
    orders = set()
    for i in range(500):
        width, height = dice.choice([(640, 480), (dice.randint(1, 600), dice.randint(1, 600))])
        to = (dice.randint(1, 300), dice.randint(1, 300))
        box = (0.0, 0.0, float(width), float(height))
        if i % 3:
            left, top = dice.uniform(0, width * 0.9), dice.uniform(0, height * 0.9)
            box = (left, top, dice.uniform(left + width * 0.01, width), dice.uniform(top + height * 0.01, height))
        image, filter = picture(width, height, i), dice.choice(FILTERS)
        assert np.array_equal(by_c(image, to, filter, box), by_pillow(image, to, filter, box)), (image, to, filter, box)
        orders.add(height - to[1] > 2 * (width - to[0]))
    assert orders == {True, False}


@pytest.mark.parametrize(
    "size",
    [
        *((1, 1), (15, 40), (16, 40), (40, 1), (5000, 16), (16, 5000)),
        (40000, 2),  # too wide for resample.c
        (2100, 2100),  # more than the 16 MB that Pillow keeps in one piece
    ],
)
def test_small_narrow_and_large_pictures_are_pillow_s(by_c: Resample, size: tuple[int, int]) -> None:
    for filter in FILTERS:
        how = ((224, 224), filter, (0, 0, *size))
        assert np.array_equal(by_c(picture(*size), *how), by_pillow(picture(*size), *how)), filter


def test_every_thread_gets_its_own_pixels(by_c: Resample) -> None:
    pictures = [picture(300 + i, 200, i) for i in range(16)]

    def work(image: Image.Image) -> bytes:
        return by_c(image, (224, 224), Image.Resampling.BICUBIC, (0, 0, *image.size)).tobytes()

    alone = [work(image) for image in pictures]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, pictures * 8)) == alone * 8


@pytest.mark.parametrize(
    "box", [(-1, 0, 20, 20), (0, 0, 31, 20), (0, 0, 20, 20.5), (5, 5, 5, 5), (0, 0, float("nan"), 9)]
)
def test_a_box_outside_the_picture_is_refused_as_pillow_does(by_c: Resample, box: tuple[float, ...]) -> None:
    results = []
    for resize in (by_c, by_pillow):
        try:
            results.append(str(resize(picture(30, 20), (20, 20), Image.Resampling.BICUBIC, box).tolist()))  # type: ignore[arg-type]
        except ValueError as exc:
            results.append(str(exc))
    assert results[0] == results[1]


def test_a_picture_that_is_not_rgb_is_left_to_pillow(by_c: Resample) -> None:
    grey = picture(40, 30).convert("L")
    how = ((20, 20), Image.Resampling.BICUBIC, (0.0, 0.0, 40.0, 30.0))
    assert np.array_equal(by_c(grey, *how), by_pillow(grey, *how))


def test_it_is_what_the_bundle_uses(by_c: Resample) -> None:
    assert resample.__qualname__ == by_c.__qualname__


@pytest.mark.parametrize(
    ("line", "other"),
    [("FRACTION = 32 - 8 - 2", "FRACTION = 32 - 8 - 12"), ("2 * (in_width - width)", "9 * (in_width - width)")],
)
def test_a_library_that_makes_other_pixels_is_not_used(build: Callable[..., Path], line: str, other: str) -> None:
    assert compiled(build(resample=(line, other))) is None
    assert compiled(build())


def test_without_a_library_pillow_does_it(tmp_path: Path) -> None:
    assert compiled(tmp_path / "pixels.so") is None
    (tmp_path / "pixels.so").write_text("cut off")
    assert compiled(tmp_path / "pixels.so") is None


@pytest.mark.measurement
def test_it_takes_less_than_a_third_of_pillow_s_time(by_c: Resample) -> None:
    image = Image.fromarray(draw(1, 400, 533, seed=1)[0])
    how = ((224, 224), Image.Resampling.BICUBIC, (91.5, 25.0, 441.5, 375.0))
    seconds: dict[Resample, list[float]] = {by_c: [], by_pillow: []}
    for _ in range(50):
        for resize, times in seconds.items():
            start = time.thread_time()
            resize(image, *how)
            times.append(time.thread_time() - start)
    ours, theirs = (float(np.median(times)) * 1e3 for times in seconds.values())
    print(f"resample.c {ours:.2f} ms, Pillow {theirs:.2f} ms")
    assert ours < theirs / 3
