"""What the worker does with connections itself: it sees whether a request is here whole, and refuses by itself."""

import ctypes
import os
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import psutil
import pytest
import requests
from servers import wait_ready, wait_up
from tiny import picture

from gateway.__main__ import TUNABLES
from gateway.turn import turn
from gateway.worker import _whole
from local import processes

POST = b"POST /predict HTTP/1.1\r\nHost: kennel\r\n"


@pytest.mark.parametrize(
    ("sent", "whole"),
    [
        (b"GET / HTTP/1.1\r\nHost: kennel\r\n\r\n", True),
        (POST + b"Content-Length: 5\r\n\r\nhello", True),
        (POST + b"content-length:5 \r\nAccept: */*\r\n\r\nhello", True),
        (POST + b"Content-Length: 5\r\n\r\nhelloGET / HTTP/1.1\r\n", True),  # and the next one has begun
        (POST + b"Content-Length: 200000\r\n\r\n" + bytes(200_000), True),
        (b"", False),
        (POST, False),
        (POST + b"Content-Length: 5\r\n\r\nhell", False),
        (POST + b"Content-Length: 200000\r\n\r\n" + bytes(199_999), False),
        (POST + b"X-Large: " + b"x" * 5000 + b"\r\n\r\n", False),  # more head than is looked at
        # What gunicorn may read otherwise than it is read here.
        (POST + b"Content-Length:\t5\r\n\r\n", False),
        (POST + b"Content-Length: 0\r\nContent-Length : 5\r\n\r\n", False),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", False),
    ],
)
def test_what_lies_in_the_socket(sent, whole, monkeypatch):
    monkeypatch.setattr(turn, "_until", time.monotonic() + 60)  # there are refusals
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        theirs.sendall(sent)
        assert _whole(ours) == (sent[: sent.index(b"\r\n\r\n") + 4] if whole else b"")
        monkeypatch.setattr(turn, "_until", 0.0)
        assert not _whole(ours)  # nobody need know
        theirs.close()
        got = b""
        while data := ours.recv(1 << 16):  # looking took nothing away
            got += data
        assert got == sent


@pytest.fixture
def started(torchserve, tiny, tmp_path):
    """Starts gateways of one process -> the gunicorn that started it, and its address."""

    def start(**settings):
        torchserve.models["tiny"] = tiny["1"]
        (port,) = processes.free_ports(1)
        ends.append(processes.start_gateway(["tiny"], torchserve.target, port, output, processes=1, **settings))
        url = f"http://127.0.0.1:{port}"
        wait_up(url)
        return ends[-1], url

    ends = []
    with (tmp_path / "log").open("ab") as output:
        yield start
        for process in ends:
            processes.end(process)


@pytest.fixture
def full(started, torchserve):
    """As `started`, a gateway with two places, both taken until `torchserve.hold` is set."""

    def start(**settings):
        process, url = started(in_flight=1, **settings)
        wait_ready(url)
        torchserve.hold.clear()
        ask = {"data": picture("red"), "timeout": 30, "headers": {"X-API-Key": "right"}}
        held.extend(threading.Thread(target=lambda: requests.post(f"{url}/predict", **ask)) for _ in range(2))
        for each in held:
            each.start()
        deadline = time.monotonic() + 20
        while "kennel_in_flight 2.0" not in requests.get(f"{url}/metrics", timeout=5).text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return process, url

    held = []
    yield start
    torchserve.hold.set()
    for each in held:
        each.join()


@pytest.mark.parametrize("size", [0, 40_000, 3_000_000])
def test_who_is_refused_has_the_answer_of_any_refusal_and_is_counted(full, size):
    _, url = full()
    answers = [
        requests.post(f"{url}/predict", data=bytes(size), headers={"X-Request-Id": f"me-{i}"}, timeout=5)
        for i in range(10)
    ]
    for i, answer in enumerate(answers):
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert answer.headers["X-Request-Id"] == answer.json()["request_id"] == f"me-{i}"
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert "try again soon" in answer.json()["detail"]
    time.sleep(0.5)
    assert 'kennel_requests_total{route="refused",status="503"} 10.0' in requests.get(f"{url}/metrics", timeout=5).text


@pytest.mark.parametrize("size", [0, 40_000])
def test_who_is_refused_with_a_request_that_is_here_whole_is_read_by_nobody_else(full, size):
    process, url = full()
    (worker,) = psutil.Process(process.pid).children()
    assert requests.post(f"{url}/predict", timeout=5).status_code == 503  # from here on there are turns, for a second
    worker.suspend()  # or it might accept a connection whose request is still on its way
    while worker.status() != psutil.STATUS_STOPPED:
        time.sleep(0.001)
    clients = [HTTPConnection("127.0.0.1", int(url.rpartition(":")[2]), timeout=5) for _ in range(10)]
    for client in clients:
        client.request("POST", "/predict", bytes(size))
    worker.resume()
    answers = [client.getresponse() for client in clients]
    assert [answer.status for answer in answers] == [503] * 10
    assert not any("Server" in answer.headers for answer in answers)  # gunicorn's own have it
    for each in [*answers, *clients]:
        each.close()


