"""One contender's turn: start, the check of its answers, the loads, the end."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench import cases, contenders, figures, processes, report, results
from bench.cases import Case
from bench.contenders import HOME, Contender, Failed, Server
from bench.load import Row
from bundle.cpus import whole_cpus
from local.processes import ROOT
from local.run import DEFAULT

MEMORY_SECONDS = 20.0  # between looks at memory; one holds up a process for milliseconds
CALM = 6.0  # seconds without a call before memory is compared: what servers give back now and then (gateway/start.py)


@dataclass(frozen=True)
class Visit:
    """What one contender does in one round, from its start to its end."""

    round: int
    contender: Contender
    cases: tuple[Case, ...]


def pay(visit: Visit, photos: dict[str, list[Path]], book: results.Book, warm_up: float) -> None:
    """Start, check the answers, measure what is not measured yet, end."""
    contender, name = visit.contender, visit.contender.name
    todo = [case for case in visit.cases if not book.has(name, visit.round, case.name)]
    if not todo:
        return
    print(f"round {visit.round}: {name}", flush=True)
    try:
        if contender.server:
            log = HOME / "logs" / f"{name.replace(', ', '-').replace(' ', '-')}.log"
            log.parent.mkdir(exist_ok=True)
            with contenders.running(contender, photos["small"][0], log) as server:
                check(server, photos)
                started: dict[str, Any] = {
                    "start_s": server.start_seconds,
                    "pss_mb": processes.memory(server.tree()),
                }
                load(server, Case("", warm_up, 32), photos)
                started["preferred"] = processes.prefer(server.tree())
                if not book.has(name, visit.round, "start"):
                    book.add(name, visit.round, "start", started | {"parts_s": server.parts()})
                for case in todo:
                    measured = measure(server, case, photos, book)
                    book.add(name, visit.round, case.name, measured)
                    print(f"  {case.name}: {report.line(measured)}", flush=True)
        else:
            for case in todo:
                measured = in_process(contender, case, photos["small"])
                book.add(name, visit.round, case.name, measured)
                print(f"  {case.name}: {report.line(measured)}", flush=True)
    except Failed as exc:
        print(f"  {exc}", flush=True)
        book.add(name, visit.round, "start", {"error": str(exc)})


def check(server: Server, photos: dict[str, list[Path]]) -> None:
    """The same top five as in this process for every picture. Raises Failed."""
    contender = server.contender
    # int8 and bf16 round: what they may differ is the subject of `make quantize`'s report and of a worker's start.
    close = 1.0 if contender.bundle != DEFAULT or contender.runtime == "bf16" else 2e-3
    for photo in [*photos["small"], *([] if contender.full else photos["large"])]:
        try:
            top = contenders.ask(server.url, contenders.body(contender, photo))
        except (OSError, ValueError) as exc:
            raise Failed(f"{photo.name}: {exc}") from exc
        if what := contenders.differs(top, reference(photo), close):
            raise Failed(f"answers otherwise than ONNX Runtime in one process does: {photo.name}: {what}")


_reference: dict[Path, list[dict[str, Any]]] = {}


def reference(photo: Path) -> list[dict[str, Any]]:
    if photo not in _reference:
        told = limit(contenders.ALL[0], [photo], 1, 0.01)
        _reference[photo] = told["tops"][0]
    return _reference[photo]


def limit(contender: Contender, photos: Sequence[Path], threads: int, seconds: float) -> dict[str, Any]:
    """bench.serve.limit's own words. Raises Failed."""
    words, settings = contenders.command(contender, 0, 0, HOME)
    words += [*map(str, photos), "--threads", str(threads), "--seconds", str(seconds), "--log", str(HOME / "calls.tsv")]
    done = subprocess.run(words, cwd=ROOT, env=settings, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{contender.name}: {done.stderr.strip().splitlines()[-1:]}")
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def in_process(contender: Contender, case: Case, photos: Sequence[Path]) -> dict[str, Any]:
    busy, began = processes.busy(), time.monotonic()
    told = limit(contender, photos, min(case.clients, whole_cpus()), case.seconds)
    others = processes.busy() - busy - told["process_seconds"]
    rows = figures.read(HOME / "calls.tsv")
    return figures.summary(rows, case.seconds) | {
        "cpu_ms": figures.per_image(told["cpu"], len(rows)),
        "elsewhere": elsewhere(others, time.monotonic() - began),
    }


def elsewhere(cpu_seconds: float, took: float) -> float:
    """The share of the machine that neither server nor load generator used: above a few percent, measure again."""
    return max(0.0, cpu_seconds / took / (os.cpu_count() or 1))


def load(
    server: Server, case: Case, photos: dict[str, list[Path]], rate: float = 0, watch: Callable[[], Any] = lambda: None
) -> tuple[list[Row], float]:
    """Runs bench.load -> its rows, and its CPU seconds a call. `watch` is called every few seconds."""
    bodies = [contenders.body(server.contender, photo) for photo in photos[case.photo]]
    log = HOME / "calls.tsv"
    words = [sys.executable, "-m", "bench.load", server.url, *(str(body.path) for body in bodies)]
    words += ["--content-type", bodies[0].content_type, "--seconds", str(case.seconds), "--log", str(log)]
    words += ["--clients", str(case.clients)] if case.clients else ["--rate", str(rate)]
    words += ["--bad", str(case.bad), "--hang-up", str(case.hang_up)]
    if server.contender.bundle == DEFAULT and not server.contender.full:
        words += [f"--expect={json.dumps(reference(photo)[0]['label'])}" for photo in photos[case.photo]]
    process = subprocess.Popen(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    processes.prefer([psutil.Process(process.pid)])
    while True:
        try:
            told, _ = process.communicate(timeout=MEMORY_SECONDS)
            break
        except subprocess.TimeoutExpired:
            watch()
    if process.returncode:
        raise Failed(f"the load generator ended with {process.returncode}")
    counted = json.loads(told)
    return figures.read(log), counted["cpu_seconds"] / max(1, counted["calls"])


def measure(server: Server, case: Case, photos: dict[str, list[Path]], book: results.Book) -> dict[str, Any]:
    """One case -> its figures. Raises Failed."""
    name = server.contender.name
    capacity = book.median(name, cases.MANY.name, "images_per_s") or 0.0
    if case.of_capacity and not capacity:
        raise Failed("its capacity is unknown: nothing was answered to 32 clients")
    series: list[dict[str, float]] = []
    watch = (lambda: series.append(processes.memory(server.tree()))) if case.of_capacity else (lambda: None)
    if case.recovery:
        time.sleep(CALM)
    memory_before = processes.memory(server.tree())
    before, busy, began = processes.cpu(server.tree()), processes.busy(), time.monotonic()
    rows, generator = load(server, case, photos, rate=case.of_capacity * capacity, watch=watch)
    after, busy, took = processes.cpu(server.tree()), processes.busy() - busy, time.monotonic() - began
    cost = processes.spent(before, after)
    series.append(processes.memory(server.tree()))
    answered = sum(row.status == 200 for row in rows)
    found = figures.summary(rows, case.seconds) | {
        "cpu_ms": figures.per_image(cost, answered),
        "ended": processes.lost(before, after),
        "generator_ms": 1e3 * generator,
        "rate": case.of_capacity * capacity or None,
        "pss_mb": max([memory_before, *series], key=lambda found: sum(found.values())),
        "took_s": took,
        "elsewhere": elsewhere(busy - sum(cost.values()) - generator * len(rows), took),
    }
    if case.recovery:
        again, _ = load(server, Case("", case.recovery, 32), photos)
        found["recovery_s"] = figures.recovered(again, capacity)
        time.sleep(CALM)
        found["pss_before_mb"], found["pss_after_mb"] = memory_before, processes.memory(server.tree())
    if case.name == cases.SOAK.name:
        found["pss_series_mb"] = series
    return found
