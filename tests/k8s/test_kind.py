"""The kind overlay and its make targets, without a cluster."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
TARGETS = ("kind-up", "kind-deploy", "kind-test", "kind-down")
needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl renders the overlay")


def rendered() -> dict[tuple[str, str], dict]:
    folder = ROOT / "k8s/overlays/kind"
    result = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True)
    return {(d["kind"], d["metadata"]["name"]): d for d in yaml.safe_load_all(result.stdout)}


def make(*words: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(shutil.which("make")), *words], cwd=ROOT, env={"PATH": path}, capture_output=True, text=True, timeout=60
    )


def amount(text: str) -> float:
    units = {"m": 1e-3, "Mi": 2.0**20, "Gi": 2.0**30, "": 1.0}
    number, unit = re.fullmatch(r"(\d+)([a-zA-Z]*)", text).groups()  # type: ignore[union-attr]
    return int(number) * units[unit]


@needs_kubectl
@pytest.mark.parametrize(("resource", "node", "others"), [("cpu", "4", "1150m"), ("memory", "8Gi", "1Gi")])
def test_all_that_the_hpa_may_start_fits_on_the_node(resource: str, node: str, others: str) -> None:
    """`others`: what Kubernetes' own pods on a kind node, metrics-server and Traefik request."""
    objects, total = rendered(), amount(others)
    for part in ("gateway", "model-server"):
        pod = objects["Deployment", part]["spec"]["template"]["spec"]
        main = sum(amount(c["resources"]["requests"][resource]) for c in pod["containers"])
        first = max((amount(c["resources"]["requests"][resource]) for c in pod.get("initContainers", [])), default=0)
        hpa = objects["HorizontalPodAutoscaler", part]["spec"]
        assert (hpa["minReplicas"], hpa["maxReplicas"]) == (2, 3)
        total += max(main, first) * (hpa["maxReplicas"] + 1)  # one more during a rollout
    assert total <= amount(node)


@needs_kubectl
def test_every_limit_fits_on_the_node_at_once() -> None:
    objects = rendered()
    pods = [objects["Deployment", part]["spec"]["template"]["spec"] for part in ("gateway", "model-server")]
    assert 3 * sum(amount(pod["containers"][0]["resources"]["limits"]["memory"]) for pod in pods) <= amount("8Gi")


@needs_kubectl
def test_images_are_those_that_are_loaded() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    objects = rendered()
    images = [
        objects["Deployment", part]["spec"]["template"]["spec"]["containers"][0]["image"]
        for part in ("gateway", "model-server")
    ]
    assert images == [f"kennel/gateway:{version}", f"kennel/model-server:{version}"]
    assert f"kind load docker-image --name kennel {' '.join(images)}" in make("-n", "kind-deploy").stdout


@needs_kubectl
def test_only_traefik_reaches_the_gateway() -> None:
    [rule] = rendered()["NetworkPolicy", "gateway"]["spec"]["ingress"]
    [namespace] = [d for d in traefik() if d["kind"] == "Namespace"]
    labels = {"kubernetes.io/metadata.name": namespace["metadata"]["name"]}
    assert rule["from"] == [{"namespaceSelector": {"matchLabels": labels}}]


def traefik() -> list[dict]:
    return list(yaml.safe_load_all((ROOT / "k8s/overlays/kind/traefik.yaml").read_text()))


def test_the_ingress_is_on_this_machine_alone() -> None:
    config = yaml.safe_load((ROOT / "kind-config.yaml").read_text())
    [node] = config["nodes"]
    [mapping] = node["extraPortMappings"]
    [controller] = [d for d in traefik() if d["kind"] == "Deployment"]
    [container] = controller["spec"]["template"]["spec"]["containers"]
    assert mapping["listenAddress"] == "127.0.0.1"
    assert mapping["containerPort"] == container["ports"][0]["hostPort"]
    assert f"http://127.0.0.1:{mapping['hostPort']}" in make("-n", "kind-test").stdout
    assert re.fullmatch(r"kindest/node:v1\.36\.1@sha256:[0-9a-f]{64}", node["image"])
    assert re.fullmatch(r"traefik:v\d+\.\d+\.\d+", container["image"])


@pytest.mark.parametrize("target", [*TARGETS, "rollback"])
def test_targets_are_doors_that_help_lists(target: str) -> None:
    result = make("-n", target)
    assert result.returncode == 0, result.stderr
    assert f"make {target} " in make("help").stdout


@pytest.mark.parametrize("target", TARGETS)
def test_targets_name_no_cluster_but_kinds(target: str) -> None:
    for command in re.findall(r"\bkubectl .*", make("-n", target).stdout):
        assert command.startswith(("kubectl --context kind-kennel ", "kubectl >/dev/null", "kubectl: https")), command


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_missing_is_named_with_a_way_to_get_it(target: str, tmp_path: Path) -> None:
    for tool in ("sed", "date", "git", "awk"):
        if found := shutil.which(tool):
            (tmp_path / tool).symlink_to(found)
    assert "needs Docker: https://" in make(target, path=str(tmp_path)).stderr
    for tool, missing in (("docker", "kind 0.32 or later: https://"), ("kind", "kubectl: https://")):
        (tmp_path / tool).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / tool).chmod(0o755)
        result = make(target, path=str(tmp_path))
        assert result.returncode == 2
        assert f"needs {missing}" in result.stderr
