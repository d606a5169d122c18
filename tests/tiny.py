"""Tiny bundles for tests, made without torch: the class whose colour the picture has wins."""

from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from load import Call
from PIL import Image

from bundle import golden, manifest
from bundle.picture import Resize

COLOURS = {"red": (230, 20, 20), "green": (20, 230, 20), "blue": (20, 20, 230)}
# Where to post a picture: an answer goes around Flask, or through it where a model is named (gateway/app.py, _short).
WAYS = ("/predict", "/predict?model=tiny")


def tiny_bundle(
    folder: Path, classes: Sequence[str] = tuple(COLOURS), *, name: str = "tiny", version: str = "1", size: int = 32
) -> manifest.Manifest:
    """A bundle whose three classes stand for red, green and blue pictures, in this order."""

    def make(new: Path) -> manifest.Manifest:
        model(new / "model.onnx", size)
        session = onnxruntime.InferenceSession(new / "model.onnx", providers=["CPUExecutionProvider"])
        golden.record(new, golden.draw(6, size, size), lambda pixels: session.run(None, {"pixels": pixels})[0])
        resize = Resize(size, size, "crop", size + 8)
        return manifest.Manifest(
            name=name,
            version=version,
            classes=tuple(classes),
            input=manifest.Input.drawn(resize, golden.draw(1, 3 * size, 4 * size, seed=7)[0]),
            licence="CC0-1.0",
            decision=manifest.Decision(threshold=0.5, top_k=2),
        )

    return manifest.write(folder, make)


# One model in two versions: what each calls a colour. They differ in input size too.
NAMES = {"1": dict(zip(COLOURS, COLOURS, strict=True)), "2": {"red": "rouge", "green": "vert", "blue": "bleu"}}


def two_versions(folder: Path) -> None:
    """folder/1 and folder/2"""
    for version, size in (("1", 32), ("2", 48)):
        tiny_bundle(folder / version, list(NAMES[version].values()), version=version, size=size)


def misnamed(calls: Iterable[Call]) -> list[Call]:
    """Those whose answer is not what the answering version calls the colour that their request id names."""
    return [call for call in calls if call.body["label"] != NAMES[call.body["version"]][call.request_id]]


def model(path: Path, size: int, gain: float = 0.05) -> None:
    """uint8 [N, size, size, 3] -> gain times the mean red, green and blue, float32 [N, 3]."""
    node, tensor = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            node("Cast", ["pixels"], ["float"], to=onnx.TensorProto.FLOAT),
            node("ReduceMean", ["float", "axes"], ["mean"], keepdims=0),
            node("Mul", ["mean", "gain"], ["logits"]),
        ],
        "tiny",
        [tensor("pixels", onnx.TensorProto.UINT8, ["n", size, size, 3])],
        [tensor("logits", onnx.TensorProto.FLOAT, ["n", 3])],
        [
            onnx.numpy_helper.from_array(np.array([1, 2], np.int64), "axes"),
            onnx.numpy_helper.from_array(np.array([gain], np.float32), "gain"),
        ],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)


def picture(colour: str, width: int = 60, height: int = 48, format: str = "PNG") -> bytes:
    """A picture file of one colour."""
    file = BytesIO()
    Image.new("RGB", (width, height), COLOURS[colour]).save(file, format)
    return file.getvalue()


# What may happen to a tiny bundle: each damages the folder and returns what the refusal must say.


def damage_golden(folder: Path) -> str:
    data = bytearray((folder / "golden.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "golden.npz").write_bytes(data)
    return "golden.npz: was altered"


def shorten_classes(folder: Path) -> str:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"red",', "", 1))
    return "manifest.json: was altered"


def truncate_onnx(folder: Path) -> str:
    data = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(data[: len(data) // 2])
    return "model.onnx: was altered or cut off"


def other_weights(folder: Path) -> str:
    """Everything else intact: digests made anew, so that only the golden pictures can tell."""
    old = manifest.read(folder)
    model(folder / "model.onnx", 32, gain=0.0501)
    files = {**old.files, "model.onnx": manifest.sha256((folder / "model.onnx").read_bytes())}
    fields = {name: getattr(old, name) for name in old.__dataclass_fields__}
    (folder / "manifest.json").write_bytes(manifest.Manifest(**{**fields, "files": files}).to_json())
    return "the model does not give the answers recorded in golden.npz"


DAMAGES = [damage_golden, shorten_classes, truncate_onnx, other_weights]
