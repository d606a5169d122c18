"""Whether a request is here whole, from what lies in the socket: reading a whole one never waits."""

import socket
import time

import pytest

from gateway.turn import turn
from gateway.worker import _whole

POST = b"POST /predict HTTP/1.1\r\nHost: kennel\r\n"


@pytest.mark.parametrize(
    ("sent", "whole"),
    [
        (b"GET / HTTP/1.1\r\nHost: kennel\r\n\r\n", True),
        (POST + b"Content-Length: 5\r\n\r\nhello", True),
        (POST + b"content-length:5 \r\nAccept: */*\r\n\r\nhello", True),
        (POST + b"Content-Length: 5\r\n\r\nhelloGET / HTTP/1.1\r\n", True),  # and the next one has begun
        (POST + b"Content-Length: 200000\r\n\r\n" + bytes(200_000), True),
        (b"", False),
        (POST, False),
        (POST + b"Content-Length: 5\r\n\r\nhell", False),
        (POST + b"Content-Length: 200000\r\n\r\n" + bytes(199_999), False),
        (POST + b"X-Large: " + b"x" * 5000 + b"\r\n\r\n", False),  # more head than is looked at
        # What gunicorn may read otherwise than it is read here.
        (POST + b"Content-Length:\t5\r\n\r\n", False),
        (POST + b"Content-Length: 0\r\nContent-Length : 5\r\n\r\n", False),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", False),
    ],
)
def test_what_lies_in_the_socket(sent, whole, monkeypatch):
    monkeypatch.setattr(turn, "_until", time.monotonic() + 60)  # there are refusals
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        theirs.sendall(sent)
        assert _whole(ours) is whole
        monkeypatch.setattr(turn, "_until", 0.0)
        assert _whole(ours) is False  # nobody need know
        theirs.close()
        got = b""
        while data := ours.recv(1 << 16):  # looking took nothing away
            got += data
        assert got == sent
