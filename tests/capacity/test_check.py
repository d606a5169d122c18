"""The check's parts against an API server that says what a cluster would."""

import json
import math
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml
from manifests import K8S
from replicas import GATEWAY, MODEL_SERVER

from bench.load import GOOD, Row
from capacity import check, cluster, manifests
from capacity.cluster import Cluster, Seen, Watch, counted, line, windows
from capacity.hpa import Flags
from capacity.measured import LEVELS, Latencies
from capacity.pods import NOTICED, Pods, busiest, growing, grows, noticed, typical
from capacity.simulation import Shared

METRICS = """# HELP container_cpu_usage_seconds_total [STABLE] Cumulative cpu time
container_cpu_usage_seconds_total{container="gateway",namespace="kennel",pod="gateway-1"} 12.5 1764097200123
container_cpu_usage_seconds_total{container="gateway",namespace="other",pod="gateway-1"} 99 1764097200123
container_cpu_usage_seconds_total{container="fetch",namespace="kennel",pod="model-server-1"} 1 1764097200123
container_cpu_usage_seconds_total{container="model-server",namespace="kennel",pod="model-server-1"} 1e+02 1764097201000
container_memory_working_set_bytes{container="gateway",namespace="kennel",pod="gateway-1"} 5 1764097200123
node_cpu_usage_seconds_total 5000.25 1764097202000
"""


def pod(tier: str, ready: bool) -> dict:
    conditions = [{"type": "Ready", "status": str(ready), "lastTransitionTime": "2026-11-25T19:00:07Z"}]
    running = [{"name": tier, "state": {"running": {"startedAt": "2026-11-25T19:00:04Z"}}}] if ready else []
    meta = {
        "name": f"{tier}-1",
        "labels": {"app.kubernetes.io/name": tier},
        "creationTimestamp": "2026-11-25T19:00:00Z",
    }
    return {"metadata": meta, "status": {"conditions": conditions, "containerStatuses": running}}


class Api(BaseHTTPRequestHandler):
    patched: list[tuple[str, dict]] = []  # noqa: RUF012  # one server a test
    nodes, nothing = 1, False

    def do_GET(self) -> None:
        if self.nothing:
            return self.answer(b"nothing", "text/plain", 500)
        kinds = {path: kind for kind, path in cluster.KINDS.items()}
        if self.path == "/api/v1/nodes/node/proxy/metrics/resource":
            return self.answer(METRICS.encode(), "text/plain")
        if self.path == "/api/v1/nodes":
            items = [{"metadata": {"name": "node"}, "status": {"capacity": {"cpu": "2"}}}] * self.nodes
        elif self.path == cluster.PODS:
            items = [pod("gateway", True), pod("model-server", False), {"metadata": {"name": "x"}, "status": {}}]
        else:
            items = [one | STATUS[one["kind"]] for one in RENDERED if one["kind"] == kinds[self.path]]
            items = [{key: value for key, value in one.items() if key != "kind"} for one in items]
        return self.answer(json.dumps({"items": items}).encode(), "application/json")

    def do_PATCH(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.patched.append((self.path.rsplit("/", 1)[1], body))
        scaler = next(one for one in RENDERED if one["kind"] == "HorizontalPodAutoscaler")
        self.answer(json.dumps(scaler).encode(), "application/json")

    def answer(self, body: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


RENDERED = manifests.render(K8S / "overlays" / "kind")
STATUS = {
    "Deployment": {"status": {"readyReplicas": 2}},
    "HorizontalPodAutoscaler": {
        "status": {
            "currentMetrics": [{"type": "Resource", "resource": {"name": "cpu", "current": {"averageUtilization": 41}}}]
        }
    },
    "ConfigMap": {},
}
for one in RENDERED:
    if one["kind"] == "Deployment":
        one["spec"]["replicas"] = 2  # as the HPA has it on a cluster


@pytest.fixture
def api(tmp_path: Path, monkeypatch):
    class Server(Api):
        patched: list[tuple[str, dict]] = []  # noqa: RUF012

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
            "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_address[1]}"}}],
            "users": [{"name": "me", "user": {"token": "any"}}],
        }
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
        yield Server
        server.shutdown()


