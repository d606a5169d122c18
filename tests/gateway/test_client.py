"""The gRPC client against a real gRPC server."""

import socket
import subprocess
import sys
import threading
import time

import grpc
import pytest
from fake_torchserve import FakeTorchServe, Request

from gateway import errors
from gateway.client import Client, RetryBudget, encode, problem


def soon(seconds=5.0):
    return time.monotonic() + seconds


def nobody() -> str:
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


EXPECTED = {
    grpc.StatusCode.OK: (errors.BadAnswer, 502),
    grpc.StatusCode.CANCELLED: (errors.Unavailable, 503),
    grpc.StatusCode.UNKNOWN: (errors.BadAnswer, 502),
    grpc.StatusCode.INVALID_ARGUMENT: (errors.BadAnswer, 502),
    grpc.StatusCode.DEADLINE_EXCEEDED: (errors.TimedOut, 503),
    grpc.StatusCode.NOT_FOUND: (errors.BadAnswer, 502),
    grpc.StatusCode.ALREADY_EXISTS: (errors.BadAnswer, 502),
    grpc.StatusCode.PERMISSION_DENIED: (errors.BadAnswer, 502),
    grpc.StatusCode.UNAUTHENTICATED: (errors.BadAnswer, 502),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (errors.Overloaded, 503),
    grpc.StatusCode.FAILED_PRECONDITION: (errors.BadAnswer, 502),
    grpc.StatusCode.ABORTED: (errors.BadAnswer, 502),
    grpc.StatusCode.UNIMPLEMENTED: (errors.BadAnswer, 502),
    grpc.StatusCode.OUT_OF_RANGE: (errors.BadAnswer, 502),
    grpc.StatusCode.INTERNAL: (errors.BadAnswer, 502),
    grpc.StatusCode.UNAVAILABLE: (errors.ConnectionLost, 503),
    grpc.StatusCode.DATA_LOSS: (errors.BadAnswer, 502),
}


@pytest.mark.parametrize("code", grpc.StatusCode)
def test_every_status_code_has_an_error_of_ours(code):
    found = problem(code, "some words")
    assert (type(found), found.status) == EXPECTED[code]
    assert (found.retry_after is not None) == (found.status == 503)


# As TorchServe 0.12 words them.
@pytest.mark.parametrize(
    ("code", "details", "kind", "status"),
    [
        ("INTERNAL", 'Model "m" has no worker to serve inference request. Please use scale workers API to add workers.'
         "\nInternalServerException.()", errors.Overloaded, 503),
        ("INTERNAL", "Model not found: m\norg.pytorch.serve.archive", errors.Unavailable, 503),
        ("INTERNAL", "Worker died.\norg.pytorch.serve.http.InternalServerException", errors.Unavailable, 503),
        ("RESOURCE_EXHAUSTED", "Worker died.\norg.pytorch.serve.http.InternalServerException", errors.Unavailable, 503),
        ("UNAVAILABLE", "Prediction failed\norg.pytorch.serve.http.InternalServerException", errors.BadAnswer, 502),
        ("INTERNAL", "Received RST_STREAM with error code 8", errors.ConnectionLost, 503),
        ("RESOURCE_EXHAUSTED", "CLIENT: Sent message larger than max (7 vs. 6)", errors.BadAnswer, 502),
        ("UNAUTHENTICATED", "Token Authentication failed.", errors.BadAnswer, 502),
    ],
)  # fmt: skip
def test_what_torchserve_says_tells_apart_what_its_codes_do_not(code, details, kind, status):
    found = problem(grpc.StatusCode[code], details)
    assert (type(found), found.status) == (kind, status)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 2_097_152])
