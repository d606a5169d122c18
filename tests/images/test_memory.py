"""What the containers use at their busiest, against what the manifests request and allow."""

import io
import itertools
import json
import time
import urllib.request

import numpy as np
import pytest
from containers import Pod, Spec, docker
from load import Load
from PIL import Image

MIB = 1 << 20
FILES = {  # of the kernel's memory controller, version 2 and 1, as a container sees its own
    "peak": ("/sys/fs/cgroup/memory.peak", "/sys/fs/cgroup/memory/memory.max_usage_in_bytes"),
    "now": ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
}


def used(pod: Pod, what: str) -> int:
    """Bytes, page cache and tmpfs with them."""
    read = f"from pathlib import Path; print(next(p.read_text() for p in map(Path, {FILES[what]!r}) if p.exists()))"
    return int(docker("exec", pod.name, "python3.11", "-c", read))


def amount(text: str) -> int:
    return int(text[:-2]) * {"Mi": MIB, "Gi": 1024 * MIB}[text[-2:]]


@pytest.fixture
def pods(images, network):
    started = [Pod(Spec("model-server"), network)]
    try:
        started[0].wait()
        started.append(Pod(Spec("gateway"), network))
        started[1].join()
        started[1].wait_ready()
        yield started
    finally:
        for pod in started:
            pod.remove()


def test_the_limits_are_above_the_worst_and_the_requests_about_what_it_takes(pods):
    url = pods[1].url(":8080/predict")
    noise = np.random.default_rng(0).integers(0, 255, (64, 1000, 3), np.uint8)
    photograph, largest = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.tile(noise, (47, 4, 1))).save(photograph, "JPEG")  # 12 megapixels
    # All that the gateway takes: 64 megapixels, in a form that cannot be decoded smaller, with transparency.
    Image.new("RGBA", (8000, 8000), (200, 30, 30, 128)).save(largest, "PNG")
    bodies = itertools.cycle([photograph.getvalue()] * 20 + [largest.getvalue()])
    with Load(8, lambda session, _: session.post(url, data=next(bodies), timeout=60)) as load:
        time.sleep(30)
    answered = [call for call in load.calls if call.status == 200]
    assert len(answered) > 100, load.calls[:3]
    with urllib.request.urlopen(urllib.request.Request(url, largest.getvalue()), timeout=60) as response:
        assert json.load(response)["label"]
    for pod in pods:
        assert not pod.state["State"]["OOMKilled"]
        peak, now, limit = used(pod, "peak"), used(pod, "now"), amount(pod.spec.limits["memory"])
        request = amount(pod.spec.requests["memory"])
        print(
            f"{pod.spec.tier}: peak {peak / MIB:.0f} MiB, now {now / MIB:.0f} MiB; "
            f"requested {request / MIB:.0f}, limit {limit / MIB:.0f}"
        )
        assert peak < 0.9 * limit
        assert now < request
