"""Drawn pictures of eight "classes", their colours, and a small model that mostly tells them apart."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
from PIL import Image, ImageDraw

from bundle import golden, picture
from bundle.manifest import Decision, Input, Manifest, write
from bundle.picture import Resize
from training.data import Catalogue, Record
from training.export import ONNX, onnx_runner
from training.metrics import Predictions

COLOURS = {
    "blue": (50, 90, 200),
    "green": (60, 160, 80),
    "orange": (235, 140, 50),
    "pink": (240, 150, 180),
    "red": (200, 50, 50),
    "teal": (40, 160, 160),
    "violet": (140, 80, 190),
    "yellow": (235, 205, 70),
}
CLASSES = tuple(COLOURS)
RESIZE = Resize(48, 48, "crop", 56)
PAPER = 225
# One direction of the mean colour a class, away from the paper; too sure of itself, as untreated models are:
# logits = WEIGHTS @ (mean - PAPER).
WEIGHTS = np.array([np.subtract(c, PAPER) / np.linalg.norm(np.subtract(c, PAPER)) for c in COLOURS.values()], "f4") * 4


def drawing(name: str, seed: int, size: int = 160) -> bytes:
    """A JPEG: some shape in about the colour `name`, on paper."""
    random = np.random.default_rng([seed, CLASSES.index(name)])
    paper = tuple(int(v) for v in random.normal(PAPER, 4, 3).clip(0, 255))
    colour = tuple(int(v) for v in (COLOURS[name] + random.normal(0, 18, 3)).clip(0, 255))
    image = Image.new("RGB", (4 * size // 3, size), paper)
    pen = ImageDraw.Draw(image)
    r = size * random.uniform(0.3, 0.42)
    x, y = random.uniform(r, image.width - r), random.uniform(r, size - r)
    turn = random.uniform(0, 90)
    match random.integers(3):
        case 0:
            pen.ellipse((x - r, y - r, x + r, y + r), colour)
        case 1:
            pen.regular_polygon((x, y, r), 4, turn, colour)
        case _:
            pen.regular_polygon((x, y, r), 3, turn, colour)
    jpeg = BytesIO()
    image.save(jpeg, "JPEG", quality=85)
    return jpeg.getvalue()


def logits(pixels: picture.Pixels, classes: Sequence[str] = CLASSES) -> np.ndarray:
    """uint8 [N, H, W, 3] -> float32 [N, C]: the colour in whose direction the mean lies from the paper wins."""
    mean = pixels.reshape(len(pixels), -1, 3).astype(np.float32).mean(axis=1)
    return (mean - PAPER) @ WEIGHTS[[CLASSES.index(name) for name in classes]].T


@dataclass(frozen=True)
class Drawn(Catalogue):
    """A catalogue in memory."""

    content: dict[str, bytes] = field(default_factory=dict)

    def pictures(self, records: Sequence[Record]) -> Iterator[tuple[Record, bytes]]:
        for record in records:
            yield record, self.read(record)

    def read(self, record: Record) -> bytes:
        return self.content[record.key]


def catalogue(each: int = 6, train: int = 2, names: Sequence[str] = CLASSES, mislabelled: int = 0) -> Drawn:
    """`each` pictures a class in validation, `train` in train; of `mislabelled` classes the first has a wrong label."""
    content, records = {}, []
    for label, name in enumerate(names):
        for i in range(each + train):
            key = f"{name}/{i:03}.jpg"
            content[key] = drawing(name, i)
            split = "train" if i >= each else "validation"
            given = (label + 1) % len(names) if i == 0 and label < mislabelled else label
            records.append(Record(key, given, split, hashlib.sha256(content[key]).hexdigest()))
    return Drawn("drawn/pictures", tuple(names), tuple(records), (), (), "d" * 64, content=content)


def predictions(of: Drawn) -> Predictions:
    """What the model makes of the validation pictures, without a bundle."""
    records = of.of("validation", evaluation=True)
    pixels = np.stack([picture.load(content, RESIZE) for _, content in of.pictures(records)])
    return Predictions(records, np.array([record.label for record in records]), logits(pixels), of.classes)


def bundle_of(folder: Path, classes: Sequence[str], decision: Decision) -> Manifest:
    """A bundle whose model gives `logits`, and -999 for a class that is none of CLASSES."""

    def make(new: Path) -> Manifest:
        rows = [WEIGHTS[CLASSES.index(name)] if name in CLASSES else np.zeros(3, "f4") for name in classes]
        bias = [-PAPER * row.sum() if row.any() else -999 for row in rows]
        constants = {"axes": np.array([1, 2]), "weights": np.stack(rows, 1), "bias": np.array(bias, "f4")}
        node, tensor = onnx.helper.make_node, onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            [
                node("Cast", ["pixels"], ["float"], to=onnx.TensorProto.FLOAT),
                node("ReduceMean", ["float", "axes"], ["mean"], keepdims=0),
                node("MatMul", ["mean", "weights"], ["product"]),
                node("Add", ["product", "bias"], ["logits"]),
            ],
            "colours",
            [tensor("pixels", onnx.TensorProto.UINT8, ["n", RESIZE.height, RESIZE.width, 3])],
            [tensor("logits", onnx.TensorProto.FLOAT, ["n", len(classes)])],
            [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        opset = [onnx.helper.make_opsetid("", 18)]
        onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), new / ONNX)
        golden.record(new, golden.draw(4, RESIZE.height, RESIZE.width), onnx_runner(new / ONNX))
        return manifest(decision, classes)

    return write(folder, make)


def manifest(decision: Decision, classes: Sequence[str] = CLASSES) -> Manifest:
    return Manifest(
        name="colours",
        version="2",
        classes=tuple(classes),
        input=Input.drawn(RESIZE, golden.draw(1, 200, 260, seed=7)[0]),
        licence="CC0-1.0",
        decision=decision,
        provenance={"data": {"digest": "d" * 64}, "seed": 0, "torch": "2.13.0"},
    )
