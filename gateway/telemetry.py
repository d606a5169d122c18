"""One JSON line a request, and Prometheus metrics summed over the worker processes.

Pictures are never logged, nor anything of their content but the answer's label.
"""

import logging
import logging.config
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from prometheus_client import REGISTRY as ONE_PROCESS
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "json": {
            "()": "pythonjsonlogger.json.JsonFormatter",
            "fmt": "%(asctime)s %(levelname)s %(name)s %(message)s",
            "rename_fields": {"asctime": "time", "levelname": "level", "name": "logger"},
            "datefmt": "%Y-%m-%dT%H:%M:%S%z",
        }
    },
    "handlers": {"stdout": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout", "formatter": "json"}},
    "root": {"level": "INFO", "handlers": ["stdout"]},
    "loggers": {"gunicorn.error": {"level": "INFO", "propagate": True, "handlers": []}},
}
log = logging.getLogger("gateway")

REQUESTS = Counter("kennel_requests", "Requests answered", ["route", "status"])
STAGES = Histogram(
    "kennel_stage_seconds",
    "Time of each stage of a prediction: read, decode, model, and the whole request",
    ["stage"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2.5, 5),
)
PREDICTIONS = Counter("kennel_predictions", 'Predictions given, "unknown" among the labels', ["model", "label"])
IN_FLIGHT = Gauge("kennel_in_flight", "Predictions being made right now", multiprocess_mode="livesum")
RETRIES = Counter("kennel_retries", "Calls to the model server made a second time")
CANARY_FAILURES = Counter("kennel_canary_failures", "Calls that a canary failed and the main model server took over")


class Later:
    """Counting and logging apart from answering, many at a time: between two pictures, whose pixels fill the caches,
    the same work costs three times as much. Until `begin` everything is done at once."""

    def __init__(self) -> None:
        self._todo: deque[Callable[[], None]] = deque()
        self._begun = False

    def __call__(self, do: Callable[[], None]) -> None:
        self._todo.append(do)
        if not self._begun:
            self.flush()

    def begin(self) -> None:
        """In the process that answers: from now on four times a second."""
        self._begun = True
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(0.25)
            try:
                self.flush()
            except Exception:  # or nothing would be counted any more, and what is to do pile up
                log.exception("not counted or not logged")

    def flush(self) -> None:
        IN_FLIGHT.set(in_flight.count)
        while self._todo:
            try:
                do = self._todo.popleft()
            except IndexError:  # another thread did it
                return
            do()


later = Later()


class InFlight:
    """Counts those that are `with` it. The gauge is told by `later`: it writes to a file, twice a picture."""

    def __init__(self) -> None:
        self._lock, self.count = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self.count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.count -= 1


in_flight = InFlight()


class Stages:
    """Where one request's time went: milliseconds by stage."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}

    def add(self, name: str, seconds: float) -> None:
        self.milliseconds[name] = round(self.milliseconds.get(name, 0) + 1000 * seconds, 2)


def answered(at: float, route: str, status: int, milliseconds: dict[str, float], fields: dict[str, Any]) -> None:
    """Counts one request, and logs it where there are fields. at: when, in Unix seconds."""
    REQUESTS.labels(route, status).inc()
    for stage, spent in milliseconds.items():
        STAGES.labels(stage).observe(spent / 1000)
    for label in fields.get("labels", ()):
        PREDICTIONS.labels(fields["model"], label).inc()
    if fields:
        record = log.makeRecord(log.name, logging.INFO, "", 0, "request", (), None, extra=fields)
        record.created = at
        log.handle(record)


class Refused:
    """Counts those that are alike together, a thousand a second of them."""

    def __init__(self) -> None:
        self._lock, self._uncounted = threading.Lock(), 0

    def __call__(self) -> None:
        with self._lock:
            self._uncounted += 1
            first = self._uncounted == 1
        if first:
            later(self._count)

    def _count(self) -> None:
        with self._lock:
            uncounted, self._uncounted = self._uncounted, 0
        REQUESTS.labels("refused", 503).inc(uncounted)


refused = Refused()


def exposition() -> bytes:
    """The text that Prometheus scrapes."""
    later.flush()
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return generate_latest(ONE_PROCESS)
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)