def test_a_cluster_is_read_as_its_manifests_are(api):
    found = Cluster()
    assert (found.node, found.node_cpus) == ("node", 2)
    assert manifests.read(found.objects()) == manifests.read(RENDERED)
    assert found.count() == {"gateway": 1, "model-server": 1}
    found.bounds({"gateway": 2, "model-server": 2}, {"gateway": 3, "model-server": 2})
    assert api.patched == [
        ("gateway", {"spec": {"minReplicas": 2, "maxReplicas": 3}}),
        ("model-server", {"spec": {"minReplicas": 2, "maxReplicas": 2}}),
    ]


def test_the_hpas_aim_lower_and_then_as_before(api):
    found, tiers = Cluster(), manifests.read(RENDERED)
    found.aim(tiers)
    as_rendered = {o["metadata"]["name"]: o["spec"]["metrics"] for o in RENDERED if o["kind"].startswith("Horizontal")}
    assert api.patched == [(tier.name, {"spec": {"metrics": as_rendered[tier.name]}}) for tier in tiers]
    api.patched.clear()
    found.aim([replace(tiers[0], scaling=replace(tiers[0].scaling, utilization=0, value=85))])
    [(_, patch)] = api.patched
    assert patch["spec"]["metrics"][0]["resource"]["target"] == {"type": "AverageValue", "averageValue": "85m"}


def test_a_look_sees_replicas_pods_and_cpu(api):
    with Cluster().watch() as watch:
        deadline = time.monotonic() + 10
        while len(watch.seen) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert len(watch.seen) >= 3
    assert watch.seen[-1].wanted == watch.seen[-1].ready == {"gateway": 2, "model-server": 2}
    assert watch.seen[-1].utilization == {"gateway": 41, "model-server": 41}
    gateway, server = watch.lives["gateway-1"], watch.lives["model-server-1"]
    assert (gateway.started - gateway.created, gateway.ready - gateway.created) == (4, 7)
    assert math.isnan(server.ready)
    assert watch.cpu["gateway-1"] == {1764097200.123: 12.5}
    assert watch.cpu[""] == {1764097202.0: 5000.25}


def test_a_cluster_that_stops_answering_is_told(api):
    def watch() -> None:
        with Cluster().watch():
            api.nothing = True
            time.sleep(1.5)

    with pytest.raises(SystemExit, match=r"looks at the cluster failed: .*/deployments: 500 nothing"):
        watch()


def test_more_nodes_than_are_modelled_are_told(api):
    api.nodes = 3
    with pytest.raises(SystemExit, match="the cluster has 3 nodes: only one"):
        Cluster()


def test_what_is_not_said_is_asked_for(monkeypatch):
    monkeypatch.delenv("KENNEL_URL", raising=False)
    with pytest.raises(SystemExit, match="KENNEL_URL and KUBECONFIG say which cluster"):
        check.main([])


def test_only_kennel_s_own_containers_count():
    assert {name for name, *_ in counted(METRICS)} == {"gateway-1", "model-server-1", ""}


def test_cpus_between_two_countings():
    samples = {0.0: 1.0, 10.0: 3.0, 20.0: 8.0, 30.0: 8.0}
    assert windows(samples, 5, 25) == [(10.0, 20.0, 0.5)]
    assert windows(samples, 0, 30) == [(0.0, 10.0, 0.2), (10.0, 20.0, 0.5), (20.0, 30.0, 0.0)]
    assert windows({0.0: 5.0, 10.0: 1.0}, 0, 10) == [], "a container that was started anew"


def test_the_line_through_what_was_counted():
    assert line([(10, 0.1), (20, 0.15), (30, 0.2)]) == pytest.approx((0.05, 0.005))
    assert line([(10, 0.1), (20, 0.05)]) == pytest.approx((0.075, 0.0)), "no CPU comes back for more images"
    assert line([(10, 0.1)]) == (0.1, 0.0)


def quantiles(ms: float) -> tuple[float, ...]:
    return tuple(np.full(len(LEVELS), ms).tolist())


def pods() -> Pods:
    shared = Shared(2.0, 0.3, 0.001, Latencies.of({0.1: quantiles(30), 0.8: quantiles(60)}))
    replicas, tiers = {"gateway": GATEWAY, "model-server": MODEL_SERVER}, manifests.read(RENDERED)
    return Pods(replicas, {"gateway": 2.0, "model-server": 5.0}, shared, 80.0, tiers)


