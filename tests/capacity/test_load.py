"""Poisson arrivals, and the two ways in which they become calls."""

import itertools
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import handler
import numpy as np
import pytest
from fake_torchserve import FakeTorchServe
from tiny import tiny_bundle

from bench import figures
from bench.load import TIMED_OUT, Generator
from capacity.load import Gateway, arrivals, knots
from local.processes import ROOT, environment


def test_arrivals_are_a_poisson_process_of_the_rate_that_is_asked_for():
    times = arrivals([(0, 200), (1000, 200)], seed=1)
    gaps = np.diff(times)
    assert len(times) == pytest.approx(200_000, rel=0.01)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.02), "exponential: as wide as its mean"
    counts = np.bincount(times.astype(int))
    assert counts.var() == pytest.approx(counts.mean(), rel=0.15)


def test_the_rate_follows_its_knots():
    times = arrivals([(0, 0), (100, 200), (200, 200), (201, 20), (300, 20)], seed=2)
    counts = np.histogram(times, [0, 50, 100, 200, 201, 300])[0]
    assert counts == pytest.approx([2500, 7500, 20_000, 110, 1980], rel=0.1)
    assert (np.diff(times) > 0).all()
    assert times.max() < 300


def test_the_same_seed_is_the_same_crowd():
    one, two, other = (arrivals([(0, 50), (10, 50)], seed) for seed in (3, 3, 4))
    assert np.array_equal(one, two)
    assert not np.array_equal(one[:100], other[:100])


@pytest.mark.parametrize("text", ["0:10", "5:1,5:2", "0:-1,5:1", "fast", "0:10,"])
def test_what_is_no_rate_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011  # argparse's own wish, without words
        knots(text)


def test_a_rate_is_read():
    assert knots("0:5,30:5,120:80.5") == [(0, 5), (30, 5), (120, 80.5)]


@pytest.fixture
def server():
    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/predict"
        server.shutdown()


def test_calls_come_when_they_are_due(server):
    times = arrivals([(0, 60), (1.5, 60)], seed=5)
    crowd = Generator(server, [b"picture"])
    crowd.at(times)
    assert sorted(row.due for row in crowd.rows) == pytest.approx(times.tolist())
    assert {row.status for row in crowd.rows} == {200}


def test_the_program_writes_bench_s_log(server, tmp_path: Path):
    body, log = tmp_path / "picture", tmp_path / "calls.tsv"
    body.write_bytes(b"picture")
    words = ["--http", server, "--bodies", str(body), "--rate", "0:40,1:40", "--log", str(log), "--say"]
    command = [sys.executable, "-m", "capacity.load", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    assert float(done.stdout) > 1e9
    assert figures.summary(figures.read(log), 1.0)["n"] == len(arrivals([(0, 40), (1, 40)], 0)) > 20


@pytest.fixture
def torchserve(tmp_path: Path):
    manifest = tiny_bundle(tmp_path / "tiny")
    fake = FakeTorchServe()
    fake.models["tiny"] = handler.Model(tmp_path / "tiny")
    yield fake, manifest
    fake.end()


def test_a_model_server_is_called_as_a_gateway_calls_it(torchserve):
    fake, manifest = torchserve
    gateway = Gateway(fake.target, manifest)
    times = arrivals([(0, 40), (1, 40)], seed=6)
    gateway.at(times)
    assert sorted(row.due for row in gateway.rows) == pytest.approx(times.tolist())
    assert {row.status for row in gateway.rows} == {200}
    assert f"pixels:{manifest.input.contract}" in set(itertools.chain(*fake.calls))


def test_clients_who_never_pause(torchserve):
    fake, manifest = torchserve
    gateway = Gateway(fake.target, manifest)
    gateway.closed(4, 0.5)
    assert len(gateway.rows) > 20
    assert max(row.due for row in gateway.rows) < 0.5


def test_what_a_model_server_refuses_or_leaves_is_told_apart(torchserve):
    fake, manifest = torchserve
    gateway = Gateway(fake.target, manifest)
    gateway.at(np.array([0.0]))
    full = 'Model "tiny" has no worker to serve inference request. Please use scale workers API to add workers.'
    fake.fail = [(grpc.StatusCode.INTERNAL, full), (grpc.StatusCode.DEADLINE_EXCEEDED, "")]
    for _ in range(2):
        gateway.at(np.array([0.0]))
    assert [row.status for row in gateway.rows] == [200, 503, TIMED_OUT]
