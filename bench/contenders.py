"""Who is compared: how each is installed, started, asked and ended."""

import base64
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from bench import processes
from bundle.cpus import HUGE_PAGES, whole_cpus
from local.processes import ROOT, free_ports
from local.run import BUNDLES, DEFAULT

HOME = ROOT / "build" / "bench"
START_SECONDS = 180.0
TORCH_INDEX = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")


class Failed(Exception):
    """A contender that cannot be installed, started or does not answer rightly; the message says which and why."""


@dataclass(frozen=True)
class Contender:
    """One line of the tables that come out."""

    name: str
    command: str  # {python}, {bin}, {port}, {grpc} and {bundle} are filled in
    environment: str = ""  # of bench/requirements-*.txt; "": ours
    runtime: Literal["onnx", "torch", "bf16"] = "onnx"  # bf16: model-server/worker/bf16.py
    body: Literal["raw", "base64", "instances"] = "raw"
    path: str = "/predict"
    bundle: str = DEFAULT  # under build/bundles
    full: bool = False  # decodes every pixel
    pillow: bool = True  # alone, as everybody does; ours, and the limit to it, have bundle/jpeg.c and resample.c
    server: bool = True

    @property
    def ours(self) -> bool:
        return self.command == OURS


OURS = "{python} -m local.run --models {bundle} --port {port} --grpc-port {grpc}"
FLASK = "{bin}/gunicorn -w {workers} -b 127.0.0.1:{port} bench.serve.flask_app:app"
SERVERS = {
    "Flask": ("flask", FLASK, "raw", "/predict"),
    "LitServe": ("litserve", "{python} -m bench.serve.litserve_app", "base64", "/predict"),
    "BentoML": (
        "bentoml",
        "{bin}/bentoml serve bench.serve.bentoml_app:Service --host 127.0.0.1 --port {port}",
        "raw",
        "/predict",
    ),
    "Ray Serve": ("ray", "{python} -m bench.serve.ray_app", "raw", "/predict"),
    "KServe": ("kserve", "{python} -m bench.serve.kserve_app", "instances", "/v1/models/bench:predict"),
    "Mosec": (
        "mosec",
        "{python} -m bench.serve.mosec_app --address 127.0.0.1 --port {port} --path {scratch}/mosec",
        "raw",
        "/inference",
    ),
}
LIMIT = "{python} -m bench.serve.limit"
INT8 = f"{DEFAULT}-int8"

ALL = (
    Contender("limit", LIMIT, pillow=False, server=False),
    Contender("ours", OURS),
    *(Contender(f"{name}, ONNX Runtime", c, env, "onnx", body, path) for name, (env, c, body, path) in SERVERS.items()),  # type: ignore[arg-type]
    *(Contender(f"{name}, PyTorch", c, env, "torch", body, path) for name, (env, c, body, path) in SERVERS.items()),  # type: ignore[arg-type]
    Contender("Flask, ONNX Runtime, full decode", FLASK, "flask", full=True),
    Contender("limit, int8", LIMIT, bundle=INT8, pillow=False, server=False),
    Contender("limit, int8, Pillow", LIMIT, bundle=INT8, server=False),
    Contender("ours, int8", OURS, bundle=INT8),
    Contender("limit, bf16", LIMIT, runtime="bf16", pillow=False, server=False),
    Contender("ours, bf16", OURS, runtime="bf16"),
)


def install(environment: str) -> None:
    """build/bench/<environment>, once for each state of its requirements. Raises Failed."""
    if not environment:
        return
    folder, wanted = HOME / environment, ROOT / "bench" / f"requirements-{environment}.txt"
    done = folder / "done"
    if done.exists() and done.read_text() == wanted.read_text():
        return
    print(f"Installing {environment} into {folder.relative_to(ROOT)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip: list[Any] = [
        folder / "bin" / "pip",
        "install",
        "-qq",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-compile",
    ]
    torch = ["--require-hashes", "-r", ROOT / "requirements" / "torch-cpu.txt"]
    if not any(_quiet([*pip, *torch, *index]) for index in ([], ["--index-url", TORCH_INDEX])):
        raise Failed(f"{environment}: torch's CPU build was found nowhere (set TORCH_INDEX to an index that has it)")
    if subprocess.run([*pip, "-r", wanted]).returncode:
        raise Failed(f"{environment}: pip could not install {wanted.relative_to(ROOT)}")
    done.write_text(wanted.read_text())


def _quiet(command: Sequence[Any]) -> bool:
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


@dataclass
class Server:
    """A contender that runs."""

    contender: Contender
    url: str
    process: subprocess.Popen[bytes]
    start_seconds: float  # from the command to the first right answer
    answering: float  # time.time() of the first answer of any kind

    def tree(self) -> list[psutil.Process]:
        return processes.tree(self.process.pid)

    def parts(self) -> dict[str, float]:
        """Of ours: seconds until the model server says it is ready, and the gateway answers anything. Asked a while
        after the start, since the model server looks at its workers twice a second."""
        found: dict[str, float] = {}
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "gateway" in process.cmdline():
                    found.setdefault("gateway", self.answering - process.create_time())  # the first is the parent
                if "model-server/serve.py" in process.cmdline():
                    log = (ROOT / "build" / "run.log").read_text(errors="replace")
                    if said := re.search(r"ready after ([0-9.]+) s", log):
                        found["model server"] = float(said[1])
        return found


