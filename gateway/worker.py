"""gunicorn's threaded worker, with what its main thread does for each request made less."""

import select
from typing import Any

from gunicorn import util
from gunicorn.workers.gthread import ThreadWorker

STAY = 2  # milliseconds after an answer; a client in a loop, or a proxy under load, is back within one
LINGER = 0.5  # seconds for a client to close its side first; what it sent has been read by then


class Worker(ThreadWorker):  # type: ignore[misc]
    def handle(self, conn: Any) -> Any:
        """As gunicorn's: whether the connection is kept.

        A request that has come with its connection needs no selector to wait for it. Where the next one follows at
        once, the same thread answers it, instead of the main thread taking the socket back and handing it out again.
        And a connection that ends is closed here: the main thread would wait for each client to close its side, for
        two seconds at most, and meanwhile serve nobody.
        """
        conn.data_ready = conn.data_ready or _readable(conn.sock, 0)
        kept = super().handle(conn)
        while kept is True and self.alive and not conn.parser.unreader.buf.getvalue() and _readable(conn.sock, STAY):
            kept = super().handle(conn)
        if not kept:
            util.close_graceful(conn.sock, LINGER)
            conn.close = lambda graceful=False: None
        return kept


def _readable(sock: Any, milliseconds: int) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(milliseconds))