def test_who_is_refused_for_another_reason_is_told_that(full, tmp_path):
    (tmp_path / "keys").write_text("right\n")
    _, url = full(api_keys_file=tmp_path / "keys")
    found = [requests.post(f"{url}/predict", headers={"X-API-Key": key}, timeout=5) for key in ("right", "wrong") * 3]
    assert [answer.status_code for answer in found] == [503, 401] * 3


def test_probes_and_pages_are_there_under_overload(full):
    _, url = full()
    for _ in range(3):
        assert requests.post(f"{url}/predict", timeout=5).status_code == 503
        assert requests.get(f"{url}/healthz", timeout=5).ok
        assert requests.get(f"{url}/", timeout=5).ok
        assert requests.post(f"{url}/nowhere", timeout=5).status_code == 404


def test_all_threads_are_there_from_the_start(started):
    process, _ = started(threads=77)
    (worker,) = psutil.Process(process.pid).children()
    assert worker.num_threads() > 77


ALL_AT_ONCE = """
import ctypes, threading
libc, all_here = ctypes.CDLL(None), threading.Barrier(64)
libc.malloc.restype = libc.fdopen.restype = ctypes.c_void_p
def take():
    all_here.wait()
    for _ in range(100):
        libc.malloc(100_000)  # of libc's own: without Python's lock
threads = [threading.Thread(target=take) for _ in range(64)]
[each.start() for each in threads]
[each.join() for each in threads]
stream = libc.fdopen(1, b"w")
libc.malloc_info(0, ctypes.c_void_p(stream))
libc.fflush(ctypes.c_void_p(stream))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="glibc's")
def test_what_is_free_in_one_thread_serves_the_others(started):
    process, _ = started()
    (worker,) = psutil.Process(process.pid).children()
    environment = os.environ | {TUNABLES: worker.environ()[TUNABLES]}  # glibc cuts what it has read: arena_max is left
    told = subprocess.run([sys.executable, "-c", ALL_AT_ONCE], env=environment, capture_output=True, check=True)
    assert told.stdout.count(b"<heap nr=") == 1


def ask(url, *pieces):
    """What comes back for these bytes, sent with a pause between them, until the server closes."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as sock:
        threading.Thread(target=_send, args=(sock, pieces)).start()
        got = b""
        while data := sock.recv(1 << 16):
            got += data
        return got


def _send(sock, pieces):
    for piece in pieces:
        sock.sendall(piece)
        time.sleep(0.1)


def test_plain_and_other_requests_of_a_connection_are_answered_in_turn(started, torchserve, tiny):
    torchserve.models["tiny"] = tiny["1"]
    _, url = started()
    wait_ready(url)
    bodies = {colour: picture(colour) for colour in ("red", "green", "blue")}
    plainly = {colour: POST + b"Content-Length: %d\r\n\r\n" % len(body) + body for colour, body in bodies.items()}
    chunked = b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
    other = chunked % (len(bodies["blue"]), bodies["blue"])
    last = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    whole = plainly["red"] + plainly["green"] + other + plainly["red"] + last
    for pieces in ([whole], [whole[:10], whole[10:80], whole[80:]], [whole[:-60], whole[-60:]]):
        got = ask(url, *pieces)
        answers = got.split(b"HTTP/1.1 200 OK\r\n")
        labels = [re.search(rb'"label":"([a-z]+)"', each)[1] for each in answers[1:5]]
        assert labels == [b"red", b"green", b"blue", b"red"]
        assert len(answers) == 6
        assert b'{"status":"alive"}' in answers[5]


def test_half_a_body_is_said_and_nothing_more_is_read(started, torchserve, tiny):
    torchserve.models["tiny"] = tiny["1"]
    _, url = started()
    wait_ready(url)
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as sock:
        sock.sendall(POST + b"Content-Length: 5\r\n\r\nhel")
        sock.shutdown(socket.SHUT_WR)
        got = b""
        while data := sock.recv(1 << 16):
            got += data
    assert got.startswith(b"HTTP/1.1 400 ")
    assert b"the body ended before the length" in got
    assert got.count(b"HTTP/1.1 ") == 1


def test_a_gateway_that_ends_answers_what_it_has_read(started, torchserve):
    process, url = started()
    wait_ready(url)
    torchserve.hold.clear()
    with ThreadPoolExecutor(4) as clients:
        asked = [clients.submit(requests.post, f"{url}/predict", picture("red"), timeout=30) for _ in range(4)]
        while "kennel_in_flight 4.0" not in requests.get(f"{url}/metrics", timeout=5).text:
            time.sleep(0.05)
        process.terminate()
        time.sleep(0.5)
        torchserve.hold.set()
        assert [future.result().status_code for future in asked] == [200] * 4
    assert process.wait(10) == 0


def test_a_gateway_told_to_end_while_it_starts_ends(torchserve, tmp_path, monkeypatch):
    """SIGTERM comes when a worker process has been forked and has no way yet to take one."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, time\n"
        "os.register_at_fork(after_in_child=lambda: (os.kill(os.getppid(), signal.SIGTERM), time.sleep(1)))\n"
    )
    (port,) = processes.free_ports(1)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with (tmp_path / "log").open("wb") as output:
        process = processes.start_gateway(["tiny"], torchserve.target, port, output, processes=1)
        try:
            assert process.wait(15) == 0  # its grace is 25 seconds
        finally:
            processes.end(process)
    assert "Worker exiting" in (tmp_path / "log").read_text()
