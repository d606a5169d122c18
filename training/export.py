"""A trained module -> a bundle: ONNX and torch.export, golden pictures, parity checked."""

import logging
import os
import platform
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import PIL
import torch
from torch import Tensor, nn

from bundle import golden
from bundle.manifest import BundleError, Decision, Input, Manifest, write
from bundle.picture import Pixels, Resize

ONNX = "model.onnx"
PT2 = "model.pt2"
# float32 through some 60 layers, summed in another order by another library: its rounding grows with the logits.
PARITY, PARITY_OF_LARGEST = 1e-4, 1e-5


class Normalised(nn.Module):
    """Puts normalisation inside: uint8 [N, H, W, 3] -> (x - mean) / std as float32 [N, 3, H, W] -> `network`."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        x = (pixels.permute(0, 3, 1, 2).float() - self.mean) / self.std
        logits: Tensor = self.network(x)
        return logits


def export(
    module: nn.Module,
    folder: Path,
    *,
    name: str,
    version: str,
    classes: Sequence[str],
    resize: Resize,
    golden_pixels: Pixels,
    licence: str,
    decision: Decision | None = None,
    metrics: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write `module` (uint8 [N, H, W, 3] -> float32 [N, C], in eval mode) as a bundle at `folder`.

    golden_pixels: uint8 [K, H, W, 3]. Raises BundleError where the exported models do not agree
    with the module to PARITY and PARITY_OF_LARGEST, or the folder holds something else.
    """

    def make(new: Path) -> Manifest:
        torch.export.save(to_onnx(module, new / ONNX, resize), new / PT2)
        _check_parity(module, new, golden_pixels)
        golden.record(new, golden_pixels, onnx_runner(new / ONNX))
        return Manifest(
            name=name,
            version=version,
            classes=tuple(classes),
            input=_input(resize),
            licence=licence,
            decision=decision or Decision(),
            metrics=metrics or {},
            provenance={**here(), **(provenance or {})},
        )

    return write(folder, make)


def onnx_runner(path: Path, threads: int = 1) -> golden.Run:
    """ONNX Runtime on CPU: uint8 [N, H, W, 3] -> float32 [N, C]."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixels": pixels})[0]


def _input(resize: Resize) -> Input:
    # Larger than twice the target, so that the check covers scaling while decoding.
    side = 2 * (resize.shorter_side or max(resize.height, resize.width))
    return Input.drawn(resize, golden.draw(1, side + 90, side + 140, seed=7)[0])


def to_onnx(module: nn.Module, path: Path, resize: Resize) -> torch.export.ExportedProgram:
    """Write `module` (uint8 [N, H, W, 3] -> float32 [N, C], in eval mode) as ONNX, and give back its program."""
    # A batch of 2: an example of 1 would make the exporter take N for a constant.
    example = (torch.zeros(2, resize.height, resize.width, 3, dtype=torch.uint8),)
    shapes = ({0: torch.export.Dim("n", min=1, max=1024)},)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's notes to its own developers
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.export.export(module, example, dynamic_shapes=shapes)
        torch.onnx.export(
            program,
            (),
            path,
            input_names=["pixels"],
            output_names=["logits"],
            external_data=False,
            verbose=False,
        )
    onnx.checker.check_model(path)
    return program


def _check_parity(module: nn.Module, folder: Path, pixels: Pixels) -> None:
    with torch.no_grad():
        expected = module(torch.from_numpy(pixels)).numpy()
        program = torch.export.load(folder / PT2).module()
        found = {ONNX: onnx_runner(folder / ONNX)(pixels), PT2: program(torch.from_numpy(pixels)).numpy()}
    most = PARITY + PARITY_OF_LARGEST * float(np.abs(expected).max())
    for file, logits in found.items():
        off = float(np.abs(logits - expected).max())
        if not off <= most:
            raise BundleError(f"{file}: its logits differ from the module's by {off:.3g}, more than {most:.3g}")


def here() -> dict[str, Any]:
    """What makes a bundle here: commit, versions, machine."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "pillow": PIL.__version__,
        "machine": platform.platform(),
    }


def _commit() -> str:
    """The image's, which holds no git, or this checkout's."""
    if revision := os.environ.get("REVISION"):
        return revision
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"
