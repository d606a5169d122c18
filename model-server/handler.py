"""TorchServe's handler: batches of pixels -> logits, framed by bundle.wire.

It knows tensors, never JPEG or class names. It refuses a bundle that is altered or does not give
its golden answers, and never raises for an item: TorchServe would fail the whole batch with it.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle import golden, manifest, wire
from bundle.cpus import gpus
from bundle.picture import Pixels

Request = Mapping[str, bytes | bytearray]

# Pictures that go through the model at once on a CPU: more than two only leave its caches. EfficientNet-Lite0 costs
# 5.0 ms a picture by ones and twos, 5.4 by fours, 5.8 by eights (ONNX Runtime 1.31, two AVX-512 cores, n=3).
AT_ONCE = 2


class Model:
    """A verified bundle, ready to run."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Raises BundleError with the file and the reason."""
        self.manifest = manifest.read(folder)
        self.manifest_json = (folder / manifest.MANIFEST).read_bytes()
        resize = self.manifest.input.resize
        self.shape = (resize.height, resize.width, 3)
        self.key = wire.PIXELS + self.manifest.input.contract
        self.classes = len(self.manifest.classes)
        self.workers = int(os.environ.get("WORKERS", "1"))

        def verify(run: golden.Run, close: float = 0) -> None:
            golden.check(folder, run, self.classes, self.manifest.tolerance, close)

        if device == "cpu":
            self.run, self.at_once = onnx_runner(folder), AT_ONCE
            verify(self.run)
            if os.environ.get("PRECISION") == "bf16":
                import bf16

                self.run = bf16.runner(folder, verify, self.run)
        else:
            import gpu  # and with it torch, which takes seconds

            self.run, self.at_once = gpu.runner(folder, device, self.shape, self.classes, verify), gpu.SIZES[-1]

    def answer(self, requests: Sequence[Request]) -> list[bytes]:
        """One frame for every request, in order."""
        started = time.perf_counter()
        answers: list[wire.Answer | None] = [self._without_running(request) for request in requests]
        waiting = [i for i, answer in enumerate(answers) if answer is None]
        items = [np.frombuffer(requests[i][self.key], np.uint8).reshape(-1, *self.shape) for i in waiting]
        logits, failed = self._run(items)
        start = 0
        for i, pixels in zip(waiting, items, strict=True):
            end = start + len(pixels)
            whys = {at - start: why for at, why in failed.items() if start <= at < end}
            if end - start == 1 and whys:
                answers[i] = self._frame(requests[i], "error", error=whys[0])
            else:
                answers[i] = self._frame(requests[i], "ok", logits[start:end], failed=whys)
            start = end
        seconds = time.perf_counter() - started
        return [wire.pack(replace(answer, seconds=seconds, workers=self.workers)) for answer in answers if answer]

    def _without_running(self, request: Request) -> wire.Answer | None:
        if self.key in request:
            count, found, each = wire.count(request), len(request[self.key]), int(np.prod(self.shape))
            if found == count * each > 0:
                return None
            expected = f"{each} for each {self.shape} of 1 to {wire.MOST}"
            return self._frame(request, "error", error=f"{found} bytes of pixels for {count}, not {expected}")
        return self._frame(request, "mismatch" if wire.has_pixels(request) else "manifest")

    def _frame(
        self,
        request: Request,
        status: wire.Status,
        logits: NDArray[np.float32] | None = None,
        error: str = "",
        failed: Mapping[int, str] | None = None,
    ) -> wire.Answer:
        digest = self.manifest.digest
        sent = b"" if digest in wire.known(request) else self.manifest_json
        return wire.Answer(status, digest, logits, sent, error, failed or {})

    def _run(self, items: Sequence[Pixels]) -> tuple[NDArray[np.float32], dict[int, str]]:
        """Pictures [N, H, W, 3] each -> logits [sum of N, C], and why some of them mean nothing."""
        logits = np.zeros((sum(map(len, items)), self.classes), np.float32)
        failed: dict[int, str] = {}
        at = 0
        for pixels in _chunks(items, self.at_once):
            for i, why in self._run_apart(pixels, logits[at : at + len(pixels)]).items():
                failed[at + i] = why
            at += len(pixels)
        return logits, failed

    def _run_apart(self, pixels: golden.Pictures, logits: NDArray[np.float32]) -> dict[int, str]:
        """Run a batch into `logits`; where that fails, its pictures one by one, so that one cannot fail the others."""
        try:
            logits[:] = self.run(pixels)
        except Exception as exc:  # whatever the runtime raises becomes this picture's own error
            if len(pixels) > 1:
                each = [self._run_apart(pixels[i : i + 1], logits[i : i + 1]) for i in range(len(pixels))]
                return {i: why[0] for i, why in enumerate(each) if why}
            print(f"{self.manifest.name}: an item failed: {exc}", file=sys.stderr, flush=True)
            logits[:] = 0
            return {0: f"{type(exc).__name__}: {exc}"}
        finite = np.isfinite(logits).all(axis=1)
        return {int(i): "the model's logits are not finite" for i in np.flatnonzero(~finite)}


