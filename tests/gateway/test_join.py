"""Who shares a call with whom, and how many calls are under way."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gateway import join
from gateway.errors import Abandoned, DamagedPicture, Overloaded, TimedOut, Unavailable
from gateway.join import Asked, Join, Told

SILENT = Told(0.005, 0.0, 0)  # of a server that does not say


class Server:
    """Answers a picture with its bytes doubled; holds calls back while `open` is not set."""

    def __init__(self):
        self.calls, self.open = [], threading.Event()
        self.open.set()

    def __call__(self, together):
        self.calls.append([asked.pixels for asked in together])
        assert self.open.wait(10)
        return [asked.pixels * 2 for asked in together], SILENT


class Workers:
    """A model server of so many workers, each of which takes so long for a call; what is too much for them waits, and
    the first to come is the first to go."""

    def __init__(self, count, seconds):
        self.count, self.seconds, self.sizes = count, seconds, []
        self._pool = ThreadPoolExecutor(count)

    def __call__(self, together):
        began = time.perf_counter()
        served = self._pool.submit(self._work).result()
        self.sizes.append(len(together))
        return [asked.pixels for asked in together], Told(time.perf_counter() - began, served, self.count)

    def _work(self):
        began = time.perf_counter()
        time.sleep(self.seconds)
        return time.perf_counter() - began


def together(threads, joined, count):
    """So many pictures, by as many clients as there are threads, none of whom pauses."""
    list(threads.map(lambda _: ask(joined, asked(b"a")), range(count)))


def asked(pixels, contract="c", seconds=5.0, wanted=lambda: True):
    return Asked(contract, time.monotonic() + seconds, "id", wanted, lambda *found: found, pixels)


def ask(joined, asked):
    joined.put(asked, asked.pixels)
    return joined.outcome(asked)


def until(true):
    deadline = time.monotonic() + 5
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def threads():
    with ThreadPoolExecutor(64) as pool:
        yield pool


def held(server, joined, threads, count=20, **how):
    """One call under way that does not end, and so many pictures waiting for it."""
    server.open.clear()
    joined.limit = 1.0
    first = threads.submit(ask, joined, asked(b"first"))
    until(lambda: server.calls)
    waiting = []
    for i in range(count):
        waiting.append(threads.submit(ask, joined, asked(str(i).encode(), **how)))
        until(lambda i=i: len(joined._waiting) == i + 1)
    return first, waiting


def test_a_picture_that_comes_alone_goes_at_once():
    server = Server()
    joined = Join(server, 8, 5)
    assert [ask(joined, asked(pixels)) for pixels in (b"a", b"b")] == [b"aa", b"bb"]
    assert server.calls == [[b"a"], [b"b"]]


def test_those_that_come_meanwhile_share_the_next_calls_in_their_order(threads):
    server = Server()
    joined = Join(server, 1, 5)
    first, waiting = held(server, joined, threads)
    assert server.calls == [[b"first"]]
    server.open.set()
    assert first.result() == b"firstfirst"
    assert [future.result() for future in waiting] == [str(i).encode() * 2 for i in range(20)]
    assert [len(call) for call in server.calls] == [1, 8, 8, 4]
    assert [pixels for call in server.calls[1:] for pixels in call] == [str(i).encode() for i in range(20)]


def test_pictures_of_another_contract_do_not_share(threads):
    server = Server()
    joined = Join(server, 1, 5)
    _, waiting = held(server, joined, threads, 3)
    waiting.append(threads.submit(ask, joined, asked(b"other", contract="d")))
    until(lambda: len(joined._waiting) == 4)
    server.open.set()
    assert [future.result() for future in waiting] == [b"00", b"11", b"22", b"otherother"]
    assert server.calls[1:] == [[b"0", b"1", b"2"], [b"other"]]


def test_large_pictures_share_less(threads, monkeypatch):
    monkeypatch.setattr(join, "BYTES", 3)
    server = Server()
    joined = Join(server, 1, 5)
    _, waiting = held(server, joined, threads, 7)
    server.open.set()
    for future in waiting:
        future.result()
    assert [len(call) for call in server.calls] == [1, 3, 3, 1]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_as_many_calls_are_under_way_as_keep_the_workers_busy_and_hardly_more(threads, count):
    server = Workers(count, 0.01)
    joined = Join(server, 64, 5)
    together(threads, joined, 500 * count)
    server.sizes.clear()
    together(threads, joined, 500 * count)
    assert count + 0.5 <= joined.limit < count + 3
    assert np.median(server.sizes) == 8


def test_a_queue_that_stands_is_never_taken_for_the_way(threads):
    joined = Join(Workers(1, 0.001), 64, 5)
    together(threads, joined, 20_000)
    assert joined.limit < 4


def test_a_server_with_more_workers_gets_more_calls_soon(threads):
    joined = Join(Workers(1, 0.01), 64, 5)
    together(threads, joined, 300)
    joined._call = Workers(8, 0.01)
    together(threads, joined, 2000)
    assert 8 <= joined.limit < 12


def test_the_way_there_and_back_is_not_taken_for_waiting(threads):
    """A model that takes a millisecond, ten of them away."""
    server = Workers(4, 0.001)

    def far(asked):
        time.sleep(0.01)
        outcomes, told = server(asked)
        return outcomes, told._replace(took=told.took + 0.01)

    joined = Join(far, 64, 5)
    together(threads, joined, 5000)
    assert joined.limit > 4


def test_it_grows_only_where_there_are_more_calls_to_make(threads):
    joined = Join(Workers(8, 0.001), 64, 5)
    joined.limit = 2.0
    for _ in range(100):
        ask(joined, asked(b"a"))
    assert joined.limit == 2  # one at a time tells nothing of three


def test_to_a_server_that_does_not_say_how_long_it_takes_all_calls_go(threads):
    def silent(together):
        time.sleep(0.005)
        return [asked.pixels for asked in together], SILENT

    joined = Join(silent, 5, 5)
    joined._call = Workers(1, 0.01)  # and one that did say was there before
    together(threads, joined, 100)
    joined._call = silent
    together(threads, joined, 500)
    assert joined.limit == 5


def test_a_call_that_fails_fails_for_each_with_an_error_of_its_own(threads):
    server = Server()

    def fail(together):
        server(together)
        raise Unavailable("gone")

    joined = Join(fail, 1, 5)
    first, waiting = held(server, joined, threads, 3)
    server.open.set()
    errors = [future.exception() for future in (first, *waiting)]
    assert [(type(error), error.detail) for error in errors] == [(Unavailable, "gone")] * 4
    assert len({id(error) for error in errors}) == 4
    with pytest.raises(Unavailable):  # and its place is free again
        ask(joined, asked(b"a"))


@pytest.mark.parametrize(("patience", "seconds"), [(5, 0.2), (0.2, 5)])
def test_who_waits_too_long_is_told_and_nothing_is_asked_for_it(threads, patience, seconds):
    server = Server()
    joined = Join(server, 1, patience)
    first, (late,) = held(server, joined, threads, 1, seconds=seconds)
    with pytest.raises(TimedOut):
        late.result()
    server.open.set()
    assert first.result() == b"firstfirst"
    assert server.calls == [[b"first"]]


def test_nothing_is_asked_for_who_is_gone(threads):
    server = Server()
    joined = Join(server, 1, 5)
    _, (gone,) = held(server, joined, threads, 1, wanted=lambda: False)
    there = threads.submit(ask, joined, asked(b"there"))
    until(lambda: len(joined._waiting) == 2)
    server.open.set()
    assert there.result() == b"therethere"
    assert isinstance(gone.exception(), Abandoned)
    assert server.calls == [[b"first"], [b"there"]]
    with pytest.raises(Abandoned):
        ask(joined, asked(b"alone", wanted=lambda: False))
    assert ask(joined, asked(b"next")) == b"nextnext"


def test_who_is_not_decoded_in_time_is_told_and_nothing_is_asked_for_it_later():
    server = Server()
    joined = Join(server, 1, 0.05)
    late = asked(b"late", seconds=0.2)
    began = time.monotonic()
    with pytest.raises(Overloaded, match="waiting to be decoded"):
        joined.outcome(late)
    assert 0.2 <= time.monotonic() - began < 2  # longer than a decoded one would wait for its call
    joined.put(late, b"late")
    assert ask(joined, asked(b"next")) == b"nextnext"
    assert server.calls == [[b"next"]]


def test_who_is_decoded_while_it_waits_has_its_answer(threads):
    server = Server()
    joined = Join(server, 1, 0.05)
    one = asked(b"")
    answer = threads.submit(joined.outcome, one)
    time.sleep(0.2)
    joined.put(one, b"a")
    assert answer.result() == b"aa"


def test_why_it_could_not_be_decoded_is_raised():
    joined, one = Join(Server(), 1, 5), asked(b"")
    joined.fail(one, DamagedPicture("cut off"))
    with pytest.raises(DamagedPicture, match="cut off"):
        joined.outcome(one)


@pytest.mark.parametrize(("waits", "left"), [(0.1, 0.9), (0.95, 0.25)])
def test_who_waited_long_does_not_wait_as_long_again_for_the_call(threads, waits, left):
    seconds = []

    def call(together):
        seconds.append(together[0].seconds)
        time.sleep(waits)
        return [one.pixels for one in together], SILENT

    joined = Join(call, 1, 1.0)
    both = [threads.submit(ask, joined, asked(b"a")) for _ in range(2)]
    assert [one.result() for one in both] == [b"a", b"a"]
    assert seconds == pytest.approx([1.0, left], abs=0.04)
