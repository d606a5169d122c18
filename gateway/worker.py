"""gunicorn's threaded worker, which stays with a connection where its next request comes at once."""

import select
from typing import Any

from gunicorn.workers.gthread import ThreadWorker

STAY = 2  # milliseconds after an answer; a client in a loop, or a proxy under load, is back within one


class Worker(ThreadWorker):  # type: ignore[misc]
    def handle(self, conn: Any) -> Any:
        """As gunicorn's: whether the connection is kept. Else its main thread takes every socket back and hands it
        out again, which costs as much as reading and answering the request."""
        kept = super().handle(conn)
        while kept is True and self.alive and not conn.parser.unreader.buf.getvalue():
            poll = select.poll()
            poll.register(conn.sock, select.POLLIN)
            if not poll.poll(STAY):
                break
            kept = super().handle(conn)
        return kept
