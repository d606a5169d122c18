"""Photographs through HTTP, TorchServe and back."""

import base64
import re
import time
from pathlib import Path

import gpu
import numpy as np
import psutil
import pytest
import requests
import torch
from servers import workers
from tiny import picture

from bundle import manifest, wire
from bundle.cpus import gpus
from bundle.picture import load
from gateway.client import Client
from training.dog_breeds import model
from training.export import onnx_runner


def test_dogs_are_named_and_others_are_not_dogs(gateway, photos):
    classes = requests.get(f"{gateway.url}/v1/models/dog-breeds").json()["classes"]
    right = top5 = others = 0
    for data, expected in photos:
        answer = requests.post(f"{gateway.url}/predict?top_k=5", data=data).json()
        names = [score["label"] for score in answer["top"]]
        if expected == classes.index("not a dog"):
            others += names[0] == "not a dog"
        else:
            right += names[0] == classes[expected]
            top5 += classes[expected] in names
    print(f"dogs named right {right} of 59, in the top five {top5}, others not a dog {others} of 17")
    assert right >= 51
    assert top5 >= 57
    assert others >= 16


def test_the_logits_that_travel_back_are_those_of_the_bundle_to_the_bit(gateway, photos):
    contract = manifest.read(gateway.bundles["dog-breeds"])
    run, client = onnx_runner(gateway.bundles["dog-breeds"] / "model.onnx"), Client(gateway.target, 1)
    for data, _ in photos[:50]:
        pixels = load(data, contract.input.resize)
        entries = wire.request({contract.input.contract: pixels.tobytes()}, [contract.digest])
        answer = wire.unpack(client.predictions("dog-breeds", entries, time.monotonic() + 10)[0])
        np.testing.assert_array_equal(answer.logits, run(pixels[None]))


def test_onnx_agrees_with_pytorch(bundle, photos):
    resize = manifest.read(bundle).input.resize
    pixels = np.stack([load(data, resize) for data, _ in photos[:50]])
    with torch.no_grad():
        expected = model(0)(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(onnx_runner(bundle / "model.onnx")(pixels), expected, rtol=0, atol=1e-4)


def test_the_program_that_a_gpu_runs_agrees_with_onnx(bundle, photos):
    resize = manifest.read(bundle).input.resize
    pixels = np.stack([load(data, resize) for data, _ in photos[:6]])
    found = gpu.eager(gpu.program(bundle, "cpu"), "cpu")(pixels)
    np.testing.assert_allclose(found, onnx_runner(bundle / "model.onnx")(pixels), rtol=0, atol=1e-4)


def test_the_answer_over_http_is_that_of_the_logits(gateway, photos):
    contract = manifest.read(gateway.bundles["dog-breeds"])
    data = photos[0][0]
    logits = onnx_runner(gateway.bundles["dog-breeds"] / "model.onnx")(load(data, contract.input.resize)[None])[0]
    exp = np.exp(logits.astype(float) - logits.max())
    best = requests.post(f"{gateway.url}/predict", data=data).json()["top"][0]
    assert best["label"] == contract.classes[logits.argmax()]
    assert best["probability"] == pytest.approx((exp / exp.sum()).max(), abs=1e-12)


@pytest.mark.skipif(gpus() > 0, reason="on a GPU torch runs the models")
def test_on_a_cpu_no_worker_loads_torch(gateway):
    found = [
        {Path(part.path).name for part in worker.memory_maps()} for worker in workers(gateway.running.model_server)
    ]
    assert len(found) >= 2
    for libraries in found:
        assert any("onnxruntime" in name for name in libraries)
        assert not any("torch" in name for name in libraries)


def in_huge_pages(process):
    """Bytes of its memory."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:"))


HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(gpus() > 0 or not HUGE.exists() or "[never]" in HUGE.read_text(), reason="no huge pages here")
def test_weights_and_the_jvm_s_heap_are_in_huge_pages(gateway):
    server = psutil.Process(gateway.running.model_server.pid)
    [jvm] = [child for child in server.children() if "java" in child.name()]
    found = [in_huge_pages(process) for process in (jvm, *workers(gateway.running.model_server))]
    assert min(found[0], max(found[1:])) > 8e6


def test_every_model_is_served_under_its_own_name_with_its_own_classes(gateway):
    listed = requests.get(f"{gateway.url}/v1/models").json()["models"]
    assert [entry["name"] for entry in listed] == ["dog-breeds", "tiny"]
    for colour in ("red", "green", "blue"):
        answer = requests.post(f"{gateway.url}/predict?model=tiny", files={"image": picture(colour)}).json()
        assert (answer["label"], answer["model"]) == (colour, "tiny")
    assert requests.post(f"{gateway.url}/predict", data=picture("red")).json()["model"] == "dog-breeds"


def test_the_json_form_answers_every_instance(gateway):
    instances = [{"b64": base64.b64encode(picture(colour)).decode()} for colour in ("red", "blue") * 8]
    answer = requests.post(f"{gateway.url}/v1/models/tiny:predict", json={"instances": instances})
    assert [prediction["label"] for prediction in answer.json()["predictions"]] == ["red", "blue"] * 8


def test_metrics_sum_over_the_worker_processes(gateway):
    def count():
        text = requests.get(f"{gateway.url}/metrics").text
        found = re.search(r'^kennel_predictions_total\{label="green",model="tiny"\} (\S+)$', text, re.MULTILINE)
        return float(found[1]) if found else 0

    before = count()
    for _ in range(40):  # a new connection each time: whichever process takes it
        requests.post(f"{gateway.url}/predict?model=tiny", data=picture("green"))
    assert count() == before + 40
