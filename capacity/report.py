"""A simulation as a table and as one page with charts: no other host, no script."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.report import templates
from capacity.hpa import Flags
from capacity.manifests import Tier
from capacity.measured import Floats, Measured
from capacity.simulation import Result, Timing

if TYPE_CHECKING:
    from capacity.simulate import Price

WIDTH, HEIGHT, LEFT = 660, 120, 56  # of a chart, and of the room for its numbers
POINTS = 330  # of a line: the highest of each stretch is drawn, so that no peak is lost


@dataclass(frozen=True)
class Run:
    name: str
    peak: float
    result: Result
    figures: Mapping[str, Any]


def head() -> str:
    columns = f"{'replicas, most':>15} {'replica hours':>16} {'p99 ms':>7} {'late':>7} {'refused':>8} {'$':>9}"
    below = f"{'':6} {'at most':>9} {'gateway, model':>15} {'gateway, model':>16}"
    return f"{'load':6} {'images/s':>9} {columns} {'$ a million':>11}\n{below}"


def row(run: Run) -> str:
    f = run.figures
    most = ", ".join(str(count) for count in f["peak_replicas"].values())
    hours = ", ".join(f"{count:,.1f}" for count in f["replica_hours"].values())
    late = f"{f['p99_ms']:7.0f} {f['late']:7.2%} {f['refused']:8.2%}"
    cost = f"{f['dollars']:9,.2f} {f['dollars_per_million']:11.2f}"
    return f"{run.name:6} {run.peak:9,.0f} {most:>15} {hours:>16} {late} {cost}"


def notes(measured: Measured, tiers: Sequence[Tier], price: "Price", timing: Timing, flags: Flags) -> list[str]:
    """What the figures rest on."""
    where = measured.where
    machine, bundle = where["machine"], where["bundle"]
    carried = []
    for tier in tiers:
        replica, scaling = measured.replica(tier.name), tier.scaling
        target = f"{scaling.utilization}%" if scaling.utilization else f"{scaling.value}m"
        carried.append(
            f"{tier.name} {replica.capacity:.0f} images/s on {replica.cpus} CPU(s), target {target}, "
            f"{scaling.least} to {scaling.most} replicas"
        )
    nodes = f"a new node takes {timing.node:g} s" if timing.node else "there are always nodes enough"
    return [
        f"Simulated from what one replica was measured to carry: {'; '.join(carried)}. "
        f"Objective: 99% within {measured.objective_ms:g} ms.",
        f"Measured on {machine['cpu']} ({machine['flags']}), {machine['system']}, {where['date']}, "
        f"commit {where['commit']}, bundle {bundle['name']} {bundle['digest'][:12]}.",
        f"The HPA looks every {flags.sync_period:g} s, with a tolerance of {flags.tolerance:g}; metrics come every "
        f"{timing.resolution:g} s; {nodes}.",
        f"Dollars: {price.vcpu:g} a vCPU hour and {price.gb:g} a GB hour of what pods request, Compute Engine's "
        f"{price.series} on demand in us-central1 (vertex/machines.toml, {price.checked}); without the cluster's fee, "
        "disks and traffic.",
    ]


def page(runs: Sequence[Run], told: Sequence[str], measured: Measured) -> str:
    return (
        templates(Path(__file__).parent)
        .get_template("report.html.j2")
        .render(
            runs=[{"run": run, "charts": charts(run, measured.objective_ms)} for run in runs],
            notes=told,
            objective=measured.objective_ms,
            width=WIDTH,
            height=HEIGHT,
            left=LEFT,
        )
    )


def charts(run: Run, objective_ms: float) -> list[dict[str, Any]]:
    """Load, replicas and latency over the same time."""
    r = run.result
    p99 = 1e3 * np.nan_to_num(r.p99)
    return [
        chart("images a second", r.tick, {"offered": r.offered, "refused": r.refused}),
        chart("replicas that serve", r.tick, r.ready),
        # Beyond three times the objective late is late, and the line below it would be flat.
        chart("99% within, ms", r.tick, {"p99": np.minimum(p99, 3 * objective_ms)}, objective_ms),
    ]


def chart(title: str, tick: float, lines: Mapping[str, Floats], bound: float = 0.0) -> dict[str, Any]:
    top = nice(max(bound, *(float(values.max()) for values in lines.values())))
    length = len(next(iter(lines.values()))) * tick
    return {
        "title": title,
        "top": top,
        "lines": {name: path(values, top) for name, values in lines.items()},
        "bound": HEIGHT * (1 - bound / top) if bound else None,
        "times": [{"x": WIDTH * share, "text": clock(length * share, length)} for share in (0, 0.25, 0.5, 0.75, 1)],
    }


def clock(seconds: float, of: float) -> str:
    return f"{seconds / 3600:.0f} h" if of > 7200 else f"{seconds / 60:.4g} min"


def path(values: Floats, top: float) -> str:
    """An SVG path of the highest value of each stretch."""
    edges = np.linspace(0, len(values), min(POINTS, len(values)) + 1).astype(int)
    highest = [values[a:b].max() for a, b in pairwise(edges)]
    points = [
        f"{WIDTH * (i + 0.5) / len(highest):.1f} {HEIGHT * (1 - value / top):.1f}" for i, value in enumerate(highest)
    ]
    return "M" + "L".join(points)


def nice(value: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** np.floor(np.log10(max(value, 1.0)))
    return float(next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value))
