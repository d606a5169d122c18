"""What is refused before Flask, what it costs, and what is left behind."""

import base64
import gc
import io
import socket

import grpc
import pytest
from tiny import WAYS, picture

from gateway import errors, front
from gateway.access import Access
from gateway.admission import Admission, Place
from gateway.app import create_app
from gateway.front import Front
from gateway.settings import Settings


class Stream(io.BytesIO):
    """A body that knows how much of it was read."""

    @property
    def left(self):
        return len(self.getbuffer()) - self.tell()


class Refused:
    def __init__(self, problem):
        self.problem = problem

    def __call__(self, environ, start_response):
        return [self.problem]


def environ(body, method="POST", path="/predict", **more):
    values = {"REQUEST_METHOD": method, "PATH_INFO": path, "REMOTE_ADDR": "10.0.0.1", "SERVER_NAME": "x"}
    values |= {"SERVER_PORT": "80", "wsgi.url_scheme": "http", "wsgi.input": Stream(body)}
    return values | {"CONTENT_LENGTH": str(len(body))} | more


def echo(environ, start_response):
    return [environ["wsgi.input"].read()]


def made(app=echo, admission=None, limit=1000):
    admission = admission or Admission(8, 0.6)
    problem = lambda problem, environ, started: Refused(problem)  # noqa: E731
    return Front(app, lambda path: path == "/predict", Access((), None), admission, limit, problem)


def test_a_body_comes_whole():
    assert made()(environ(b"x" * 1000), None) == [b"x" * 1000]


def test_who_gets_no_place_has_sent_a_body_that_was_read():
    admission = Admission(1, 0.6)
    for _ in range(2):  # one more in a burst
        admission.enter("10.0.0.1")
    sent = environ(b"x" * 900)
    (problem,) = made(admission=admission)(sent, None)
    assert problem.status == 503
    assert sent["wsgi.input"].left == 0


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (environ(b"x" * 1001), 413),
        (environ(b"x" * 5000, CONTENT_LENGTH="", HTTP_TRANSFER_ENCODING="chunked"), 413),
        (environ(b"x" * 10, CONTENT_LENGTH="11"), 400),
    ],
    ids=["announced", "chunked", "cut off"],
)
def test_a_body_that_is_too_large_or_too_short_is_refused_when_it_was_read(sent, status):
    (problem,) = made()(sent, None)
    assert problem.status == status
    assert sent["wsgi.input"].left == 0


def test_bodies_that_are_held_are_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr(front, "HELD", 2500)
    inside = []

    def three_at_a_time(sent, start_response):
        inside.append(len(inside))
        return made_once(environ(b"x" * 900), None) if len(inside) < 3 else echo(sent, start_response)

    made_once = made(three_at_a_time)
    (problem,) = made_once(environ(b"x" * 900), None)
    assert (problem.status, problem.retry_after) == (503, 1)
    assert inside == [0, 1]
    assert made_once._held == 0
    assert made_once(environ(b"x" * 900), None) == [b"x" * 900]


def test_a_place_and_its_bytes_come_back_whatever_the_app_does():
    def broken(environ, start_response):
        raise RuntimeError("boom")

    admission = Admission(1, 0.6)
    app = made(broken, admission)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            app(environ(b"x" * 900), None)
    assert (app._held, type(admission.enter("another"))) == (0, Place)


def test_reading_takes_no_place():
    """Or whoever sends slowly would hold one."""
    admission = Admission(1, 0.6)
    seen = []

    class Slow(Stream):
        def read(self, *args):
            seen.append(admission._total)
            return super().read(*args)

    made(admission=admission)(environ(b"", CONTENT_LENGTH="5", **{"wsgi.input": Slow(b"abcde")}), None)
    assert seen == [0]


def test_nothing_is_decoded_or_asked_for_a_client_that_hung_up(torchserve, tiny):
    torchserve.models["tiny"] = tiny["1"]
    client = create_app(Settings(models=("tiny",), model_server=torchserve.target)).test_client()
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    there = {"gunicorn.socket": ours}
    assert client.post("/predict", data=picture("red"), environ_overrides=there).status_code == 200
    theirs.sendall(b"POST /predict")  # its next request is no sign of having left
    assert client.post("/predict", data=picture("red"), environ_overrides=there).status_code == 200
    ours.recv(100)
    torchserve.calls.clear()
    theirs.close()
    assert client.post("/predict", data=picture("red"), environ_overrides=there).status_code == 499
    assert not torchserve.calls
    ours.close()
    assert client.post("/predict", data=picture("red"), environ_overrides=there).status_code == 499


@pytest.mark.parametrize("path", WAYS)
def test_neither_an_answer_nor_a_refusal_leaves_anything_to_the_garbage_collector(torchserve, tiny, monkeypatch, path):
    """Circles of them held pictures until it came by, and at a thousand refusals a second it came by all the time."""
    torchserve.models["tiny"] = tiny["1"]
    app = create_app(Settings(models=("tiny",), model_server=torchserve.target, in_flight=1))
    client = app.test_client()
    admission = app.extensions["gateway"].admission

    def left(status, ask=lambda: client.post(path, data=picture("red"))):
        assert ask().status_code == status
        gc.collect()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            assert ask().status_code == status
            gc.collect()
            kept = {
                "frame",
                "traceback",
                "Asked",
                "Place",
                *(kind.__name__ for kind in errors.Problem.__subclasses__()),
            }
            return {type(thing).__name__ for thing in gc.garbage} & kept
        finally:
            gc.set_debug(0)
            gc.garbage.clear()

    def fails():
        torchserve.fail.append((grpc.StatusCode.INTERNAL, "Worker died."))
        return client.post(path, data=picture("red"))

    def several():
        pictures = [{"b64": base64.b64encode(data).decode()} for data in (picture("red"), b"no picture")]
        return client.post("/v1/models/tiny:predict", json={"instances": pictures})

    assert left(200) == set()
    assert left(415, lambda: client.post(path, data=b"no picture")) == set()
    assert left(503, fails) == set()
    assert left(415, several) == set()
    with monkeypatch.context() as patch:
        patch.setattr("gateway.schemas.decide", lambda *_: 1 / 0)
        assert left(500) == set()
    places = [admission.enter("10.0.0.1") for _ in range(2)]  # one more in a burst
    assert left(503) == set()
    for place in places:
        place.leave()
