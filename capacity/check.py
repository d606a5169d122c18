"""The simulation against a real cluster, at small scale: replicas and 99th percentile within a fifth.

    KUBECONFIG=... KENNEL_URL=http://127.0.0.1:8080 python -m capacity.check

Kennel must be there (`make kind-deploy`), on one node, whose CPUs everything shares: the pods, Kubernetes, and the
load where it comes from that machine. First the very pods are measured: with both HPAs held at their least, a few
rates give CPU an image of each tier and of all else, and latency by how busy the node is; one more replica of each,
under the load that the ramp will have come to by then, gives the time that a start takes, its CPU, and how much it
slows the rest. Then the HPAs are free, a ramp goes up and down, and replicas are recorded each second. It goes as high
as leaves a start its CPU, and for that time the HPAs aim so low that both tiers grow: near its limit a node answers as
late as chance has it, from one minute to the next. The simulation gets the same ramp, the HPAs and requests as the
cluster has them, and the measurement. The HPA's looks fall at moments that nobody knows, so it runs with several, and
the means are compared.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import figures
from bench.load import Row
from bench.prepare import photographs
from capacity import headroom, manifests
from capacity.cluster import Cluster, Watch
from capacity.hpa import Flags
from capacity.manifests import TIERS
from capacity.measured import Floats
from capacity.pods import RISE, Load, Pods, measure
from capacity.simulation import Result, Timing, simulate
from local.processes import ROOT

WITHIN = 0.2
P99 = "99% within, ms"
LOW = 5.0  # images/s before the ramp and after
MOMENTS = tuple((scrape, sync) for scrape in (2.0, 7.0, 12.0) for sync in (1.0, 5.0, 9.0))


def ramp(peak: float) -> list[tuple[float, float]]:
    return [(0, LOW), (30, LOW), (30 + RISE, peak), (180, peak), (200, LOW), (340, LOW)]


def simulated(pods: Pods, images: Floats, flags: Flags, moments: tuple[float, float]) -> Result:
    """The same ramp, with the first scrape and the first look of the HPAs at these moments."""
    # A start is known as it was, from the container to the pod's readiness: nothing is to be rounded.
    exact = [dataclasses.replace(tier, probe=pods.replicas[tier.name].start_seconds) for tier in pods.tiers]
    return simulate(
        [(tier, pods.replicas[tier.name]) for tier in exact],
        images,
        0.3,
        flags=flags,
        timing=Timing(create=pods.create, scrape=moments[0], sync=moments[1]),
        limits=headroom.limits(pods.tiers),
        shared=pods.shared,
    )


def compare(real: Mapping[str, float], results: Sequence[Result]) -> list[tuple[str, float, float, float]]:
    """(what, real, simulated, their ratio)"""
    guesses: dict[str, list[float]] = {}
    for result in results:
        for name in TIERS:
            guesses.setdefault(f"{name}: replica seconds", []).append(float(result.replicas[name].sum()) * result.tick)
            guesses.setdefault(f"{name}: replicas at most", []).append(float(result.replicas[name].max()))
        guesses.setdefault(P99, []).append(1e3 * result.percentile(0.99))
    means = {what: statistics.mean(found) for what, found in guesses.items()}
    return [(what, real[what], mean, mean / real[what] if real[what] else math.nan) for what, mean in means.items()]


def offered(knots: Sequence[tuple[float, float]]) -> Floats:
    """Images a second in each second of a ramp, as meant: what is random in those that came is in the latencies that
    were measured, and would count twice."""
    images: Floats = np.interp(np.arange(knots[-1][0]) + 0.5, *np.transpose(knots))
    return images


def observed(watch: Watch, rows: Sequence[Row], began: float, seconds: float) -> dict[str, float]:
    """What the cluster did from `began` on."""
    found: dict[str, float] = {}
    ats = np.array([seen.at - began for seen in watch.seen])
    for name in TIERS:
        wanted = np.array([seen.wanted[name] for seen in watch.seen], float)
        # As it stood at each second: a look that came late counts for the seconds before it.
        each = wanted[np.clip(np.searchsorted(ats, np.arange(seconds), "right") - 1, 0, len(wanted) - 1)]
        found[f"{name}: replica seconds"], found[f"{name}: replicas at most"] = float(each.sum()), float(each.max())
    right = [row.seconds for row in rows if row.status == 200]
    found[P99] = 1e3 * (figures.percentile(right, 0.99) or math.nan)
    found["not answered"] = float(len(rows) - len(right))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="capacity.check", description=__doc__)
    parser.add_argument("--data", type=Path, help="a folder of photographs; drawings where there is none")
    parser.add_argument("--sync-period", type=float, default=Flags.sync_period, help="of this cluster's HPA controller")
    parser.add_argument(
        "--peak", type=float, help="images/s at the ramp's height; by default as high as leaves a start its CPU"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "capacity" / "check.json")
    args = parser.parse_args(arguments)
    url = os.environ.get("KENNEL_URL")
    if not url or not os.environ.get("KUBECONFIG"):
        raise SystemExit("check: KENNEL_URL and KUBECONFIG say which cluster may be used: its ingress and its API")
    cluster, flags = Cluster(), Flags(sync_period=args.sync_period)
    tiers = manifests.read(cluster.objects())
    least, most = ({tier.name: getattr(tier.scaling, bound) for tier in tiers} for bound in ("least", "most"))
    with tempfile.TemporaryDirectory(prefix="check-") as scratch:
        load = Load(url, photographs(args.data)["small"], Path(scratch))
        try:
            pods = measure(cluster, load, tiers, args.peak)
            cluster.settle(least)
            time.sleep(30)  # of rest
            cluster.aim(pods.tiers)
            cluster.bounds(least, most)
            knots = ramp(pods.peak)
            print(f"the ramp, to {pods.peak:.0f} images/s, {knots[-1][0] / 60:.0f} minutes", flush=True)
            with cluster.watch() as watch, load.running(knots, seed=92) as rows:
                began = load.began
        finally:
            cluster.aim(tiers)
            cluster.bounds(least, most)
    real = observed(watch, rows, began, knots[-1][0])
    results = [simulated(pods, offered(knots), flags, moments) for moments in MOMENTS]
    compared = compare(real, results)
    for what, a, b, ratio in compared:
        print(f"{what:32} cluster {a:8.1f}  simulated {b:8.1f}  ratio {ratio:.2f}")
    print(f"not answered: {real['not answered']:.0f} of {len(rows)}")
    write(args.out, pods, compared, watch, rows, results, began)
    missed = [what for what, *_, ratio in compared if not abs(ratio - 1) <= WITHIN]
    grew = any(real[f"{name}: replicas at most"] > least[name] for name in TIERS)
    if missed or not grew:
        raise SystemExit(f"check: not within {WITHIN:.0%}: {', '.join(missed)}" if missed else "check: no tier grew")
    print(f"all within {WITHIN:.0%}")


def write(
    path: Path,
    pods: Pods,
    compared: Sequence[tuple[str, float, float, float]],
    watch: Watch,
    rows: Sequence[Row],
    results: Sequence[Result],
    began: float,
) -> None:
    """Everything, each second, for whoever asks why."""
    told: dict[str, Any] = {
        "peak": pods.peak,
        "compared": [dict(zip(("what", "cluster", "simulated", "ratio"), row, strict=True)) for row in compared],
        "pods": {
            "create": dict(pods.create),
            "shared": {key: getattr(pods.shared, key) for key in ("cpus", "fixed", "per_image")},
            "loads": pods.shared.latencies.loads.tolist(),
            "seconds_at_levels": np.round(pods.shared.latencies.seconds, 5).tolist(),
            "seconds_at_levels_slowed": {k: np.round(v, 5).tolist() for k, v in pods.shared.slowed.items()},
            "replicas": [dataclasses.asdict(replica) for replica in pods.replicas.values()],
        },
        "seen": [dataclasses.asdict(seen) | {"at": seen.at - began} for seen in watch.seen],
        "lives": [dataclasses.asdict(life) for life in watch.lives.values()],
        "answers": by_second(rows),
        "simulated": [
            {"replicas": {k: v.tolist() for k, v in r.replicas.items()}, "p99": np.nan_to_num(r.p99).tolist()}
            for r in results
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told) + "\n")
    print(path)


def by_second(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Offered, answered, and half of the answers' latency in ms, of the calls due in each second."""
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(int(row.due), []).append(row)
    return [
        {
            "second": second,
            "offered": len(some),
            "answered": sum(row.status == 200 for row in some),
            **figures.latencies([row for row in some if row.status == 200]),
        }
        for second, some in sorted(found.items())
    ]


if __name__ == "__main__":
    main()
