"""In the gateway's image, while it is built: the real start, a picture through the decoder, its refusal.

There is no model server here, so a picture's right answer is the problem 503.
"""

import io
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request

from PIL import Image

from bundle.jpeg import jpegs
from bundle.picture import Resize, load
from bundle.resample import by_pillow, resample


def main() -> None:
    assert resample is not by_pillow, "resample.c was not compiled, or makes other pixels than Pillow"
    assert jpegs, "jpeg.c was not compiled, or makes other pixels than Pillow"
    drawing = Image.effect_mandelbrot((640, 480), (-2, -1, 1, 1), 50).convert("RGB")
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        data = io.BytesIO()
        drawing.save(data, kind)
        assert load(data.getvalue(), Resize(224, 224, shorter_side=256)).shape == (224, 224, 3), kind
    settings = {"MODELS": "smoke", "HOST": "127.0.0.1", "PROCESSES": "1"}
    gateway = subprocess.Popen([sys.executable, "-m", "gateway"], env=os.environ | settings)
    try:
        wait("http://127.0.0.1:8080/healthz")
        assert status("http://127.0.0.1:8080/predict", data.getvalue()) == 503
    finally:
        gateway.terminate()
        assert gateway.wait(30) == 0


def status(url: str, body: bytes) -> int:
    try:
        return urllib.request.urlopen(url, body, 10).status
    except urllib.error.HTTPError as exc:
        return exc.code


def wait(url: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    main()
