"""What tests/images/test_fleet.py does to containers, done by Kubernetes: nobody gets a wrong answer or none.

Also what only a cluster has: Pod Security, a rollout that reports a broken model, the HPA, NetworkPolicies.
"""

import subprocess
import time
from collections.abc import Callable

import pytest
import requests
from cluster.kube import (
    BROKEN,
    LONG_PAUSE,
    NAMESPACE,
    PAUSE,
    ROOT,
    TIERS,
    Clients,
    Cluster,
    Variant,
    fair,
    shares,
    termination_messages,
)
from kubernetes.client import ApiException
from tiny import NAMES

pytestmark = pytest.mark.slow


def test_predicts_through_the_ingress(serving):
    for colour in NAMES["1"]:
        answer = serving.ask(colour)
        assert answer, serving.describe()
        assert (answer["label"], answer["model"], answer["version"]) == (colour, "tiny", "1")


# What happens to a tier's pods.


def restart(cluster: Cluster, tier: str) -> None:
    cluster.kubectl("-n", NAMESPACE, "rollout", "restart", f"deployment/{tier}")


def delete_one(cluster: Cluster, tier: str) -> None:
    cluster.core.delete_namespaced_pod(cluster.pods(tier)[0].metadata.name, NAMESPACE)


def evict_one(cluster: Cluster, tier: str) -> None:
    """As draining a node does; the disruption budget may ask for patience."""
    name = cluster.pods(tier)[0].metadata.name
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": NAMESPACE}}

    def evicted() -> bool:
        try:
            cluster.core.create_namespaced_pod_eviction(name, NAMESPACE, body)
        except ApiException as exc:
            if exc.status == 429:
                return False
            raise
        return True

    cluster.wait(f"{name} may be evicted", 60, evicted)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("change", [restart, delete_one, evict_one])
def test_loses_no_request(serving, tier: str, change: Callable[[Cluster, str], None]):
    before = {pod.metadata.name for pod in serving.pods(tier)}
    with Clients(serving) as clients:
        clients.check("before", "1")
        change(serving, tier)
        serving.settle(tier)
        clients.check(f"{tier}: {change.__name__}", "1")
    stayed = before & {pod.metadata.name for pod in serving.pods(tier)}
    assert len(stayed) == (0 if change is restart else 1)


def test_a_model_update_switches_classes_and_rollback_returns(serving):
    """Other classes and another input size, under load."""
    with Clients(serving) as clients:
        clients.check("the first model", "1")
        serving.deploy(Variant("2"))
        clients.check("the update", "1", "2")
        clients.check("the second model", "2")
        assert classes(serving) == list(NAMES["2"].values())
        done = subprocess.run(
            ["make", "rollback"], cwd=ROOT, env=serving.environment, capture_output=True, text=True, timeout=700
        )
        assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{serving.describe()}"
        serving.settle("model-server")
        clients.check("the rollback", "1", "2")
        clients.check("the first model again", "1")
        assert classes(serving) == list(NAMES["1"].values())


def classes(cluster: Cluster) -> list[str]:
    found: list[str] = requests.get(f"{cluster.url}/v1/models/tiny", timeout=10).json()["classes"]
    return found


