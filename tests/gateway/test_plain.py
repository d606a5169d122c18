"""A plain request is read as gunicorn would read it, or left to gunicorn."""

import random
import socket
from types import SimpleNamespace

import pytest
from gunicorn import http
from gunicorn.config import Config
from gunicorn.http import wsgi

from gateway import plain

CLIENT, SERVER = ("10.0.0.9", 40000), ("10.0.0.1", 8080)
CONFIG = Config()
BASE = wsgi.base_environ(CONFIG) | plain.CONSTANT
POST = b"POST /predict HTTP/1.1\r\nHost: kennel\r\nContent-Length: 5\r\n"
APART = {"wsgi.input", "wsgi.errors", "gunicorn.socket", "wsgi.early_hints"}  # each reading has its own


def read_plainly(data, later=b""):
    """(environ, body, what is left, whether it is the last), or None. later: what comes by the socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        request = plain.read(data, SimpleNamespace(sock=ours, client=CLIENT, server=SERVER), BASE)
        if not request:
            return None
        theirs.sendall(later)
        theirs.close()
        body = b""
        while chunk := request.body.read(3):
            body += chunk
        assert request.environ["wsgi.input"] is request.body
        assert request.body.left == int(request.environ["CONTENT_LENGTH"]) - len(body)
        return _apart(request.environ), body, request.ahead, request.last


def read_by_gunicorn(data):
    """(environ, body, what is left, whether it is the last), or None where it refuses."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.close()
        parser = http.get_parser(CONFIG, ours, CLIENT)
        try:
            request = next(parser)
            environ = wsgi.create(request, ours, CLIENT, SERVER, CONFIG)[1] | {"wsgi.multithread": True}
            body = environ["wsgi.input"].read()
        except Exception:  # all of gunicorn's
            return None
        left = parser.unreader.take_buffered()
        while more := ours.recv(1 << 16):
            left += more
        return _apart(environ), body, left, request.should_close()


def _apart(environ):
    return {key: value for key, value in environ.items() if key not in APART}


HEADERS = [
    b"Host: kennel",
    b"Content-Length: 5",
    b"content-length:5",
    b"Content-Length: 0",
    b"Content-Length: 05",
    b"Content-Length: +5",
    b"Content-Length: 5, 5",
    b"Content-Length : 5",
    b"Content-Length:",
    b"Content-Type: image/jpeg",
    b"Connection: keep-alive",
    b"Connection: Keep-Alive",
    b"Connection: close",
    b"Connection: upgrade",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: identity",
    b"transfer_encoding: chunked",
    b"Content_Length: 7",
    b"Expect: 100-continue",
    b"Upgrade: h2c",
    b"HTTP2-Settings: AAMAAABkAAQAAP__",
    b"Trailer: X",
    b"Script-Name: /predict",
    b"X-Forwarded-For: 1.2.3.4, 5.6.7.8",
    b"X-Forwarded-Proto: https",
    b"Authorization: Basic OmtleQ==",
    b"X-Request-Id:\t a b \t",
    b"X-Empty:",
    b"X-Long: " + b"x" * 5000,
    b"X-Latin: caf\xe9",
    b"X-Zero: \0",
    b"X-Return: a\rb",
    b" folded",
    b"X y: z",
    b": nothing",
    b"nothing",
    b"",
]
LINES = [
    b"POST /predict HTTP/1.1",
    b"POST /predict HTTP/1.1",
    b"POST /v1/models/dog-breeds:predict HTTP/1.1",
    b"POST //predict HTTP/1.1",
    b"POST /predict/../x HTTP/1.1",
    b"POST /predict?top_k=3&model=dog%2Dbreeds HTTP/1.1",
    b"POST /predict? HTTP/1.1",
    b"POST /predict?a?b HTTP/1.1",
    b"POST /predict?u=http://kennel//predict HTTP/1.1",
    b"POST /predict?a=1#b HTTP/1.1",
    b"POST ?a=1 HTTP/1.1",
    b"POST /pre%64ict HTTP/1.1",
    b"POST /predict#x HTTP/1.1",
    b"POST http://kennel/predict HTTP/1.1",
    b"POST  /predict HTTP/1.1",
    b"POST /predict HTTP/1.0",
    b"POST /predict HTTP/1.1 ",
    b"post /predict HTTP/1.1",
    b"PUT /predict HTTP/1.1",
    b"GET / HTTP/1.1",
    b"",
]


def test_it_is_read_as_gunicorn_reads_it_or_not_at_all():
    chance, plainly = random.Random(0), 0
    for _ in range(10_000):
        headers = [*chance.choices(HEADERS[:3], k=2), *chance.choices(HEADERS, k=chance.randrange(4))]
        chance.shuffle(headers)
        body = chance.choice([b"", b"hell", b"hello", b"hello" + POST, b"5\r\nhello\r\n0\r\n\r\n"])
        data = chance.choice([b"\r\n"] * 9 + [b"\n"]).join([chance.choice([LINES[0], *LINES]), *headers, b"", body])
        if found := read_plainly(data):
            assert found == read_by_gunicorn(data), data
            plainly += 1
    assert plainly > 300  # neither all nor none


PLAIN = [
    POST,
    POST + b"Accept: */*\r\nUser-Agent: curl/8.5.0\r\nContent-Type: application/x-www-form-urlencoded\r\n",
    POST + b"User-Agent: python-requests/2.32\r\nAccept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\n",
    POST.replace(b"/predict", b"/predict?model=dog-breeds&top_k=3"),
    POST + b"Accept-Encoding: identity\r\nConnection: close\r\n",
    POST + b"X-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Proto: https\r\nVia: 1.1 google\r\nX-Cloud-Trace-Context: 1/2\r\n",
]


@pytest.mark.parametrize("head", PLAIN)
def test_what_programs_and_proxies_send_is_plain(head):
    data = head + b"\r\nhello" + POST
    assert read_plainly(data) == read_by_gunicorn(data)
    assert read_plainly(data)[1:3] == (b"hello", POST)


@pytest.mark.parametrize("come", [0, 2, 5])
def test_the_rest_of_a_body_is_read_from_the_socket(come):
    assert read_plainly(POST + b"\r\n" + b"hello"[:come], b"hello"[come:] + POST)[1:] == (b"hello", b"", False)
    assert read_plainly(POST + b"\r\n" + b"hello"[:come], b"")[1:] == (b"hello"[:come], b"", False)
