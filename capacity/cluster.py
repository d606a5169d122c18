"""A cluster under load as `capacity.check` sees it: each second, replicas, pods and the CPU they took."""

import contextlib
import datetime
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from kubernetes import client, config

from capacity.manifests import TIERS, Object, Tier, amount

NAMESPACE = "kennel"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
KINDS = {
    "Deployment": f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments",
    "HorizontalPodAutoscaler": f"/apis/autoscaling/v2/namespaces/{NAMESPACE}/horizontalpodautoscalers",
    "ConfigMap": f"/api/v1/namespaces/{NAMESPACE}/configmaps",
}
SAMPLE = re.compile(r"^(container|node)_cpu_usage_seconds_total(?:\{(.*)\})? (\S+) (\d+)$", re.MULTILINE)


@dataclass
class Life:
    """A pod's moments, in Unix seconds; NaN until they came. Kubernetes tells whole seconds."""

    name: str
    tier: str
    created: float
    started: float = float("nan")  # its main container
    ready: float = float("nan")


@dataclass
class Seen:
    """One look: replicas as each Deployment is asked for, and those that are ready; what the HPA read, in percent."""

    at: float
    wanted: dict[str, int]
    ready: dict[str, int]
    utilization: dict[str, int | None]


@dataclass
class Watch:
    """`with watch(...)`: looks each second until the block is left.

    cpu: of each container by its pod's name, and of the node under "": CPU seconds by the moment they were counted.
    """

    seen: list[Seen] = field(default_factory=list)
    lives: dict[str, Life] = field(default_factory=dict)
    cpu: dict[str, dict[float, float]] = field(default_factory=dict)

    def now(self) -> Seen:
        return self.seen[-1]


