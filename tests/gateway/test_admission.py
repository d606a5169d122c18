"""How many are let in, by the latency that is measured, and who."""

import threading
import time
from collections import Counter

import pytest
from tiny import picture

from gateway import admission as admission_module
from gateway.admission import LEAST, Admission, Place
from gateway.app import create_app
from gateway.errors import Overloaded
from gateway.settings import Settings


@pytest.fixture
def no_bursts(monkeypatch):
    monkeypatch.setattr(admission_module, "BURST", 0.0)


def entered(admission, client, tries):
    """Places that the client got of so many tries."""
    places = []
    for _ in range(tries):
        if isinstance(place := admission.enter(client), Overloaded):
            break
        places.append(place)
    return places


def answer(admission, seconds, client="one"):
    """One round: as many as are let in, each answered after so many seconds."""
    places = entered(admission, client, 1000)
    for _ in places:
        admission.leave(client, 1, seconds)
    return len(places)


def test_late_answers_shrink_the_number_and_timely_ones_let_it_grow_again(monkeypatch, no_bursts):
    clock = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    admission = Admission(48, 0.6)
    assert answer(admission, 0.7) == 48
    assert answer(admission, 0.7) == 44  # 0.9 times 48, and that they all were late counts once
    for _ in range(100):
        clock += 0.7
        answer(admission, 5.0)
    assert answer(admission, 0.1) == LEAST
    rounds = 0
    while answer(admission, 0.1) < 48:
        rounds += 1
    assert 25 <= rounds <= 120  # about one more in a round


def test_the_number_settles_where_answers_take_as_long_as_they_may(no_bursts):
    """A server of 100 answers a second: 60 at a time take 0.6 s."""
    clock, history = 0.0, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: clock)
        admission = Admission(1000, 0.6)
        for _ in range(400):
            count = min(len(entered(admission, "one", 1000)), 1000)
            clock += count / 100
            for _ in range(count):
                admission.leave("one", 1, count / 100)
            history.append(count)
    settled = history[200:]
    assert min(settled) >= 50
    assert max(settled) <= 62


def test_no_load_does_not_let_it_grow():
    admission = Admission(48, 0.6)
    admission.limit = 20.0
    for _ in range(1000):
        admission.enter("one").leave(tells=True)
    assert admission.limit == 20.0


@pytest.mark.parametrize("burst", [0.0, 1.0])
def test_one_client_with_many_calls_does_not_shut_out_one_with_a_single_call(monkeypatch, burst):
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(admission_module, "BURST", burst)
    admission = Admission(24, 0.6)
    many = entered(admission, "many", 500)
    assert len(many) == 24 * (1 + burst)
    one = admission.enter("one")
    assert isinstance(admission.enter("many"), Overloaded)
    one.leave(tells=True)
    # And it never gets out of hand: clients who each hold nothing yet fill half as much again, no more.
    assert len([client for client in range(100) if entered(admission, str(client), 1)]) == 12


def test_what_comes_in_a_burst_is_let_in_and_a_standing_queue_is_not(monkeypatch):
    """A server of 100 answers a second, asked ten times a tenth of a second, stands still for 0.4 s; and then 300
    times."""
    clock = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    admission = Admission(20, 0.6)

    def tick(calls, answers):
        nonlocal clock
        clock += 0.1
        refused = calls - len(entered(admission, "one", calls))
        for _ in range(min(answers, admission._total)):
            admission.leave("one", 1, 0.3)
        return refused

    assert [tick(8, 10) for _ in range(20)] == [0] * 20
    assert tick(32, 10) == 0  # those of the 0.4 s at once
    assert [tick(8, 10) for _ in range(20)] == [0] * 20
    overload = [tick(30, 10) for _ in range(30)]
    assert overload[0] == 0
    assert overload[-1] == 20
    assert admission._total <= 20


def test_every_place_comes_back(no_bursts):
    admission = Admission(10, 0.6)
    places = entered(admission, "one", 10)
    places[0].holds(32)
    assert "try again soon" in admission.enter("one").detail
    for place in places:
        place.leave(tells=False)
    assert len(entered(admission, "one", 20)) == 10


def test_when_to_come_back_is_when_those_here_will_have_been_answered(no_bursts):
    admission = Admission(8, 10.0)
    entered(admission, "one", 8)
    for _ in range(200):
        admission.leave("one", 1, 2.4)
        admission.more("one", 1)
    assert admission.enter("one").retry_after == 3


def test_through_the_app_refusals_come_at_once_and_good_answers_follow(torchserve, tiny, no_bursts):
    """Thirty at a time while eight may be in: eight are answered, the others told to come back."""
    torchserve.models["tiny"] = tiny["1"]
    app = create_app(Settings(models=("tiny",), model_server=torchserve.target, in_flight=8))
    client = app.test_client()
    assert client.post("/predict", data=picture("red")).status_code == 200
    torchserve.hold.clear()
    answers, refusals = [], []

    def ask():
        started = time.monotonic()
        response = app.test_client().post("/predict", data=picture("red"))
        answers.append(response.status_code)
        if response.status_code == 503:
            refusals.append((time.monotonic() - started, response.headers["Retry-After"], response.json["title"]))

    threads = [threading.Thread(target=ask) for _ in range(30)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 1.2
    while len(refusals) < 22 and time.monotonic() < deadline:
        time.sleep(0.01)
    torchserve.hold.set()
    for thread in threads:
        thread.join()
    assert Counter(answers) == {200: 8, 503: 22}
    assert {(wait, title) for _, wait, title in refusals} == {("1", "Overloaded")}
    assert client.post("/predict", data=picture("red")).json["label"] == "red"
    assert client.post("/predict", data=b"no picture").status_code == 415
    assert isinstance(app.extensions["gateway"].admission.enter("x"), Place)  # every place came back
    assert not app.extensions["gateway"].admission._held - Counter({"x": 1})
