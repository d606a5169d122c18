"""Kennel on a cluster as its tests see it: what they apply, what is there then, and what answers."""

import contextlib
import json
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import requests
import yaml
from containers import total
from kubernetes import client, config
from load import Call, Load
from tiny import COLOURS, misnamed, other_weights, picture, shorten_classes, two_versions

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "kennel"
TIERS = ("model-server", "gateway")
OURS = {"kennel/test": "true"}  # on what the tests add to the overlay, so that it can be found and removed
# The bundles that are broken, and what says so.
BROKEN = {"altered": "manifest.json: was altered", "wrong": "does not give the answers recorded in golden.npz"}
# CPU that the HPA wants a model server to take. Eight clients' calls took 650m with a pause of 0.02 s (125 calls/s),
# and an idle model server 20m, measured once without a cluster on 2 cores: that is three pods' work, and with a
# pause of 2 s one pod's.
TARGET = "120m"
PAUSE, LONG_PAUSE = 0.02, 2.0
T = TypeVar("T")


def make_bundles(folder: Path) -> None:
    """One model in two versions, of other classes and another input size, and two that must be refused."""
    two_versions(folder)
    for name, damage in (("altered", shorten_classes), ("wrong", other_weights)):
        shutil.copytree(folder / "1", folder / name)
        damage(folder / name)


@dataclass(frozen=True)
class Variant:
    """What differs from the overlay, besides the tiny bundles in the place of its model."""

    bundle: str = "1"
    scaling: bool = False  # the model server by CPU, from one to three; else two of each tier and no more
    deadline: int = 0  # progressDeadlineSeconds of the model server; 0: the overlay's


class Overlays:
    """A copy of the overlay's tree, kustomize takes no paths from outside, and the tests' overlay in it."""

    def __init__(self, folder: Path, overlay: Path) -> None:
        assert overlay.parent.name == "overlays", f"{overlay} is no folder in overlays/"
        shutil.copytree(overlay.parents[1], folder / "k8s")
        self.plain = folder / "k8s" / "overlays" / overlay.name
        self.test = folder / "k8s" / "overlays" / "cluster-test"
        self.test.mkdir()
        make_bundles(self.test / "bundles")
        self.bundles = sorted(path.name for path in (self.test / "bundles").iterdir())

    def write(self, variant: Variant) -> Path:
        """The folder to apply. No bucket and no registry: ConfigMaps bring the bundles to the init container."""
        settings = {"gateway": "MODELS=tiny", "model-server": f"MODEL_URI=file:///bundles/{variant.bundle}"}
        merged = [
            {"name": tier, "namespace": NAMESPACE, "behavior": "merge", "literals": [setting]}
            for tier, setting in settings.items()
        ]
        made = [
            {
                "name": f"bundle-{name}",
                "namespace": NAMESPACE,
                "files": sorted(str(path.relative_to(self.test)) for path in (self.test / "bundles" / name).iterdir()),
            }
            for name in self.bundles
        ]
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [f"../{self.plain.name}", "metrics.yaml"],
            "generatorOptions": {"labels": OURS},
            "configMapGenerator": merged + made,
            "patches": [self._mounts(variant), *(_replicas(tier, variant) for tier in TIERS)],
        }
        (self.test / "metrics.yaml").write_text(yaml.safe_dump(METRICS_POLICY))
        (self.test / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return self.test

    def _mounts(self, variant: Variant) -> dict[str, Any]:
        volumes = [{"name": f"bundle-{name}", "configMap": {"name": f"bundle-{name}"}} for name in self.bundles]
        mounts = [{"name": f"bundle-{name}", "mountPath": f"/bundles/{name}"} for name in self.bundles]
        pod = {"initContainers": [{"name": "fetch", "volumeMounts": mounts}], "volumes": volumes}
        deadline = {"progressDeadlineSeconds": variant.deadline} if variant.deadline else {}
        patch = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "any"}}
        return _patch("Deployment", "model-server", patch | {"spec": deadline | {"template": {"spec": pod}}})


# The API server's proxy reads the pods' counters, from an address that only the cluster knows.
METRICS_POLICY = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "cluster-test-metrics", "namespace": NAMESPACE, "labels": OURS},
    "spec": {
        "podSelector": {"matchLabels": {"app.kubernetes.io/component": "model-server"}},
        "policyTypes": ["Ingress"],
        "ingress": [{"ports": [{"port": 8092}]}],
    },
}


def _patch(kind: str, name: str, patch: object) -> dict[str, Any]:
    return {"target": {"kind": kind, "name": name}, "patch": yaml.safe_dump(patch)}


def _replicas(tier: str, variant: Variant) -> dict[str, Any]:
    scales = variant.scaling and tier == "model-server"
    values: dict[str, Any] = {"minReplicas": 1 if scales else 2, "maxReplicas": 3 if scales else 2}
    if scales:
        resource = {"name": "cpu", "container": tier, "target": {"type": "AverageValue", "averageValue": TARGET}}
        values["metrics"] = [{"type": "ContainerResource", "containerResource": resource}]
        values["behavior/scaleDown"] = {
            "stabilizationWindowSeconds": 15,
            "policies": [{"type": "Pods", "value": 1, "periodSeconds": 15}],
        }
    patch = [{"op": "replace", "path": f"/spec/{path}", "value": value} for path, value in values.items()]
    return _patch("HorizontalPodAutoscaler", tier, patch)


