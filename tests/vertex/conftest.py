"""A bucket, the stand-in for Vertex AI, a login that works, and the commands that talk to them."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import HTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from gcp_storage_emulator.server import RequestHandler, create_server
from google.cloud import storage
from standin import ROOT, StandIn

from vertex.__main__ import main

BUCKET = "zoo-42-kennel"
SETTINGS = {"PROJECT": "zoo-42", "REGION": "europe-west4", "BUCKET": BUCKET, "REPOSITORY": "images"}
IMAGE = "europe-west4-docker.pkg.dev/zoo-42/images/training:0.1.0-c0ffeec0ffee"


class Emulator:
    """The bucket's server. `fault`: (method, path, how many before) -> a status to answer, 0 to hang up, or None."""

    def __init__(self) -> None:
        self.server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
        self.fault: Callable[[str, str, int], int | None] = lambda *_: None
        self.count, self.lock = 0, threading.Lock()
        emulator = self

        class Faulty(RequestHandler):  # type: ignore[misc]
            def parse_request(self) -> bool:
                if not super().parse_request():
                    return False
                with emulator.lock:
                    emulator.count += 1
                    status = emulator.fault(self.command, self.path, emulator.count)
                if status is None:
                    return True
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.close_connection = True
                if status:
                    body = json.dumps({"error": {"code": status, "message": f"storage: {status} as told"}}).encode()
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                return False

        self.server.start()
        self.server._api._httpd.RequestHandlerClass = partial(Faulty, self.server._storage)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server._api._httpd.server_address[1]}"


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    monkeypatch.setattr(HTTPServer, "request_queue_size", 128)
    emulator = Emulator()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator.url)
    try:
        yield emulator
    finally:
        emulator.server.stop()


@pytest.fixture
def bucket(emulator: Emulator, login: Path) -> Any:
    return storage.Client(project="zoo-42").bucket(BUCKET)


@pytest.fixture
def standin(emulator: Emulator) -> Iterator[StandIn]:
    with StandIn(emulator.url) as standin:
        yield standin


@pytest.fixture(scope="session")
def key() -> str:
    made = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    form = serialization.PrivateFormat.PKCS8
    return made.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()


@pytest.fixture
def login(standin: StandIn, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A service account's key, whose tokens come from the stand-in: application default credentials."""
    account = {
        "type": "service_account",
        "client_email": "trainer@zoo-42.iam.gserviceaccount.com",
        "private_key": key,
        "private_key_id": "1",
        "project_id": "zoo-42",
        "token_uri": f"{standin.url}/token",
    }
    path = tmp_path / "login.json"
    path.write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    return path


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    path = tmp_path / "vertex.env"
    path.write_text("".join(f"{key}={value}\n" for key, value in SETTINGS.items()))
    return path


@pytest.fixture
def vertex(standin: StandIn, login: Path, settings_file: Path) -> Callable[..., int]:
    """The doors, as make calls them, with an image that needs no docker."""

    def run(door: str, *words: str, image: str = IMAGE) -> int:
        known = ["--env", str(settings_file), "--endpoint", standin.url, "--pause", "0.1"]
        known += ["--image", image] if door != "status" else []
        return main([door, *known, *words])

    return run


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn pictures of three classes in a folder, by training's own environment, which can draw them."""
    import subprocess

    folder = tmp_path_factory.mktemp("pictures") / "colours"
    code = f"from pathlib import Path; from learner import folder; folder(Path({str(folder)!r}), train=8, validation=4)"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    subprocess.run([ROOT / ".venv/bin/python", "-c", code], check=True, env=environment, timeout=120)
    return folder
