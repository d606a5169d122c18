"""In the model server's image, while it is built: fetch, TorchServe, the golden answers of the default model."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from smoke_gateway import wait

from bundle import golden, manifest
from bundle.cpus import features


def main() -> None:
    with tempfile.TemporaryDirectory() as store:
        settings = {"MODEL_STORE": store, "HOST": "127.0.0.1", "WORKERS": "1"}
        server = subprocess.Popen([sys.executable, "model-server/serve.py"], env=os.environ | settings)
        try:
            wait("http://127.0.0.1:8093/readyz")
        finally:
            server.terminate()
            assert server.wait(60) == 0
    sys.path.append("model-server/worker")
    folder = Path("/opt/bundles/dog-breeds")
    try_openvino(folder)
    if importlib.util.find_spec("torch"):
        try_program(folder)


def try_openvino(folder: Path) -> None:
    """What PRECISION=bf16 runs, where this CPU has what it takes: so OpenVINO is known to be whole. Its byte code."""
    import bf16
    import openvino  # noqa: F401

    if "amx_bf16" in features():
        classes = len(manifest.read(folder).classes)
        golden.check(folder, bf16.compiled(folder), classes, 0, golden.ROUNDINGS * bf16.EPSILON)


def try_program(folder: Path) -> None:
    """The program for GPUs, on a CPU since no build has one: so torch is known to be whole, and has its byte code."""
    import gpu

    found = manifest.read(folder)
    golden.check(folder, gpu.eager(gpu.program(folder, "cpu"), "cpu"), len(found.classes), found.tolerance)


if __name__ == "__main__":
    main()
