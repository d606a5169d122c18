"""In the training image, while it is built: drawings of two classes to a bundle, by the head alone and in full."""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from bundle.golden import draw
from bundle.manifest import read


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        for label, colour in (("red", 0), ("blue", 2)):
            (data / label).mkdir(parents=True)
            for i, pixels in enumerate(draw(12, 96, 96, seed=colour)):
                pixels[..., colour] = 255
                Image.fromarray(pixels).save(data / label / f"{i}.png")
        for name, flags in (("quick", ["--quick"]), ("full", ["--epochs", "1", "--batch", "4", "--workers", "1"])):
            bundle = Path(scratch) / name
            command = [sys.executable, "-m", "training.train", str(data), "--out", str(bundle), *flags]
            command += ["--cache", f"{scratch}/cache"]
            subprocess.run(command, check=True)
            assert read(bundle).classes == ("blue", "red")


if __name__ == "__main__":
    main()
