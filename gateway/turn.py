"""Under overload, one thread at a time receives.

A refusal is a dozen system calls, and each lets go of Python's interpreter lock: of several threads that refuse side
by side every one waits for that lock again and again, which took most of a CPU at a thousand requests a second. So
whoever has a whole request before it takes a turn, and leaves it when the request is answered or turns out to be work.
While nothing is refused nobody waits for a turn.
"""

import threading
import time
from collections import deque
from collections.abc import Callable

SECONDS = 1.0  # after a refusal: overload


class _Mine(threading.local):
    held = False
    then: Callable[[], None] | None = None


class Turn:
    """A lock that goes to whoever has waited longest, and that only its holder gives back."""

    def __init__(self) -> None:
        self._guard, self._taken = threading.Lock(), False
        self._waiting: deque[threading.Lock] = deque()
        self._mine, self._until = _Mine(), 0.0

    def refused(self) -> None:
        """From now on there are turns, for a while."""
        self._until = time.monotonic() + SECONDS

    @property
    def needed(self) -> bool:
        return time.monotonic() < self._until

    def take(self) -> None:
        if not self.needed:
            return
        with self._guard:
            if waits := self._taken:
                come = threading.Lock()
                come.acquire()
                self._waiting.append(come)
            self._taken = True
        if waits:
            come.acquire()
        self._mine.held = True

    def give(self) -> None:
        """Nothing where this thread does not hold it."""
        if self._mine.held:
            self._mine.held = False
            with self._guard:
                if self._waiting:
                    self._waiting.popleft().release()
                else:
                    self._taken = False

    def lead(self, then: Callable[[], None]) -> None:
        """This thread accepts connections; once it has other things to do, `then` is called, for another one to."""
        self._mine.then = then

    @property
    def leads(self) -> bool:
        return self._mine.then is not None

    def leave(self, passing: bool = True) -> None:
        """For work, or waiting, of any length. passing: False where nobody need accept in this thread's stead."""
        self.give()
        then, self._mine.then = self._mine.then, None
        if then and passing:
            then()


turn = Turn()
