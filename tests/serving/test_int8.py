"""An int8 bundle through a real TorchServe: what callers get is what the bundle gives, alone and sharing calls."""

from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import onnx
import pytest
import requests
from PIL import Image

from bundle import golden, manifest, picture
from gateway.schemas import decide
from local import processes, run
from training import int8, quantize
from training.export import ONNX, onnx_runner


@pytest.fixture(scope="module")
def folder(bundle, tmp_path_factory):
    """The default bundle in int8, from drawings."""
    folder, base = tmp_path_factory.mktemp("int8") / "dog-breeds", manifest.read(bundle)
    resize = base.input.resize
    pixels = golden.draw(8, resize.height, resize.width)
    manifest.write(folder, quantize._Maker(bundle, base, pixels, 3, {}))
    return folder


def test_callers_get_what_the_bundle_gives(folder, tmp_path):
    served = manifest.read(folder)
    drawings = golden.draw(12, 300, 400, seed=3)
    files = []
    for drawing in drawings:
        Image.fromarray(drawing).save(file := BytesIO(), "PNG")
        files.append(file.getvalue())
    model = onnx_runner(folder / ONNX)
    pixels = [picture.load(data, served.input.resize) for data in files]
    expected = [decide(served, model(one[None])[0], 5).model_dump() for one in pixels]
    port, grpc_port = processes.free_ports(2)
    with (
        (tmp_path / "log").open("wb") as log,
        run.running([folder], port, grpc_port, log) as running,
        ThreadPoolExecutor(12) as callers,
    ):

        def ask(data):
            return requests.post(f"{running.url}/predict?top_k=5", data=data, timeout=30).json()

        for answers in ([ask(data) for data in files[:3]], list(callers.map(ask, files))):
            for answer, right in zip(answers, expected, strict=False):
                assert [score["label"] for score in answer["top"]] == [score["label"] for score in right["top"]]
                found = [score["probability"] for score in answer["top"]]
                np.testing.assert_allclose(found, [score["probability"] for score in right["top"]], atol=1e-6)
                assert answer["digest"] == served.digest

    assert int8.is_int8(onnx.load(folder / ONNX).graph)
