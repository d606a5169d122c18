"""`make run`: archive, model server, gateway; waits for a first answer, runs until Ctrl-C.

The same two processes as on the cluster, started as their images start them.
"""

import argparse
import ctypes
import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests
from PIL import Image

from bundle.cpus import whole_cpus
from bundle.golden import draw
from bundle.manifest import NAME, BundleError, read

ROOT = Path(__file__).resolve().parent.parent
BUNDLES = ROOT / "build" / "bundles"
DEFAULT = "dog-breeds"
# A worker takes about 350 MB; a laptop of sixteen cores need not give sixteen of them.
MOST_WORKERS = 4
START_SECONDS = 120.0


@dataclass(frozen=True)
class Running:
    """Both processes, answering."""

    url: str
    models: tuple[str, ...]
    model_server: subprocess.Popen[bytes]
    gateway: subprocess.Popen[bytes]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make run", description=__doc__)
    parser.add_argument("--models", default=DEFAULT, help="names under build/bundles or paths of bundles, by commas")
    parser.add_argument("--port", type=int, default=8080, help="of the gateway")
    parser.add_argument("--grpc-port", type=int, default=7070, help="of the model server")
    parser.add_argument("--since", type=float, default=time.time(), help="when the command began, in Unix seconds")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    log = ROOT / "build" / "run.log"
    log.parent.mkdir(exist_ok=True)
    try:
        bundles = [find(model) for model in args.models.split(",")]
        for port, setting in ((args.port, "PORT"), (args.grpc_port, "GRPC_PORT")):
            check_free(port, setting)
        print(f"Starting {', '.join(path.name for path in bundles)}; the log is {log.relative_to(ROOT)}", flush=True)
        with log.open("wb") as output, running(bundles, args.port, args.grpc_port, output) as kennel:
            label = first_answer(kennel.url)
            print(
                f"\n  Ready: {kennel.url}   (first answer {time.time() - args.since:.0f} s after the command)\n"
                f"\n  Open the page, or try it with a drawing (answered {label!r}; send @your-photo.jpg instead):"
                f"\n  curl -s --data-binary @{drawing().relative_to(ROOT)} {kennel.url}/predict"
                f"\n\n  A photo of yours: make predict PHOTO=dog.jpg      A folder: make predict DIR=photos"
                f"\n  Ctrl-C ends it.",
                flush=True,
            )
            while kennel.gateway.poll() is None and kennel.model_server.poll() is None:
                time.sleep(0.5)
            raise SystemExit(f"run: a process ended by itself; see {log}")
    except KeyboardInterrupt:
        print("\nStopped.")
    except BundleError as exc:
        raise SystemExit(f"run: {exc}") from exc


def find(model: str) -> Path:
    """A bundle by path, or by name under build/bundles; the default one is made at need. Raises BundleError."""
    folder = Path(model) if "/" in model or not NAME.fullmatch(model) else BUNDLES / model
    if folder == BUNDLES / DEFAULT and not folder.exists():
        print("Making the default bundle (once, about half a minute)", flush=True)
        subprocess.run([sys.executable, "-m", "training.dog_breeds", str(folder)], cwd=ROOT, check=True)
    read(folder)
    return folder


def check_free(port: int, setting: str) -> None:
    """Raises SystemExit where something listens on the port already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as exc:
            raise SystemExit(f"run: port {port} is taken ({exc.strerror}): choose another, {setting}=...") from exc


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextmanager
def running(bundles: Sequence[Path], port: int, grpc_port: int, output: io.BufferedWriter) -> Iterator[Running]:
    """Both processes, ready; ended when the context is left. Raises SystemExit where they do not become ready."""
    with tempfile.TemporaryDirectory(prefix="kennel-") as scratch:
        store = Path(scratch)
        subprocess.run(
            [sys.executable, "model-server/archive.py", *map(str, bundles), "--store", str(store)],
            cwd=ROOT,
            env=environment(),
            stdout=output,
            check=True,
        )
        names = tuple(read(path).name for path in bundles)
        server = start_model_server(store, grpc_port, output)
        try:
            gateway = start_gateway(names, f"127.0.0.1:{grpc_port}", port, output)
            try:
                kennel = Running(f"http://127.0.0.1:{port}", names, server, gateway)
                wait_ready(kennel)
                yield kennel
            finally:
                end(gateway)
        finally:
            end(server)


def environment(**settings: object) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **{key.upper(): str(value) for key, value in settings.items()}}


def start_model_server(store: Path, grpc_port: int, output: io.BufferedWriter) -> subprocess.Popen[bytes]:
    """The model server on loopback; every port but gRPC's is whichever is free."""
    http, metrics, health, management, grpc_management, worker = free_ports(6)
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
        workers=os.environ.get("WORKERS", min(whole_cpus(), MOST_WORKERS)),
    )
    return _start([sys.executable, "model-server/serve.py"], settings, output)


def start_gateway(
    models: Sequence[str], model_server: str, port: int, output: io.BufferedWriter, **settings: object
) -> subprocess.Popen[bytes]:
    values = environment(models=",".join(models), model_server=model_server, host="127.0.0.1", port=port, **settings)
    return _start([sys.executable, "-m", "gateway"], values, output)


def _start(command: list[str], settings: dict[str, str], output: io.BufferedWriter) -> subprocess.Popen[bytes]:
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
            response = requests.get(f"{kennel.url}/readyz", timeout=5)
            if response.ok:
                return
            last = response.json()["detail"]
        except requests.RequestException:
            pass
        time.sleep(0.2)
    raise SystemExit(f"run: not ready after {seconds:.0f} s: {last}; see the log")


def drawing() -> Path:
    """A picture at hand for the first try, where no photograph is."""
    path = ROOT / "build" / "drawing.png"
    Image.fromarray(draw(1, 360, 480, seed=3)[0]).save(path)
    return path


def first_answer(url: str) -> str:
    response = requests.post(f"{url}/predict", data=drawing().read_bytes(), timeout=10)
    response.raise_for_status()
    label: str = response.json()["label"]
    return label


if __name__ == "__main__":
    main()
