"""A steady load of a few clients, and what each call came to."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import requests


@dataclass
class Call:
    at: float  # time.monotonic() when it was answered
    seconds: float
    status: int  # 0: no response
    retry_after: str | None
    body: Any
    request_id: str = ""


@dataclass
class Load:
    """`with Load(url, 8, ask):` calls until the block is left; `calls` has every one."""

    clients: int
    ask: Callable[[requests.Session, int], requests.Response]  # session, number of the call
    calls: list[Call] = field(default_factory=list)

    def __enter__(self) -> "Load":
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(i,)) for i in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _client(self, number: int) -> None:
        session, count = requests.Session(), number
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                response = self.ask(session, count)
                headers = response.headers
                outcome = response.status_code, headers.get("Retry-After"), response.json(), headers["X-Request-Id"]
            except requests.RequestException as exc:
                outcome = 0, None, repr(exc), ""
            ended = time.monotonic()
            self.calls.append(Call(ended, ended - started, *outcome))
            count += self.clients
            if outcome[0] != 200:
                self._stop.wait(0.05)

    def since(self, moment: float) -> list[Call]:
        return [call for call in self.calls if call.at >= moment]

    def wait_for(self, status: int, count: int, seconds: float) -> float:
        """Seconds until `count` more calls ended with `status`. Raises AssertionError where they do not."""
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            if sum(call.status == status for call in self.since(started)) >= count:
                return time.monotonic() - started
            time.sleep(0.02)
        found = [(call.status, call.body) for call in self.since(started)][-3:]
        raise AssertionError(f"no {count} answers of {status} within {seconds} s; the last were {found}")
