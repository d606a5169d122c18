"""The endpoint's image, run as Vertex AI runs a prediction container."""

import base64
import subprocess
import time

import pytest
import requests
from containers import DOCKER, docker
from tiny import picture, tiny_bundle

HEALTH, PREDICT = "/v1/endpoints/7/deployedModels/8", "/v1/endpoints/7/deployedModels/8:predict"

# As soon as there is one.
TO_THE_JVM = """
import psutil, signal, sys
while not (found := [p for p in psutil.process_iter(["name"]) if p.info["name"] == "java"]):
    pass
found[0].send_signal(signal.Signals[sys.argv[1]])
"""


@pytest.fixture
def container(images, tmp_path):
    """Its name; without any right, and nothing but /tmp to write to."""
    tiny_bundle(tmp_path / "tiny")
    tmp_path.chmod(0o755)
    flags = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true", "--tmpfs", "/tmp"]
    variables = {"STORAGE_URI": "file:///tiny", "HTTP_PORT": "9000", "HEALTH_ROUTE": HEALTH, "PREDICT_ROUTE": PREDICT}
    flags += [word for key, value in variables.items() for word in ("-e", f"AIP_{key}={value}")]
    name = docker("run", "--detach", *flags, "-v", f"{tmp_path}/tiny:/tiny:ro", "-e", "WORKERS=1", images["endpoint"])
    yield name
    print(subprocess.run([DOCKER, "logs", "--tail", "30", name], capture_output=True, text=True).stdout)
    docker("rm", "--force", name)


def test_the_contract(container):
    host = docker("inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", container)
    url, seen = f"http://{host}:9000", []
    deadline = time.monotonic() + 120
    docker("exec", container, "python3.11", "-c", TO_THE_JVM, "SIGSTOP")  # or it might be ready before it is asked
    while 200 not in seen:
        assert docker("inspect", "--format", "{{.State.Running}}", container) == "true"
        assert time.monotonic() < deadline
        try:
            seen.append(requests.get(url + HEALTH, timeout=10).status_code)
            docker("exec", container, "python3.11", "-c", TO_THE_JVM, "SIGCONT")
        except requests.ConnectionError:
            time.sleep(0.1)
    assert seen[0] == 503
    assert set(seen) == {503, 200}
    body = {"instances": [{"b64": base64.b64encode(picture("blue")).decode()}]}
    assert requests.post(url + PREDICT, json=body, timeout=10).json()["predictions"][0]["label"] == "blue"
    bad = requests.post(url + PREDICT, json={"instances": [{"b64": "?"}]}, timeout=10)
    assert bad.status_code == 400
    assert "instances[0].b64: is not base64" in bad.json()["detail"]
    while docker("inspect", "--format", "{{.State.Health.Status}}", container) != "healthy":
        assert time.monotonic() < deadline
        time.sleep(0.5)
    docker("stop", "--time", "60", container)
    assert docker("inspect", "--format", "{{.State.ExitCode}}", container) == "0"