@dataclass(frozen=True)
class Body:
    """A picture as a contender wants it."""

    path: Path
    content_type: str


def body(contender: Contender, photo: Path) -> Body:
    """Written under build/bench/bodies."""
    if contender.body == "raw":
        return Body(photo, "image/jpeg")
    text = base64.b64encode(photo.read_bytes()).decode()
    value = {"image": text} if contender.body == "base64" else {"instances": [{"image": {"b64": text}}]}
    path = HOME / "bodies" / f"{photo.stem}.{contender.body}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return Body(path, "application/json")


def command(contender: Contender, port: int, grpc: int, scratch: Path) -> tuple[list[str], dict[str, str]]:
    """What is run, and its environment."""
    folder = HOME / contender.environment / "bin" if contender.environment else Path(sys.executable).parent
    bundle = BUNDLES / contender.bundle
    words = {"python": folder / "python", "bin": folder, "port": port, "grpc": grpc, "bundle": bundle}
    words |= {"workers": whole_cpus(), "scratch": scratch}
    settings = {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "BENTOML_HOME": str(HOME / "bentoml-home"),
        "BENTOML_DO_NOT_TRACK": "True",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if contender.ours:  # which decides the rest for itself, as its users have it
        settings["PRECISION"] = "bf16" if contender.runtime == "bf16" else ""
    else:
        settings |= {"BUNDLE": str(bundle), "RUNTIME": contender.runtime}
        settings |= {"FULL": str(int(contender.full)), "PILLOW": str(int(contender.pillow))}
        # A process a CPU with a thread each: a third more images/s than one process with a thread a CPU.
        settings |= {"THREADS": "1", "OMP_NUM_THREADS": "1", "WORKERS": str(whole_cpus()), "PORT": str(port)}
        if not contender.server:  # the limit to ours has their workers' pages
            settings |= HUGE_PAGES
    return contender.command.format(**words).split(), os.environ | settings


@contextmanager
def running(contender: Contender, photo: Path, log: Path) -> Iterator[Server]:
    """The contender, after its first answer; nothing of it is left afterwards. Raises Failed."""
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        port, grpc = free_ports(2)
        words, settings = command(contender, port, grpc, Path(scratch))
        url = f"http://127.0.0.1:{port}{contender.path}"
        with log.open("wb") as output:
            began = time.monotonic()
            process = subprocess.Popen(
                words, cwd=ROOT, env=settings, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            known: list[psutil.Process] = []
            try:
                first, answering = body(contender, photo), 0.0
                while True:
                    known = processes.tree(process.pid) or known
                    if process.poll() is not None:
                        raise Failed(f"ended by itself with {process.returncode}: {tail(log)}")
                    try:
                        answering = answering or answers(url)
                        ask(url, first)
                        break
                    except (OSError, ValueError) as exc:
                        if time.monotonic() - began > START_SECONDS:
                            raise Failed(f"no answer in {START_SECONDS:g} s ({exc}): {tail(log)}") from exc
                    time.sleep(0.05)
                yield Server(contender, url, process, time.monotonic() - began, answering)
            finally:
                end(process, known)


def end(process: subprocess.Popen[bytes], known: Sequence[psutil.Process], seconds: float = 10) -> None:
    """SIGTERM to the one that was started; SIGKILL to all that is left of its tree."""
    family = {*known, *processes.tree(process.pid)}
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=5)


def tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return " / ".join(lines[-3:]) or "it said nothing"


def answers(url: str) -> float:
    """time.time() once a GET is answered, be it with an error: a picture may have to wait for what is behind a gateway.
    Raises OSError where it is not."""
    with contextlib.suppress(urllib.error.HTTPError):
        urllib.request.urlopen(url, timeout=1).close()
    return time.time()


def ask(url: str, what: Body, timeout: float = 20) -> list[dict[str, Any]]:
    """The top answers, the best first. Raises OSError or ValueError where there are none."""
    request = urllib.request.Request(url, what.path.read_bytes(), {"Content-Type": what.content_type})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            answer = json.load(response)
        answer = answer["predictions"][0] if "predictions" in answer else answer
        top: list[dict[str, Any]] = answer["top"]
    except (http.client.HTTPException, LookupError, TypeError) as exc:
        raise ValueError(f"no answer that can be read ({exc!r})") from exc
    return top


def differs(top: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]], close: float = 2e-3) -> str:
    """ "" where both name the same five in the same order, but for those whose probabilities are closer than `close`;
    else what differs."""
    probability = {item["label"]: item["probability"] for item in reference}
    for i, (item, right) in enumerate(zip(top, reference, strict=True)):
        if item["label"] != right["label"] and abs(probability.get(item["label"], 0) - right["probability"]) > close:
            return f"place {i + 1} is {item['label']!r}, not {right['label']!r}"
    return ""
