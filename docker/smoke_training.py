"""In the training image, while it is built: drawings of two classes to a bundle.

By the head alone; and in full, as a job of two workers, as Vertex AI would start them.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from bundle.golden import draw
from bundle.jpeg import jpegs
from bundle.manifest import read
from bundle.resample import by_pillow, resample


def main() -> None:
    assert resample is not by_pillow, "resample.c was not compiled, or makes other pixels than Pillow"
    assert jpegs, "jpeg.c was not compiled, or makes other pixels than Pillow"
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        for label, colour in (("red", 0), ("blue", 2)):
            (data / label).mkdir(parents=True)
            for i, pixels in enumerate(draw(12, 96, 96, seed=colour)):
                pixels[..., colour] = 255
                Image.fromarray(pixels).save(data / label / f"{i}.png")
        quick = [sys.executable, "-m", "training.train", str(data), "--out", f"{scratch}/quick", "--quick"]
        subprocess.run([*quick, "--cache", f"{scratch}/cache"], check=True)
        assert read(Path(scratch) / "quick").classes == ("blue", "red")
        job(data, Path(scratch) / "base")
        assert read(Path(scratch) / "base" / "model").provenance["hardware"]["processes"] == 2


def job(data: Path, base: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = {"MODEL_DIR": "model", "CHECKPOINT_DIR": "checkpoints", "TENSORBOARD_LOG_DIR": "logs"}
    environment = os.environ | {f"AIP_{key}": f"{base}/{part}/" for key, part in places.items()}
    command = [sys.executable, "-m", "training.job", str(data), "--epochs", "1", "--batch", "4", "--workers", "1"]
    workers = []
    for number in range(2):
        cluster = {f"workerpool{i}": ["127.0.0.1:2222"] for i in range(2)}
        spec = {"cluster": cluster, "task": {"type": f"workerpool{number}", "index": 0}, "open_ports": [port]}
        workers.append(subprocess.Popen(command, env=environment | {"CLUSTER_SPEC": json.dumps(spec)}))
    assert [worker.wait() for worker in workers] == [0, 0]


if __name__ == "__main__":
    main()
