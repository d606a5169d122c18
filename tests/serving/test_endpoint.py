"""Vertex AI's contract for a prediction container, kept by the image's start program with the real processes."""

import base64
import subprocess
import sys
import time

import psutil
import pytest
import requests
from servers import descendants, gone
from tiny import picture, tiny_bundle

from local import processes

HEALTH, PREDICT = "/v1/endpoints/7/deployedModels/8", "/v1/endpoints/7/deployedModels/8:predict"


@pytest.fixture
def start(tmp_path):
    """Starts the program with these AIP_ variables; what a failed test leaves is killed."""
    started = []

    def begin(**variables):
        environment = processes.environment(**{f"aip_{key}": value for key, value in variables.items()}, workers=1)
        command = [sys.executable, "vertex/endpoint/start.py"]
        with (tmp_path / "log").open("wb") as log:
            started.append(
                subprocess.Popen(command, cwd=processes.ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
            print((tmp_path / "log").read_text()[-3000:])


def test_from_a_bucket_ready_a_prediction_a_refusal_and_an_orderly_end(start, bucket, tmp_path):
    tiny_bundle(tmp_path / "tiny")
    for path in (tmp_path / "tiny").iterdir():
        bucket.pipe_file(f"pets/models/tiny/{path.name}", path.read_bytes())
    port = processes.free_ports(1)[0]
    process = start(storage_uri="gs://pets/models/tiny/", http_port=port, health_route=HEALTH, predict_route=PREDICT)
    url, seen = f"http://127.0.0.1:{port}", []
    deadline = time.monotonic() + 120
    while not (jvm := descendants(process, "ModelServer")):
        assert time.monotonic() < deadline
    jvm[0].suspend()  # or it might be ready before it is asked
    while 200 not in seen:
        assert process.poll() is None
        assert time.monotonic() < deadline
        try:
            seen.append(requests.get(url + HEALTH, timeout=10).status_code)
            jvm[0].resume()
        except requests.ConnectionError:
            time.sleep(0.1)
    assert seen[0] == 503
    assert set(seen) == {503, 200}
    instances = [{"b64": base64.b64encode(picture(colour)).decode()} for colour in ("green", "red")]
    answer = requests.post(url + PREDICT, json={"instances": instances, "parameters": {"top_k": 1}}, timeout=10)
    assert [each["label"] for each in answer.json()["predictions"]] == ["green", "red"]
    assert set(answer.json()) == {"predictions"}
    bad = requests.post(url + PREDICT, json={"instances": [{"image": "x"}]}, timeout=10)
    assert (bad.status_code, bad.headers["Content-Type"]) == (400, "application/problem+json")
    assert "instances[0].b64: Field required" in bad.json()["detail"]
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert process.wait(60) == 0
    assert gone(family)


def test_one_of_the_two_that_ends_by_itself_ends_it(start, tmp_path):
    tiny_bundle(tmp_path / "tiny")
    port = processes.free_ports(1)[0]
    process = start(storage_uri=f"file://{tmp_path}/tiny", http_port=port)
    deadline = time.monotonic() + 60
    while not (children := [one for one in descendants(process, "gateway") if one.ppid() == process.pid]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    children[0].kill()
    assert process.wait(60) == 1
    assert "one of the two programs ended by itself" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"storage_uri": "file:///nowhere"}, "fetch: file:///nowhere: its manifest.json does not exist"),
        ({"http_port": "http"}, "AIP_HTTP_PORT='http' is no port"),
    ],
)
def test_what_is_wrong_is_said_at_once(start, tmp_path, variables, sentence):
    assert start(**variables).wait(60) == 1
    assert sentence in (tmp_path / "log").read_text()
