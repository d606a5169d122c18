"""The model server dies, in part or whole, under a steady load; a bundle is damaged."""

import contextlib
import os
import signal
import threading
import time
import zipfile
from collections.abc import Iterator

import psutil
import pytest
import requests
from load import Load
from servers import gone, model_server, workers
from tiny import DAMAGES, picture, tiny_bundle

from local import processes


@pytest.fixture(scope="module")
def fragile(tmp_path_factory):
    """A gateway whose model server the tests kill and start: yields (url, start)."""
    folder = tmp_path_factory.mktemp("fragile")
    tiny_bundle(folder / "tiny")
    port, grpc_port = processes.free_ports(2)
    log = folder / "log"

    def start():
        return model_server(folder / "store", grpc_port, log, folder / "tiny")

    with log.open("ab") as output:
        gateway = processes.start_gateway(["tiny"], f"127.0.0.1:{grpc_port}", port, output)
        try:
            yield f"http://127.0.0.1:{port}", start
        finally:
            processes.end(gateway)


def load_of(url: str) -> Load:
    return Load(8, lambda session, _: session.post(f"{url}/predict", data=picture("blue"), timeout=10))


def check(calls) -> None:
    """Every call ended in time: right, or refused with when to come back."""
    for call in calls:
        assert call.status in (200, 503), call
        assert call.seconds < 2, call
        if call.status == 200:
            assert call.body["label"] == "blue"
        else:
            assert int(call.retry_after) >= 1


@contextlib.contextmanager
def killing(server) -> Iterator[None]:
    """Kills all workers, and those that come in their place."""

    def kill() -> None:
        while not over.wait(0.02):
            for process in workers(server):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    over = threading.Event()
    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def wait_ready(url: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if requests.post(f"{url}/predict", data=picture("red"), timeout=5).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(0.1)
    raise AssertionError("not ready")


def wait_for_all_workers(server, seconds: float = 60) -> list[psutil.Process]:
    """Until each of the server's workers, and not only the first, has loaded the model."""
    port = psutil.Process(server.pid).environ()["MANAGEMENT_PORT"]
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        (version,) = requests.get(f"http://127.0.0.1:{port}/models/tiny", timeout=5).json()
        if all(worker["status"] == "READY" for worker in version["workers"]):
            return workers(server)
        time.sleep(0.1)
    raise AssertionError(f"workers are not ready: {version['workers']}")


def test_a_killed_worker_a_killed_server_and_back_without_a_gateway_restart(fragile):
    url, start = fragile
    with start() as server:
        wait_ready(url)
        with load_of(url) as load:
            load.wait_for(200, 100, 30)

            with killing(server):  # new ones too, which might answer the rest before so many are refused
                refused = load.wait_for(503, 8, 2)
            back = load.wait_for(200, 100, 60)
            print(f"all workers killed: first refusals after {refused:.2f} s, answers again after {back:.1f} s")

            family = psutil.Process(server.pid).children(recursive=True)
            os.killpg(server.pid, signal.SIGKILL)
            refused = load.wait_for(503, 8, 2)
            assert gone(family), "processes outlived the start program"
            with start():
                back = load.wait_for(200, 100, 60)
                print(f"server killed: first refusals after {refused:.2f} s, answers again after {back:.1f} s")
        check(load.calls)


def test_one_killed_worker_of_two_is_hardly_noticed(fragile):
    url, start = fragile
    with start() as server:
        wait_ready(url)
        family = wait_for_all_workers(server)
        if len(family) < 2:
            pytest.skip("one CPU: one worker")
        with load_of(url) as load:
            load.wait_for(200, 100, 30)
            family[0].kill()
            time.sleep(3)
        check(load.calls)
        refused = [call for call in load.calls if call.status == 503]
        assert len(refused) <= 8, "more than the batch that was on the killed worker"


def test_callers_that_hang_up_in_the_middle_leave_the_workers_alone(fragile):
    url, start = fragile
    with start() as server:
        wait_ready(url)
        before = {process.pid for process in workers(server)}

        def impatient(session, _):
            return session.post(f"{url}/predict", data=picture("blue", 3000, 2000), timeout=0.02)

        with Load(16, impatient) as load:
            time.sleep(4)
        assert any(call.status == 0 for call in load.calls)
        wait_ready(url, 5)
        assert {process.pid for process in workers(server)} == before


def test_sigterm_answers_what_is_there_and_leaves_no_process(fragile):
    url, start = fragile
    with start() as server:
        wait_ready(url)
        family = psutil.Process(server.pid).children(recursive=True)
        with load_of(url) as load:
            load.wait_for(200, 50, 30)
            server.terminate()
            assert server.wait(30) == 0
        check(load.calls)
        assert gone(family)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bundle_never_becomes_ready_and_the_log_says_why(damage, tmp_path):
    """Damaged after it was archived: the handler is the last to look."""
    tiny_bundle(tmp_path / "tiny")
    port, grpc_port = processes.free_ports(2)
    log = tmp_path / "log"
    with model_server(tmp_path / "good", grpc_port, log, tmp_path / "tiny"):
        pass  # only to have the archive
    reason = damage(tmp_path / "tiny")
    mar = tmp_path / "store" / "tiny.mar"
    mar.parent.mkdir()
    with zipfile.ZipFile(tmp_path / "good" / "tiny.mar") as good, zipfile.ZipFile(mar, "w") as bad:
        for name in good.namelist():
            path = tmp_path / "tiny" / name
            bad.writestr(name, path.read_bytes() if path.exists() else good.read(name))
    with log.open("ab") as output:
        server = processes.start_model_server(mar.parent, grpc_port, output)
        gateway = processes.start_gateway(["tiny"], f"127.0.0.1:{grpc_port}", port, output)
        try:
            deadline = time.monotonic() + 60
            while f"tiny: refused: {reason}" not in log.read_text() and time.monotonic() < deadline:
                time.sleep(0.2)
            assert f"tiny: refused: {reason}" in log.read_text()
            answer = requests.get(f"http://127.0.0.1:{port}/readyz", timeout=10)
            assert answer.status_code == 503
            assert requests.get(f"http://127.0.0.1:{port}/healthz", timeout=10).ok
        finally:
            processes.end(gateway)
            processes.end(server)
