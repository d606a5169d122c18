"""A bucket, the stand-in for Vertex AI, a login that works, and the commands that talk to them."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import HTTPServer
from pathlib import Path
from typing import Any

import hypothesis.configuration
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from gcp_storage_emulator.server import RequestHandler, create_server
from google.cloud import storage
from standin import PYTHON, ROOT, StandIn

from vertex.__main__ import main

# Always the same examples, and nothing kept of them here.
hypothesis.configuration.set_hypothesis_home_dir(ROOT / "build" / "hypothesis")
hypothesis.settings.register_profile("kennel", database=None, derandomize=True, deadline=None)
hypothesis.settings.load_profile("kennel")

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


def in_training(code: str) -> None:
    """In training's own environment, which can draw and has torch."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    subprocess.run([PYTHON, "-c", f"from pathlib import Path\n{code}"], check=True, env=environment, timeout=120)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn pictures of three classes, in a folder."""
    folder = tmp_path_factory.mktemp("pictures") / "colours"
    in_training(f"import learner; learner.folder(Path({str(folder)!r}), train=8, validation=4)")
    return folder


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny classifier to fine-tune, as transformers stores one."""
    folder = tmp_path_factory.mktemp("network") / "tiny"
    in_training(f"import learner; learner.save_transformer(Path({str(folder)!r}), 'resnet')")
    return str(folder)


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle."""
    folder = tmp_path_factory.mktemp("bundles") / "colours"
    what = f"Path({str(folder)!r}), drawn.CLASSES, manifest.Decision()"
    in_training(f"import drawn; from bundle import manifest; drawn.bundle_of({what})")
    return folder


@pytest.fixture
def publishing(standin: StandIn, colours: Path, tmp_path: Path) -> Path:
    """Makes the stand-in's containers leave `colours` where a job's bundle goes, within a second or two."""
    program = tmp_path / "publish"
    program.write_text(f"""#!{sys.executable}
import os, pathlib
from google.cloud import storage
_, _, name, prefix = os.environ["AIP_MODEL_DIR"].rstrip("/").split("/", 3)
print("publishing", flush=True)
for path in sorted(pathlib.Path({str(colours)!r}).iterdir(), key=lambda path: path.name == "manifest.json"):
    storage.Client(project="x").bucket(name).blob(prefix + "/" + path.name).upload_from_filename(str(path))
""")
    program.chmod(0o755)
    standin.python = str(program)
    return program
