"""TorchServe's handler: batches of pixels -> logits, framed by bundle.wire.

It knows tensors, never JPEG or class names. It refuses a bundle that is altered or does not give
its golden answers, and never raises for an item: TorchServe would fail the whole batch with it.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle import golden, manifest, wire
from bundle.picture import Pixels

Request = Mapping[str, bytes | bytearray]


class Model:
    """A verified bundle, ready to run."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Raises BundleError with the file and the reason."""
        self.manifest = manifest.read(folder)
        self.manifest_json = (folder / manifest.MANIFEST).read_bytes()
        resize = self.manifest.input.resize
        self.shape = (resize.height, resize.width, 3)
        self.key = wire.PIXELS + self.manifest.input.contract
        self.run = onnx_runner(folder) if device == "cpu" else torch_runner(folder, device)
        golden.check(folder, self.run, len(self.manifest.classes), self.manifest.tolerance)

    def answer(self, requests: Sequence[Request]) -> list[bytes]:
        """One frame for every request, in order."""
        answers: list[wire.Answer | None] = [self._without_running(request) for request in requests]
        waiting = [i for i, answer in enumerate(answers) if answer is None]
        if waiting:
            pixels = self._stack([requests[i][self.key] for i in waiting])
            for i, result in zip(waiting, self._run_apart(pixels), strict=True):
                answers[i] = self._frame(requests[i], *result)
        return [wire.pack(answer) for answer in answers if answer]

    def _without_running(self, request: Request) -> wire.Answer | None:
        if self.key in request:
            expected, found = int(np.prod(self.shape)), len(request[self.key])
            if found == expected:
                return None
            return self._frame(request, "error", error=f"{found} bytes of pixels, not {expected} for {self.shape}")
        return self._frame(request, "mismatch" if wire.has_pixels(request) else "manifest")

    def _frame(
        self, request: Request, status: wire.Status, logits: NDArray[np.float32] | None = None, error: str = ""
    ) -> wire.Answer:
        digest = self.manifest.digest
        sent = b"" if digest in wire.known(request) else self.manifest_json
        return wire.Answer(status, digest, logits, sent, error)

    def _stack(self, items: Sequence[bytes | bytearray]) -> Pixels:
        if len(items) == 1:
            return np.frombuffer(items[0], np.uint8).reshape(1, *self.shape)
        batch = np.empty((len(items), *self.shape), np.uint8)
        for row, item in zip(batch, items, strict=True):
            row[:] = np.frombuffer(item, np.uint8).reshape(self.shape)
        return batch

    def _run_apart(self, pixels: Pixels) -> list[tuple[wire.Status, NDArray[np.float32] | None, str]]:
        """Run a batch; where that fails, its items one by one, so that one cannot fail the others."""
        try:
            logits = self.run(pixels)
        except Exception as exc:  # whatever the runtime raises becomes this item's own error
            if len(pixels) > 1:
                return [self._run_apart(pixels[i : i + 1])[0] for i in range(len(pixels))]
            print(f"{self.manifest.name}: an item failed: {exc}", file=sys.stderr, flush=True)
            return [("error", None, f"{type(exc).__name__}: {exc}")]
        return [
            ("ok", row, "") if np.isfinite(row).all() else ("error", None, "the model's logits are not finite")
            for row in logits
        ]


def onnx_runner(folder: Path) -> golden.Run:
    """ONNX Runtime on CPU: twice what eager PyTorch gives (see README, Speed)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("THREADS", "1"))
    options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # onnxruntime's own exceptions are not importable by a stable name
        raise manifest.BundleError(f"model.onnx: ONNX Runtime cannot load it: {exc}") from exc
    return lambda pixels: session.run(None, {"pixels": pixels})[0]


def torch_runner(folder: Path, device: str) -> golden.Run:
    """The torch.export program on a GPU."""
    import torch
    from torch.export.passes import move_to_device_pass

    if not (folder / "model.pt2").exists():
        raise manifest.BundleError(
            "model.pt2: is missing, as in int8 bundles, which are for CPUs: on a GPU serve the fp32 one"
        )
    program = move_to_device_pass(torch.export.load(folder / "model.pt2"), device).module()

    def run(pixels: Pixels) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = program(torch.from_numpy(pixels.copy()).to(device)).float().cpu().numpy()
            return logits

    return run


_model: Model | None = None


def handle(data: list[Request] | None, context: Any) -> list[bytes] | None:
    """TorchServe's entry point: called once without data to load, then with every batch."""
    global _model
    if _model is None:
        properties = context.system_properties
        try:
            gpu = properties.get("gpu_id")
            _model = Model(Path(properties["model_dir"]), "cpu" if gpu is None else f"cuda:{gpu}")
        except manifest.BundleError as exc:
            # TorchServe logs what a worker writes to stderr as a warning, and tracebacks as mere information.
            print(f"{context.manifest['model']['modelName']}: refused: {exc}", file=sys.stderr, flush=True)
            raise RuntimeError(str(exc)) from exc
    if data is None:
        return None
    context.metrics.add_counter("kennel_batches", 1)  # TorchServe counts calls alone: batch size = calls / batches
    return _model.answer(data)
