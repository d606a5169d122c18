"""What was measured: JSON for programs, one page for people, a table for the terminal.

The page begins with what is required and not met, and with every figure in which another one is better.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2

from bench import cases
from bench.figures import Spread
from bench.results import START, Book

OURS, OURS_INT8, LIMIT, LIMIT_INT8 = "ours", "ours, int8", "limit", "limit, int8"
ONNX, EAGER = ", ONNX Runtime", ", PyTorch"
FLASK_FULL = "Flask, ONNX Runtime, full decode"
UNKNOWN = "\N{EN DASH}"  # where there is no figure


@dataclass(frozen=True)
class Measure:
    """A figure that contenders are compared by."""

    title: str
    unit: str
    case: cases.Case
    figure: str
    more_is_better: bool
    digits: int = 0


MEASURES = (
    Measure("Images a second, 32 clients", "images/s", cases.MANY, "images_per_s", True, 1),
    Measure("CPU an image, all processes, 32 clients", "ms", cases.MANY, "cpu_ms", False, 1),
    Measure("Half of one client's answers come within", "ms", cases.ONE, "p50_ms", False, 1),
    Measure("99% of the answers to 32 clients come within", "ms", cases.MANY, "p99_ms", False),
    Measure("Images a second, 8 clients", "images/s", cases.FEW, "images_per_s", True, 1),
    Measure("Images a second of 12 megapixels, 8 clients", "images/s", cases.BIG, "images_per_s", True, 1),
    *(
        Measure(
            f"99% of the answers come within, at {case.of_capacity:g} of its own capacity", "ms", case, "p99_ms", False
        )
        for case in (cases.HALF, cases.MOST, cases.WHOLE)
    ),
    Measure(
        "Right answers a second under 5 times its own capacity", "images/s", cases.TOO_MUCH, "images_per_s", True, 1
    ),
    Measure("99% of those come within", "ms", cases.TOO_MUCH, "p99_ms", False),
    Measure("Full speed again after it", "s", cases.TOO_MUCH, "recovery_s", False),
    Measure("Memory under load, 32 clients (PSS)", "MB", cases.MANY, "pss_mb", False),
    Measure("First answer after the start", "s", cases.Case(START, 0), "start_s", False, 1),
)


def value(book: Book, name: str, measure: Measure) -> Spread | None:
    return book.total(name, measure.case.name, measure.figure)


def better(measure: Measure, ours: float, other: float) -> float:
    """How many times as good ours is: above 1 where it is better."""
    return (ours / other if other else 1.0) if measure.more_is_better else (other / ours if ours else 1.0)


def comparisons(book: Book) -> list[dict[str, Any]]:
    """Ours against every contender in every figure, ours at its worst first."""
    found = []
    for measure in MEASURES:
        mine = value(book, OURS, measure)
        for name in book.names():
            other = value(book, name, measure)
            if mine and other and not name.startswith((OURS, LIMIT)):
                times = better(measure, mine.median, other.median)
                # Ranges that do not meet: as sure as this many rounds can be.
                apart = mine.low > other.high or mine.high < other.low
                row = {"measure": measure, "name": name, "ours": mine, "other": other, "times": times, "apart": apart}
                found.append(row)
    return sorted(found, key=lambda row: row["times"])


@dataclass(frozen=True)
class Bound:
    """Something that is required: met or not, or None where it was not measured."""

    text: str
    found: str
    met: bool | None


def bounds(book: Book) -> list[Bound]:
    """Every requirement on speed, in order."""
    median, total = book.median, book.median_total
    many, one = cases.MANY.name, cases.ONE.name
    servers = [name for name in book.names() if name.endswith(ONNX)]
    speed = {name: found for name in servers if (found := median(name, many, "images_per_s"))}
    best = max(speed, key=lambda name: speed[name], default="")
    eager = {n: found for n in book.names() if n.endswith(EAGER) and (found := median(n, many, "images_per_s"))}
    others = {name: found for name, found in speed.items() if not name.startswith("Flask")}
    ours, ours_cpu = median(OURS, many, "images_per_s"), total(OURS, many, "cpu_ms")
    int8, int8_cpu = median(OURS_INT8, many, "images_per_s"), total(OURS_INT8, many, "cpu_ms")
    best_cpu = total(best, many, "cpu_ms")
    fastest_eager = max(eager.values(), default=None)
    refused = median(OURS, cases.TOO_MUCH.name, "refused_p99_ms")
    made = [
        _ratio(f"fp32, 32 clients: images/s of the fastest contender ({best})", ours, speed.get(best), 0.95, True),
        _ratio(f"fp32, 32 clients: CPU an image of the same ({best})", ours_cpu, best_cpu, 1.1, False),
        _ratio("fp32, 32 clients: images/s of the fastest of LitServe, KServe, Mosec, BentoML, Ray Serve",
               ours, max(others.values(), default=None), 1.0, True),
        _ratio("images/s of the fastest with eager PyTorch", ours, fastest_eager, 2.0, True),
        _ratio(f"int8: images/s of the fastest fp32 contender ({best})", int8, speed.get(best), 1.25, True),
        _ratio(f"int8: CPU an image of the same ({best})", int8_cpu, best_cpu, 0.8, False),
        _ratio("int8: images/s of the same model in one process", int8,
               median(LIMIT_INT8, many, "images_per_s"), 0.8, True),
        _under("one client: p50 above the time in one process, ms",
               _minus(median(OURS, one, "p50_ms"), median(LIMIT, one, "p50_ms")), 6.0),
        _ratio("12 megapixels: images/s of Flask that decodes fully", median(OURS, cases.BIG.name, "images_per_s"),
               median(FLASK_FULL, cases.BIG.name, "images_per_s"), 3.0, True),
        _ratio("5 times its capacity: right answers of what it answers to 32 clients",
               median(OURS, cases.TOO_MUCH.name, "images_per_s"), ours, 0.8, True),
        _ratio("5 times its capacity: p99 of that at capacity", median(OURS, cases.TOO_MUCH.name, "p99_ms"),
               median(OURS, cases.WHOLE.name, "p99_ms"), 2.0, False),
        _under("5 times its capacity: p99 of refusals, ms", refused, 50.0),
        _under("after it, and calm: a process grew at most, %", _growth(book), 5.0),
        _under("after it: full speed again, s", median(OURS, cases.TOO_MUCH.name, "recovery_s"), 10.0),
        _under("thirty minutes at 0.8 of capacity: good requests that failed", _failed(book), 0.0),
        _under("its last twenty: memory grew, %", _soak_growth(book), 2.0),
        _under("the model server is ready, s", _part(book, "model server"), 6.0),
        _under("the gateway answers, s", _part(book, "gateway"), 2.0),
    ]  # fmt: skip
    return made


def _ratio(text: str, ours: float | None, other: float | None, bound: float, least: bool) -> Bound:
    sign = "at least" if least else "at most"
    text = f"{text}: {sign} {bound:g} times"
    if ours is None or not other:
        return Bound(text, "not measured", None)
    met = ours / other >= bound if least else ours / other <= bound
    return Bound(text, f"{ours / other:.2f} ({ours:.1f} against {other:.1f})", met)


def _under(text: str, found: float | None, bound: float) -> Bound:
    text = f"{text}: at most {bound:g}"
    return Bound(text, "not measured", None) if found is None else Bound(text, f"{found:.1f}", found <= bound)


def _median(found: Spread | None) -> float | None:
    return found.median if found else None


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _growth(book: Book) -> float | None:
    """Percent, of the process (by role) that grew most during the overload."""
    before, after = (book.values(OURS, cases.TOO_MUCH.name, f"pss_{when}_mb") for when in ("before", "after"))
    grown = [
        100 * (b.get(role, mb) / mb - 1) for a, b in zip(before, after, strict=True) for role, mb in a.items() if mb
    ]
    return max(grown, default=None)


def _failed(book: Book) -> float | None:
    counts = book.values(OURS, cases.SOAK.name, "failed")
    refused = book.values(OURS, cases.SOAK.name, "refused")
    return float(sum(sum(count.values()) for count in counts) + sum(refused)) if counts else None


def _soak_growth(book: Book) -> float | None:
    """Percent, all processes, from the end of the first third to the end."""
    series = book.values(OURS, cases.SOAK.name, "pss_series_mb")
    totals = [sum(look.values()) for look in series[-1]] if series else []
    return 100 * (totals[-1] / totals[len(totals) // 3] - 1) if len(totals) > 2 else None


def _part(book: Book, part: str) -> float | None:
    found = sorted(parts[part] for parts in book.values(OURS, START, "parts_s") if part in parts)
    return found[len(found) // 2] if found else None


def line(figures: Mapping[str, Any]) -> str:
    """One measurement in a line."""
    cpu = figures.get("cpu_ms") or {}
    parts = [f"{figures['images_per_s']:.1f} images/s", f"p50 {_number(figures['p50_ms'])} ms"]
    parts += [f"p99 {_number(figures['p99_ms'])} ms", f"CPU {sum(cpu.values()):.1f} ms"]
    parts += [f"others used {figures['elsewhere']:.0%}"] if figures.get("elsewhere", 0) > 0.05 else []
    parts += [f"{figures['refused']} refused"] if figures["refused"] else []
    parts += [f"failed: {figures['failed']}"] if figures["failed"] else []
    return ", ".join(parts)


def text(book: Book) -> str:
    """The table for the terminal, and where it was measured."""
    lines = [
        where(book),
        f"{'':34} {'images/s, 32 clients':>28} {'CPU ms an image':>16} {'p50, 1 client':>14}",
    ]
    for name in ranked(book):
        if reason := book.error(name):
            lines.append(f"{name:34} not measured: {reason}")
            continue
        speed = book.spread(name, cases.MANY.name, "images_per_s")
        cpu = book.total(name, cases.MANY.name, "cpu_ms")
        one = book.spread(name, cases.ONE.name, "p50_ms")
        lines.append(
            f"{name:34} {_range(speed, 1):>28} {_number(_median(cpu), 1):>16} {_number(_median(one), 1):>14} "
            "   " + ", ".join(f"{k} {v:.1f}" for k, v in cpu_parts(book, name).items())
        )
    lines += ["", *(f"{_mark(b.met):9} {b.text}: {b.found}" for b in bounds(book))]
    return "\n".join(lines)


def _mark(met: bool | None) -> str:
    return {True: "met", False: "NOT MET", None: UNKNOWN}[met]


def where(book: Book) -> str:
    machine, commit = book.identity["machine"], book.identity["commit"]
    most = max((r["figures"].get("elsewhere", 0.0) for r in book.records), default=0.0)
    return (
        f"{machine['cpu']}, {machine['cpus']} CPUs ({machine['flags']}), {machine['memory_gb']} GB, "
        f"{machine['system']}, Python {machine['python']}; commit {commit}; run {book.run}; "
        f"medians over n rounds (lowest to highest); others used up to {most:.0%} of the machine meanwhile"
    )


def cpu_parts(book: Book, name: str) -> dict[str, float]:
    """CPU ms an image by process: the median round's share of each, the dearest first."""
    rounds = book.values(name, cases.MANY.name, "cpu_ms")
    if not rounds:
        return {}
    middle = sorted(rounds, key=lambda parts: sum(parts.values()))[len(rounds) // 2]
    return dict(sorted(middle.items(), key=lambda item: -float(item[1])))


def ranked(book: Book) -> list[str]:
    """The fastest first."""
    return sorted(book.names(), key=lambda name: -(book.median(name, cases.MANY.name, "images_per_s") or -1.0))


def charts(book: Book, measures: Sequence[Measure] = MEASURES) -> Iterator[dict[str, Any]]:
    """A bar a contender for every figure that was measured, the best first."""
    for measure in measures:
        rows = [(name, found) for name in book.names() if (found := value(book, name, measure))]
        rows.sort(key=lambda row: -row[1].median if measure.more_is_better else row[1].median)
        top = max((found.high for _, found in rows), default=0.0)
        if top and any(name == OURS for name, _ in rows):
            yield {"measure": measure, "top": top, "rows": [(n, f, _parts(book, n, measure)) for n, f in rows]}


def _parts(book: Book, name: str, measure: Measure) -> dict[str, float]:
    return cpu_parts(book, name) if measure.figure == "cpu_ms" else {}


def write(book: Book, folder: Path) -> None:
    """report.json, report.html and speed.svg into the folder."""
    told = {
        "run": book.run,
        "identity": book.identity,
        "bounds": [asdict(bound) for bound in bounds(book)],
        "contenders": {
            name: {m.title: asdict(found) for m in MEASURES if (found := value(book, name, m))} for name in book.names()
        },
        "records": book.records,
    }
    (folder / "report.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    (folder / "report.html").write_text(page(book))
    (folder / "speed.svg").write_text(picture(book))


def templates(folder: Path) -> jinja2.Environment:
    """Pages of that folder: text is escaped, and what is missing fails."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def page(book: Book) -> str:
    required = bounds(book)
    compared = comparisons(book)
    return _rendered(
        "report.html.j2",
        book,
        where=where(book),
        headline=headline(required),
        required=required,
        behind=[row for row in compared if row["times"] < 1],
        ahead=[row for row in reversed(compared) if row["times"] >= 1],
        charts=list(charts(book)),
        errors={name: reason for name in book.names() if (reason := book.error(name))},
        overload=list(overload(book)),
    )


def picture(book: Book) -> str:
    """SVG of the first two figures."""
    return _rendered("speed.svg.j2", book, charts=list(charts(book, MEASURES[:2])))


def _rendered(template: str, book: Book, **more: Any) -> str:
    environment = templates(Path(__file__).parent)
    environment.filters |= {"number": _number, "range": _range}
    parts = [part for name in book.names() for part in cpu_parts(book, name).items()]
    roles = sorted({role for role, ms in parts if ms >= VISIBLE})
    colours = {role: i % COLOURS for i, role in enumerate(roles)}
    return environment.get_template(template).render(book=book, ours=OURS, colours=colours, **more)


COLOURS = 7  # that the pages' style has
VISIBLE = 0.05  # CPU ms an image that are drawn


def overload(book: Book) -> Iterator[dict[str, Any]]:
    """What came of 5 times its capacity, by contender."""
    for name in book.names():
        for figures in book.rows(name, cases.TOO_MUCH.name):
            yield {"name": name, **figures, "capacity": book.median(name, cases.MANY.name, "images_per_s")}


def headline(required: Sequence[Bound]) -> str:
    known = [bound for bound in required if bound.met is not None]
    missed = sum(not bound.met for bound in known)
    unknown = len(required) - len(known)
    rest = f"; {unknown} not measured" if unknown else ""
    return f"{len(known) - missed} of {len(known)} requirements met{rest}" if known else "Nothing is measured yet"


def _number(found: float | None, digits: int = 0) -> str:
    return UNKNOWN if found is None else f"{found:,.{digits}f}"


def _range(found: Spread | None, digits: int = 0) -> str:
    """Median (lowest to highest, n rounds)."""
    if found is None:
        return UNKNOWN
    middle, low, high = (_number(value, digits) for value in (found.median, found.low, found.high))
    return f"{middle} ({low} to {high}, n {found.n})" if found.n > 1 else f"{middle} (n 1)"
