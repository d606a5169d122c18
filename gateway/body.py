"""Reads every request's body before the app runs, so that an answer given early is an answer received.

A server that answers while a client still sends closes the connection under it, and the client
sees a reset instead of the 413. So a body over the limit is read too, and thrown away, up to a
point; then the app is told through the environ.
"""

import time
from collections.abc import Callable, Iterable
from io import BytesIO
from typing import Any

TOO_LARGE = "kennel.body_too_large"  # environ: the request body is over the limit
CUT_OFF = "kennel.body_cut_off"  # environ: the client sent less than it announced
READ_SECONDS = "kennel.read_seconds"  # environ: how long reading took

CHUNK = 1 << 18
# How much of a refused body is read. Beyond it the connection is closed: somebody means no good.
DRAINED = 512 << 20

Environ = dict[str, Any]
App = Callable[[Environ, Callable[..., Any]], Iterable[bytes]]


class Body:
    """WSGI middleware: bodies of at most `limit` bytes come whole, others not at all."""

    def __init__(self, app: App, limit: int) -> None:
        self.app, self.limit = app, limit

    def __call__(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        started = time.perf_counter()
        body = self._read(environ)
        environ[READ_SECONDS] = time.perf_counter() - started
        environ["wsgi.input"] = BytesIO(body)
        environ["CONTENT_LENGTH"] = str(len(body))
        environ.pop("HTTP_TRANSFER_ENCODING", None)
        return self.app(environ, start_response)

    def _read(self, environ: Environ) -> bytes:
        chunked = environ.get("wsgi.input_terminated") or environ.get("HTTP_TRANSFER_ENCODING")
        length = environ.get("CONTENT_LENGTH", "")
        announced = int(length) if length.isdigit() else None
        if announced is None and not chunked:
            return b""
        stream, chunks, read = environ["wsgi.input"], [], 0
        while announced is None or read < announced:
            chunk = stream.read(CHUNK if announced is None else min(CHUNK, announced - read))
            if not chunk:
                break
            read += len(chunk)
            if max(read, announced or 0) <= self.limit:
                chunks.append(chunk)
            else:
                chunks.clear()
                environ[TOO_LARGE] = True
                if read > DRAINED:
                    break
        if announced is not None and read < announced and read <= DRAINED:
            environ[CUT_OFF] = True
        return b"".join(chunks)
