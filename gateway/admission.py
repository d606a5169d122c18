"""How many predictions a process makes at a time: as many as are answered in time, and a place for everybody.

Under more load than there is capacity for, waiting only makes every answer late. So the number let in follows
the latency that is measured: it grows by one for every full round of answers in time and shrinks by a tenth
when one is late, at most once in the time that an answer may take (additive increase, multiplicative decrease:
D. Chiu and R. Jain, Analysis of the increase and decrease algorithms for congestion avoidance, 1989; as a limit
of concurrency: AIMDLimit of Netflix's concurrency-limits). The rest is refused at once, before it is parsed.

What comes in a burst is another matter: where a machine stood still for a moment, those who called meanwhile come all
at once, and are answered in time, since nothing else waits. So where fewer than half the places were taken a moment
ago there are up to twice as many, and a second later no more than ever (as a queue of Facebook's that was empty a
moment ago may be long, and a standing one may not: B. Maurer, Fail at Scale, 2015; after CoDel, K. Nichols and
V. Jacobson, Controlling queue delay, 2012).
"""

import math
import threading
import time
from collections import Counter

from gateway.errors import Overloaded

LEAST = 32  # are always let in: calls of clients who do not wait would cost more to refuse than to answer
SHRINK = 0.9
BURST, BURST_SECONDS = 1.0, 1.0  # places more, of the limit, which then become fewer for so long
OTHERS = 0.5  # places above all those, of the limit, for clients that hold less than their share


class Admission:
    """One process's places."""

    def __init__(self, most: int, late_seconds: float) -> None:
        """most: predictions at a time, whatever the latency; late_seconds: an answer later than that is too late."""
        self._least, self._most, self._late = min(LEAST, most), most, late_seconds
        self.limit = float(most)
        self._held: Counter[str] = Counter()  # places by client
        self._total, self._shrunk, self._seconds = 0, -math.inf, 0.0
        self._calm = time.monotonic()  # when fewer than half the places were taken
        self._lock = threading.Lock()

    def look(self, client: str) -> Overloaded | None:
        """Why there is no place."""
        with self._lock:
            return self._check(client)

    def enter(self, client: str) -> "Place | Overloaded":
        """A place, to be left again, or why there is none. It is not raised: an error that was raised keeps all that
        its frames hold until the garbage collector comes by, and there may be a thousand a second.

        Where all are taken, a client that holds less than its share still gets in, so that one with hundreds
        of calls does not shut out one with a single call.
        """
        with self._lock:
            if refused := self._check(client):
                return refused
            self._take(client, 1)
        return Place(self, client)

    def _check(self, client: str) -> Overloaded | None:
        now = time.monotonic()
        if 2 * self._total < self.limit:
            self._calm = now
        room = self.limit * (1 + BURST * max(0.0, 1 - (now - self._calm) / BURST_SECONDS))
        if self._total >= room:
            share = self.limit / (len(self._held) + (client not in self._held))
            if self._held[client] + 1 > share or self._total >= room + OTHERS * self.limit:
                # About when what is here now will have been answered.
                return Overloaded(
                    "more pictures are waiting than can be answered in time: try again soon",
                    retry_after=max(1, math.ceil(self._seconds)),
                )
        return None

    def _take(self, client: str, count: int) -> None:
        self._held[client] += count
        self._total += count
        if not self._held[client]:
            del self._held[client]

    def more(self, client: str, count: int) -> None:
        with self._lock:
            self._take(client, count)

    def leave(self, client: str, count: int, seconds: float | None) -> None:
        """Give places back. seconds: how long the answer took; None where that says nothing about the load."""
        with self._lock:
            used = 2 * self._total >= self.limit
            self._take(client, -count)
            if seconds is None:
                return
            self._seconds += (seconds - self._seconds) / 16
            now = time.monotonic()
            if seconds <= self._late:
                if used:  # else nobody knows whether more would be in time too
                    self.limit = min(self._most, self.limit + 1 / self.limit)
            elif now - self._shrunk > self._late:
                self.limit, self._shrunk = max(self._least, self.limit * SHRINK), now


class Place:
    """What one request holds until it is answered."""

    def __init__(self, admission: Admission, client: str) -> None:
        self._admission, self._client, self._count = admission, client, 1
        self._since = time.monotonic()

    def holds(self, pictures: int) -> None:
        """The request turned out to have so many pictures."""
        self._admission.more(self._client, pictures - self._count)
        self._count = pictures

    def leave(self, tells: bool = False) -> None:
        """tells: the answer's time speaks of the load; not that of a bad picture, or of many in one request.

        Only the first call counts.
        """
        seconds = time.monotonic() - self._since if tells and self._count == 1 else None
        count, self._count = self._count, 0
        if count:
            self._admission.leave(self._client, count, seconds)
