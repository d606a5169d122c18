"""Pictures of concurrent requests share calls to the model server, as soon as more calls would only wait there.

A call costs gateway, JVM and worker about 1 ms of CPU whatever it holds. So a process has only so many calls of a
model under way as keep the model server's workers busy, and the pictures that come meanwhile go together in the next
one. Every answer tells how long a worker was busy with it and how many workers there are; what a call took beyond that
and the way there and back, it waited. Of a process's calls, or of all calls at a model server, whichever is less, one
should be waiting, so that no worker is idle, and not two: as TCP Vegas counts and bounds what its own connection has
waiting on the way (L. Brakmo and L. Peterson, TCP Vegas: end to end congestion avoidance on a global Internet, 1995).
With nothing else under way a picture is sent at once.

So pictures wait here and not there, where nobody would know that their time is over or their caller gone.
"""

import copy
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bundle.wire import Bytes
from gateway.client import SLOW
from gateway.errors import Abandoned, Overloaded, TimedOut, untraced

PICTURES = 8  # a call: beyond it nothing is won, and all wait for the last one
BYTES = 4 << 20  # a call, likewise: for large inputs
LEAST, MOST = 0.5, 1.5  # calls waiting: with fewer the limit grows, with more it shrinks
MEMORY = 1 / 8  # the share of the last call in means of calls
DRIFT = 1 / 100  # for each call that is under way alone, so that the shortest way there and back may become longer
START = 16  # calls, until answers tell more
UNDECODED = "more pictures are waiting to be decoded than may wait: try again soon"


@dataclass(eq=False)
class Asked:
    """One picture on its way. `contract` as on the wire; `deadline` in time.monotonic()."""

    contract: str
    deadline: float
    request_id: str
    wanted: Callable[[], bool]  # False once its caller is gone
    answer: Callable[..., Any]  # what becomes of its manifest and logits, for `call` to ask
    pixels: Bytes = b""  # as on the wire, once it is decoded
    decoded: float = 0.0  # when, in time.perf_counter()
    until: float = field(init=False)  # when it has waited too long for what comes next, in time.monotonic()
    seconds: float = math.inf  # that its call may take
    outcome: Any = None
    together: "list[Asked] | None" = None  # whom it calls for, itself first
    turn: threading.Lock = field(default_factory=threading.Lock)  # free: there is an outcome, or a call to make
    over: bool = False  # nobody waits for it any more

    def __post_init__(self) -> None:
        self.until = self.deadline
        self.turn.acquire()


class Told(NamedTuple):
    """What an answer tells: the seconds that the call took, those of them that a worker was busy with it, and how many
    workers the model server has; the last two are 0 where it does not say."""

    took: float
    served: float
    workers: int


# Makes one call for pictures of one contract -> the outcome of each, an exception where it failed.
Call = Callable[[Sequence[Asked]], tuple[Sequence[Any], Told]]


class Join:
    """One model's calls. A picture's own thread makes the call for those that waited with it: there are no others."""

    def __init__(self, call: Call, most: int, seconds: float) -> None:
        """most: calls at a time, whatever the model server says; seconds: that a picture may wait for its call,
        and that both may take; a call has a quarter of them at least."""
        self._call, self._most, self._seconds = call, most, seconds
        self.limit = float(min(START, most))  # of calls under way
        self._calls = 0
        self._served, self._beside, self._way = 0.0, 0.0, math.inf  # of a call, in seconds: see _learn
        self._waiting: deque[Asked] = deque()
        self._lock = threading.Lock()

    def put(self, asked: Asked, pixels: Bytes) -> None:
        """By whoever has decoded it: now it waits for its call."""
        with self._lock:
            if not asked.over:
                asked.pixels, asked.decoded = pixels, time.perf_counter()
                asked.until = min(asked.deadline, time.monotonic() + self._seconds)
                self._waiting.append(asked)
                self._start()

    def fail(self, asked: Asked, why: Exception) -> None:
        """By whoever could not decode it."""
        asked.outcome = untraced(why)
        asked.turn.release()

    def outcome(self, asked: Asked) -> Any:
        """Of `call` for this picture, which another thread decodes: its own is woken once. Raises it where it is an
        exception, Overloaded where it is not decoded in time, and TimedOut.
        """
        while not asked.turn.acquire(timeout=max(0, min(self._seconds, asked.until - time.monotonic()))):
            with self._lock:
                if not asked.turn.locked() or asked.until > time.monotonic():
                    continue
                asked.over = True
                if asked in self._waiting:  # else it is not decoded, or its call is under way
                    self._waiting.remove(asked)
            raise TimedOut(SLOW) if asked.decoded else Overloaded(UNDECODED)
        if asked.together:
            self._lead(asked.together)
            asked.together = None  # it is in there itself: a circle, with all their pixels
        if isinstance(asked.outcome, BaseException):
            raise copy.copy(asked.outcome) from asked.outcome  # several threads raise it
        return asked.outcome

    def _start(self) -> None:
        """As many calls as may be under way, each made by the thread of its first picture."""
        while self._waiting and self._calls < int(self.limit):
            together = [first := self._waiting.popleft()]
            most = min(PICTURES, max(1, BYTES // max(1, len(first.pixels))))
            while self._waiting and len(together) < most and self._waiting[0].contract == first.contract:
                together.append(self._waiting.popleft())
            # Less, the longer the first one waited: or it would wait as long again.
            seconds = max(first.until - time.monotonic(), self._seconds / 4)
            for asked in together:
                asked.until, asked.seconds = asked.deadline, seconds
            self._calls += 1
            first.together = together
            first.turn.release()

    def _lead(self, together: list[Asked]) -> None:
        gone = [asked for asked in together if not asked.wanted()]
        wanted = [asked for asked in together if asked not in gone]
        outcomes: Sequence[Any] = []
        try:
            if wanted:
                outcomes, told = self._call(wanted)
                with self._lock:
                    self._learn(*told)
        except BaseException as exc:
            outcomes = [exc] * len(wanted)
        with self._lock:
            self._calls -= 1
            self._start()
        for asked, outcome in [*zip(wanted, outcomes, strict=True), *((asked, Abandoned()) for asked in gone)]:
            asked.outcome = untraced(outcome)
            if asked is not together[0]:  # whose thread this is
                asked.turn.release()

    def _learn(self, took: float, served: float, workers: int) -> None:
        """In a full round of calls the limit grows or shrinks by one, or by as many as are waiting beyond MOST."""
        waiting = 0.0  # calls, at the model server
        if served and workers:
            beside = max(1e-6, took - served)
            self._served += MEMORY * (served - self._served)
            self._beside += MEMORY * (beside - self._beside)
            self._way = min(beside, self._way * (1 + DRIFT * (self._calls == 1)))
            waited = max(0.0, self._beside - self._way)
            waiting = waited * min(self._calls / (self._beside + self._served), workers / self._served)
        if waiting > MOST:
            self.limit = max(1.0, self.limit - max(1.0, waiting - MOST) / self.limit)
        elif waiting < LEAST and self._calls >= int(self.limit):  # else nobody knows whether more would wait
            self.limit = min(self._most, self.limit + 1 / self.limit)
