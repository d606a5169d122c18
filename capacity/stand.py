"""The stand on which a tier is measured: its CPUs and the load's, and a model server or gateway on them."""

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import onnx
import onnxruntime
import psutil

from bench import processes
from bundle import golden, manifest
from bundle.manifest import Manifest
from local import processes as local
from local.processes import ROOT

LOG = ROOT / "build" / "calibrate.log"


@contextlib.contextmanager
def pinned(cpus: Sequence[int]) -> Iterator[None]:
    """What is started inside runs on these CPUs, and counts them as all it has."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


Split = dict[str, tuple[list[int], list[int]]]  # {tier: its CPUs, its load's}


def split(limits: dict[str, float], given: int | None) -> Split:
    """Raises SystemExit where this machine has too few CPUs for that."""
    available, found = sorted(os.sched_getaffinity(0)), {}
    for name, cpus in limits.items():
        count = given or int(cpus)
        if not given and count != cpus:
            raise SystemExit(
                f"calibrate: the {name} may take {cpus:g} CPUs by its limit, and only whole ones can be kept apart: "
                "say how many with --cpus"
            )
        if len(available) <= count:
            raise SystemExit(
                f"calibrate: there are {len(available)} CPU(s) here and one {name} takes {count}: at least one more is "
                "needed, or the load would take from what it measures. Find a larger machine, or give fewer by --cpus"
            )
        found[name] = available[:count], available[count:]
    return found


def light(bundle: Path, folder: Path) -> None:
    """A bundle of the same name, input and classes whose graph looks at one pixel: a model server that is not the
    limit of a gateway, which does all its own work for it."""
    real = manifest.read(bundle)
    resize, classes = real.input.resize, len(real.classes)

    def make(new: Path) -> Manifest:
        node, tensor = onnx.helper.make_node, onnx.helper.make_tensor_value_info
        constants = {
            "from": np.array([0, 0]),
            "to": np.array([1, 1]),
            "axes": np.array([1, 2]),
            "shape": np.array([-1, 3]),
            "weights": np.linspace(-1, 1, 3 * classes, dtype=np.float32).reshape(3, classes) / 255,
        }
        graph = onnx.helper.make_graph(
            [
                node("Slice", ["pixels", "from", "to", "axes"], ["pixel"]),
                node("Cast", ["pixel"], ["float"], to=onnx.TensorProto.FLOAT),
                node("Reshape", ["float", "shape"], ["rows"]),
                node("MatMul", ["rows", "weights"], ["logits"]),
            ],
            "light",
            [tensor("pixels", onnx.TensorProto.UINT8, ["n", resize.height, resize.width, 3])],
            [tensor("logits", onnx.TensorProto.FLOAT, ["n", classes])],
            [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        opset = [onnx.helper.make_opsetid("", 18)]
        onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), new / "model.onnx")
        session = onnxruntime.InferenceSession(new / "model.onnx", providers=["CPUExecutionProvider"])
        drawn = golden.draw(4, resize.height, resize.width)
        golden.record(new, drawn, lambda pixels: session.run(None, {"pixels": pixels})[0])
        return dataclasses.replace(real, files={}, version="light", tolerance=1e-3, metrics={}, provenance={})

    manifest.write(folder, make)


@contextlib.contextmanager
def running(process: subprocess.Popen[bytes], name: str, ready: Callable[[], float]) -> Iterator[float]:
    """Seconds from now until the moment (Unix seconds) that `ready` gives once it is, 0 before; ended when the context
    is left."""
    began = time.time()
    try:
        processes.prefer([psutil.Process(process.pid)])
        while not (at := ready()):
            if process.poll() is not None or time.time() - began > local.START_SECONDS:
                raise SystemExit(f"calibrate: the {name} did not become ready; see {LOG.relative_to(ROOT)}")
            time.sleep(0.02)
        processes.prefer(processes.tree(process.pid))  # sessions that it began have shares of their own
        yield at - began
    finally:
        local.end(process)


@contextlib.contextmanager
def model_server(
    bundle: Path, cpus: Sequence[int], output: IO[bytes]
) -> Iterator[tuple[subprocess.Popen[bytes], str, float]]:
    """One on these CPUs: its process, its gRPC address, seconds to its first answer."""
    [port] = local.free_ports(1)
    target = f"127.0.0.1:{port}"
    # Asked from a process of its own: gRPC's threads do not live through the forks that start others here.
    command = [sys.executable, "-m", "capacity.load", "--grpc", target, "--bundle", str(bundle), "--first-answer"]
    with tempfile.TemporaryDirectory(prefix="calibrate-") as store:
        archive = [sys.executable, "model-server/archive.py", str(bundle), "--store", store]
        subprocess.run(archive, cwd=ROOT, env=local.environment(), check=True, stdout=output)
        with subprocess.Popen(command, cwd=ROOT, env=local.environment(), stdout=subprocess.PIPE) as asking:
            try:
                with pinned(cpus):
                    process = local.start_model_server(Path(store), port, output)

                def answered() -> float:
                    return float(asking.stdout.read()) if asking.poll() == 0 and asking.stdout else 0.0

                with running(process, "model server", answered) as seconds:
                    yield process, target, seconds
            finally:
                asking.kill()


@contextlib.contextmanager
def gateway(
    name: str, target: str, cpus: Sequence[int], output: IO[bytes]
) -> Iterator[tuple[subprocess.Popen[bytes], str, float]]:
    """One before that model server: its process, its address, seconds until it was ready."""
    [port] = local.free_ports(1)

    def ready() -> float:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                return time.time()
        except OSError:
            return 0.0

    with pinned(cpus):
        process = local.start_gateway([name], target, port, output)
    with running(process, "gateway", ready) as seconds:
        yield process, f"http://127.0.0.1:{port}", seconds
