"""A cluster of whoever asks: KENNEL_URL, the base URL of its ingress, says that the current context may be changed.

    KENNEL_URL=http://127.0.0.1:8080 pytest tests/cluster

KENNEL_OVERLAY is the folder to apply, k8s/overlays/kind by default. What was in the namespace `kennel` is that
overlay again afterwards; where there was none it goes.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from cluster.kube import NAMESPACE, ROOT, Cluster, Overlays, Variant


def kubectl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["kubectl", *arguments], capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="session")
def url() -> str:
    """Skips where no cluster was meant or none is there."""
    if not os.environ.get("KENNEL_URL"):
        pytest.skip("KENNEL_URL is not set: the ingress of a cluster whose namespace `kennel` may be changed")
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not there, which applies the overlay")
    if (found := kubectl("config", "current-context")).returncode:
        pytest.skip(f"kubectl has no context: {found.stderr.strip()}")
    if (found := kubectl("get", "--raw", "/readyz", "--request-timeout=10s")).returncode:
        pytest.skip(f"the context's API server does not answer: {found.stderr.strip()[-200:]}")
    return os.environ["KENNEL_URL"]


@pytest.fixture(scope="session")
def cluster(url: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Two of each tier serve the tiny bundle."""
    context = kubectl("config", "current-context").stdout.strip()
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    reporter.write_line(f"\ncontext {context}, namespace {NAMESPACE}, ingress {url}")
    folder = tmp_path_factory.mktemp("cluster")
    kubeconfig = folder / "kubeconfig"
    kubeconfig.touch(mode=0o600)
    # This context alone, so that nothing below follows when the current one changes.
    kubeconfig.write_text(kubectl("config", "view", "--minify", "--flatten", "--raw", f"--context={context}").stdout)
    overlay = (ROOT / os.environ.get("KENNEL_OVERLAY", "k8s/overlays/kind")).resolve()
    cluster = Cluster(kubeconfig, url, Overlays(folder, overlay))
    was_there = bool(cluster.kubectl("get", "namespace", NAMESPACE, "--ignore-not-found", "-o", "name"))
    try:
        cluster.deploy(Variant())
        cluster.wait(f"an answer at {url}", 120, lambda: cluster.ask("red"))
        yield cluster
    finally:
        cluster.restore(was_there)


@pytest.fixture
def serving(cluster: Cluster) -> Cluster:
    """As it was in the beginning, whatever the test before left."""
    cluster.deploy(Variant())
    return cluster


@pytest.fixture(scope="session")
def metrics_api(url: str) -> None:
    if (found := kubectl("get", "--raw", "/apis/metrics.k8s.io/v1beta1/nodes")).returncode:
        pytest.skip(f"no metrics API, which the HPA asks for CPU: {found.stderr.strip()[-200:]}")
