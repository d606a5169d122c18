"""`make run`: archive, model server, gateway; waits for a first answer, runs until Ctrl-C.

The same two processes as on the cluster, started as their images start them.
"""

import argparse
import io
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import requests
from PIL import Image

from bundle.golden import draw
from bundle.manifest import NAME, BundleError, read
from local.processes import ROOT, Running, both, environment, wait_ready

BUNDLES = ROOT / "build" / "bundles"
CACHE = ROOT / "build" / "fetched"
DEFAULT = "dog-breeds"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make run", description=__doc__)
    parser.add_argument(
        "--models",
        default=DEFAULT,
        help="names under build/bundles, paths or addresses (gs://...) of bundles, by commas",
    )
    parser.add_argument("--port", type=int, default=8080, help="of the gateway")
    parser.add_argument("--grpc-port", type=int, default=7070, help="of the model server")
    parser.add_argument("--since", type=float, default=time.time(), help="when the command began, in Unix seconds")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    log = ROOT / "build" / "run.log"
    log.parent.mkdir(exist_ok=True)
    try:
        bundles = [find(model) for model in args.models.split(",")]
        names = [read(path).name for path in bundles]
        if twice := next((name for name in names if names.count(name) > 1), ""):
            raise SystemExit(f"run: two bundles are named {twice!r}, perhaps fp32 and int8 of one: serve them in turn")
        for port, setting in ((args.port, "PORT"), (args.grpc_port, "GRPC_PORT")):
            check_free(port, setting)
        print(f"Starting {', '.join(names)}; the log is {log.relative_to(ROOT)}", flush=True)
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
    """A bundle by address, by path, or by name under build/bundles; the default one is made at need.

    Behind an address like gs://bucket/path, or gs://bucket/path#sha256=..., it is fetched, once for each digest.
    Raises BundleError, and SystemExit where it cannot be fetched.
    """
    if "://" in model:
        print(f"Fetching {model}", flush=True)
        fetch = [sys.executable, "model-server/fetch.py", model, str(CACHE)]
        found = subprocess.run(fetch, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
        if found.returncode:
            raise SystemExit(found.returncode)  # it has said why
        return Path(found.stdout.splitlines()[-1])
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
        with both([read(path).name for path in bundles], store, port, grpc_port, output) as kennel:
            wait_ready(kennel)
            yield kennel


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
