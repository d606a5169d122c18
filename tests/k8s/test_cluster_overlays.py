"""What tests/cluster applies and how it judges what it sees, without a cluster."""

from types import SimpleNamespace as Object

import kubernetes_validate
import pytest
from cluster.kube import BROKEN, TARGET, Overlays, Variant, complaints, fair, settled, shares
from cluster.kube import termination_messages as messages
from containers import total
from load import Call
from manifests import K8S, Combination, Rendered, Tree, kustomize, parse, pod

VARIANTS = [Variant(), Variant("2"), Variant("wrong", deadline=30), Variant(scaling=True)]
MOST = 256 << 10  # bytes of an object that kubectl apply can note in an annotation of it


@pytest.fixture(scope="module", params=["kind", "gke"])
def overlays(request, tree: Tree, tmp_path_factory) -> Overlays:
    folder = tree.add(Combination(request.param), f"for-cluster-{request.param}")
    return Overlays(tmp_path_factory.mktemp("overlays"), folder)


@pytest.fixture(params=VARIANTS, ids=str)
def variant(request) -> Variant:
    return request.param


@pytest.fixture
def rendered(overlays: Overlays, variant: Variant) -> Rendered:
    return Rendered(str(variant), [parse(text) for text in kustomize(overlays.write(variant)).split("\n---\n")])


def test_is_valid_and_small_enough_to_apply(rendered):
    for one in rendered.objects:
        if ".gke.io/" not in one["apiVersion"] and "cloud.google.com/" not in one["apiVersion"]:
            kubernetes_validate.validate(one, "1.36", strict=True)
        assert len(str(one)) < MOST / 2, one["metadata"]["name"]


def test_only_adds_the_bundles_and_names_the_model(rendered, variant, overlays):
    server, gateway = (rendered.get("Deployment", name) for name in ("model-server", "gateway"))
    fetch = pod(server)["initContainers"][0]
    assert rendered.settings(fetch)["MODEL_URI"] == f"file:///bundles/{variant.bundle}"
    assert rendered.settings(pod(gateway)["containers"][0])["MODELS"] == "tiny"
    volumes = {one["name"]: one["configMap"]["name"] for one in pod(server)["volumes"] if "configMap" in one}
    mounts = {one["mountPath"]: volumes[one["name"]] for one in fetch["volumeMounts"] if one["name"] in volumes}
    assert mounts.keys() == {f"/bundles/{name}" for name in ("1", "2", *BROKEN)}
    for config in mounts.values():
        files = rendered.get("ConfigMap", config)
        assert {*files.get("data", {}), *files.get("binaryData", {})} == {"manifest.json", "model.onnx", "golden.npz"}
    plain = [parse(text) for text in kustomize(overlays.plain).split("\n---\n")]
    added = {one["metadata"]["name"] for one in rendered.objects if "kennel/test" in one["metadata"].get("labels", {})}
    there = {one["metadata"]["name"] for one in plain}
    assert {one["metadata"]["name"] for one in rendered.objects} - there <= added
    assert not added & there, "what the tests remove afterwards"


def test_scales_only_where_that_is_tested(rendered, variant):
    bounds = {
        one["metadata"]["name"]: (one["spec"]["minReplicas"], one["spec"]["maxReplicas"])
        for one in rendered.kind("HorizontalPodAutoscaler")
    }
    assert bounds == {"gateway": (2, 2), "model-server": (1, 3) if variant.scaling else (2, 2)}
    if variant.scaling:
        [metric] = rendered.get("HorizontalPodAutoscaler", "model-server")["spec"]["metrics"]
        assert metric["containerResource"]["target"]["averageValue"] == TARGET
    deadline = rendered.get("Deployment", "model-server")["spec"]["progressDeadlineSeconds"]
    assert (deadline == variant.deadline) == bool(variant.deadline)


def test_refuses_what_is_no_overlay(tmp_path):
    with pytest.raises(AssertionError, match="is no folder in overlays/"):
        Overlays(tmp_path, K8S / "base")


def call(status: int = 200, asked: str = "red", label: str = "red", version: str = "1") -> Call:
    return Call(0, 0, status, None, {"label": label, "version": version}, asked)


@pytest.mark.parametrize(
    ("calls", "versions", "says"),
    [
        ([call(), call(label="rouge", version="2")], "12", ""),
        ([call(), call(status=503)], "1", "1 of 2 calls failed"),
        ([call(status=0)], "1", "1 of 1 calls failed"),
        ([call(label="green")], "1", "1 of 1 answers are wrong"),
        ([call(label="rouge")], "1", "1 of 1 answers are wrong"),
        ([call()], "12", "versions ['1'] answered"),
        ([call(), call(label="rouge", version="2")], "1", "versions ['1', '2'] answered"),
    ],
)
def test_calls_are_judged(calls, versions, says):
    found = complaints(calls, tuple(versions))
    assert found == "" if not says else found.startswith(says)


def test_shares_are_of_the_same_pods():
    before = {"a": 10.0, "b": 0.0, "c": 5.0}
    assert shares(before, {"a": 20.0, "b": 10.0, "c": 15.0}) == {"a": 1, "b": 1, "c": 1}
    assert fair(shares(before, {"a": 20.0, "b": 9.0, "c": 16.0}))
    assert not fair(shares(before, {"a": 20.0, "b": 8.0, "c": 17.0}))
    assert not fair(shares(before, before)), "nobody was called"
    assert not fair(shares(before, {"a": 20.0, "b": 10.0, "d": 15.0})), "one went, another came"


def test_series_are_summed():
    assert total('# TYPE a counter\na{m="x"} 2.0\na{m="y"} 3.0\nab 9\na 1\n', "a") == 6


def test_a_deployment_is_settled_once_nothing_else_is_there():
    def deployment(generation=2, **changed):
        counts = {"replicas": 2, "updated_replicas": 2, "available_replicas": 2, "observed_generation": 2} | changed
        return Object(metadata=Object(generation=generation), spec=Object(replicas=2), status=Object(**counts))

    stays, leaves = (Object(metadata=Object(deletion_timestamp=at)) for at in (None, "2026-11-22T00:00:00Z"))
    assert settled(deployment(), [stays, stays], 2)
    assert not settled(deployment(), [stays, stays], 3)
    assert not settled(deployment(generation=3), [stays, stays], 2)
    assert not settled(deployment(updated_replicas=1), [stays, stays], 2)
    assert not settled(deployment(available_replicas=None), [stays, stays], 2)
    assert not settled(deployment(), [stays, leaves], 2)
    assert not settled(deployment(), [stays, stays, leaves], 2)


def test_termination_messages_are_found_in_every_container():
    def status(now="", last=""):
        return Object(
            state=Object(terminated=now and Object(message=now)),
            last_state=Object(terminated=last and Object(message=last)),
        )

    pods = [
        Object(status=Object(init_container_statuses=[status(last="fetch: altered")], container_statuses=[status()])),
        Object(status=Object(init_container_statuses=None, container_statuses=[status(now="killed")])),
    ]
    assert messages(pods) == ["fetch: altered", "killed"]