@pytest.mark.parametrize("bundle", BROKEN)
def test_a_broken_model_gets_no_traffic(serving, bundle: str):
    """An altered one ends the init container, one of wrong answers never becomes ready."""
    before = {pod.metadata.name for pod in serving.pods("model-server")}

    def new() -> list:
        return [pod for pod in serving.pods("model-server") if pod.metadata.name not in before]

    def reported() -> bool:
        status = serving.apps.read_namespaced_deployment("model-server", NAMESPACE).status
        return any(
            (one.type, one.status, one.reason) == ("Progressing", "False", "ProgressDeadlineExceeded")
            for one in status.conditions or []
        )

    def reason() -> bool:
        if bundle == "altered":
            return any(BROKEN[bundle] in message for message in termination_messages(new()))
        # A model server that starts its worker again and again has not ended: its log says why.
        logs = [serving.kubectl("-n", NAMESPACE, "logs", pod.metadata.name, check=False) for pod in new()]
        return any(BROKEN[bundle] in log for log in logs)

    with Clients(serving) as clients:
        clients.check("before", "1")
        serving.apply(Variant(bundle, deadline=30))
        serving.wait("the rollout reports ProgressDeadlineExceeded", 180, reported)
        serving.wait(f"the new pod says {BROKEN[bundle]!r}", 180, reason)
        assert len(new()) == 1, serving.describe()
        ready = {pod.metadata.name for pod in serving.pods("model-server") if is_ready(pod)}
        assert ready == before, serving.describe()
        clients.check("a broken model beside it", "1")
        serving.deploy(Variant())
        clients.check("the good one applied again", "1")
    assert {pod.metadata.name for pod in serving.pods("model-server")} == before


def is_ready(pod) -> bool:
    return any(one.type == "Ready" and one.status == "True" for one in pod.status.conditions or [])


@pytest.mark.usefixtures("metrics_api")
def test_load_scales_the_model_server_up_and_down(serving):
    serving.apply(Variant(scaling=True))
    with Clients(serving) as clients:
        clients.pause = LONG_PAUSE
        serving.settle("model-server", 1)
        clients.check("a light load, one pod", "1")
        clients.pause = PAUSE
        serving.settle("model-server", 3)
        # A pod counts as available once it was Ready for minReadySeconds, 5.
        check_shares(serving, 30 - 5)
        clients.check("three pods", "1")
        clients.pause = LONG_PAUSE
        serving.settle("model-server", 1)
        clients.check("one pod again", "1")


def check_shares(cluster: Cluster, seconds: float) -> None:
    """By then every pod gets its share of the calls, to 15%."""
    deadline, before = time.monotonic() + seconds, cluster.counts()
    while True:
        time.sleep(5)
        after = cluster.counts()
        found = shares(before, after)
        print("shares:", ", ".join(f"{name} {share:.2f}" for name, share in found.items()))
        if fair(found):
            return
        assert time.monotonic() < deadline, f"{found} of a fair share\n{cluster.describe()}"
        before = after


def test_network_policies_deny_what_they_should(serving):
    server = f"{serving.pods('model-server')[0].status.pod_ip}:7070"
    # Both outside the namespace: the API server, which any cluster has, and an address that some have a way to.
    api = f"{serving.core.read_namespaced_service('kubernetes', 'default').spec.cluster_ip}:443"
    targets = [server, api, "1.1.1.1:443"]
    nobody = serving.probe(NAMESPACE, {}, targets)
    if nobody[server]:
        pytest.skip("this cluster enforces no NetworkPolicy: a pod that deny-all selects gets through")
    with serving.namespace() as other:
        stranger = serving.probe(other, {}, targets)
    gateway = serving.probe(NAMESPACE, {"app.kubernetes.io/component": "gateway"}, targets)
    print(f"nobody {nobody}, a stranger {stranger}, a gateway {gateway}")
    assert stranger[api], f"{api} cannot be reached without policies either, and so says nothing about them"
    assert not any(nobody.values())
    assert not stranger[server]
    assert gateway == {server: True, api: False, "1.1.1.1:443": False}


def test_pod_security_is_enforced_and_accepted_every_pod(serving):
    """The last test: every pod of those before is among them."""
    labels = serving.core.read_namespace(NAMESPACE).metadata.labels
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    root = {"metadata": {"name": "root"}, "spec": {"containers": [{"name": "root", "image": "any"}]}}
    with pytest.raises(ApiException, match="violates PodSecurity"):
        serving.core.create_namespaced_pod(NAMESPACE, root, dry_run="All")
    assert not serving.refused() - serving.refused_before
