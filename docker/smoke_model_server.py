"""In the model server's image, while it is built: fetch, TorchServe, the golden answers of the default model."""

import os
import subprocess
import sys
import tempfile

from smoke_gateway import wait


def main() -> None:
    with tempfile.TemporaryDirectory() as store:
        settings = {"MODEL_STORE": store, "HOST": "127.0.0.1", "WORKERS": "1"}
        server = subprocess.Popen([sys.executable, "model-server/serve.py"], env=os.environ | settings)
        try:
            wait("http://127.0.0.1:8093/readyz")
        finally:
            server.terminate()
            assert server.wait(60) == 0


if __name__ == "__main__":
    main()