class Cluster:
    """One context, whatever happens to the current one meanwhile."""

    def __init__(self, kubeconfig: Path, url: str, overlays: Overlays) -> None:
        self.url, self.overlays = url.rstrip("/"), overlays
        self.environment = os.environ | {"KUBECONFIG": str(kubeconfig)}
        api = config.new_client_from_config(str(kubeconfig))
        self.core, self.apps = client.CoreV1Api(api), client.AppsV1Api(api)
        self.refused_before = self.refused()

    def kubectl(self, *arguments: str, check: bool = True) -> str:
        """What it printed. Raises AssertionError with what it complained of, unless told not to."""
        command = ["kubectl", *arguments]
        found = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=700)
        assert not check or found.returncode == 0, f"kubectl {' '.join(arguments)}: {found.stderr}\n{self.describe()}"
        return found.stdout if check else found.stdout + found.stderr

    def describe(self) -> str:
        """The pods' states, what is held against them and their last words."""
        pods = self.kubectl("-n", NAMESPACE, "get", "pods", "-o", "wide", check=False)
        warnings = ["get", "events", "--field-selector", "type=Warning", "--sort-by", ".metadata.creationTimestamp"]
        said = ["logs", "-l", "app.kubernetes.io/part-of=kennel", "--all-containers", "--tail=5", "--prefix"]
        events = self.kubectl("-n", NAMESPACE, *warnings, check=False).splitlines()[-10:]
        return "\n".join([pods, *events, self.kubectl("-n", NAMESPACE, *said, "--ignore-errors", check=False)])

    def wait(self, what: str, seconds: float, check: Callable[[], T]) -> T:
        """Until `check` gives something true. Raises AssertionError with the state of things where it does not."""
        deadline = time.monotonic() + seconds
        while not (found := check()):
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}\n{self.describe()}"
            time.sleep(1)
        return found

    def ask(self, colour: str) -> dict[str, Any] | None:
        """The answer to one picture through the ingress, where there is one."""
        try:
            response = requests.post(f"{self.url}/predict", data=picture(colour), timeout=10)
            found: dict[str, Any] = response.json()
        except requests.RequestException:
            return None
        return found if response.ok else None

    def apply(self, variant: Variant) -> None:
        self.kubectl("apply", "-k", str(self.overlays.write(variant)))

    def deploy(self, variant: Variant) -> None:
        """Apply it, and wait until it alone serves."""
        self.apply(variant)
        for tier in TIERS:
            self.settle(tier)

    def settle(self, tier: str, count: int = 2, seconds: float = 420) -> None:
        """Until the tier is `count` pods of its newest kind, and no other is there or just leaving."""

        def check() -> bool:
            return settled(self.apps.read_namespaced_deployment(tier, NAMESPACE), self.pods(tier), count)

        self.wait(f"{count} of {tier}, up to date and available, and no other", seconds, check)

    def pods(self, tier: str) -> list[Any]:
        found = self.core.list_namespaced_pod(NAMESPACE, label_selector=f"app.kubernetes.io/name={tier}").items
        return sorted(found, key=lambda pod: pod.metadata.name)

    def refused(self) -> set[tuple[str, int, str]]:
        """The pods that a ReplicaSet could not make: event, how often, why."""
        events = self.core.list_namespaced_event(NAMESPACE, field_selector="reason=FailedCreate").items
        return {(one.metadata.uid, one.count or 1, one.message or "") for one in events}

    def counts(self) -> dict[str, float]:
        """Predictions that each model server was asked for so far."""
        names = [pod.metadata.name for pod in self.pods("model-server")]
        read = self.core.connect_get_namespaced_pod_proxy_with_path
        return {
            name: total(read(f"{name}:8092", NAMESPACE, "metrics"), "ts_inference_requests_total") for name in names
        }

    def probe(self, namespace: str, labels: dict[str, str], targets: list[str]) -> dict[str, bool]:
        """Which of host:port a pod with these labels gets a connection to."""
        gateway = self.apps.read_namespaced_deployment("gateway", NAMESPACE).spec.template.spec
        name = f"cluster-test-{uuid.uuid4().hex[:8]}"
        pod = {
            "metadata": {"name": name, "labels": labels | OURS},
            "spec": {
                "restartPolicy": "Never",
                "automountServiceAccountToken": False,
                "enableServiceLinks": False,
                "securityContext": {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": RUNTIME_DEFAULT},
                "containers": [
                    {
                        "name": "probe",
                        "image": gateway.containers[0].image,
                        "command": ["python3.11", "-c", PROBE, *targets],
                        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                        "resources": {"requests": {"cpu": "10m"}, "limits": {"cpu": "100m", "memory": "64Mi"}},
                    }
                ],
            },
        }
        self.core.create_namespaced_pod(namespace, pod)
        try:

            def ended() -> bool:
                return self.core.read_namespaced_pod(name, namespace).status.phase in ("Succeeded", "Failed")

            self.wait(f"{namespace}/{name}, which connects to {', '.join(targets)}", 120, ended)
            found: dict[str, bool] = json.loads(self.kubectl("-n", namespace, "logs", name))
            return found
        finally:
            self.core.delete_namespaced_pod(name, namespace, grace_period_seconds=0)

    @contextlib.contextmanager
    def namespace(self) -> Iterator[str]:
        """Another namespace, which has no policies."""
        name = f"cluster-test-{uuid.uuid4().hex[:8]}"
        self.core.create_namespace({"metadata": {"name": name, "labels": OURS}})
        try:
            yield name
        finally:
            self.core.delete_namespace(name)

    def restore(self, was_there: bool) -> None:
        """The overlay as it is, or nothing where there was nothing."""
        if not was_there:
            self.kubectl("delete", "-k", str(self.overlays.plain), "--ignore-not-found", "--timeout=300s")
            return
        self.kubectl("apply", "-k", str(self.overlays.plain))
        for tier in TIERS:
            self.kubectl("-n", NAMESPACE, "rollout", "status", f"deployment/{tier}", "--timeout=600s")
        self.kubectl("-n", NAMESPACE, "delete", "networkpolicies,configmaps,pods", "-l", selector(OURS))


RUNTIME_DEFAULT = {"type": "RuntimeDefault"}
# A policy reaches a new pod's address a moment after the pod has it, hence the pause.
PROBE = """
import json, socket, sys, time
time.sleep(5)
def reaches(target):
    host, port = target.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), 3).close()
    except OSError:
        return False
    return True
print(json.dumps({target: reaches(target) for target in sys.argv[1:]}))
"""


class Clients:
    """Eight of them, who send pictures through the ingress until the block is left."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.pause, self.seen = cluster, PAUSE, 0
        self.load = Load(8, self.ask)

    def __enter__(self) -> "Clients":
        self.load.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.load.__exit__(*error)

    def ask(self, session: requests.Session, count: int) -> requests.Response:
        time.sleep(self.pause)
        colour = list(COLOURS)[count % 3]
        headers = {"X-Request-Id": colour}
        response = session.post(f"{self.cluster.url}/predict", data=picture(colour), headers=headers, timeout=10)
        if "X-Request-Id" not in response.headers:  # the ingress controller's own words
            raise requests.HTTPError(f"{response.status_code} {response.text[:80]!r}")
        return response

    def check(self, what: str, *versions: str) -> None:
        """Everything asked since the last check, and a hundred more, was answered rightly by these versions."""
        try:
            self.load.wait_for(200, 100, 60)
        except AssertionError as exc:
            raise AssertionError(f"{what}: {exc}\n{self.cluster.describe()}") from None
        calls = self.load.calls[self.seen :]
        self.seen += len(calls)
        complaint = complaints(calls, versions)
        assert not complaint, f"{what}: {complaint}\n{self.cluster.describe()}"
        print(f"{what}: {len(calls)} answers")


def complaints(calls: list[Call], versions: tuple[str, ...]) -> str:
    """What is wrong with these calls: "" where each was answered, named by the version that answered."""
    if failed := [call for call in calls if call.status != 200]:
        return f"{len(failed)} of {len(calls)} calls failed, the first {failed[:3]}"
    if wrong := misnamed(calls):
        return f"{len(wrong)} of {len(calls)} answers are wrong, the first {wrong[:3]}"
    found = sorted({call.body["version"] for call in calls})
    return "" if found == sorted(versions) else f"versions {found} answered, not {sorted(versions)}"


def settled(deployment: Any, pods: list[Any], count: int) -> bool:
    """Whether the Deployment's controller is done with its newest specification and `count` pods are all there are."""
    status = deployment.status
    done = (status.observed_generation or 0) >= deployment.metadata.generation
    counts = {deployment.spec.replicas, status.replicas, status.updated_replicas, status.available_replicas, len(pods)}
    return done and counts == {count} and not any(pod.metadata.deletion_timestamp for pod in pods)


def termination_messages(pods: list[Any]) -> list[str]:
    """What their containers, the first ones too, said when they ended."""
    statuses = [
        one
        for pod in pods
        for one in (pod.status.init_container_statuses or []) + (pod.status.container_statuses or [])
    ]
    ended = [state.terminated for one in statuses for state in (one.state, one.last_state) if state]
    return [one.message for one in ended if one and one.message]


def shares(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Each pod's part of the calls between two readings of the same pods, 1.0 where all have the same; {} where
    pods came or went, or none was called."""
    calls = {name: after[name] - before[name] for name in after.keys() & before.keys()}
    mean = sum(calls.values()) / len(calls) if calls else 0
    return {name: one / mean for name, one in calls.items()} if mean and before.keys() == after.keys() else {}


def fair(found: dict[str, float]) -> bool:
    return bool(found) and all(abs(share - 1) <= 0.15 for share in found.values())


def selector(labels: dict[str, str]) -> str:
    return ",".join("=".join(item) for item in labels.items())
