"""How many replicas, how late and at what cost, for ramps, spikes and days of traffic: `make simulate`.

What a replica carries is read from what `make calibrate` wrote; how the HPAs behave from the rendered manifests with
that component. Where the manifests allow fewer replicas than the peak takes, maxReplicas is raised and said: the
question is how many it takes.
"""

import argparse
import dataclasses
import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from capacity import headroom, manifests, report, traffic
from capacity.hpa import Flags
from capacity.manifests import Tier
from capacity.measured import NAME, Measured, read
from capacity.simulation import Result, Timing, simulate
from local.processes import ROOT

OUT = ROOT / "build" / "capacity"
GB = 1e9


@dataclass(frozen=True)
class Price:
    """Dollars an hour for a vCPU and for a GB that a pod requests.

    Compute Engine's of that machine series, on demand in us-central1, as vertex/machines.toml has them with their
    sources: what GKE's nodes cost. A pod pays for its requests, as if nodes were full; the cluster's own fee, disks,
    load balancer and traffic are left out.
    """

    series: str
    vcpu: float
    gb: float
    checked: str

    @classmethod
    def of(cls, series: str) -> "Price":
        told = tomllib.loads((ROOT / "vertex" / "machines.toml").read_text())
        if series not in told["series"]:
            raise SystemExit(
                f"simulate: {series!r} has no price in vertex/machines.toml: {', '.join(told['series'])} have"
            )
        return cls(series, **told["series"][series], checked=str(told["checked"]))

    def hour(self, tier: Tier) -> float:
        return tier.request * self.vcpu + tier.memory_request / GB * self.gb


def figures(result: Result, tiers: Sequence[Tier], price: Price) -> dict[str, Any]:
    """One load in numbers. late: of the answered, after the objective; hours: of replicas that hold a place."""
    offered, served = result.offered.sum(), result.served.sum()
    hours = {name: float(paid.sum()) * result.tick / 3600 for name, paid in result.paid.items()}
    dollars = sum(hours[tier.name] * price.hour(tier) for tier in tiers)
    return {
        "images": float(offered * result.tick),
        "peak_images_per_s": float(result.offered.max()),
        "peak_replicas": {name: int(count.max()) for name, count in result.replicas.items()},
        "replica_hours": hours,
        "p50_ms": 1e3 * result.percentile(0.5),
        "p99_ms": 1e3 * result.percentile(0.99),
        "late": float(result.late.sum() / served),
        "refused": float(result.refused.sum() / offered),
        "seconds_late": float((np.nan_to_num(result.late) > 0.01 * result.served).sum() * result.tick),
        "dollars": dollars,
        "dollars_per_million": dollars / (served * result.tick) * 1e6,
    }


def enough(tiers: Sequence[Tier], measured: Measured, peak: float) -> tuple[Tier, ...]:
    """The tiers with maxReplicas for a peak half as high again, where the manifests allow fewer."""
    found = []
    for tier in tiers:
        replica, scaling = measured.replica(tier.name), tier.scaling
        most = max(scaling.most, math.ceil(1.5 * peak / max(replica.rate(tier.target), 1e-3 * replica.saturated)))
        found.append(dataclasses.replace(tier, scaling=dataclasses.replace(scaling, most=most)))
    return tuple(found)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make simulate", description=__doc__)
    parser.add_argument("--peak", type=float, nargs="+", default=[100.0, 1000.0, 10_000.0], help="images/s")
    parser.add_argument("--load", nargs="+", choices=list(traffic.LOADS), default=list(traffic.LOADS))
    parser.add_argument("--calibrated", type=Path, default=manifests.COMPONENT, help="what `make calibrate` wrote")
    parser.add_argument("--manifests", type=Path, default=manifests.BASE, help="a kustomization, like k8s/overlays/gke")
    parser.add_argument("--as-it-is", action="store_true", help="the manifests' own targets and maxReplicas")
    parser.add_argument("--node-seconds", type=float, default=0.0, help="until a new node is there; 0: always enough")
    parser.add_argument("--sync-period", type=float, default=Flags.sync_period, help="of the HPA controller, seconds")
    parser.add_argument("--prices", default="e2", help="a machine series of vertex/machines.toml")
    parser.add_argument("--out", type=Path, default=OUT, help="simulation.json and simulation.html go there")
    args = parser.parse_args(arguments)
    measured, price = read(args.calibrated / NAME), Price.of(args.prices)
    tiers = manifests.read(manifests.render(args.manifests, [] if args.as_it_is else [args.calibrated]))
    timing, flags = Timing(node=args.node_seconds), Flags(sync_period=args.sync_period)
    runs: list[report.Run] = []
    for peak in args.peak:
        chosen = tiers if args.as_it_is else enough(tiers, measured, peak)
        for name in args.load:
            result = simulate(
                [(tier, measured.replica(tier.name)) for tier in chosen],
                traffic.LOADS[name](peak),
                measured.objective_ms / 1e3,
                flags=flags,
                timing=timing,
                limits=headroom.limits(chosen),
            )
            runs.append(report.Run(name, peak, result, figures(result, chosen, price)))
            print(report.row(runs[-1]) if len(runs) > 1 else f"{report.head()}\n{report.row(runs[-1])}", flush=True)
    notes = report.notes(measured, tiers, price, timing, flags)
    told = {
        "notes": notes,
        "price": dataclasses.asdict(price),
        "timing": dataclasses.asdict(timing),
        "flags": dataclasses.asdict(flags),
        "where": measured.where,
        "runs": [{"load": run.name, "peak": run.peak, **run.figures} for run in runs],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "simulation.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    (args.out / "simulation.html").write_text(report.page(runs, notes, measured))
    print("\n" + "\n".join(notes))
    most = max(tier.scaling.most for tier in tiers)
    needed = max(max(run.figures["peak_replicas"].values()) for run in runs)
    if needed > most:
        print(f"The manifests allow {most} replicas; up to {needed} were taken here: raise maxReplicas for such peaks.")
    print(f"{args.out / 'simulation.html'}\n{args.out / 'simulation.json'}")


if __name__ == "__main__":
    main()