def test_a_tier_grows_before_the_ramp_is_at_its_height():
    for tier in manifests.read(RENDERED):
        # 70% of the request is aimed at, and 10% more than that is borne; two replicas, which take 20 millicores idle.
        as_it_is = 2 * (0.77 * tier.request - 0.02) / 0.004
        assert grows(tier, 0.02, 0.004) == pytest.approx(as_it_is)
        assert growing(tier, 0.02, 0.004, as_it_is + 1) == tier
        lower = growing(tier, 0.02, 0.004, 20.0)
        by_value = replace(tier, scaling=replace(tier.scaling, utilization=0, value=round(700 * tier.request)))
        assert 0.9 * 20 <= grows(lower, 0.02, 0.004) <= 20
        assert 0.9 * 20 <= grows(growing(by_value, 0.02, 0.004, 20.0), 0.02, 0.004) <= 20
        assert growing(tier, 0.5, 0.004, 1.0).scaling.utilization >= 1


def test_beside_the_ramp_s_height_one_more_replica_can_start():
    assert [busiest(cpus) for cpus in (1, 2, 4, 16)] == [0.5, 0.5, 0.75, 0.8]


def real_as(result, seconds: int, look: float = 1.0) -> Watch:
    """What a cluster would have shown that did what was simulated."""
    looks = np.arange(0, seconds, look)
    each = [{name: int(found[int(at)]) for name, found in result.replicas.items()} for at in looks]
    return Watch([Seen(1000.0 + at, wanted, wanted, {}) for at, wanted in zip(looks, each, strict=True)])


def test_a_cluster_that_does_what_is_simulated_is_within_it():
    offered = np.interp(np.arange(340.0), *zip(*check.ramp(80), strict=True))
    results = [check.simulated(pods(), offered, Flags(), moments) for moments in check.MOMENTS]
    assert {result.replicas["gateway"].max() for result in results} == {3}
    middle = results[4]
    rows = [Row(at, latency, 200, GOOD) for at, latency in enumerate(middle.p50.tolist())]
    real = check.observed(real_as(middle, 340, look=1.3), rows, 1000.0, 340)
    assert real["gateway: replica seconds"] == pytest.approx(middle.replicas["gateway"].sum(), abs=3)
    compared = check.compare(real, results)
    assert [what for what, *_ in compared] == [
        "gateway: replica seconds", "gateway: replicas at most", "model-server: replica seconds",
        "model-server: replicas at most", check.P99,
    ]  # fmt: skip
    assert all(abs(ratio - 1) <= check.WITHIN for *_, ratio in compared[:4])


def test_a_cluster_that_does_something_else_is_not():
    offered = np.full(340, 5.0)
    results = [check.simulated(pods(), offered, Flags(), moments) for moments in check.MOMENTS]
    grown = {"gateway": np.full(340, 3.0), "model-server": np.full(340, 2.0)}
    real = check.observed(real_as(type("R", (), {"replicas": grown}), 340), [Row(0, 0.1, 200, GOOD)] * 10, 1000.0, 340)
    ratios = {what: ratio for what, *_, ratio in check.compare(real, results)}
    assert ratios["gateway: replica seconds"] == pytest.approx(2 / 3)
    assert ratios["model-server: replica seconds"] == pytest.approx(1)
    assert ratios[check.P99] == pytest.approx(0.3, rel=0.1)


def test_the_ramp_is_offered_as_meant_and_a_tier_grows_later_than_the_load_asks_for_it():
    images = check.offered(check.ramp(95))
    assert (len(images), images[10], images[150], images[300]) == (340, check.LOW, 95, check.LOW)
    asked, top = 50.0, 95.0
    rates = noticed({"gateway": 90.0, "model-server": asked}, top)
    assert rates["gateway"] == top
    later = int(np.searchsorted(images, asked)) + NOTICED
    assert rates["model-server"] == pytest.approx(images[int(later)], abs=2)


def test_one_start_of_three_that_was_far_slower_does_not_count():
    usual, slow = np.linspace(0.02, 0.2, 200), np.linspace(0.5, 3, 200)
    found = typical([usual, slow, usual * 1.1, np.full(10, 9.0)])
    assert found == pytest.approx(np.quantile(usual * 1.1, LEVELS))
    assert typical([np.full(10, 9.0)]) is None
