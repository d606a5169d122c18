"""Kubernetes' HorizontalPodAutoscaler (autoscaling/v2) for CPU: what it wants, and how fast it may have it.

After Kubernetes 1.36, pkg/controller/podautoscaler: replica_calculator.go (GetResourceReplicas, GetRawResourceReplicas,
groupPods), metrics/utilization.go (whole percent, cut off) and horizontal.go (stabilizeRecommendationWithBehaviors,
calculateScaleUpLimitWithScalingRules, calculateScaleDownLimitWithBehaviors, storeScaleEvent); the same in words:
https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/#algorithm-details. Defaults:
pkg/apis/autoscaling/v2/defaults.go for a manifest, and podautoscaler/config/v1alpha1/defaults.go for the controller's
flags. Times are seconds, CPU is in thousandths of a CPU, as integers, as the controller has them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Flags:
    """kube-controller-manager's --horizontal-pod-autoscaler-..., with its defaults."""

    sync_period: float = 15.0
    tolerance: float = 0.1
    cpu_initialization_period: float = 300.0
    initial_readiness_delay: float = 30.0
    downscale_stabilization: float = 300.0


@dataclass(frozen=True)
class Policy:
    type: Literal["Pods", "Percent"]
    value: int
    period: float


@dataclass(frozen=True)
class Rules:
    """scaleUp or scaleDown of an HPA's behavior. tolerance: None where it is the controller's."""

    window: float
    policies: tuple[Policy, ...]
    select: Literal["Max", "Min", "Disabled"] = "Max"
    tolerance: float | None = None


UP = Rules(0.0, (Policy("Pods", 4, 15), Policy("Percent", 100, 15)))
DOWN = Rules(Flags.downscale_stabilization, (Policy("Percent", 100, 15),))


@dataclass(frozen=True)
class Scaling:
    """One HPA's spec. Exactly one of utilization (percent of the request) and value (thousandths of a CPU) is set."""

    name: str
    least: int
    most: int
    utilization: int = 0
    value: int = 0
    up: Rules = UP
    down: Rules = DOWN


@dataclass(frozen=True)
class Metric:
    """CPU that a pod took in the `window` seconds before `at`, as metrics-server tells it."""

    at: float
    window: float
    usage: int


@dataclass(frozen=True)
class Pod:
    """What the controller sees of one. since: when its readiness last changed."""

    started: float
    ready: bool
    since: float
    request: int
    metric: Metric | None
    pending: bool = False
    leaving: bool = False