def test_a_request_is_what_protobuf_makes_of_it(size):
    whole = bytes(range(256)) * (size // 256) + bytes(size % 256)
    half = memoryview(whole)[: size // 2]
    found = Request.FromString(encode("dögs", {"known": b"", "pixels:c": whole, "parts": [half, whole[size // 2 :]]}))
    assert (found.model_name, dict(found.input)) == ("dögs", {"known": b"", "pixels:c": whole, "parts": whole})


def test_an_answer_and_the_request_id_travel(torchserve, tiny):
    torchserve.models["tiny"] = tiny["1"]
    assert Client(torchserve.target, 1).predictions("tiny", {}, soon(), "abc")[0]
    assert torchserve.metadata[0]["x-request-id"] == "abc"


def test_a_lost_connection_is_tried_once_more(torchserve, tiny):
    torchserve.models["tiny"] = tiny["1"]
    torchserve.fail = [(grpc.StatusCode.UNAVAILABLE, "connection reset")]
    retries = []
    client = Client(torchserve.target, 1, on_retry=lambda: retries.append(1))
    answer, seconds = client.predictions("tiny", {}, soon())
    assert answer
    assert seconds < 0.05  # the time between the two is not the model server's
    assert (len(torchserve.calls), len(retries)) == (2, 1)


def test_but_not_twice(torchserve, tiny):
    torchserve.models["tiny"] = tiny["1"]
    torchserve.fail = [(grpc.StatusCode.UNAVAILABLE, "connection reset")] * 3
    with pytest.raises(errors.Unavailable):
        Client(torchserve.target, 1).predictions("tiny", {}, soon())
    assert len(torchserve.calls) == 2


@pytest.mark.parametrize(
    ("code", "details"),
    [("INTERNAL", "Worker died."), ("UNAVAILABLE", "Prediction failed"), ("RESOURCE_EXHAUSTED", "busy")],
)
def test_what_the_server_answered_is_not_tried_again(torchserve, code, details):
    torchserve.fail = [(grpc.StatusCode[code], details)] * 2
    with pytest.raises(errors.Problem):
        Client(torchserve.target, 1).predictions("tiny", {}, soon())
    assert len(torchserve.calls) == 1


def test_an_outage_is_not_made_worse_by_retries(torchserve):
    torchserve.fail = [(grpc.StatusCode.UNAVAILABLE, "connection reset")] * 1000
    client = Client(torchserve.target, 1)
    for _ in range(100):
        with pytest.raises(errors.Unavailable):
            client.predictions("tiny", {}, soon())
    assert 100 + 10 <= len(torchserve.calls) <= 100 + 10 + 10  # ten saved up, and a tenth of a hundred


def test_a_budget_is_never_larger_than_ten_retries():
    budget = RetryBudget()
    for _ in range(1000):
        budget.earn()
    assert sum(budget.spend() for _ in range(50)) == 10


def test_nobody_there_is_told_at_once():
    started = time.monotonic()
    with pytest.raises(errors.Unavailable, match="cannot be reached"):
        Client(nobody(), 1).predictions("tiny", {}, soon())
    assert time.monotonic() - started < 1


def test_an_outage_leaves_no_thread_that_watches_for_its_end():
    client, before = Client(nobody(), 1), set(threading.enumerate())
    for _ in range(3):
        with pytest.raises(errors.Unavailable):
            client.predictions("tiny", {}, soon())
    deadline = soon(3)
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not set(threading.enumerate()) - before  # others' may end meanwhile


@pytest.mark.parametrize(("seconds", "deadline"), [(0.3, 5), (5, 0.3)])
def test_a_call_that_hangs_is_ended(torchserve, seconds, deadline):
    torchserve.hold.clear()
    started = time.monotonic()
    with pytest.raises(errors.TimedOut):
        Client(torchserve.target, 1).predictions("tiny", {}, soon(deadline), seconds=seconds)
    assert 0.25 < time.monotonic() - started < 1


def test_a_deadline_in_the_past_makes_no_call(torchserve):
    with pytest.raises(errors.TimedOut):
        Client(torchserve.target, 1).predictions("tiny", {}, soon(-1))
    assert not torchserve.calls


def test_more_calls_than_may_be_in_flight_are_refused_at_once(torchserve, tiny):
    torchserve.models["tiny"] = tiny["1"]
    torchserve.hold.clear()
    client = Client(torchserve.target, 3)
    threads = [threading.Thread(target=client.predictions, args=("tiny", {}, soon())) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(torchserve.calls) < 3:
        time.sleep(0.01)
    started = time.monotonic()
    with pytest.raises(errors.Overloaded):
        client.predictions("tiny", {}, soon())
    assert time.monotonic() - started < 0.1
    torchserve.hold.set()
    for thread in threads:
        thread.join()
    assert client.predictions("tiny", {}, soon())[0]  # and each gave its place back


def test_calls_go_round_over_every_address(tiny):
    servers = [FakeTorchServe(), FakeTorchServe(), FakeTorchServe()]
    for server in servers:
        server.models["tiny"] = tiny["1"]
    client = Client("ipv4:" + ",".join(server.target for server in servers), 4)
    for _ in range(60):
        client.predictions("tiny", {}, soon())
        time.sleep(0.005)
    assert min(len(server.calls) for server in servers) >= 12
    for server in servers:
        server.end()


def test_importing_the_gateway_opens_nothing_and_needs_no_torch():
    script = "import sys, gateway.app, threading; print('torch' in sys.modules, threading.active_count())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONPATH": "."})
    assert done.stdout.split() == ["False", "1"], done.stderr