def _chunks(items: Sequence[Pixels], most: int) -> Iterator[golden.Pictures]:
    """At most so many pictures at a time, whoever sent them."""
    pictures = items[0] if len(items) == 1 else [picture for item in items for picture in item]
    for start in range(0, len(pictures), most):
        yield pictures[start : start + most]


def onnx_runner(folder: Path) -> golden.Run:
    """ONNX Runtime on CPU: twice what eager PyTorch gives (see README, How fast)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("THREADS", "1"))
    options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # onnxruntime's own exceptions are not importable by a stable name
        raise manifest.BundleError(f"model.onnx: ONNX Runtime cannot load it: {exc}") from exc
    return lambda pixels: session.run(None, {"pixels": np.asarray(pixels)})[0]


class Tally:
    """Batches and pictures for TorchServe's metrics, told once a second: each time costs a line of text, which the
    worker writes and the JVM parses."""

    def __init__(self, metrics: Any) -> None:
        self._metrics, self._lock = metrics, threading.Lock()
        self._counts = dict.fromkeys(("kennel_batches", "kennel_pictures"), 0)
        # What else TorchServe's Python writes for every batch nobody reads.
        logging.getLogger().setLevel(logging.WARNING)
        told = logging.getLogger("ts.metrics.caching_metric")
        told.setLevel(logging.INFO)
        told.addFilter(lambda record: "kennel_" in str(record.msg))
        threading.Thread(target=self._tell, daemon=True).start()

    def add(self, pictures: int) -> None:
        with self._lock:
            self._counts["kennel_batches"] += 1
            self._counts["kennel_pictures"] += pictures

    def _tell(self) -> None:
        while True:
            time.sleep(1)
            with self._lock:
                counts, self._counts = self._counts, dict.fromkeys(self._counts, 0)
            for name, count in counts.items():
                if count:
                    self._metrics.add_counter(name, count)


_model: Model | None = None
_tally: Tally | None = None


def handle(data: list[Request] | None, context: Any) -> list[bytes] | None:
    """TorchServe's entry point: called once without data to load, then with every batch."""
    global _model, _tally
    if _model is None:
        properties = context.system_properties
        try:
            gpu = properties.get("gpu_id")
            if gpu is None and gpus():
                print("there is a GPU, but TorchServe found none: is nvidia-smi missing?", file=sys.stderr, flush=True)
            _model = Model(Path(properties["model_dir"]), "cpu" if gpu is None else f"cuda:{gpu}")
            _model.answer([{}])  # an archive of another version, whose answers this wire cannot pack, fails here
        except manifest.BundleError as exc:
            # TorchServe logs what a worker writes to stderr as a warning, and tracebacks as mere information.
            print(f"{context.manifest['model']['modelName']}: refused: {exc}", file=sys.stderr, flush=True)
            raise RuntimeError(str(exc)) from exc
    if data is None:
        return None
    if _tally is None:
        _tally = Tally(context.metrics)
    _tally.add(sum(map(wire.count, filter(wire.has_pixels, data))))
    return _model.answer(data)