class Cluster:
    """The current context of KUBECONFIG. Raises SystemExit where it is none with Kennel on one node."""

    def __init__(self) -> None:
        try:
            self._api = config.new_client_from_config()  # type: ignore[no-untyped-call]
        except config.ConfigException as exc:
            raise SystemExit(f"check: KUBECONFIG names no cluster: {exc}") from exc
        nodes = self._items("/api/v1/nodes")
        if len(nodes) != 1:
            raise SystemExit(f"check: the cluster has {len(nodes)} nodes: only one, whose CPUs all share, is modelled")
        self.node, self.node_cpus = nodes[0]["metadata"]["name"], amount(nodes[0]["status"]["capacity"]["cpu"])

    def _get(self, path: str) -> bytes:
        """As it comes: to make objects of it takes longer than a second of them may."""
        asked = self._api.param_serialize("GET", path, auth_settings=["BearerToken"])
        response = self._api.call_api(*asked, _request_timeout=10)
        body: bytes = response.read()
        if response.status != 200:
            raise OSError(f"{path}: {response.status} {body[:200].decode(errors='replace')}")
        return body

    def _items(self, path: str) -> list[Object]:
        found: list[Object] = json.loads(self._get(path))["items"]
        return found

    def objects(self) -> list[Object]:
        """What is applied, as a manifest has it."""
        return [one | {"kind": kind} for kind, path in KINDS.items() for one in self._items(path)]

    def bounds(self, least: Mapping[str, int], most: Mapping[str, int]) -> None:
        """The HPAs' minReplicas and maxReplicas."""
        for name in least:
            self._patch_scaler(name, {"minReplicas": least[name], "maxReplicas": most[name]})

    def aim(self, tiers: Sequence[Tier]) -> None:
        """The HPAs' targets, as these tiers have them."""
        for tier in tiers:
            goal: Object = {"type": "AverageValue", "averageValue": f"{tier.scaling.value}m"}
            if tier.scaling.utilization:
                goal = {"type": "Utilization", "averageUtilization": tier.scaling.utilization}
            metric: Object = {"type": "Resource", "resource": {"name": "cpu", "target": goal}}
            if tier.container:
                asked = {"name": "cpu", "container": tier.container, "target": goal}
                metric = {"type": "ContainerResource", "containerResource": asked}
            self._patch_scaler(tier.name, {"metrics": [metric]})

    def _patch_scaler(self, name: str, spec: Object) -> None:
        scaling = client.AutoscalingV2Api(self._api)
        scaling.patch_namespaced_horizontal_pod_autoscaler(name, NAMESPACE, {"spec": spec})

    def count(self) -> dict[str, int]:
        """Pods by tier, leaving ones too."""
        tiers = [pod["metadata"].get("labels", {}).get("app.kubernetes.io/name", "") for pod in self._items(PODS)]
        return {name: tiers.count(name) for name in TIERS}

    def settle(self, least: Mapping[str, int], seconds: float = 180) -> None:
        """Until the pods are the least, and no other is leaving. Raises SystemExit."""
        deadline = time.monotonic() + seconds
        while self.count() != least:
            if time.monotonic() > deadline:
                raise SystemExit(f"check: after {seconds:g} s there are {self.count()} pods, not {dict(least)}")
            time.sleep(1)

    def look(self, watch: Watch) -> None:
        at = time.time()
        deployments = {one["metadata"]["name"]: one for one in self._items(KINDS["Deployment"])}
        scalers = {one["metadata"]["name"]: one["status"] for one in self._items(KINDS["HorizontalPodAutoscaler"])}
        watch.seen.append(
            Seen(
                at,
                {name: deployments[name]["spec"]["replicas"] for name in TIERS},
                {name: deployments[name]["status"].get("readyReplicas", 0) for name in TIERS},
                {name: _utilization(scalers[name]) for name in TIERS},
            )
        )
        for pod in self._items(PODS):
            tier = pod["metadata"].get("labels", {}).get("app.kubernetes.io/name", "")
            if tier in TIERS:
                name = pod["metadata"]["name"]
                life = watch.lives.setdefault(name, Life(name, tier, moment(pod["metadata"]["creationTimestamp"])))
                for status in pod["status"].get("containerStatuses", []):
                    if "running" in status["state"]:
                        life.started = moment(status["state"]["running"]["startedAt"])
                for condition in pod["status"].get("conditions", []):
                    if condition["type"] == "Ready" and condition["status"] == "True":
                        life.ready = moment(condition["lastTransitionTime"])
        text = self._get(f"/api/v1/nodes/{self.node}/proxy/metrics/resource").decode()
        for name, when, seconds in counted(text):
            watch.cpu.setdefault(name, {})[when] = seconds

    @contextlib.contextmanager
    def watch(self) -> Iterator[Watch]:
        watch, stop = Watch(), threading.Event()
        errors: list[Exception] = []

        def looks() -> None:
            due = time.monotonic()
            while not stop.is_set():
                try:
                    self.look(watch)
                except Exception as exc:  # told below: a thread's own would only be printed
                    errors.append(exc)
                due = max(due + 1, time.monotonic())
                stop.wait(due - time.monotonic())

        self.look(watch)
        thread = threading.Thread(target=looks)
        thread.start()
        try:
            yield watch
        finally:
            stop.set()
            thread.join()
        if len(errors) > len(watch.seen) / 10:
            raise SystemExit(f"check: {len(errors)} of {len(watch.seen)} looks at the cluster failed: {errors[-1]}")


def _utilization(status: Mapping[str, Any]) -> int | None:
    for metric in status.get("currentMetrics") or []:
        for kind in ("resource", "containerResource"):
            if kind in metric:
                found: int | None = metric[kind]["current"].get("averageUtilization")
                return found
    return None


def counted(text: str) -> Iterator[tuple[str, float, float]]:
    """The kubelet's /metrics/resource -> pod ("" for the node), moment, CPU seconds, of Kennel's own containers."""
    for kind, labels, value, milliseconds in SAMPLE.findall(text):
        told = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if kind == "node":
            yield "", int(milliseconds) / 1e3, float(value)
        elif told.get("namespace") == NAMESPACE and told.get("container") in TIERS:
            yield told["pod"], int(milliseconds) / 1e3, float(value)


def moment(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()


def windows(samples: Mapping[float, float], begin: float, end: float) -> list[tuple[float, float, float]]:
    """(from, to, CPUs taken) between each two countings that lie within begin and end."""
    inside = [(at, value) for at, value in sorted(samples.items()) if begin <= at <= end]
    return [(a, b, (y - x) / (b - a)) for (a, x), (b, y) in pairwise(inside) if y >= x]


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least squares through (x, y) -> value at 0 and slope, neither below 0."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((a - x) ** 2 for a in xs)
    slope = max(0.0, sum((a - x) * (b - y) for a, b in points) / spread) if spread else 0.0
    return max(0.0, y - slope * x), slope
