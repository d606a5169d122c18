"""The component that is written is a component: of base, of the overlays, beside the others."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from k8s.test_manifests import CHECKS, check_schema
from manifests import K8S, Combination, Rendered, Tree, kustomize, parse, pod
from replicas import GATEWAY, MEASURED

from capacity import component
from capacity import manifests as read_manifests
from capacity.hpa import Policy, Rules
from capacity.manifests import amount, read

TARGETS = {"gateway": 51, "model-server": 55}


@pytest.fixture(scope="module")
def render(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Rendered]:
    """A copy of k8s/ that has it, as `make calibrate` would have left it there."""
    tree = Tree(tmp_path_factory.mktemp("calibrated"))
    base = read(read_manifests.render(K8S / "base"))
    component.write(tree.folder / "k8s" / "components" / "calibrated", MEASURED, base, TARGETS)
    made = {}

    def render(overlay: str = "", *components: str) -> Rendered:
        wanted = Combination(overlay, components)
        if wanted not in made:
            folder = tree.add(wanted, f"combination-{len(made)}")
            made[wanted] = Rendered(str(wanted), [parse(text) for text in kustomize(folder).split("\n---\n")])
        return made[wanted]

    return render


COMBINATIONS = [
    ("", "calibrated"),
    ("kind", "calibrated"),
    ("gke", "calibrated"),
    ("", "canary", "calibrated"),
    ("", "calibrated", "api-key", "monitoring", "remote-model", "tls"),
]


@pytest.mark.parametrize("combination", COMBINATIONS, ids=" + ".join)
def test_passes_what_every_combination_passes(render, combination):
    rendered = render(*combination)
    assert not [fault for check in CHECKS for fault in check(rendered)]
    for one in rendered.objects:
        check_schema(one)


@pytest.mark.parametrize("overlay", ["", "gke"])
def test_says_what_was_measured(render, overlay):
    rendered = render(overlay, "calibrated")
    for tier, requests, limit in (("gateway", "384Mi", "1024Mi"), ("model-server", "384Mi", "1536Mi")):
        resources = pod(rendered.get("Deployment", tier))["containers"][0]["resources"]
        assert (resources["requests"]["cpu"], resources["requests"]["memory"]) == ("1", requests)
        assert (resources["limits"]["cpu"], resources["limits"]["memory"]) == ("1", limit)
        assert "ephemeral-storage" in resources["limits"], "the rest is as it was"
        [metric] = rendered.get("HorizontalPodAutoscaler", tier)["spec"]["metrics"]
        source = metric["resource"] if tier == "gateway" else metric["containerResource"]
        assert source["target"] == {"type": "Utilization", "averageUtilization": TARGETS[tier]}
        assert source.get("container", "gateway") == tier


def test_on_kind_the_overlay_s_own_small_requests_stay(render):
    """An overlay's patches come after those of its components: percent there are of other requests."""
    resources = pod(render("kind", "calibrated").get("Deployment", "gateway"))["containers"][0]["resources"]
    assert (resources["requests"]["cpu"], resources["limits"]["memory"]) == ("200m", "1024Mi")


def test_a_canary_is_as_large(render):
    canary = pod(render("", "canary", "calibrated").get("Deployment", "model-server-canary"))
    assert canary["containers"][0]["resources"]["requests"]["memory"] == "384Mi"


@pytest.mark.parametrize(
    ("order", "kind"), [("hpa-queue calibrated", "ContainerResource"), ("calibrated hpa-queue", "External")]
)
def test_beside_hpa_queue_the_last_one_says_by_what_it_scales(render, order, kind):
    [metric] = render("", *order.split()).get("HorizontalPodAutoscaler", "model-server")["spec"]["metrics"]
    assert metric["type"] == kind


def test_memory_follows_the_measurement_but_no_limit_falls_below_base_s():
    [gateway, _] = read(read_manifests.render(K8S / "base"))
    assert component.memory(gateway, dataclasses.replace(GATEWAY, memory_mb=300)) == (384, 1024)
    assert component.memory(gateway, dataclasses.replace(GATEWAY, memory_mb=1000)) == (1216, 1440)


def test_the_comments_say_where_and_how_it_was_measured():
    text = component.text(MEASURED, read(read_manifests.render(K8S / "base")), TARGETS)
    comments = "\n".join(line for line in text.splitlines() if line.lstrip().startswith("#"))
    for part in (
        "A <fast> one",
        "0123456789ab",
        "2026-11-25",
        "onnxruntime 1.31.1",
        "abababababab",
        "300 ms",
        "198 images/s",
    ):
        assert part in comments, part
    assert max(map(len, text.splitlines())) <= 120
    assert yaml.safe_load(text)["kind"] == "Component"


def test_a_folder_with_something_else_stays(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="holds something that `make calibrate` did not write"):
        component.check(tmp_path)
    component.check(tmp_path / "new")
    made = tmp_path / "made"
    base = read(read_manifests.render(K8S / "base"))
    for _ in range(2):
        component.check(made)
        component.write(made, MEASURED, base, TARGETS)
    assert sorted(path.name for path in made.iterdir()) == ["kustomization.yaml", "measured.json"]


def test_manifests_are_read_as_kubernetes_would():
    gateway, server = read(read_manifests.render(K8S / "overlays" / "kind"))
    assert (gateway.request, gateway.limit, gateway.memory_request) == (0.2, 1.0, 256 * 2**20)
    assert (server.container, server.leaves, server.probe) == ("model-server", 15, 2)
    assert server.settings["MODEL_URI"].startswith("file:")
    scaling = gateway.scaling
    assert (scaling.least, scaling.most, scaling.utilization, scaling.value) == (2, 3, 70, 0)
    assert scaling.up == Rules(0, (Policy("Percent", 100, 30), Policy("Pods", 2, 30)))
    assert scaling.down == Rules(60, (Policy("Pods", 1, 60),))


def test_what_a_manifest_leaves_out_is_kubernetes_default():
    objects = read_manifests.render(K8S / "base")
    for one in objects:
        if one["kind"] == "HorizontalPodAutoscaler":
            del one["spec"]["behavior"], one["spec"]["minReplicas"]
            source = one["spec"]["metrics"][0]
            (source.get("resource") or source["containerResource"])["target"] = {
                "type": "AverageValue",
                "averageValue": "120m",
            }
    scaling = read(objects)[0].scaling
    assert (scaling.least, scaling.value, scaling.utilization, scaling.down.window) == (1, 120, 0, 300)
    assert set(scaling.up.policies) == {Policy("Pods", 4, 15), Policy("Percent", 100, 15)}


def test_what_does_not_scale_by_cpu_is_named(render):
    with pytest.raises(SystemExit, match="model-server scales by External: only CPU is simulated"):
        read(render("", "hpa-queue").objects)
    with pytest.raises(SystemExit, match="have no Deployment gateway"):
        read([])


def test_a_folder_that_is_no_kustomization_is_named(tmp_path: Path):
    with pytest.raises(SystemExit, match=f"{tmp_path} cannot be rendered"):
        read_manifests.render(tmp_path)


@pytest.mark.parametrize(("text", "value"), [("200m", 0.2), ("1.5", 1.5), (2, 2), ("512Mi", 2**29), ("1G", 1e9)])
def test_quantities(text, value):
    assert amount(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["much", "1Zi", ""])
def test_no_quantities(text):
    with pytest.raises(SystemExit, match="is no quantity"):
        amount(text)
