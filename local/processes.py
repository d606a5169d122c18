"""The model server and the gateway as two processes of one machine: started, waited for, ended."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bundle.cpus import gpus, whole_cpus

ROOT = Path(__file__).resolve().parent.parent
# A worker takes about 140 MB; a laptop of sixteen cores need not give sixteen of them.
MOST_WORKERS = 4
START_SECONDS = 120.0


@dataclass(frozen=True)
class Running:
    """Both processes."""

    url: str
    models: tuple[str, ...]
    model_server: subprocess.Popen[bytes]
    gateway: subprocess.Popen[bytes]


_taken: set[int] = set()  # ports of somebody who may not listen yet


def free_ports(count: int, *besides: int) -> list[int]:
    """Ports on loopback that nobody has, given to nobody before and none of `besides`, which others get."""
    _taken.update(besides)
    ports: list[int] = []
    with contextlib.ExitStack() as probes:
        while len(ports) < count:
            probe = probes.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            if (port := probe.getsockname()[1]) not in _taken:
                ports.append(port)
    _taken.update(ports)
    return ports


@contextlib.contextmanager
def both(
    names: Sequence[str], store: Path, port: int, grpc_port: int, output: IO[bytes], **settings: object
) -> Iterator[Running]:
    """Both processes, not ready yet, for the models of these names in the store; ended when the context is left.

    settings: the gateway's own, by their names there. The gateway ends first, so that what it has is answered.
    """
    server = start_model_server(store, grpc_port, output, port)
    try:
        gateway = start_gateway(names, f"127.0.0.1:{grpc_port}", port, output, **settings)
        try:
            yield Running(f"http://127.0.0.1:{port}", tuple(names), server, gateway)
        finally:
            end(gateway)
    finally:
        end(server)


def environment(**settings: object) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **{key.upper(): str(value) for key, value in settings.items()}}


def start_model_server(store: Path, grpc_port: int, output: IO[bytes], *besides: int) -> subprocess.Popen[bytes]:
    """The model server on loopback; every port but gRPC's is whichever is free, and none of `besides`."""
    http, metrics, health, management, grpc_management, worker = free_ports(6, grpc_port, *besides)
    settings = environment(
        model_store=store,
        host="127.0.0.1",
        grpc_port=grpc_port,
        http_port=http,
        metrics_port=metrics,
        health_port=health,
        management_port=management,
        grpc_management_port=grpc_management,
        worker_port=worker,
        workers=os.environ.get("WORKERS", gpus() or min(whole_cpus(), MOST_WORKERS)),
    )
    return _start([sys.executable, "model-server/serve.py"], settings, output)


def start_gateway(
    models: Sequence[str], model_server: str, port: int, output: IO[bytes], **settings: object
) -> subprocess.Popen[bytes]:
    values: dict[str, object] = {"models": ",".join(models), "model_server": model_server, "port": port}
    values |= {"host": "127.0.0.1"} | settings
    return _start([sys.executable, "-m", "gateway"], environment(**values), output)


def _start(command: list[str], settings: dict[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    # In a session of its own, so that Ctrl-C reaches this program alone, which ends them in order.
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=settings,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )


def _end_with_parent() -> None:
    """In the child: SIGTERM when this program is killed, so that nothing of it is left behind (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, linux/prctl.h


def end(process: subprocess.Popen[bytes], seconds: float = 40) -> None:
    """SIGTERM, and SIGKILL to its whole session where that is not enough."""
    process.terminate()
    try:
        process.wait(seconds)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_ready(kennel: Running, seconds: float = START_SECONDS) -> None:
    deadline, last = time.monotonic() + seconds, "nothing answers yet"
    while time.monotonic() < deadline:
        for process, part in ((kennel.model_server, "the model server"), (kennel.gateway, "the gateway")):
            if (code := process.poll()) is not None:
                raise SystemExit(f"run: {part} ended with exit code {code}; see the log")
        try:
            with urllib.request.urlopen(f"{kennel.url}/readyz", timeout=5):
                return
        except urllib.error.HTTPError as exc:
            last = json.load(exc)["detail"]
        except OSError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"run: not ready after {seconds:.0f} s: {last}; see the log")
