"""gunicorn's threaded worker, made to answer and refuse with fewer threads handing things to each other.

gunicorn's main thread accepts a connection, hands it to a thread, is told when that has answered, waits for the next
request and hands it on again. Here a thread of the pool accepts, reads, refuses and closes, one connection after the
other, until a request is let in; then another thread takes that over.

Nearly every call on a socket lets go of Python's interpreter lock; mostly another thread takes it, and the CPU turns to
that one and back. So there are few: of a connection's next request one waits and reads, and one sends the answer.
"""

import array
import contextlib
import fcntl
import re
import select
import selectors
import socket
import struct
import termios
import threading
import time
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

from gunicorn import util
from gunicorn.glogging import Logger
from gunicorn.http import wsgi
from gunicorn.workers import gthread

from gateway import plain
from gateway.turn import turn

STAY = 20  # milliseconds for what comes next; a client in a loop, or a proxy under load, is back by then
SILENT = 2  # milliseconds for a new connection's first bytes, which mostly come with it
SOON, EVER = struct.pack("@ll", 0, 1000 * STAY), struct.pack("@ll", 0, 0)  # timeval
LINGER = 0.5  # seconds for a client to close its side first; what it sent has been read by then
HEAD = 4096  # bytes of a request that are looked at
PICTURE = 1 << 16  # bytes read at once of a request that follows; what it has beyond them is read as it is asked for
CHUNK, PIECES = 1 << 18, 64  # bytes of a refused body read at a time, and how often: a socket holds no more
LENGTH = re.compile(rb"\r\ncontent-length: *(\d{1,9}) *\r\n", re.IGNORECASE)
CHUNKED = re.compile(rb"\r\ntransfer-encoding:", re.IGNORECASE)


class Log(Logger):  # type: ignore[misc]
    """gunicorn's own log without a line a request, which it would put together for nobody: gateway.telemetry has it."""

    def access(self, *_: Any) -> None:
        pass


class Socket(socket.socket):
    """A connection's. gunicorn sets whether it blocks three times a request, mostly to what it is."""

    def settimeout(self, value: float | None) -> None:
        if value != self.gettimeout():
            super().settimeout(value)

    def setblocking(self, flag: bool) -> None:
        self.settimeout(None if flag else 0.0)


class Plainly(NamedTuple):
    """How a plain request was answered."""

    kept: bool  # its connection
    over: bool  # nothing else is to come on it


