"""Both autoscalers under a load: how many replicas, how late, how many refused.

Discrete events for what controls: metrics-server's scrapes, the HPAs' looks, pods that start, become ready and go.
Between them pictures are a fluid, one amount a tick, whatever their number: a day of 10,000/s is 860 million. A tier
answers at most what its replicas were measured to; what is more waits, or is refused as the gateway's admission would.
Latency is what was measured of a replica under that share of its load, both tiers' added, and the wait. Each was
measured with the call between them, so that is counted twice: a few milliseconds too much.

What a pod tells of its CPU: the kubelet's cAdvisor looks every 10 s (housekeeping_interval), metrics-server asks
every 15 s (--metric-resolution) and keeps the last two looks, whose difference is the usage; a container of 10 to 15
seconds counts from its start (metrics-server, pkg/storage/pod.go). So the HPA sees the mean of a time that ended up
to 25 s ago, and a new pod counts only once such a time lies all after it became ready.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from capacity import hpa
from capacity.manifests import Tier
from capacity.measured import LEVELS, Floats, Latencies, Replica

AGO = -1e6  # of a pod that was there long before
EDGES = np.geomspace(1e-4, 100, 1201)  # seconds; a bin is 1.2% wide


@dataclass(frozen=True)
class Timing:
    """Of the cluster, in seconds. Defaults: Kubernetes', metrics-server's and this repository's.

    create: by tier, from a pod's creation to its container's start, the image on the node, its init container's time
    included, as `make capacity-check` found it on Kubernetes 1.36 (one node of 2 CPUs, whole seconds, n=1);
    node: until a new node is there, 0 where there are always enough; keep: how long an empty node stays
    (Cluster Autoscaler's --scale-down-unneeded-time); look, scrape, sync: the first of each, within their periods.
    """

    resolution: float = 15.0
    housekeeping: float = 10.0
    create: Mapping[str, float] = field(default_factory=lambda: {"gateway": 1.0, "model-server": 2.0})
    node: float = 0.0
    keep: float = 600.0
    scrape: float = 4.0
    sync: float = 9.0


@dataclass(frozen=True)
class Limits:
    """Pictures that may be under way: a gateway's replica, of which late ones shrink it to `least`; and the queue of
    a model server's. Seconds an answer may take before the gateway takes fewer pictures at a time."""

    most: float = math.inf
    least: float = math.inf
    late: float = math.inf
    queue: float = math.inf


@dataclass(frozen=True)
class Shared:
    """One node's CPUs, which everything shares: `fixed` CPUs and `per_image` CPU seconds are others', and latency
    goes by the share of what the node can answer. slowed: by tier, seconds at LEVELS while a pod of it starts, as far
    as that was measured: then its CPUs are in there, and count no second time."""

    cpus: float
    fixed: float
    per_image: float
    latencies: Latencies
    slowed: Mapping[str, Floats] = field(default_factory=dict)


@dataclass
class Pod:
    created: float
    started: float  # its container
    ready: float
    left: float = math.inf
    last: tuple[float, float] | None = None  # metrics-server's: time of the look, CPU seconds so far
    before: tuple[float, float] | None = None


@dataclass
class Group:
    """A tier's pods, and what each with a full share of the calls took so far."""

    tier: Tier
    replica: Replica
    scaler: hpa.Autoscaler
    timing: Timing
    tick: float
    joins: float = 1.0  # seconds until a ready pod has its share of the calls
    pods: list[Pod] = field(default_factory=list)
    gone: list[Pod] = field(default_factory=list)  # places on nodes are paid until the last call is answered
    taken: list[float] = field(default_factory=lambda: [0.0])  # CPU seconds at every tick
    rooms: list[float] = field(default_factory=list)  # places on nodes: when each was last free
    waiting: float = 0.0
    weight: float = 0.0
    wanted: int = 0
    _moving: float = AGO  # until when pods start or join

    def begin(self, count: int) -> None:
        self.wanted, self.weight = count, float(count)
        self.pods = [Pod(AGO, AGO, AGO) for _ in range(count)]

    def turn(self, now: float) -> None:
        if now <= self._moving:
            shares = (min(1.0, (now - pod.ready) / self.joins) for pod in self.pods if pod.ready < now)
            self.weight = sum(shares)

    def scale(self, now: float, count: int) -> None:
        for _ in range(len(self.pods), count):
            started = now + self.timing.create[self.tier.name] + self._room(now)
            # The first look at readiness comes at once, the next after a period each (the startup probe is quicker).
            looks = math.ceil(self.replica.start_seconds / self.tier.probe)
            self.pods.append(pod := Pod(now, started, started + looks * self.tier.probe))
            self._moving = max(self._moving, pod.ready + self.joins + self.tick)
        while len(self.pods) > count:  # the newest first, as a ReplicaSet chooses
            pod = self.pods.pop()
            pod.left = now + self.tier.leaves
            self.gone.append(pod)
            self._moving = max(self._moving, now + self.tick)
        self.wanted = count

    def _room(self, now: float) -> float:
        """Seconds until there is a node for one more."""
        if not self.timing.node:
            return 0.0
        self.rooms = [at for at in self.rooms if at > now - self.timing.keep]
        if self.rooms:
            self.rooms.pop()
            return 0.0
        return self.timing.node

    def paid(self, now: float) -> int:
        if self.gone and self.gone[0].left <= now:
            self.rooms += [pod.left for pod in self.gone if pod.left <= now]
            self.gone = [pod for pod in self.gone if pod.left > now]
        return len(self.pods) + len(self.gone)

    def ready(self, now: float) -> int:
        return len(self.pods) if now > self._moving else sum(pod.ready <= now for pod in self.pods)

    def scrape(self, now: float) -> None:
        for number, pod in enumerate(self.pods):
            # Each container is looked at in a rhythm of its own.
            phase = self.timing.housekeeping * (number * 0.618 % 1)
            at = math.floor((now - phase) / self.timing.housekeeping) * self.timing.housekeeping + phase
            if at <= pod.started or (pod.last and at <= pod.last[0]):
                continue
            age = at - pod.started
            pod.before = (pod.started, 0.0) if 10 <= age < self.timing.resolution else pod.last
            pod.last = at, self._usage(pod, at)

    def sync(self, now: float) -> None:
        self.scale(now, self.scaler.sync(now, self.wanted, [self._seen(pod, now) for pod in self.pods]))

    def _seen(self, pod: Pod, now: float) -> hpa.Pod:
        metric = None
        if pod.last and pod.before:
            window = pod.last[0] - pod.before[0]
            metric = hpa.Metric(pod.last[0], window, math.ceil(1e3 * (pod.last[1] - pod.before[1]) / window))
        ready = pod.ready <= now
        since = pod.ready if ready else pod.started
        return hpa.Pod(pod.created, ready, since, round(1e3 * self.tier.request), metric, pod.started > now)

    def _usage(self, pod: Pod, at: float) -> float:
        """CPU seconds of its container until then."""
        starting = self.replica.start_cores * (min(at, pod.ready) - pod.started)
        return starting + max(0.0, self._taken(at) - self._taken(pod.ready + self.joins / 2))

    def _taken(self, at: float) -> float:
        last, place = len(self.taken) - 1, at / self.tick
        if place <= 0:
            return place * (self.taken[1] - self.taken[0])
        low = min(int(place), last)
        return self.taken[low] + (place - low) * (self.taken[min(low + 1, last)] - self.taken[low])

    def starting(self, now: float) -> int:
        """Pods that work without answering: their sandbox and init container are work too."""
        return sum(pod.created <= now < pod.ready for pod in self.pods) if now <= self._moving else 0


@dataclass(frozen=True)
class Result:
    """By tick. offered, served, refused: images a second; late: those of the served after the objective; replicas: as
    the Deployments want them; ready: those that serve; paid: those that hold a place on a node; p99: seconds, NaN
    where nothing was served. seen: how often a latency fell into each bin of EDGES."""

    tick: float
    offered: Floats
    served: Floats
    refused: Floats
    late: Floats
    p50: Floats
    p99: Floats
    replicas: dict[str, Floats]
    ready: dict[str, Floats]
    paid: dict[str, Floats]
    seen: Floats

    def percentile(self, share: float) -> float:
        """Seconds that this share of all answers did not exceed."""
        total = np.cumsum(self.seen)
        return float(EDGES[1 + int(np.searchsorted(total, share * total[-1]))]) if total[-1] else math.nan


FLAGS, TIMING, LIMITS = hpa.Flags(), Timing(), Limits()


@lru_cache(maxsize=1 << 16)
def _summed(latencies: tuple[Latencies, ...], hundredths: tuple[int, ...]) -> Floats:
    """Levels of the sum of independent latencies under these loads."""
    found = np.zeros(1)
    for one, load in zip(latencies, hundredths, strict=True):
        sums = np.sort(np.add.outer(found, one.at(load / 100)).ravel())
        found = sums[len(sums) // len(LEVELS) // 2 :: len(sums) // len(LEVELS)]
    return found


def simulate(
    tiers: Sequence[tuple[Tier, Replica]],
    offered: Floats,
    objective: float,
    *,
    tick: float = 1.0,
    flags: hpa.Flags = FLAGS,
    timing: Timing = TIMING,
    limits: Limits = LIMITS,
    shared: Shared | None = None,
) -> Result:
    """offered: images a second, at every tick. tiers: in the order in which a picture meets them; the first admits.

    It begins with the replicas that the first tick's load needs, as if it had always been there.
    """
    groups = []
    for tier, replica in tiers:
        # A new gateway is in the ingress within a second; a new model server is found when a connection ages
        # (model-server/serve.py: 10 s) and the names are resolved again.
        joins = 10.0 if tier.name == "model-server" else 1.0
        group = Group(tier, replica, hpa.Autoscaler(tier.scaling, flags), timing, tick, joins)
        group.begin(settled(tier, replica, float(offered[0])))
        groups.append(group)
    columns = [np.zeros(len(offered)) for _ in range(5)]
    served, refused, late, p50, p99 = columns
    counts = {kind: {g.tier.name: np.zeros(len(offered)) for g in groups} for kind in ("replicas", "ready", "paid")}
    seen, scrape, sync = np.zeros(len(EDGES) - 1), timing.scrape, timing.sync
    for k, rate in enumerate(offered.tolist()):
        now = k * tick
        if now >= scrape:
            scrape += timing.resolution
            for group in groups:
                group.scrape(now)
        if now >= sync:
            sync += flags.sync_period
            for group in groups:
                group.sync(now)
        for group in groups:
            group.turn(now)
        flow, wait, lost, loads = rate, 0.0, 0.0, []
        node = _node(shared, groups, now) if shared else math.inf
        for number, group in enumerate(groups):
            able = max(1e-9, min(group.weight * group.replica.saturated, node))
            loads.append(flow / able)
            given = min(able, flow + group.waiting / tick)
            group.waiting += (flow - given) * tick
            room = _room(limits, groups) if number == 0 else limits.queue * group.weight
            if group.waiting > room:
                lost += (group.waiting - room) / tick
                group.waiting = room
            wait += group.waiting / able
            used = group.replica.cores(given / max(1e-9, group.weight))
            group.taken.append(group.taken[-1] + used * tick)
            flow = given
        if shared:
            found = _summed((shared.latencies,), (_hundredths(rate / node),))
            for group in groups:
                if group.starting(now) and group.tier.name in shared.slowed:
                    found = np.maximum(found, shared.slowed[group.tier.name])
            found = found + wait
        else:
            found = _summed(tuple(g.replica.latencies for g in groups), tuple(map(_hundredths, loads))) + wait
        served[k], refused[k] = flow, lost
        late[k] = flow * (1 - np.searchsorted(found, objective, "right") / len(found))
        p50[k], p99[k] = (found[int(share * len(found))] if flow else math.nan for share in (0.5, 0.99))
        seen += np.histogram(found, EDGES)[0] * (flow * tick / len(found))
        for group in groups:
            name = group.tier.name
            counts["replicas"][name][k], counts["ready"][name][k] = group.wanted, group.ready(now)
            counts["paid"][name][k] = group.paid(now)
    return Result(tick, offered, served, refused, late, p50, p99, **counts, seen=seen)


def settled(tier: Tier, replica: Replica, rate: float) -> int:
    """Replicas that the HPA keeps under a steady load."""
    scaling = tier.scaling
    for count in range(max(1, scaling.least), scaling.most):
        if replica.cores(rate / count) <= tier.target:
            return count
    return scaling.most


def _hundredths(load: float) -> int:
    return min(200, round(100 * load))


def _room(limits: Limits, groups: Sequence[Group]) -> float:
    """Pictures that the gateways let wait. Each lets in as many as are answered in time, between two bounds
    (gateway/admission.py), and those of the model servers' queues are among them."""
    if math.isinf(limits.most):
        return math.inf
    able = min(group.weight * group.replica.saturated for group in groups)
    first = groups[0]
    each = min(limits.most, max(limits.least, able * limits.late / max(1.0, first.weight)))
    return max(0.0, each * first.weight - sum(group.waiting for group in groups[1:]))


def _node(shared: Shared, groups: Sequence[Group], now: float) -> float:
    """Images a second that one node's CPUs are enough for. What starts takes its share by the requests, at most."""
    unknown = [group for group in groups if group.tier.name not in shared.slowed]
    starting = sum(group.starting(now) * group.replica.start_cores for group in unknown)
    if starting:
        new = sum(group.tier.request * group.starting(now) for group in unknown)
        starting = min(starting, shared.cpus * new / (new + sum(group.tier.request * group.weight for group in groups)))
    low, high = 0.0, 1e5
    for _ in range(40):
        middle = (low + high) / 2
        used = sum(group.weight * group.replica.cores(middle / max(1e-9, group.weight)) for group in groups)
        past = sum(max(0.0, middle / max(1e-9, g.weight) - g.replica.saturated) for g in groups)
        enough = shared.fixed + shared.per_image * middle + used + starting <= shared.cpus and not past
        low, high = (middle, high) if enough else (low, middle)
    return max(low, 1e-9)
