"""What Prometheus reads from both parts, and that the dashboard and the autoscaler ask for nothing else."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import requests
import yaml
from tiny import picture

from local.processes import ROOT

COMPONENTS = ROOT / "k8s" / "components"
# What a cluster adds: kube-state-metrics' names, and the labels of whoever scrapes.
KUBE_STATE = {
    "kube_deployment_status_replicas_ready": {"deployment"},
    "kube_horizontalpodautoscaler_status_desired_replicas": {"horizontalpodautoscaler"},
}
SCRAPED = {"namespace", "pod"}


def samples(address):
    """[(name, labels, value)] of one exposition, as Prometheus names them: its client library renames counters."""
    lines = re.findall(r"^(\w+)(?:\{(.*)\})? (\S+)$", requests.get(address, timeout=5).text, re.MULTILINE)
    return [(name, dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)) for name, labels, value in lines]


@pytest.fixture(scope="module")
def model_server_metrics(gateway):
    port = psutil.Process(gateway.running.model_server.pid).environ()["METRICS_PORT"]
    return f"http://127.0.0.1:{port}/metrics"


@pytest.fixture(scope="module")
def calls_and_batches(gateway, model_server_metrics):
    """How many calls, pictures and batches the tiny model got for 64 pictures, 16 at a time."""

    def count(name, label):
        return sum(v for n, labels, v in samples(model_server_metrics) if (n, labels.get(label)) == (name, "tiny"))

    def all_three():
        ours = [count(name, "ModelName") for name in ("kennel_pictures", "kennel_batches")]
        return count("ts_inference_requests_total", "model_name"), *ours

    def told():
        """Once nothing more comes of what was asked before: the counts of batches are told once a second."""
        before, deadline = None, time.monotonic() + 30
        while (now := all_three()) != before:
            assert time.monotonic() < deadline, now
            before = now
            time.sleep(2)
        return now

    before = told()
    with ThreadPoolExecutor(16) as clients:
        url = f"{gateway.url}/predict?model=tiny"
        answers = list(
            clients.map(lambda _: requests.post(url, data=picture("red"), timeout=10).status_code, range(64))
        )
    assert answers == [200] * 64
    return [after - earlier for after, earlier in zip(told(), before, strict=True)]


def test_the_model_server_counts_its_batches(calls_and_batches):
    """So pictures / batches is the size of a batch."""
    calls, pictures, batches = calls_and_batches
    assert pictures == 64
    assert 64 / 8 <= calls <= 64 + 1  # one that asks for the manifest
    assert 1 <= batches <= calls


@pytest.mark.usefixtures("calls_and_batches")
def test_the_dashboard_asks_for_what_is_there(gateway, model_server_metrics):
    exposed = {name: set(labels) for name, labels in KUBE_STATE.items()}
    for name, labels, _ in samples(f"{gateway.url}/metrics") + samples(model_server_metrics):
        exposed.setdefault(name, set()).update(labels)
    dashboard = json.loads((COMPONENTS / "grafana" / "dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(queries) > 10
    for query in queries:
        names = metrics(query)
        assert names, query
        assert names <= exposed.keys(), query
        assert labels_of(query) <= SCRAPED.union(*(exposed[name] for name in names)), query


@pytest.mark.usefixtures("calls_and_batches")
def test_the_autoscaler_asks_for_what_is_there(gateway):
    exposed = {name for name, _, _ in samples(f"{gateway.url}/metrics")}
    (patch,) = yaml.safe_load((COMPONENTS / "hpa-queue" / "kustomization.yaml").read_text())["patches"]
    ((operation,)) = yaml.safe_load(patch["patch"])
    wanted = operation["value"][0]["external"]["metric"]["name"]
    assert wanted in exposed
    rules = yaml.safe_load((COMPONENTS / "hpa-queue" / "prometheus-adapter.yaml").read_text())["rules"]
    assert [(rule["name"]["as"], metrics(rule["seriesQuery"])) for rule in rules["external"]] == [(wanted, {wanted})]


def metrics(query: str) -> set[str]:
    """The names of series in a query: what is neither a label, a function nor a number."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(by|without) \([^)]*\)", " ", query)
    return set(re.findall(r"\b[A-Za-z_]\w*\b(?!\s*\()", bare))


def labels_of(query: str) -> set[str]:
    matched = re.findall(r"[{,] ?(\w+)(?==|!=|=~|!~)", query)
    grouped = re.findall(r"\bby \(([^)]*)\)", query)
    return {*matched, *(name for group in grouped for name in re.split(r", ?", group))}
