"""A plain POST is read and answered without gunicorn's parser, environ and response, which are a third of what Python
does between two pictures (docs/speed.md).

Plain is what programs and proxies send. Whatever is not, or could be read in two ways, is left to gunicorn: other
methods and versions, escapes in paths, chunks, Expect, Upgrade, headers that come twice or with unusual signs.
"""

import functools
import re
import socket
import time
from email.utils import formatdate
from typing import Any, NamedTuple

import gunicorn

from gateway.front import App, Environ

# Names have no underscore: in an environ it would be the same as a hyphen.
HEADER = rb"[A-Za-z0-9-]{1,64}:[\t -~]{0,4096}\r\n"
TARGET = rb"(/[A-Za-z0-9._:-][A-Za-z0-9._:/-]*)(?:\?([A-Za-z0-9._~:/=&+%-]*))?"
HEAD = re.compile(rb"POST (%b) HTTP/1\.1\r\n((?:%b){1,50})\r\n" % (TARGET, HEADER))
LENGTH = re.compile(r"[0-9]{1,12}")
CONNECTION = ("keep-alive", "close")
FRAMING = frozenset(("HTTP_TRANSFER_ENCODING", "HTTP_EXPECT", "HTTP_UPGRADE", "HTTP_TRAILER"))
CONSTANT = {
    "REQUEST_METHOD": "POST",
    "SERVER_PROTOCOL": "HTTP/1.1",
    "SCRIPT_NAME": "",
    "wsgi.url_scheme": "http",
    "wsgi.multithread": True,
}


class Body:
    """wsgi.input: so many bytes, of which `come` are the first."""

    def __init__(self, sock: socket.socket, come: bytes, length: int) -> None:
        self._sock, self._come, self.left = sock, come, length

    def read(self, size: int) -> bytes:
        """As many, or less where the client has gone."""
        size = min(size, self.left)
        if self._come:
            chunk, self._come = self._come[:size], self._come[size:]
        else:
            chunk = self._sock.recv(size, socket.MSG_WAITALL)
        self.left -= len(chunk)
        return chunk


class Request(NamedTuple):
    environ: Environ
    body: Body
    ahead: bytes  # what follows it
    last: bool  # the client wants the connection closed once it is answered


def read(data: bytes, conn: Any, base: Environ) -> Request | None:
    """What has come of a request -> the request; None where it is not plain.

    conn: gunicorn's, of which the rest of the body is read; base: what all its requests have in their environ.
    """
    head = HEAD.match(data)
    if not head:
        return None
    target, path, query, rest = (part.decode() for part in head.groups(b""))
    lines = rest.split("\r\n")[:-1]
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers["HTTP_" + name.upper().replace("-", "_")] = value.strip(" \t")
    length = headers.pop("HTTP_CONTENT_LENGTH", "")
    twice = len(headers) + 1 != len(lines)
    connection = headers.get("HTTP_CONNECTION", "keep-alive").lower()
    if twice or connection not in CONNECTION or not LENGTH.fullmatch(length) or not FRAMING.isdisjoint(headers):
        return None
    end = head.end() + int(length)
    body = Body(conn.sock, data[head.end() : end], int(length))
    environ = base | headers | {"RAW_URI": target, "PATH_INFO": path, "QUERY_STRING": query}
    environ |= {"CONTENT_LENGTH": length, "wsgi.input": body}
    if "HTTP_CONTENT_TYPE" in headers:
        environ["CONTENT_TYPE"] = environ.pop("HTTP_CONTENT_TYPE")
    environ["gunicorn.socket"] = conn.sock
    environ["REMOTE_ADDR"], environ["REMOTE_PORT"] = conn.client[0], str(conn.client[1])
    environ["SERVER_NAME"], environ["SERVER_PORT"] = conn.server[0], str(conn.server[1])
    return Request(environ, body, data[end:], connection == "close")


def answer(app: App, environ: Environ, *server: str) -> bytes:
    """All that is sent. server: the lines of the head that are not the app's."""
    said: list[Any] = []
    chunks = app(environ, lambda *status_and_headers: said.extend(status_and_headers))
    try:
        body = b"".join(chunks)
    finally:
        getattr(chunks, "close", lambda: None)()
    status, headers = said
    lines = (f"HTTP/1.1 {status}", *server, *(f"{name}: {value}" for name, value in headers), "", "")
    return "\r\n".join(lines).encode("latin-1") + body


def server(keep: bool) -> tuple[str, ...]:
    """As gunicorn has them. keep: whether the client is told that the connection stays open."""
    connection = "keep-alive" if keep else "close"
    return f"Server: {gunicorn.SERVER}", f"Date: {_date(int(time.time()))}", f"Connection: {connection}"


@functools.lru_cache(1)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)
