"""Model servers and gateways come, go, are replaced and killed under load: nobody gets a wrong answer or none.

What Kubernetes does to pods, done to containers of the same images with the manifests' limits, environment,
signals and drain times. Clients stand for the ingress: they know the gateways that are ready, and a gateway
that is to end is forgotten first (its preStop), as an endpoint is.
"""

import itertools
import shutil
import time

import pytest
import requests
from containers import Pod, Spec, docker, metric
from load import Load
from tiny import COLOURS, misnamed, picture, shorten_classes, two_versions

pytestmark = pytest.mark.slow
ANSWERS = 10_000


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    two_versions(folder)
    shutil.copytree(folder / "1", folder / "broken")
    shorten_classes(folder / "broken")
    folder.chmod(0o755)
    return folder


class Fleet:
    """Both tiers, changed one pod at a time as a rolling update with maxSurge 1 and maxUnavailable 0 does."""

    def __init__(self, network, bundles):
        self.network, self.bundles = network, bundles
        self.servers: list[Pod] = []
        self.gateways: list[Pod] = []
        self.urls: list[str] = []
        self.bundle = "1"

    def server(self) -> Pod:
        uri = f"file:///bundles/{self.bundle}"
        return Pod(Spec("model-server"), self.network, "-v", f"{self.bundles}:/bundles:ro", MODEL_URI=uri)

    def scale(self, count: int) -> None:
        new = [self.server() for _ in range(count - len(self.servers))]
        self.servers += [pod.wait() for pod in new]
        while len(self.servers) > count:
            self.end(self.servers.pop(0))

    def replace_servers(self) -> None:
        for old in list(self.servers):
            self.servers.append(self.server().wait())
            self.servers.remove(old)
            self.end(old)

    def add_gateway(self) -> None:
        pod = Pod(Spec("gateway"), self.network, MODELS="tiny")
        # It asks the model server by name, and so is on the network before it can be ready.
        pod.join()
        pod.wait_ready()
        self.gateways.append(pod)
        self.urls.append(pod.url(":8080"))

    def replace_gateways(self) -> None:
        for old in list(self.gateways):
            self.add_gateway()
            self.urls.remove(old.url(":8080"))
            time.sleep(old.spec.pre_stop)
            self.gateways.remove(old)
            self.end(old)

    @staticmethod
    def end(pod: Pod) -> None:
        words = pod.logs()
        assert pod.end() == 0, words

    def counts(self) -> list[float]:
        """Predictions that each model server was asked for so far."""
        return [metric(pod.url(":8092/metrics"), "ts_inference_requests_total") for pod in self.servers]

    def shares(self, seconds: float) -> list[float]:
        before = self.counts()
        time.sleep(seconds)
        found = [after - first for after, first in zip(self.counts(), before, strict=True)]
        return [one / sum(found) for one in found]


@pytest.fixture
def fleet(images, network, bundles):
    fleet = Fleet(network, bundles)
    try:
        fleet.scale(1)
        for _ in range(2):
            fleet.add_gateway()
        yield fleet
    finally:
        for pod in fleet.servers + fleet.gateways:
            print(f"--- {pod.name}\n{pod.logs(5)}")
            pod.remove()


def test_everything_that_a_cluster_does_loses_no_answer(fleet):
    turn = itertools.count()

    def ask(session: requests.Session, count: int) -> requests.Response:
        time.sleep(0.02)  # the two CPUs of a small machine carry the whole fleet and its starting JVMs
        colour = list(COLOURS)[count % 3]
        url = fleet.urls[next(turn) % len(fleet.urls)]
        return session.post(f"{url}/predict", data=picture(colour), headers={"X-Request-Id": colour}, timeout=10)

    with Load(8, ask) as load:

        def stage(what: str, *expected: str) -> None:
            """What was asked since the last stage ended well; `expected` versions answered."""
            calls = load.calls[stage.seen :]  # type: ignore[attr-defined]
            stage.seen += len(calls)  # type: ignore[attr-defined]
            failed = [call for call in calls if call.status != 200]
            assert not failed, (what, len(failed), failed[:3])
            assert not misnamed(calls), (what, misnamed(calls)[:3])
            assert {call.body["version"] for call in calls} == set(expected), what
            print(f"{what}: {len(calls)} answers")

        stage.seen = 0  # type: ignore[attr-defined]

        load.wait_for(200, 300, 60)
        stage("one server", "1")

        fleet.scale(3)
        check_shares(fleet)
        stage("three servers", "1")

        fleet.replace_servers()
        stage("the servers replaced", "1")

        fleet.replace_gateways()
        stage("the gateways replaced", "1")

        docker("kill", "--signal", "KILL", fleet.servers[0].name)
        fleet.servers.pop(0).remove()
        load.wait_for(200, 300, 60)
        stage("a server killed", "1")

        fleet.scale(1)
        load.wait_for(200, 300, 60)
        stage("one server again", "1")

        fleet.bundle = "broken"
        broken = fleet.server()
        try:
            with pytest.raises(AssertionError, match=r"manifest\.json: was altered"):
                broken.wait(20)
            assert not broken.state["State"]["Running"], "a bundle that is refused ends the container"
        finally:
            broken.remove()
        stage("a broken model beside it", "1")

        fleet.bundle = "2"
        fleet.replace_servers()
        load.wait_for(200, 300, 60)
        stage("another model", "1", "2")
        fleet.scale(2)
        check_shares(fleet)
        load.wait_for(200, max(0, ANSWERS - len(load.calls)), 300)
        stage("two servers of it", "2")
    print(f"{len(load.calls)} answers, none wrong, none lost")
    assert len(load.calls) >= ANSWERS


def check_shares(fleet: Fleet) -> None:
    """Within 30 s of being ready every server gets its share, to 15%."""
    ready, fair = time.monotonic(), 1 / len(fleet.servers)
    while True:
        shares = fleet.shares(5)
        print(f"shares: {', '.join(f'{share:.2f}' for share in shares)}")
        if all(abs(share - fair) <= 0.15 * fair for share in shares):
            return
        assert time.monotonic() - ready < 30, shares
