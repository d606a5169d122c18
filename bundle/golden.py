"""Golden pictures: recorded answers that must come out again before a model serves."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bundle.manifest import BundleError
from bundle.picture import Pixels

GOLDEN = "golden.npz"
Pictures = Pixels | Sequence[Pixels]  # uint8 [N, H, W, 3], or N of [H, W, 3]
Run = Callable[[Pictures], NDArray[np.float32]]  # -> float32 [N, C]
# Compares a run with the golden answers, up to this part of their spread. Raises BundleError.
Verify = Callable[[Run, float], None]
# Roundings that golden logits may be away in coarser arithmetic, of the difference between a picture's largest and
# smallest: the two example models are up to 5 away in float16 and 6 in bfloat16, which is eight times as far (24
# photographs, emulated on a CPU).
ROUNDINGS = 16


def record(folder: Path, pixels: Pixels, run: Run) -> None:
    """Write golden.npz: pixels uint8 [N, H, W, 3] and what `run` makes of them."""
    np.savez_compressed(folder / GOLDEN, pixels=pixels, logits=run(pixels))


def check(folder: Path, run: Run, classes: int, tolerance: float, close: float = 0) -> None:
    """Raises BundleError where `run` does not give the recorded logits, each within `tolerance`.

    close: or within this part of the largest difference between two logits of a picture, for coarser arithmetic.
    """
    try:
        # Opened here: where the zip is damaged, np.load would leave its file open.
        with (folder / GOLDEN).open("rb") as file, np.load(file, allow_pickle=False) as golden:
            pixels, expected = golden["pixels"], golden["logits"]
    except Exception as exc:  # a damaged zip raises whatever zipfile, zlib and numpy raise
        raise BundleError(f"{GOLDEN}: cannot be read ({exc})") from exc
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or not len(pixels):
        raise BundleError(f"{GOLDEN}: has pixels {pixels.dtype} {pixels.shape}, not uint8 [N, H, W, 3]")
    if expected.dtype.kind != "f" or expected.shape != (len(pixels), classes):
        raise BundleError(f"{GOLDEN}: has logits {expected.dtype} {expected.shape} for {classes} classes")
    most = max(tolerance, close * float(np.ptp(expected, axis=1).max()))
    for start in range(0, len(pixels), 4):  # in more than one batch: its size must not matter
        got, right = run(pixels[start : start + 4]), expected[start : start + 4]
        if got.shape != right.shape:
            raise BundleError(f"the model answers with shape {got.shape}, {GOLDEN} has {classes} classes")
        off = np.abs(got - right).max(axis=1)
        if not (off <= most).all():  # not (<=): NaN must fail too
            worst = int(np.argmax(np.nan_to_num(off, nan=np.inf)))
            raise BundleError(
                f"the model does not give the answers recorded in {GOLDEN}: picture {start + worst}: "
                f"logits differ by {off[worst]:.4g}, more than {most:g}"
            )


def draw(count: int, height: int, width: int, seed: int = 0) -> Pixels:
    """Drawings by code, uint8 [count, height, width, 3]: waves, a disc and a bar in random colours."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : complex(height), 0 : 1 : complex(width)]
    pictures = np.empty((count, height, width, 3), np.uint8)
    for picture in pictures:
        colours = random.uniform(0, 255, (4, 3))
        (fx, fy, phase), (cx, cy, radius), (edge, thick, _) = random.uniform(0, 1, (3, 3))
        waves = np.sin(2 * np.pi * (phase + 9 * fx * x + 9 * fy * y))[..., None]
        canvas = colours[0] + waves * (colours[1] - colours[0]) / 2
        canvas[(x - cx) ** 2 + (y - cy) ** 2 < (0.15 + 0.3 * radius) ** 2] = colours[2]
        canvas[np.abs(x + y - 2 * edge) < 0.02 + 0.1 * thick] = colours[3]
        picture[:] = canvas.clip(0, 255)
    return pictures
