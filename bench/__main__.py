"""Runs the contenders in rounds, each alone on the machine, and writes results and page: `make bench`.

Everything once, the closed loop at 1 and 32 clients in five rounds for ours and the three fastest others: about two
hours, of two CPUs with nothing else to do. Every measurement is appended to build/bench/results.jsonl at once, and the
same command goes on where it was stopped, as long as the commit and the machine are the same.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from PIL import Image, ImageOps

from bench import cases, contenders, figures, processes, report, results
from bench.cases import Case
from bench.contenders import HOME, Contender, Failed, Server
from bundle.cpus import whole_cpus
from bundle.golden import draw
from bundle.manifest import BundleError
from bundle.manifest import read as read_bundle
from local.processes import ROOT
from local.run import BUNDLES, DEFAULT

SMALL, LARGE = (533, 400), (4032, 3024)  # width and height of the photographs: as from the web, as from a phone
PHOTOS = 4  # small ones, sent in turn
MEMORY_SECONDS = 5.0  # between looks at memory; one takes milliseconds a process


@dataclass(frozen=True)
class Visit:
    """What one contender does in one round, from its start to its end."""

    round: int
    contender: Contender
    cases: tuple[Case, ...]


IN_QUICK = ("limit", "ours", "Flask, ONNX Runtime", "LitServe, ONNX Runtime")
FASTEST = 3
WARM_UP, QUICK_WARM_UP = 12, 6  # seconds of 32 clients; a JVM takes a thousand calls to become fast
ROUNDS = 5


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="ours, the limit and two contenders; five minutes")
    parser.add_argument("--data", type=Path, help="a folder of photographs; drawings where there is none")
    parser.add_argument("--only", help="contenders, separated by ';': " + "; ".join(c.name for c in contenders.ALL))
    parser.add_argument("--rounds", type=int, help="of the closed loop at 1 and 32 clients for those in --only")
    parser.add_argument("--results", type=Path, default=HOME / "results.jsonl", help="records are appended to it")
    args = parser.parse_args(arguments)
    names = tuple(name.strip() for name in args.only.split(";")) if args.only else IN_QUICK if args.quick else ()
    chosen = choose(names)
    HOME.mkdir(parents=True, exist_ok=True)
    photos = photographs(args.data)
    broken = prepare(chosen)
    book = results.Book(args.results, identity(chosen, photos, args.quick, args.rounds))
    for name, reason in broken.items():
        book.add(name, 0, "start", {"error": reason})
    able = [c for c in chosen if c.name not in broken]
    for visit in plan(able, args.quick, args.rounds, bool(names), book):
        pay(visit, photos, book, warm_up=QUICK_WARM_UP if args.quick else WARM_UP)
        report.write(book, HOME)
    book.finish()
    print(f"\n{report.text(book)}\n\n{HOME / 'report.html'}\n{HOME / 'report.json'}", flush=True)


def choose(names: Sequence[str]) -> list[Contender]:
    """By name; all where none is given. Raises SystemExit naming those there are."""
    known = {contender.name: contender for contender in contenders.ALL}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"bench: there is no contender {unknown[0]!r}: there are {'; '.join(known)}")
    return [known[name] for name in names] if names else list(known.values())


def plan(
    able: Sequence[Contender], quick: bool, rounds: int | None, named: bool, book: results.Book
) -> Iterator[Visit]:
    """Every visit, in the order in which they are paid; made as it goes, since the later rounds are for the fastest."""
    if quick or rounds:
        loads = cases.QUICK if quick else cases.REPEATED
        for number in range(1, (rounds or 3) + 1):
            for contender in shuffled(able, number):
                yield Visit(number, contender, loads)
        return
    for contender in shuffled(able, 1):
        yield Visit(1, contender, cases.EVERY if contender.server else cases.REPEATED)
    best = able if named else fastest(able, book)
    for number in range(2, ROUNDS + 1):
        for contender in shuffled(best, number):
            yield Visit(number, contender, cases.REPEATED)
    for contender in able:
        if contender.name == "ours":
            yield Visit(1, contender, (cases.SOAK,))


def fastest(able: Sequence[Contender], book: results.Book) -> list[Contender]:
    """Ours, the limits, and the others that were fastest at 32 clients in the first round."""
    ours = [c for c in able if c.ours or not c.server]
    speed = {c.name: max(book.values(c.name, cases.MANY.name, "images_per_s")[:1], default=0.0) for c in able}
    others = sorted((c for c in able if c not in ours and not c.full), key=lambda c: -speed[c.name])
    return ours + others[:FASTEST]


def shuffled(able: Sequence[Contender], number: int) -> list[Contender]:
    """Another order each round, the same whenever the run is continued."""
    return random.Random(number).sample(list(able), len(able))


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
                started = {
                    "start_s": server.start_seconds,
                    "pss_mb": processes.memory(server.tree()),
                }
                load(server, Case("", warm_up, 32), photos)
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
    # int8 rounds: what it may differ is the subject of `make quantize`'s report, not of this one.
    close = 1.0 if contender.bundle != DEFAULT else 2e-3
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
        told = limit(choose(["limit"])[0], [photo], 1, 0.01)
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
) -> tuple[list[Any], float]:
    """Runs bench.load -> its rows, and its CPU seconds a call. `watch` is called every few seconds."""
    bodies = [contenders.body(server.contender, photo) for photo in photos[case.photo]]
    log = HOME / "calls.tsv"
    words = [sys.executable, "-m", "bench.load", server.url, *(str(body.path) for body in bodies)]
    words += ["--content-type", bodies[0].content_type, "--seconds", str(case.seconds), "--log", str(log)]
    words += ["--clients", str(case.clients)] if case.clients else ["--rate", str(rate)]
    words += ["--bad", str(case.bad), "--hang-up", str(case.hang_up)]
    process = subprocess.Popen(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
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
        found["pss_before_mb"], found["pss_after_mb"] = memory_before, processes.memory(server.tree())
    if case.name == cases.SOAK.name:
        found["pss_series_mb"] = series
    return found


def photographs(folder: Path | None) -> dict[str, list[Path]]:
    """Small ones and one of 12 megapixels, under build/bench/photos: from a folder, or drawn where there is none."""
    folder = folder or ROOT.parent / "shared" / "data" / "photos"
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg")) if folder.is_dir() else []
    target = HOME / "photos"
    target.mkdir(parents=True, exist_ok=True)
    step = max(1, len(found) // PHOTOS)
    images = [Image.open(path).convert("RGB") for path in found[::step][:PHOTOS]]
    images = images or [Image.fromarray(pixels) for pixels in draw(PHOTOS, SMALL[1], SMALL[0], seed=11)]
    small = []
    for i, image in enumerate(images):
        ImageOps.fit(image, SMALL, Image.Resampling.LANCZOS).save(path := target / f"small-{i}.jpg", quality=80)
        small.append(path)
    ImageOps.fit(images[0], LARGE, Image.Resampling.BICUBIC).save(large := target / "large-0.jpg", quality=90)
    return {"small": small, "large": [large]}


def prepare(chosen: Sequence[Contender]) -> dict[str, str]:
    """Install what is needed -> {contender: why it cannot take part}."""
    broken = {}
    failed: dict[str, str] = {}
    for contender in chosen:
        try:
            read_bundle(BUNDLES / contender.bundle)
        except BundleError as exc:
            broken[contender.name] = str(exc)
            continue
        try:
            if contender.environment not in failed:
                contenders.install(contender.environment)
        except (Failed, subprocess.CalledProcessError) as exc:
            failed[contender.environment] = str(exc)
        if contender.environment in failed:
            broken[contender.name] = failed[contender.environment]
    for name, reason in broken.items():
        print(f"without {name}: {reason}", flush=True)
    return broken


def identity(
    chosen: Sequence[Contender], photos: dict[str, list[Path]], quick: bool, rounds: int | None
) -> dict[str, Any]:
    """What a run is of: another machine, another commit or another plan is another run."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
    )
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    flags = {flag for line in _cpuinfo() if line.startswith("flags") for flag in line.split()}
    wide = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "amx_int8") if flag in flags]
    bundles = {}
    for name in sorted({contender.bundle for contender in chosen}):
        with contextlib.suppress(BundleError):  # told by `prepare`
            bundles[name] = read_bundle(BUNDLES / name).digest[:12]
    return {
        "commit": git.stdout.strip() or "unknown",
        "machine": {
            "cpu": model,
            "cpus": whole_cpus(),
            "flags": " ".join(wide),
            "memory_gb": round(psutil.virtual_memory().total / 1e9),
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
        },
        "bundles": bundles,
        "photos": {size: [_kilobytes(path) for path in paths] for size, paths in photos.items()},
        "versions": {c.environment: versions(c.environment) for c in chosen if c.environment},
        "contenders": [dataclasses.asdict(c) for c in chosen],
        "quick": quick,
        "rounds": rounds,
    }


def versions(environment: str) -> str:
    """What the first line of its requirements names."""
    first = (ROOT / "bench" / f"requirements-{environment}.txt").read_text().splitlines()[0]
    return first.split(": ")[1].split(", with")[0]


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _kilobytes(path: Path) -> str:
    with Image.open(path) as image:
        return f"{image.width}x{image.height}, {path.stat().st_size / 1e3:.0f} kB"


if __name__ == "__main__":
    main()
