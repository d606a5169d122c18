"""What a GPU gives: the default model in bare loops, as the handler runs it, in the model server, and as a whole.

    make bench-gpu ARGS='--seconds 2 --rounds 5'

Bare loops have their pictures on the GPU already and wait for the last batch alone. The handler's run is from pictures
in the host's memory to logits there, a batch after the other. Then model server and gateway start as `make run`
starts them: pixels over gRPC, as gateways send them, and photographs over HTTP, from processes of this machine, whose
CPUs they share. Writes build/bench/gpu.json.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gpu
import handler
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from bench import contenders, figures, processes
from bench.contenders import HOME, Server
from bench.prepare import jpegs, photographs
from bundle import golden
from bundle.cpus import whole_cpus
from bundle.picture import load as load_picture
from local.processes import ROOT
from local.run import BUNDLES, DEFAULT

DEVICE = "cuda:0"
FOLDER = BUNDLES / DEFAULT
BATCHES = (1, 8, 64)
Loop = Callable[[int], None]  # so many batches, to the end of the last


@cache
def served() -> handler.Model:
    """As a worker makes it. The first of these four to be called, each of which takes seconds: here float32 is made
    exact, without TF32."""
    return handler.Model(FOLDER, DEVICE)


@cache
def program() -> fx.GraphModule:
    return gpu.program(FOLDER, DEVICE)


@cache
def mixed(cast: torch.dtype) -> fx.GraphModule:
    return gpu.mixed(gpu.fold(gpu.program(FOLDER, DEVICE)), cast)


@cache
def graphs(cast: torch.dtype) -> gpu.Graphs:
    return gpu.Graphs(mixed(cast), DEVICE, served().shape, served().classes, cast)


def loops(batch: int) -> dict[str, Loop]:
    """By name, in the order in which they are told."""
    model = served()
    pictures = golden.draw(batch, *model.shape[:2])
    pixels = torch.from_numpy(pictures).to(DEVICE)
    replayed = graphs(torch.float16).graphs[batch]

    def bare(module: Callable[[Tensor], Tensor], autocast: bool) -> Loop:
        def loop(count: int) -> None:
            with torch.inference_mode(), torch.autocast("cuda", torch.float16, enabled=autocast):
                for _ in range(count):
                    module(pixels)
            torch.cuda.synchronize()

        return loop

    def graph(count: int) -> None:
        for _ in range(count):
            replayed.replay()
        torch.cuda.synchronize()

    def handled(count: int) -> None:
        for _ in range(count):
            model.run(pictures)

    return {
        "eager, float32": bare(program(), False),
        "eager, float16 by autocast": bare(program(), True),
        "eager, float16, folded": bare(mixed(torch.float16), True),
        "CUDA graph, float16, folded": graph,
        "the handler's run": handled,
    }


def speed(loop: Loop, batch: int, seconds: float) -> float:
    """Images/s."""
    count = 4
    while True:
        began = time.perf_counter()
        loop(count)
        if (took := time.perf_counter() - began) >= seconds:
            return count * batch / took
        count = int(count * min(10, 1.2 * seconds / took)) + 1


def in_process(seconds: float, rounds: int) -> dict[str, dict[str, list[float]]]:
    """{batch size: {loop: images/s of each round}}, interleaved."""
    found: dict[str, dict[str, list[float]]] = {}
    for batch in BATCHES:
        ways = loops(batch)
        for loop in ways.values():
            loop(10)
        results: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds):
            for name in random.Random(number).sample(list(ways), len(ways)):
                results[name].append(speed(ways[name], batch, seconds / rounds))
        found[str(batch)] = results
    return found


def closeness(photos: Sequence[Path]) -> dict[str, dict[str, float]]:
    """How far less exact arithmetic is from float32 at most, in roundings of the spread of a picture's logits; and how
    many of the pictures it names otherwise."""
    resize = served().manifest.input.resize
    pixels = [load_picture(path.read_bytes(), resize) for path in photos]
    parts = [pixels[start : start + gpu.SIZES[-1]] for start in range(0, len(pixels), gpu.SIZES[-1])]

    def logits(run: golden.Run) -> NDArray[np.float32]:
        return np.concatenate([run(part) for part in parts])

    exact = logits(gpu.eager(program(), DEVICE))
    found = {}
    for name, cast in gpu.CASTS.items():
        rough = logits(graphs(cast))
        away = np.abs(rough - exact).max(1) / np.ptp(exact, axis=1) / torch.finfo(cast).eps
        otherwise = (rough.argmax(1) != exact.argmax(1)).sum()
        found[name] = {"pictures": len(pixels), "roundings": float(away.max()), "named otherwise": float(otherwise)}
    return found


def whole(loads: Sequence[tuple[str, int, int]], seconds: float) -> dict[str, Any]:
    """Images/s, times and CPU of each of loads: "grpc" or "http", processes, clients of each."""
    ours, photos = next(c for c in contenders.ALL if c.ours), photographs(None)["small"]
    found: dict[str, Any] = {}
    with contenders.running(ours, photos[0], HOME / "gpu.log") as server:
        found["start_s"] = server.start_seconds
        words = list(map(str, server.process.args))  # type: ignore[arg-type]
        port = words[words.index("--grpc-port") + 1]
        for kind, count, clients in loads:
            target = ["--grpc", f"127.0.0.1:{port}", "--bundle", FOLDER]
            if kind == "http":
                target = ["--http", server.url, "--bodies", *photos]
            load(server, target, count, clients, seconds)  # a JVM takes a thousand calls to become fast
            name = f"{kind}, {count} x {clients} clients"
            found[name] = load(server, target, count, clients, seconds)
            print(f"{name}: {found[name]}", flush=True)
        found["pss_mb"] = processes.memory(server.tree())
    return found


def load(server: Server, target: Sequence[Any], count: int, clients: int, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        logs = [Path(scratch) / f"{number}.tsv" for number in range(count)]
        common = [sys.executable, "-m", "capacity.load", *target, "--clients", str(clients), "--seconds", str(seconds)]
        before = processes.cpu(server.tree())
        running = [subprocess.Popen([*common, "--log", log], cwd=ROOT, stdout=subprocess.DEVNULL) for log in logs]
        codes = [process.wait() for process in running]
        if any(codes):
            raise SystemExit("a load generator failed")
        cost = processes.spent(before, processes.cpu(server.tree()))
        rows = [row for log in logs for row in figures.read(log)]
    told = figures.summary(rows, seconds)
    return {**told, "cpu_ms": figures.per_image(cost, sum(row.status == 200 for row in rows))}


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=2, help="of each loop, in all its rounds, and of each load")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, help="photographs for which float16's answers are compared")
    parser.add_argument("--loads", nargs="*", default=["grpc:4:64", "http:4:64"], help="grpc or http:processes:clients")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU here: TORCH=cuda make run installs the build that can")
    machine = {"gpu": torch.cuda.get_device_name(), "cpus": whole_cpus(), "torch": torch.__version__}
    found: dict[str, Any] = {"machine": machine, "loops": in_process(args.seconds, args.rounds)}
    for batch, results in found["loops"].items():
        for name, values in results.items():
            middle, low, high = statistics.median(values), min(values), max(values)
            print(f"{batch} at a time, {name}: {middle:.0f} images/s ({low:.0f} to {high:.0f}, n={len(values)})")
    if args.data:
        found["closeness"] = closeness(jpegs(args.data))
        print(found["closeness"])
    loads = [(kind, int(count), int(clients)) for kind, count, clients in (each.split(":") for each in args.loads)]
    found["whole"] = whole(loads, args.seconds)
    (HOME / "gpu.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
