"""What the very pods of a cluster take: CPU an image, latency by how busy their node is, the time of a start."""

import contextlib
import dataclasses
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import figures
from bench.load import Row
from capacity.cluster import Cluster, Life, Watch, line, windows
from capacity.hpa import Flags
from capacity.manifests import TIERS, Tier
from capacity.measured import LEVELS, Floats, Latencies, Replica
from capacity.simulation import Shared
from local.processes import ROOT, environment

RATES = (*np.arange(10.0, 60.0, 10.0).tolist(), *np.arange(60.0, 400.0, 20.0).tolist())  # images/s, as the node bears
WARM_UP = ((0.0, 40.0), (30.0, 40.0))
HOLD = 20.0  # seconds of each: the kubelet counts CPU every ten
LONG = 60.0  # of the ramp's height: of a thousand calls the slowest hundredth may all be of one bad moment
# Of what the node can answer, at the ramp's height, and CPUs that a start takes: where the load leaves less of either,
# latency is whatever the moment brings.
BUSIEST, STARTING = 0.8, 1.0
AHEAD = 1.5  # how far the ramp goes beyond what makes each tier grow
RISE = 90.0  # seconds from the foot of the ramp (check.py) to its height
NOTICED = 25.0  # seconds until the HPA sees what a pod takes (simulation.py), in which the load rises on
STARTS = 3  # of each tier, one after the other: two at a time slow the rest more than the ramp's do


@dataclass(frozen=True)
class Pods:
    """What was measured of the very pods.

    create: by tier, seconds from a pod's creation to its container's start; peak: images/s at the ramp's height;
    tiers: with the HPAs' targets so low that each grows well before it.
    """

    replicas: Mapping[str, Replica]
    create: Mapping[str, float]
    shared: Shared
    peak: float
    tiers: Sequence[Tier]


class Load:
    """Pictures for the ingress, from a process of their own."""

    def __init__(self, url: str, photos: Sequence[Path], scratch: Path) -> None:
        self.url, self.photos, self.scratch = url.rstrip("/"), photos, scratch
        self.began = 0.0

    def run(self, knots: Sequence[tuple[float, float]], seed: int) -> list[Row]:
        with self.running(knots, seed) as rows:
            pass
        return rows

    @contextlib.contextmanager
    def running(self, knots: Sequence[tuple[float, float]], seed: int) -> Iterator[list[Row]]:
        """The calls, once the block is left and the last is answered. `began`: about when the first was due."""
        log = self.scratch / "calls.tsv"
        words = [sys.executable, "-m", "capacity.load", "--http", f"{self.url}/predict", "--log", str(log)]
        words += ["--bodies", *map(str, self.photos), "--seed", str(seed), "--say"]
        words += ["--rate", ",".join(f"{second:g}:{rate:g}" for second, rate in knots)]
        rows: list[Row] = []
        with subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            if not (said := process.stdout.readline()):
                raise SystemExit(f"check: the load generator ended with exit code {process.wait()}")
            self.began = float(said)
            try:
                yield rows
                process.wait()
            except BaseException:
                process.kill()
                raise
            if process.returncode:
                raise SystemExit(f"check: the load generator ended with exit code {process.returncode}")
        rows += figures.read(log)


def measure(cluster: Cluster, load: Load, tiers: Sequence[Tier], peak: float | None) -> Pods:
    """The pods as they are, at their least, and one more of each. peak: None chooses it by what the node answers."""
    least = {tier.name: tier.scaling.least for tier in tiers}
    cluster.bounds(least, least)
    print("holding both HPAs at their least; a first load, which warms them up", flush=True)
    load.run(WARM_UP, seed=90)
    steps: dict[float, list[Row]] = {}
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in (*TIERS, "")}
    with cluster.watch() as watch:
        for rate in RATES:
            rows = load.run([(0, rate), (HOLD, rate)], seed=int(rate))
            for name, samples in watch.cpu.items():
                of = watch.lives[name].tier if name in watch.lives else ""
                share = rate / least[of] if of else rate
                if of or not name:
                    points[of] += [(share, cores) for *_, cores in windows(samples, load.began, load.began + HOLD)]
            told = figures.summary(rows, HOLD)
            print(f"  {rate:g} images/s: p50 {told['p50_ms']:.0f} ms, p99 {told['p99_ms']:.0f} ms", flush=True)
            if told["failed"] or told["refused"]:
                break
            steps[rate] = rows
            if len(steps) > 1 and rate > (peak or busiest(cluster.node_cpus) * node_able(cluster, points[""])):
                break  # the next is beyond what is to be known
    if len(steps) < 2:
        raise SystemExit("check: the cluster does not bear 30 images/s without refusing any: too little to measure")
    fitted = {name: line(found) for name, found in points.items()}
    if fitted[""][1] < sum(fitted[name][1] for name in TIERS):
        raise SystemExit("check: the node's CPUs did not follow the load, others were busy: measure on a quiet machine")
    able = node_able(cluster, points[""])
    asked = max(grows(tier, *fitted[tier.name]) for tier in tiers)
    top = min(max(steps), peak or min(AHEAD * asked, busiest(cluster.node_cpus) * able))
    tiers = [growing(tier, *fitted[tier.name], top / AHEAD) for tier in tiers]
    grow = {tier.name: grows(tier, *fitted[tier.name]) for tier in tiers}
    ends = ", ".join(f"the {name} grows beyond {rate:.0f}" for name, rate in grow.items())
    print(f"the node answers {able:.0f} images/s; the ramp goes to {top:.0f}, {ends}", flush=True)
    steps[top] = load.run([(0, top), (LONG, top)], seed=92)  # where most of the ramp's answers are, as it is
    rates = noticed(grow, top)
    where = ", ".join(f"the {name} at {rate:.0f} images/s" for name, rate in rates.items())
    print(f"{STARTS} times one more replica of each, {where}", flush=True)
    starts = {
        tier.name: [start(cluster, load, least, tier.name, rates[tier.name], fitted[tier.name]) for _ in range(STARTS)]
        for tier in tiers
    }
    replicas, create = {}, {}
    for tier in tiers:
        idle, an_image = fitted[tier.name]
        lives, cores, _ = zip(*starts[tier.name], strict=True)
        saturated = (tier.limit - idle) / max(an_image, 1e-6)
        seconds = statistics.mean(life.ready - life.started for life in lives)
        create[tier.name] = statistics.mean(life.started - life.created for life in lives)
        replicas[tier.name] = Replica(
            tier.name, 1, saturated, saturated, tier.limit, idle, max(0.5, seconds), statistics.mean(cores), 0.0, ()
        )  # fmt: skip
    node, an_image = fitted[""]
    fixed = max(0.0, node - sum(least[name] * fitted[name][0] for name in TIERS))
    others = max(0.0, an_image - sum(fitted[name][1] for name in TIERS))
    answers = {rate / able: [1e3 * row.seconds for row in rows if row.status == 200] for rate, rows in steps.items()}
    quantiles = {load: tuple(np.quantile(found, LEVELS).tolist()) for load, found in answers.items()}
    latencies = Latencies.of(quantiles, {load: len(found) for load, found in answers.items()})
    slowed = {name: found for name in TIERS if (found := typical([slow for *_, slow in starts[name]])) is not None}
    shared = Shared(cluster.node_cpus, fixed, others, latencies, slowed)
    return Pods(replicas, create, shared, top, tiers)