class Worker(gthread.ThreadWorker):  # type: ignore[misc]
    def init_process(self) -> None:
        self._guard, self._leaders = threading.Lock(), 0
        self._environ = wsgi.base_environ(self.cfg) | plain.CONSTANT  # of every plain request
        super().init_process()

    def get_thread_pool(self) -> Any:
        """All its threads at once: all are used then, and what each comes to hold, a fifth of a megabyte, it holds
        before a first overload and not only after it."""
        pool = super().get_thread_pool()
        here = threading.Barrier(self.cfg.threads + 1)
        for _ in range(self.cfg.threads):
            pool.submit(here.wait)
        here.wait()
        return pool

    def accept(self, listener: Any) -> None:
        """On the main thread: a thread of the pool takes the listener, and with it all that waits there."""
        self.poller.unregister(listener)
        self._pass_on(listener)

    def set_accept_enabled(self, enabled: bool) -> None:
        """As gunicorn's; but a listener that a thread has is not here to be taken away."""
        self._accepting = enabled
        for listener in self.sockets:
            listener.setblocking(False)
            if enabled:
                self._watch(listener)
            elif listener in self.poller.get_map():
                self.poller.unregister(listener)

    def handle(self, conn: Any) -> Any:
        try:
            return self._serve(conn, not _ahead(conn) and bool(_whole(conn.sock)))
        finally:
            turn.leave()

    def _pass_on(self, listener: Any) -> None:
        with self._guard:
            if not self._leaders:  # this is the main thread, then
                self.nr_conns += 1  # one for all of them: the worker does not end before they do
            self._leaders += 1
        self.tpool.submit(self._lead, listener)

    def _lead(self, listener: Any) -> None:
        turn.lead(partial(self._pass_on, listener))
        server = listener.getsockname()
        try:
            while turn.leads and self.alive and self._accepting and (conn := self._accepted(listener, server)):
                head = _whole(conn.sock)
                conn.data_ready = bool(head) or _readable(conn.sock, SILENT)  # so gunicorn need not wait
                head = head or _whole(conn.sock)
                if head and self._refused(conn, head):
                    continue
                if kept := self._serve(conn, bool(head)) if conn.data_ready else gthread._DEFER:
                    self.method_queue.defer(self._adopt, conn, kept)
            if turn.leads:
                turn.leave(passing=False)
                self.method_queue.defer(self._watch, listener)
        finally:
            turn.leave()
            with self._guard:
                self._leaders -= 1
                if not self._leaders:
                    self.method_queue.defer(self._led)

    def _serve(self, conn: Any, whole: bool) -> Any:
        """As gunicorn's `handle`: whether the connection is kept. whole: its request has come to its end.

        Where the next request follows at once, the same thread answers it. And a connection that ends is closed here:
        the main thread would wait for each client to close its side, for two seconds at most, and meanwhile serve
        nobody.
        """
        come: bytes | None = b""  # of the next request
        while come is not None:
            if whole:
                turn.take()
            else:
                turn.leave()
            before = conn.parser and conn.parser.mesg
            plainly = self._plainly(conn, come)
            kept = plainly.kept if plainly else super().handle(conn)
            turn.give()
            if kept is not True or not self.alive or _ahead(conn):
                break
            turn.leave()
            if turn.needed:  # to look at what is still in the socket
                come = b"" if _readable(conn.sock, STAY) else None
                whole = bool(_whole(conn.sock))
            else:
                come, whole = _more(conn.sock), False
        if not kept:
            if plainly.over if plainly else _over(conn, before):  # then closing cannot cut off the answer
                util.close(conn.sock)
            else:
                turn.leave()
                util.close_graceful(conn.sock, LINGER)
            conn.close = lambda graceful=False: None
        return kept

    def _plainly(self, conn: Any, come: bytes) -> Plainly | None:
        """A plain request is answered; None where it is left to gunicorn. come: what has been read of it."""
        if not (conn.initialized or conn.data_ready):  # nothing has come yet
            return None
        conn.sock.setblocking(True)
        try:
            conn.init()
            come = come or conn.parser.unreader.take_buffered() or conn.sock.recv(PICTURE)
            request = plain.read(come, conn, self._environ)
            if not request:
                conn.parser.unreader.unread(come)
                return None
            keep = not request.last and self.alive and len(self.keepalived_conns) < self.max_keepalived
            conn.sock.sendall(plain.answer(self.wsgi, request.environ, *plain.server(keep)))
            if request.ahead:
                conn.parser.unreader.unread(request.ahead)
            read = not (request.body.left or request.ahead)
            return Plainly(keep and not request.body.left, request.last and read)
        except OSError:  # the client is gone
            return Plainly(False, True)
        except Exception as exc:
            self.handle_error(None, conn.sock, conn.client, exc)
            return Plainly(False, False)

    def _refused(self, conn: Any, head: bytes) -> bool:
        """Whether there was no place for a connection's first request, which has come whole: it ends here, in half the
        time that gunicorn takes to read a head and to put an answer together."""
        answer = self.wsgi.extensions["gateway"].closed(head, conn.client[0])
        if answer:
            turn.take()
            turn.refused()
            with contextlib.suppress(OSError):  # all is here: once it is read, closing cannot cut off the answer
                for _ in range(PIECES):
                    if not conn.sock.recv(CHUNK):
                        break
            with contextlib.suppress(OSError):  # the client is gone
                conn.sock.sendall(answer)
            turn.give()
            conn.close()
        return bool(answer)

    def _accepted(self, listener: Any, server: Any) -> Any:
        """The next connection, or None where there is none for a while."""
        for wait in (0, STAY):
            if wait and not _readable(listener, wait):
                return None
            with contextlib.suppress(OSError):  # another process has taken it, or it is gone
                accepted, address = listener.accept()
                sock = Socket(accepted.family, accepted.type, accepted.proto, accepted.detach())
                return gthread.TConn(self.cfg, sock, address, server)
        return None

    def _watch(self, listener: Any) -> None:
        if self._accepting and listener not in self.poller.get_map():
            self.poller.register(listener, selectors.EVENT_READ, self.accept)

    def _adopt(self, conn: Any, kept: Any) -> None:
        """A connection that a leader kept is from here on the main thread's, as if that had accepted it."""
        self.nr_conns += 1
        done: Future[Any] = Future()
        done.set_result(kept)
        self.finish_request(conn, done)

    def _led(self) -> None:
        self.nr_conns -= 1


def _ahead(conn: Any) -> bool:
    """Whether the parser has read some of the next request already."""
    return bool(conn.parser and conn.parser.unreader.buf.getvalue())


def _over(conn: Any, before: Any) -> bool:
    """Whether nothing of a request is left to come. before: the parser's message before it, which is still there
    where this one was not understood."""
    try:
        return bool(
            conn.parser and conn.parser.mesg is not before and conn.parser.finish_body(time.monotonic() + 0.001)
        )
    except Exception:  # whatever reading raises of what is no body
        return False


def _whole(sock: Any) -> bytes:
    """The head of a request that has come to its end, so that reading it does not wait. Empty where that is not easily
    seen, and where nobody need know."""
    if not turn.needed:
        return b""
    try:
        head = sock.recv(HEAD, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:
        return b""
    end = head.find(b"\r\n\r\n")
    length = LENGTH.findall(head, 0, end + 2)
    if end < 0 or CHUNKED.search(head, 0, end + 2) or len(length) != head.lower().count(b"content-length", 0, end):
        return b""
    come = array.array("i", [0])
    fcntl.ioctl(sock, termios.FIONREAD, come)
    return head[: end + 4] if come[0] >= end + 4 + sum(map(int, length)) else b""


def _more(sock: Any) -> bytes | None:
    """What comes of the next request within STAY; nothing where the connection ends, None where it stays silent."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, SOON)
    try:
        return bytes(sock.recv(PICTURE))
    except BlockingIOError:
        return None
    except OSError:
        return b""  # whoever reads on is told
    finally:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, EVER)


def _readable(sock: Any, milliseconds: int) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(milliseconds))
