"""The HPAs' targets: how much of what a replica carries may be used, so that load can grow while new ones start.

Load that grows is seen late: a mean over 15 seconds, up to 25 seconds old, at the next look of the HPA, and then a pod
has to start. How much that takes is not guessed but simulated, with both tiers, by the manifests' own policies: load
doubles every five minutes, from what two replicas keep to four times that, and 99% of all pictures must come within
the objective and none be refused, whatever the moments at which scrapes and looks happen to fall.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from capacity.manifests import Tier
from capacity.measured import Measured
from capacity.simulation import Limits, Timing, simulate
from gateway.admission import LEAST
from gateway.settings import Settings

DOUBLING, TIMES = 300.0, 2  # seconds, and how often
LEAST_SHARE = 0.3  # of capacity; a quarter would carry that growth with no new replica
SETTLED = 120  # seconds of steady load before
MOMENTS = ((4.0, 9.0), (8.0, 9.0), (13.0, 14.0), (1.0, 15.0))  # of the first scrape and the first look
QUEUE = 100.0  # model-server/serve.py's queue_size


def limits(tiers: Sequence[Tier]) -> Limits:
    """What the gateway of these manifests admits, and the model server's queue."""
    by_name = {tier.name: tier for tier in tiers}
    gateway = Settings.from_environment(by_name["gateway"].settings)
    processes = gateway.processes_on(max(1, int(by_name["gateway"].limit)))
    queue = float(by_name["model-server"].settings.get("QUEUE_SIZE", QUEUE))
    return Limits(processes * gateway.in_flight, processes * LEAST, gateway.late_seconds, queue)


def targets(tiers: Sequence[Tier], measured: Measured) -> dict[str, int]:
    """{tier: percent of its request}: the same share of what is used at capacity, for both.

    Raises SystemExit where that is so little that new replicas came too late for anything.
    """
    low, high = 0.0, 1.0
    while high - low > 0.01:
        share = (low + high) / 2
        low, high = (share, high) if grows(tiers, measured, share) else (low, share)
    if low < LEAST_SHARE:
        raise SystemExit(
            f"calibrate: load that doubles in {DOUBLING:.0f} s is answered too late at any sensible target: replicas "
            f"start too slowly, or {measured.objective_ms:g} ms are too little"
        )
    return {tier.name: _percent(tier, measured, low) for tier in tiers}


def _percent(tier: Tier, measured: Measured, share: float) -> int:
    replica = measured.replica(tier.name)
    # Of the CPUs that it was measured with, which become its request.
    return int(100 * share * replica.cores(replica.capacity) / replica.cpus)


def grows(tiers: Sequence[Tier], measured: Measured, share: float) -> bool:
    """Whether load can grow as above with targets of that share of what is used at capacity."""
    pairs, keep = [], []
    for tier in tiers:
        replica, percent = measured.replica(tier.name), _percent(tier, measured, share)
        if not percent:
            return False
        scaling = dataclasses.replace(tier.scaling, least=2, most=1000, utilization=percent, value=0)
        pairs.append((dataclasses.replace(tier, request=float(replica.cpus), scaling=scaling), replica))
        keep.append(replica.rate(percent / 100 * replica.cpus))
    seconds = np.arange(SETTLED + TIMES * DOUBLING)
    load = 2 * min(keep) * 2 ** (np.maximum(0, seconds - SETTLED) / DOUBLING)
    for scrape, look in MOMENTS:
        timing = Timing(scrape=scrape, sync=look)
        result = simulate(pairs, load, measured.objective_ms / 1e3, timing=timing, limits=limits(tiers))
        if result.refused.any() or result.late.sum() > 0.01 * result.served.sum():
            return False
    return True
