"""One thread at a time receives, and whoever has waited longest is next."""

import threading
import time

from gateway.turn import Turn


def test_turns_come_in_the_order_in_which_they_were_asked_for():
    turn, order, threads = Turn(), [], []
    turn.refused()
    turn.take()

    def ask(i):
        turn.take()
        order.append(i)
        turn.give()

    for i in range(20):
        threads.append(threading.Thread(target=ask, args=(i,)))
        threads[-1].start()
        while len(turn._waiting) <= i:
            time.sleep(0.001)
    assert order == []
    turn.give()
    for thread in threads:
        thread.join(5)
    assert order == list(range(20))
    turn.take()  # and it is free again
    turn.give()


def test_only_its_holder_gives_it_back():
    turn = Turn()
    turn.refused()
    turn.take()
    thread = threading.Thread(target=turn.leave)
    thread.start()
    thread.join()
    second = threading.Thread(target=turn.take, daemon=True)
    second.start()
    second.join(0.1)
    assert second.is_alive()
    turn.give()
    second.join(5)
    assert not second.is_alive()


def test_who_accepts_and_goes_to_work_is_replaced_once():
    turn, replaced = Turn(), []
    turn.lead(lambda: replaced.append("one"))
    turn.take()
    assert turn.leads
    turn.give()
    assert (turn.leads, replaced) == (True, [])  # an answer that took no time
    turn.leave()
    turn.leave()
    assert (turn.leads, replaced) == (False, ["one"])
    turn.lead(lambda: replaced.append("another"))
    turn.leave(passing=False)
    assert (turn.leads, replaced) == (False, ["one"])


def test_while_nothing_is_refused_nobody_waits(monkeypatch):
    turn = Turn()
    turn.take()
    turn.take()
    turn.refused()
    turn.take()
    later = time.monotonic() + 1.1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    thread = threading.Thread(target=turn.take, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
