"""bundle.golden: a model that does not give the recorded answers is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bundle import golden
from bundle.manifest import BundleError
from bundle.picture import Pixels

CLASSES = 3
PIXELS = golden.draw(6, 8, 12)


def run(pixels: Pixels) -> Any:
    """Stands for a model: the mean of every channel."""
    return pixels.reshape(len(pixels), -1, CLASSES).mean(1, dtype=np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    golden.record(tmp_path, PIXELS, run)
    return tmp_path


@pytest.mark.parametrize("off", [0, 0.009, -0.009])
def test_answers_within_the_tolerance_pass(folder: Path, off: float) -> None:
    golden.check(folder, lambda pixels: run(pixels) + off, CLASSES, 0.01)


def changed(picture: int, by: float) -> golden.Run:
    """`run` with one logit of one picture changed, wherever in a batch the picture comes."""

    def other(pixels: Pixels) -> Any:
        logits = run(pixels)
        logits[(pixels == PIXELS[picture]).all((1, 2, 3)), 1] += by
        return logits

    return other


@pytest.mark.parametrize("picture", [0, 3, 5])
@pytest.mark.parametrize(("by", "shown"), [(0.02, "0.02"), (-5, "5"), (np.nan, "nan"), (np.inf, "inf")])
def test_one_logit_off_is_refused_with_its_picture(folder: Path, picture: int, by: float, shown: str) -> None:
    with pytest.raises(BundleError, match=rf"npz: picture {picture}: logits differ by {shown}.*, more than 0.01"):
        golden.check(folder, changed(picture, by), CLASSES, 0.01)


@pytest.mark.parametrize(
    "other",
    [lambda pixels: run(pixels)[:, :2], lambda pixels: run(pixels)[:1], lambda pixels: run(pixels)[0]],
    ids=["fewer classes", "fewer pictures", "no batch"],
)
def test_answers_of_another_shape_are_refused(folder: Path, other: golden.Run) -> None:
    with pytest.raises(BundleError, match=r"the model answers with shape .*golden.npz has 3 classes"):
        golden.check(folder, other, CLASSES, 0.01)


def test_another_number_of_classes_is_refused(folder: Path) -> None:
    with pytest.raises(BundleError, match=r"golden.npz: has logits float32 \(6, 3\) for 4 classes"):
        golden.check(folder, run, 4, 0.01)


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"pixels": PIXELS},
        {"pixels": PIXELS, "logits": run(PIXELS)[:5]},
        {"pixels": PIXELS[:0], "logits": run(PIXELS)[:0]},
        {"pixels": PIXELS.astype(np.float32), "logits": run(PIXELS)},
        {"pixels": PIXELS[..., 0], "logits": run(PIXELS)},
        {"pixels": np.uint8(3), "logits": run(PIXELS)},
        {"pixels": PIXELS, "logits": np.full((6, 3), "x")},
        {"pixels": PIXELS, "logits": np.full((6, 3), {})},
    ],
    ids=["none", "no logits", "too few", "empty", "float pixels", "3 axes", "a number", "text", "objects"],
)
def test_a_golden_file_of_something_else_is_refused(tmp_path: Path, arrays: dict[str, Any]) -> None:
    np.savez(tmp_path / golden.GOLDEN, **arrays)
    with pytest.raises(BundleError, match=r"golden.npz: (cannot be read|has)"):
        golden.check(tmp_path, run, CLASSES, 0.01)


def test_a_missing_golden_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"golden.npz: cannot be read"):
        golden.check(tmp_path, run, CLASSES, 0.01)


@pytest.mark.parametrize("kept", [0, 0.1, 0.5, 0.9, 0.999])
def test_a_golden_file_cut_off_is_refused(folder: Path, kept: float) -> None:
    file = folder / golden.GOLDEN
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    with pytest.raises(BundleError, match=r"golden.npz: cannot be read"):
        golden.check(folder, run, CLASSES, 0.01)


@pytest.mark.parametrize("part", ["pixels.npy", "logits.npy"])
def test_a_golden_file_with_a_changed_byte_is_refused(folder: Path, part: str) -> None:
    file = folder / golden.GOLDEN
    data = bytearray(file.read_bytes())
    data[data.index(part.encode()) + 60] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match=r"golden.npz"):
        golden.check(folder, run, CLASSES, 0.01)


def test_drawings_are_the_same_every_time_and_differ_by_seed_and_number() -> None:
    again = golden.draw(6, 8, 12)
    assert (again.shape, str(again.dtype)) == ((6, 8, 12, 3), "uint8")
    assert np.array_equal(again, PIXELS)
    assert not np.array_equal(golden.draw(6, 8, 12, seed=1), PIXELS)
    assert len({picture.tobytes() for picture in PIXELS}) == 6


def test_fewer_drawings_are_the_first_of_more() -> None:
    assert np.array_equal(golden.draw(2, 8, 12), PIXELS[:2])


def test_drawings_have_colours_and_shapes() -> None:
    for picture in golden.draw(8, 64, 64):
        assert picture.std(axis=(0, 1)).max() > 10