def wanted(spec: Scaling, current: int, pods: Sequence[Pod], now: float, flags: Flags) -> int | None:
    """Replicas that the metric asks for, before any limit; None where no pod has a metric that counts."""
    counted, unready, missing = group(pods, now, flags)
    if not counted:
        return None
    ratio = _ratio(spec, [(pod.metric.usage, pod.request) for pod in counted if pod.metric])
    growing_with_unready = bool(unready) and ratio > 1
    if not growing_with_unready and not missing:
        return current if _within(spec, ratio, flags) else math.ceil(ratio * len(counted))
    taken = [(pod.metric.usage, pod.request) for pod in counted if pod.metric]
    if ratio < 1:
        # As if they took all that they asked for: nobody goes on a guess.
        taken += [
            (pod.request * max(100, spec.utilization) // 100 if spec.utilization else spec.value, pod.request)
            for pod in missing
        ]
    elif ratio > 1:
        taken += [(0, pod.request) for pod in missing]
    if growing_with_unready:
        taken += [(0, pod.request) for pod in unready]
    again = _ratio(spec, taken)
    if _within(spec, again, flags) or (ratio < 1 < again) or (again < 1 < ratio):
        return current
    found = math.ceil(again * len(taken))
    return current if (again < 1 and found > current) or (again > 1 and found < current) else found


def group(pods: Sequence[Pod], now: float, flags: Flags) -> tuple[list[Pod], list[Pod], list[Pod]]:
    """Those whose metric counts, those that are not ready for it, and those without one; leaving ones are none."""
    counted, unready, missing = [], [], []
    for pod in pods:
        if pod.leaving:
            continue
        if pod.pending:
            unready.append(pod)
        elif pod.metric is None:
            missing.append(pod)
        elif _not_yet(pod, pod.metric, now, flags):
            unready.append(pod)
        else:
            counted.append(pod)
    return counted, unready, missing


def _not_yet(pod: Pod, metric: Metric, now: float, flags: Flags) -> bool:
    if pod.started + flags.cpu_initialization_period > now:
        return not pod.ready or metric.at < pod.since + metric.window
    return not pod.ready and pod.started + flags.initial_readiness_delay > pod.since


def _ratio(spec: Scaling, taken: Sequence[tuple[int, int]]) -> float:
    usage, requests = sum(used for used, _ in taken), sum(request for _, request in taken)
    if spec.utilization:
        return (usage * 100 // requests) / spec.utilization
    return (usage // len(taken)) / spec.value


def _within(spec: Scaling, ratio: float, flags: Flags) -> bool:
    up, down = (flags.tolerance if r.tolerance is None else r.tolerance for r in (spec.up, spec.down))
    return 1 - down <= ratio <= 1 + up


@dataclass
class Autoscaler:
    """One HPA's memory: what it wanted, and what it did."""

    spec: Scaling
    flags: Flags = Flags()
    _wanted: list[tuple[float, int]] = field(default_factory=list)
    _changes: list[tuple[float, int]] = field(default_factory=list)  # positive: added

    def sync(self, now: float, current: int, pods: Sequence[Pod]) -> int:
        """One look: replicas that there shall be."""
        if not self._wanted:
            self._wanted.append((now, current))
        if current > self.spec.most:
            return self._store(now, current, self.spec.most)
        if current < self.spec.least:
            return self._store(now, current, self.spec.least)
        found = wanted(self.spec, current, pods, now, self.flags)
        if found is None:
            return current
        return self._store(now, current, self.limited(current, self.stabilized(now, current, found), now))

    def stabilized(self, now: float, current: int, found: int) -> int:
        """The lowest of what was wanted in scaleUp's window, or the highest in scaleDown's, whatever is nearer."""
        up, down = self.spec.up.window, self.spec.down.window
        lowest = min([found, *(n for at, n in self._wanted if at > now - up)])
        highest = max([found, *(n for at, n in self._wanted if at > now - down)])
        self._wanted = [(at, n) for at, n in self._wanted if at >= now - max(up, down)] + [(now, found)]
        return min(max(current, lowest), highest)

    def limited(self, current: int, found: int, now: float) -> int:
        """Within min, max, and what the policies allow in their periods."""
        if found > current:
            allowed = self._allowed(self.spec.up, current, now, 1)
            return min(found, max(current, allowed), self.spec.most)
        if found < current:
            allowed = self._allowed(self.spec.down, current, now, -1)
            return max(found, min(current, allowed), self.spec.least)
        return found

    def _allowed(self, rules: Rules, current: int, now: float, sign: int) -> int:
        if rules.select == "Disabled":
            return current
        proposed = []
        for policy in rules.policies:
            before = current - sum(n for at, n in self._changes if at > now - policy.period)
            if policy.type == "Pods":
                proposed.append(before + sign * policy.value)
            else:  # rounded up, or one pod could never grow; down, towards zero
                share = before * (1 + sign * policy.value / 100)
                proposed.append(math.ceil(share) if sign > 0 else int(share))
        most_change, least_change = (max, min) if sign > 0 else (min, max)
        return (most_change if rules.select == "Max" else least_change)(proposed)

    def _store(self, now: float, current: int, found: int) -> int:
        if found != current:
            longest = max(policy.period for rules in (self.spec.up, self.spec.down) for policy in rules.policies)
            self._changes = [(at, n) for at, n in self._changes if at > now - longest] + [(now, found - current)]
        return found
