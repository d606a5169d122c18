"""Counting and logging apart from answering: nothing is lost, and each line says when it was."""

import json
import logging
import logging.config
import threading
import time

from gateway import telemetry
from gateway.telemetry import LOGGING, Later


def test_until_it_is_begun_everything_is_done_at_once():
    done = []
    Later()(lambda: done.append(1))
    assert done == [1]


def test_once_begun_it_is_done_soon_and_in_order_and_a_scrape_waits_for_it(monkeypatch):
    later, done = Later(), []
    later.begin()
    for i in range(100):
        later(lambda i=i: done.append(i))
    deadline = time.monotonic() + 5
    while len(done) < 100 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert done == list(range(100))
    monkeypatch.setattr(telemetry, "later", later)
    before = counted()
    later(lambda: telemetry.answered(0, "refused", 503, {}, {}))
    assert counted() == before + 1


def counted():
    lines = telemetry.exposition().decode().splitlines()
    name = 'kennel_requests_total{route="refused",status="503"} '
    return next((float(line.removeprefix(name)) for line in lines if line.startswith(name)), 0.0)


def test_what_fails_holds_up_nothing():
    later, done = Later(), []
    later.begin()
    later(lambda: 1 / 0)
    later(lambda: done.append(1))
    deadline = time.monotonic() + 5
    while not done and time.monotonic() < deadline:
        time.sleep(0.02)
    assert done == [1]


def test_several_threads_may_flush_and_nothing_is_done_twice():
    later, done = Later(), []
    later._begun = True
    for i in range(20_000):
        later(lambda i=i: done.append(i))
    threads = [threading.Thread(target=later.flush) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == list(range(20_000))


def test_a_line_says_when_the_answer_was_given_and_not_when_it_was_written(capsys):
    logging.config.dictConfig({**LOGGING, "root": {"level": "INFO", "handlers": ["stdout"]}})
    telemetry.answered(86_400 * 365.0, "/predict", 200, {"decode": 1.5}, {"labels": ["red"], "model": "tiny"})
    line = json.loads(capsys.readouterr().out)
    assert line["time"].startswith(time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(86_400 * 365)))
    assert (line["message"], line["labels"]) == ("request", ["red"])
