"""A bundle's model.onnx on a CPU in bfloat16, where the golden answers stay close: OpenVINO.

AMX, which Intel's Xeons have since 2023, multiplies bfloat16 at many times float32's speed; ONNX Runtime does not use
it for convolutions. Without AMX bfloat16 is slower than float32 (docs/speed.md).
"""

import os
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bundle.cpus import features
from bundle.golden import ROUNDINGS, Pictures, Run, Verify

EPSILON = 2.0**-7  # of bfloat16: from 1 to the next larger number


def runner(folder: Path, verify: Verify, exact: Run) -> Run:
    """Pixels -> logits, in bfloat16; `exact` where the CPU has no AMX or the answers are not close, which the log says
    then."""
    try:
        if "amx_bf16" not in features():
            raise RuntimeError("this CPU has no AMX, and is faster with float32")
        run = compiled(folder)
        verify(run, ROUNDINGS * EPSILON)
        return run
    except Exception as exc:  # of OpenVINO's of several types, and lines
        print(f"not served in bfloat16: {' '.join(str(exc).split())}", file=sys.stderr, flush=True)
        return exact


def compiled(folder: Path) -> Run:
    """For one picture at a time: two take as long each, and a number that changes a third longer."""
    import openvino

    core = openvino.Core()
    model = core.read_model(folder / "model.onnx")
    shape = model.input(0).get_partial_shape()
    shape[0] = 1
    model.reshape(shape)
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16",
        "INFERENCE_NUM_THREADS": int(os.environ.get("THREADS", "1")),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # every worker would choose the same CPU
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(pixels: Pictures) -> NDArray[np.float32]:
        logits = [request.infer({0: picture[None]}, share_inputs=True)[0] for picture in pixels]
        return np.concatenate(logits)

    return run