def typical(starts: Sequence[Floats]) -> Floats | None:
    """Seconds of the calls during each start -> at LEVELS, of the start in the middle: one that meets a moment in which
    the node has more to do is no measure of the others. None where there were too few calls."""
    levels = [np.quantile(seconds, LEVELS) for seconds in starts if len(seconds) > 50]
    found: Floats | None = np.median(levels, axis=0) if levels else None
    return found


def grows(tier: Tier, idle: float, an_image: float) -> float:
    """Images/s beyond which the tier's least replicas are too few for its HPA, by the CPUs that one takes."""
    return tier.scaling.least * max(0.0, tier.target * (1 + Flags.tolerance) - idle) / max(an_image, 1e-6)


def growing(tier: Tier, idle: float, an_image: float, rate: float) -> Tier:
    """The tier, its HPA's target lowered where it would grow only beyond so many images/s."""
    if grows(tier, idle, an_image) <= rate:
        return tier
    cpus, scaling = (idle + an_image * rate / tier.scaling.least) / (1 + Flags.tolerance), tier.scaling
    if scaling.utilization:
        lower = dataclasses.replace(scaling, utilization=max(1, int(100 * cpus / tier.request)))
    else:
        lower = dataclasses.replace(scaling, value=max(1, int(1e3 * cpus)))
    return dataclasses.replace(tier, scaling=lower)


def busiest(cpus: float) -> float:
    """How high the ramp may go, of what a node of so many CPUs answers: beside it, one more replica can start."""
    return min(BUSIEST, max(cpus - STARTING, STARTING / 2) / cpus)


def noticed(grow: Mapping[str, float], top: float) -> dict[str, float]:
    """Images/s that a ramp to this height has come to when its tiers grow: a start that a node bears beside as many
    may be beyond it beside a few more."""
    return {name: min(top, rate + NOTICED * top / RISE) for name, rate in grow.items()}


def node_able(cluster: Cluster, points: Sequence[tuple[float, float]]) -> float:
    """Images a second, by (rate, CPUs that the node was busy)."""
    idle, an_image = line(points)
    return (cluster.node_cpus - idle) / max(an_image, 1e-6)


def start(
    cluster: Cluster, load: Load, least: Mapping[str, int], tier: str, rate: float, fitted: tuple[float, float]
) -> tuple[Life, float, Floats]:
    """One more of this tier under load, then as before -> its life, the CPUs that its start took, and seconds of the
    calls that were due from its creation to its readiness."""
    more = {**least, tier: least[tier] + 1}
    with cluster.watch() as watch:
        there = set(watch.lives)
        with load.running([(0, rate), (45, rate)], seed=91) as rows:
            time.sleep(5)
            cluster.bounds(more, more)
            time.sleep(35)
    cluster.bounds(least, least)
    cluster.settle(least)
    lives = [life for life in watch.lives.values() if life.name not in there and not math.isnan(life.ready)]
    if not lives:
        raise SystemExit(f"check: one more {tier} was not ready within 35 s: has the node room for it?")
    life, (idle, an_image) = lives[0], fitted
    slow = [r.seconds for r in rows if r.status == 200 and life.created <= load.began + r.due <= life.ready]
    return life, _start_cores(watch, life, idle + an_image * rate / more[tier]), np.array(slow)


def _start_cores(watch: Watch, life: Life, works: float) -> float:
    """CPUs from its container's start until it was ready: by the first counting after that, less its work since."""
    after = [(at, seconds) for at, seconds in sorted(watch.cpu.get(life.name, {}).items()) if at >= life.ready]
    if not after:
        return 1.0
    at, seconds = after[0]
    return min(1.0, max(0.0, seconds - works * (at - life.ready)) / max(1.0, life.ready - life.started))
