"""Real servers for tests."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

from local import processes


@dataclass(frozen=True)
class Kennel:
    """Both processes and what they serve. `log` has what they printed."""

    running: processes.Running
    bundles: dict[str, Path]
    log: Path
    target: str  # the model server's gRPC address

    @property
    def url(self) -> str:
        return self.running.url


@contextlib.contextmanager
def model_server(store: Path, grpc_port: int, log: Path, *bundles: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One model server of these bundles, not yet ready."""
    command = [sys.executable, "model-server/archive.py", *map(str, bundles), "--store", str(store)]
    subprocess.run(command, cwd=processes.ROOT, env=processes.environment(), check=True, stdout=subprocess.DEVNULL)
    with log.open("ab") as output:
        process = processes.start_model_server(store, grpc_port, output)
        try:
            yield process
        finally:
            processes.end(process)


def descendants(server: subprocess.Popen[bytes], word: str) -> list[psutil.Process]:
    """Those with this word in their command line: "model_service_worker" runs models, "ModelServer" is the JVM."""
    found = []
    for process in psutil.Process(server.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end meanwhile
            if word in " ".join(process.cmdline()):
                found.append(process)
    return found


def workers(server: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return descendants(server, "model_service_worker")


def gone(family: list[psutil.Process], seconds: float = 5) -> bool:
    """Whether none of them runs any more; what is dead but not waited for yet is gone too."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family):
            return True
        time.sleep(0.05)
    return False


def wait_up(url: str) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            requests.get(f"{url}/healthz", timeout=1)
            return
        except requests.RequestException:
            time.sleep(0.1)
    raise AssertionError(f"{url} does not answer")


def wait_ready(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if requests.get(f"{url}/readyz", timeout=5).ok:
            return
        time.sleep(0.1)
    raise AssertionError(f"{url} is not ready")
