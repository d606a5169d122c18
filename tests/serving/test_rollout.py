"""Another model takes over behind a running gateway: every answer is named by who gave it."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from load import Load
from servers import model_server, wait_ready, wait_up
from tiny import COLOURS, NAMES, misnamed, picture, two_versions

from bundle import manifest, wire
from gateway.client import Client
from local import processes

SIDE_BY_SIDE_SECONDS = 60


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """One model in two versions: other classes and another input size."""
    folder = tmp_path_factory.mktemp("versions")
    two_versions(folder)
    return folder


def ask(url):
    def call(session, count):
        colour = list(COLOURS)[count % 3]
        return session.post(f"{url}/predict", data=picture(colour), headers={"X-Request-Id": colour}, timeout=10)

    return call


def check_named_by_who_answered(calls) -> Counter[str]:
    """Every call was answered, with the name that the answering version gives that colour."""
    for call in calls:
        assert call.status == 200, call
    assert not misnamed(calls), misnamed(calls)[:3]
    return Counter(call.body["version"] for call in calls)


def test_two_versions_side_by_side_then_the_old_one_leaves(versions, tmp_path):
    """Both behind one round-robin address, as in a rollout; then the first drains."""
    old_port, new_port, port = processes.free_ports(3)
    log = tmp_path / "log"
    target = f"ipv4:127.0.0.1:{old_port},127.0.0.1:{new_port}"
    with (
        model_server(tmp_path / "new", new_port, log, versions / "2"),
        model_server(tmp_path / "old", old_port, log, versions / "1") as old,
        log.open("ab") as output,
    ):
        for each in (old_port, new_port):
            wait_answer(each)
        gateway = processes.start_gateway(["tiny"], target, port, output)
        url = f"http://127.0.0.1:{port}"
        try:
            wait_up(url)
            wait_ready(url)
            with Load(8, ask(url)) as load:
                time.sleep(SIDE_BY_SIDE_SECONDS)
                side_by_side = time.monotonic()
                old.terminate()
                assert old.wait(30) == 0
                drained = time.monotonic()
                load.wait_for(200, 100, 20)
            both = check_named_by_who_answered([call for call in load.calls if call.at < side_by_side])
            check_named_by_who_answered(load.calls)
            after = check_named_by_who_answered([call for call in load.calls if call.at - call.seconds > drained])
            print(f"side by side for {SIDE_BY_SIDE_SECONDS} s: {dict(both)}; after the old one left: {dict(after)}")
            assert min(both["1"], both["2"]) > 0.35 * both.total()
            assert set(after) == {"2"}
        finally:
            processes.end(gateway)


def test_a_new_version_replaces_the_old_one_at_the_same_address(versions, tmp_path):
    grpc_port, port = processes.free_ports(2)
    log = tmp_path / "log"
    url = f"http://127.0.0.1:{port}"
    with log.open("ab") as output:
        gateway = processes.start_gateway(["tiny"], f"127.0.0.1:{grpc_port}", port, output)
        try:
            wait_up(url)
            for version in ("1", "2", "1"):
                with model_server(tmp_path / version, grpc_port, log, versions / version):
                    wait_answer(grpc_port)
                    deadline = time.monotonic() + 10  # the gateway finds the address again
                    while not (answer := requests.post(f"{url}/predict", data=picture("green"))).ok:
                        assert time.monotonic() < deadline, answer.text
                        time.sleep(0.1)
                    assert (answer.json()["version"], answer.json()["label"]) == (version, NAMES[version]["green"])
                    assert requests.get(f"{url}/v1/models/tiny").json()["classes"] == list(NAMES[version].values())
        finally:
            processes.end(gateway)


def test_one_poisoned_item_in_a_batch_fails_alone(versions, tmp_path, monkeypatch):
    """Sixteen calls at once to a worker that takes up eight together; every fourth one is of a wrong length."""
    monkeypatch.setenv("BATCH_SIZE", "8")
    monkeypatch.setenv("WORKERS", "1")
    contract = manifest.read(versions / "1")
    (port,) = processes.free_ports(1)
    client = Client(f"127.0.0.1:{port}", 32)
    good = contract.input.check_pixels().tobytes()

    def call(i):
        data = good[: -1 if i % 4 == 0 else None]
        entries = wire.request({contract.input.contract: data}, [contract.digest])
        return wire.unpack(client.predictions("tiny", entries, time.monotonic() + 10)[0])

    with model_server(tmp_path / "store", port, tmp_path / "log", versions / "1"), ThreadPoolExecutor(16) as pool:
        wait_answer(port)
        rounds = [list(pool.map(call, range(16))) for _ in range(5)]
    for answers in rounds:
        assert [answer.status for answer in answers] == ["error", "ok", "ok", "ok"] * 4
    taken_up = Counter(answer.seconds for answers in rounds for answer in answers)
    assert max(taken_up.values()) > 2, "the calls came one by one"


def wait_answer(grpc_port: int) -> None:
    """Until the server at this port itself answers for its model."""
    client, deadline = Client(f"127.0.0.1:{grpc_port}", 1), time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            client.predictions("tiny", wire.request({}, []), time.monotonic() + 1)
            return
        except Exception:  # not there yet: the deadline says when that is a failure
            time.sleep(0.1)
    raise AssertionError(f"no model server answers at port {grpc_port}")
