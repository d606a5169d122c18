"""What every contender does with a picture: the bundle's own decode, model and decision, and its resize's pixels."""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle import manifest, picture, resample

Run = Callable[[picture.Pixels], NDArray[np.float32]]  # uint8 [N, H, W, 3] -> float32 [N, C]


class Classifier:
    """Picture bytes -> {"top": [{"label", "probability"}, ...]}, the best first.

    From the environment: BUNDLE, a folder; RUNTIME, "onnx", "torch" or "bf16"; THREADS, for each call of the model;
    FULL=1 to decode every pixel of a JPEG, as a guide's Image.open does, instead of what the resize needs; PILLOW=1 for
    Pillow alone, as everybody does, instead of with bundle/jpeg.c and resample.c: the pixels are the same.
    """

    def __init__(self) -> None:
        folder, threads = Path(os.environ["BUNDLE"]), int(os.environ["THREADS"])
        self.manifest = manifest.read(folder)
        self.full = os.environ.get("FULL") == "1"
        if os.environ.get("PILLOW") == "1":
            picture.resample, picture.jpegs = resample.by_pillow, None  # type: ignore[attr-defined]
        self.run = {"onnx": onnx, "torch": torch, "bf16": bf16}[os.environ["RUNTIME"]](folder, threads)

    def __call__(self, data: bytes) -> dict[str, Any]:
        return self.decide(self.run(self.decode(data)[None])[0])

    def decode(self, data: bytes) -> picture.Pixels:
        """Picture bytes -> uint8 [H, W, 3]."""
        resize = self.manifest.input.resize
        return picture.resize(picture.decode(data), resize) if self.full else picture.load(data, resize)

    def decide(self, logits: NDArray[np.float32]) -> dict[str, Any]:
        """float32 [C] -> the answer."""
        decision = self.manifest.decision
        scaled = logits / decision.temperature
        exp = np.exp(scaled - scaled.max())
        best = np.argsort(-exp)[: decision.top_k]
        share = exp / exp.sum()
        return {"top": [{"label": self.manifest.classes[i], "probability": float(share[i])} for i in best]}


def onnx(folder: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(pixels: picture.Pixels) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = session.run(None, {name: pixels})[0]
        return logits

    return run


def bf16(folder: Path, threads: int) -> Run:
    """As the model server runs it. Each thread has its own: one is for one picture at a time."""
    sys.path.append(str(Path(__file__).parents[2] / "model-server" / "worker"))
    import bf16

    mine = threading.local()

    def run(pixels: picture.Pixels) -> NDArray[np.float32]:
        if not hasattr(mine, "run"):
            mine.run = bf16.compiled(folder)  # with THREADS from the environment
        logits: NDArray[np.float32] = mine.run(pixels)
        return logits

    return run


def torch(folder: Path, threads: int) -> Run:
    """Eager PyTorch: the exported program's operators, one by one, none of them compiled or fused.

    It takes 4 to 6% more CPU than the nn.Module that it was exported from (15.3 against 14.4 ms, medians of 25, three
    times, one thread), which a bundle does not hold.
    """
    import torch

    torch.set_num_threads(threads)
    program = torch.export.load(folder / "model.pt2").module()

    def run(pixels: picture.Pixels) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = program(torch.from_numpy(pixels.copy())).numpy()
            return logits

    return run


def port() -> int:
    """Where to listen, on loopback."""
    return int(os.environ["PORT"])


def workers() -> int:
    """Processes that run the model."""
    return int(os.environ["WORKERS"])
