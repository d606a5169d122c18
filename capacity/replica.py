"""A tier under load: what came of a rate, and what it cost."""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil

from bench import figures, processes
from bench.load import Row
from capacity.measured import LEVELS, Floats, Step
from capacity.stand import LOG, pinned
from local import processes as local
from local.processes import ROOT

CLIENTS = 32  # of the closed loop that tells what saturates a replica: four full calls to the model server
LEAD, STEP = 1.5, 8.0  # seconds: before what counts of a step, and of what counts
BUSY = 0.95  # of the load's CPUs: beyond it, it is the load that was late
OTHERS = 0.1  # CPUs of the tier's that others took: beyond it, measure again
IDLE, LOOK = 3.0, 1.0  # seconds without load; between looks


@dataclass
class Bench:
    """A tier that runs alone on its CPUs, how to call it, and what was seen of it so far."""

    name: str
    process: subprocess.Popen[bytes]
    call: Sequence[str]
    cpus: Sequence[int]
    load_cpus: Sequence[int]
    start_seconds: float
    objective_ms: float
    start_cores: float = 0.0
    idle_cores: float = 0.0
    peak_mb: float = 0.0
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start_cores = min(len(self.cpus), self._spent() / self.start_seconds)

    def run(self, *words: str) -> tuple[list[Row], dict[str, float]]:
        """Calls from the other CPUs -> each of them; and cpu_ms, beside, others as in Step."""
        with tempfile.TemporaryDirectory(prefix="calibrate-") as scratch:
            log = Path(scratch) / "calls.tsv"
            command = [sys.executable, "-m", "capacity.load", *self.call, *words, "--log", str(log)]
            began, spent, busy = time.monotonic(), self._spent(), [_busy()]
            with pinned(self.load_cpus):
                load = subprocess.Popen(command, cwd=ROOT, env=local.environment())
            processes.prefer([psutil.Process(load.pid)])
            while load.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    load.wait(LOOK)
                self.look()
                busy.append(_busy())
            if load.returncode:
                raise SystemExit(f"calibrate: the load generator ended with exit code {load.returncode}")
            rows = figures.read(log)
        spent, took = self._spent() - spent, time.monotonic() - began
        seconds = [float((b - a)[self.load_cpus].mean()) / LOOK for a, b in pairwise(busy[:-1])]
        return rows, {
            "cpu_ms": 1e3 * max(0.0, spent - self.idle_cores * took) / max(1, len(rows)),
            # Not their mean: the load's own start, and the wait for the last answer, are not the load.
            "beside": min(1.0, float(np.quantile(seconds or [0.0], 0.75))),
            "others": max(0.0, float((busy[-1] - busy[0])[self.cpus].sum() - spent) / took),
        }

    def look(self) -> None:
        if (code := self.process.poll()) is not None:
            raise SystemExit(f"calibrate: the {self.name} ended with exit code {code}; see {LOG.relative_to(ROOT)}")
        self.peak_mb = max(self.peak_mb, sum(processes.memory(processes.tree(self.process.pid)).values()))

    def _spent(self) -> float:
        return sum(seconds for _, seconds in processes.cpu(processes.tree(self.process.pid)).values())

    def _cores(self, rate: float, cpu_ms: float) -> float:
        """CPUs at that rate: never more than it has, though a call may cost more than its share of them, as the first
        ones of a JVM do, or those of a step too short to show that its rate is never kept."""
        return min(len(self.cpus), self.idle_cores + rate * cpu_ms / 1e3)

    def idle(self) -> None:
        before, began = self._spent(), time.monotonic()
        time.sleep(IDLE)
        self.idle_cores = (self._spent() - before) / (time.monotonic() - began)

    def saturate(self, seconds: float) -> tuple[float, float]:
        """Answers a second to clients who never pause, and the CPUs that they took."""
        rows, cost = self.run("--clients", str(CLIENTS), "--seconds", str(seconds))
        # The second half: the first has the connections to make.
        answers = sum(row.status == 200 and seconds / 2 <= row.due + row.seconds < seconds for row in rows)
        if not answers:
            raise SystemExit(f"calibrate: the {self.name} answered nobody; see {LOG.relative_to(ROOT)}")
        rate = 2 * answers / seconds
        return rate, self._cores(rate, cost["cpu_ms"])

    def step(self, rate: float, seconds: float = 0.0) -> Step:
        """The rate held for `seconds`, STEP by default, after a lead that does not count."""
        seconds = seconds or STEP
        words = ["--rate", f"0:{rate:g},{LEAD + seconds:g}:{rate:g}", "--seed", str(len(self.steps))]
        rows, cost = self.run(*words)
        counted = [row for row in rows if row.due >= LEAD]
        told = figures.summary(counted, seconds)
        right = [1e3 * row.seconds for row in counted if row.status == 200] or [0.0]
        p99, failed = told["p99_ms"] or 0.0, sum(told["failed"].values())
        step = Step(
            rate=rate,
            seconds=seconds,
            n=len(counted),
            p50_ms=told["p50_ms"] or 0.0,
            p99_ms=p99,
            refused=told["refused"],
            failed=failed,
            passed=not failed and not told["refused"] and 0 < p99 <= self.objective_ms,
            cores=self._cores(rate, cost["cpu_ms"]),
            memory_mb=self.peak_mb,
            quantiles_ms=tuple(np.quantile(right, LEVELS).tolist()),
            **cost,
        )
        self.steps.append(step)
        print(f"  {line(step)}", flush=True)
        return step


def line(step: Step) -> str:
    parts = [f"{step.rate:6.1f} images/s: p50 {step.p50_ms:.0f} ms, p99 {step.p99_ms:.0f} ms, CPU {step.cpu_ms:.1f} ms"]
    parts += [f"{step.refused} refused"] if step.refused else []
    parts += [f"{step.failed} failed"] if step.failed else []
    parts += [f"others took {step.others:.2f} CPUs"] if step.others > OTHERS else []
    parts += [f"the load's own CPUs {step.beside:.0%} busy"] if step.beside > BUSY else []
    return ", ".join(parts) + ("" if step.passed else ": too much")


def _busy() -> Floats:
    """CPU seconds of each CPU that were not idle, so far."""
    return np.array(processes.busy_each())
