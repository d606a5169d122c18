"""What happens before Flask: who may ask, whether there is a place, and the body read whole.

Refusing must cost little, or it takes from what is answered; so it is done here, with the body read and thrown away.
Read it must be: a server that answers while a client still sends closes the connection under it, and the client sees
a reset instead of the 503 or 413.
"""

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from io import BytesIO
from typing import Any

from gateway import errors
from gateway.access import Access
from gateway.admission import Admission
from gateway.turn import turn

PLACE = "kennel.place"  # environ: this request's Place
READ_SECONDS = "kennel.read_seconds"  # environ: how long reading took

ESTABLISHED = 1  # TCP_ESTABLISHED of the kernel's include/net/tcp_states.h
CHUNK = 1 << 18
# How much of a refused body is read. Beyond it the connection is closed: somebody means no good.
DRAINED = 512 << 20
# Bodies that a process holds at a time, in bytes. Pictures of phones have 2 to 15 MB, and each is held until it is
# answered; more of them at a time than this are refused.
HELD = 128 << 20

Environ = dict[str, Any]
App = Callable[[Environ, Callable[..., Any]], Iterable[bytes]]


class Front:
    """WSGI middleware. Bodies of at most `limit` bytes come whole; what is refused gets the answer of `problem`."""

    def __init__(
        self,
        app: App,
        asks: Callable[[str], bool],
        access: Access,
        admission: Admission,
        limit: int,
        problem: Callable[[errors.Problem, Environ, float], App],
    ) -> None:
        """asks: whether a path is for those who may ask alone; problem: the answer to one that came at this time."""
        self._app, self._asks, self._access, self._admission = app, asks, access, admission
        self._limit, self._problem = limit, problem
        self._held, self._lock = 0, threading.Lock()

    def __call__(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        started = time.perf_counter()
        asks = self._asks(environ["PATH_INFO"])
        predicts = asks and environ["REQUEST_METHOD"] == "POST"
        client, place, problem = "", None, None
        try:
            client = self._access.check(environ) if asks else ""
        except errors.Problem as exc:
            problem = exc.with_traceback(None)  # which has this frame, and would keep all that it holds
        if predicts:
            problem = problem or self._admission.look(client)
        held: list[int] = []
        try:
            body, problem = self._read(environ, held, problem)
            if predicts and not problem:  # not before: who sends slowly would hold a place
                entered = self._admission.enter(client)
                place, problem = (None, entered) if isinstance(entered, errors.Problem) else (entered, None)
            if problem:
                turn.refused()
                return self._problem(problem, environ, started)(environ, start_response)
            turn.leave()
            environ[PLACE] = place
            environ[READ_SECONDS] = time.perf_counter() - started
            environ["wsgi.input"] = BytesIO(body)
            environ["CONTENT_LENGTH"] = str(len(body))
            environ.pop("HTTP_TRANSFER_ENCODING", None)
            return self._app(environ, start_response)
        finally:
            if place:
                place.leave()
            with self._lock:
                self._held -= sum(held)

    def _read(
        self, environ: Environ, held: list[int], problem: errors.Problem | None
    ) -> tuple[bytes, errors.Problem | None]:
        """The body; its bytes are held, and `held` has how many. Where there is a problem already, or one turns up,
        the rest is read and thrown away.
        """
        stream, announced, chunks, read = environ["wsgi.input"], _announced(environ), [], 0
        while announced is None or read < announced:
            chunk = stream.read(CHUNK if announced is None else min(CHUNK, announced - read))
            if not chunk:
                if announced is not None and problem is None:
                    problem = errors.BadRequest("the body ended before the length that was announced: send it whole")
                break
            read += len(chunk)
            if problem is None:
                problem = self._hold(len(chunk), max(read, announced or 0), held)
            if problem is None:
                chunks.append(chunk)
                continue
            chunks.clear()
            if read > DRAINED:
                break
        return b"".join(chunks), problem

    def _hold(self, size: int, total: int, held: list[int]) -> errors.Problem | None:
        if total > self._limit:
            return errors.TooLarge(f"the body is larger than {self._limit:,} bytes: send a smaller picture")
        with self._lock:
            if self._held + size > max(HELD, self._limit):
                return errors.Overloaded("as many bytes of pictures are waiting as may wait: try again soon")
            self._held += size
            held.append(size)
        return None


def _announced(environ: Environ) -> int | None:
    """The length of the body in bytes; None where it comes in chunks until it ends."""
    length = environ.get("CONTENT_LENGTH", "")
    if length.isdigit():
        return int(length)
    return None if environ.get("wsgi.input_terminated") or environ.get("HTTP_TRANSFER_ENCODING") else 0


def wanted(environ: Environ) -> bool:
    """Whether the client is still there: its side of gunicorn's socket has not been closed."""
    try:
        sock: socket.socket = environ["gunicorn.socket"]
        if sys.platform == "linux":
            # tcpi_state of linux/tcp.h: unlike recv, asking for it does not let go of the interpreter's lock.
            return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == ESTABLISHED
        return bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except (KeyError, BlockingIOError, InterruptedError):
        return True
    except OSError:
        return False
