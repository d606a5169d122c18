"""In the model server's image, while it is built: fetch, TorchServe, the golden answers of the default model."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from smoke_gateway import wait

from bundle import golden, manifest


def main() -> None:
    with tempfile.TemporaryDirectory() as store:
        settings = {"MODEL_STORE": store, "HOST": "127.0.0.1", "WORKERS": "1"}
        server = subprocess.Popen([sys.executable, "model-server/serve.py"], env=os.environ | settings)
        try:
            wait("http://127.0.0.1:8093/readyz")
        finally:
            server.terminate()
            assert server.wait(60) == 0
    if importlib.util.find_spec("torch"):
        try_program(Path("/opt/bundles/dog-breeds"))


def try_program(folder: Path) -> None:
    """The program for GPUs, on a CPU since no build has one: so torch is known to be whole, and has its byte code."""
    sys.path.append("model-server/worker")
    import gpu

    found = manifest.read(folder)
    golden.check(folder, gpu.eager(gpu.program(folder, "cpu"), "cpu"), len(found.classes), found.tolerance)


if __name__ == "__main__":
    main()
