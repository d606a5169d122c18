"""What clients do with their connections: slow ones keep nobody waiting, none loses an answer."""

import contextlib
import socket
import struct
import time

import pytest
import requests
from tiny import WAYS, picture

from gateway.turn import SECONDS

PICTURE = picture("red", 300, 200, "JPEG")
PATHS = (*WAYS, "/%70redict")  # the last is read and answered by gunicorn's own parser, the others by gateway/plain.py


@contextlib.contextmanager
def connections(gateway, count):
    host, port = gateway.url.removeprefix("http://").split(":")
    socks = [socket.create_connection((host, int(port)), 10) for _ in range(count)]
    try:
        yield socks
    finally:
        for sock in socks:
            sock.close()


def request(body=PICTURE, path="/predict", **headers):
    lines = {"Host": "kennel", "Content-Type": "image/jpeg", "Content-Length": len(body)} | headers
    head = "".join(f"{key}: {value}\r\n" for key, value in lines.items() if value is not None)
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def answers(sock, count):
    """Statuses and bodies of so many answers on one connection."""
    with sock.makefile("rb") as file:
        for _ in range(count):
            status = int(file.readline().split()[1])
            length = 0
            while (line := file.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            yield status, file.read(length)


def quickly(gateway):
    """A good answer, in seconds."""
    started = time.monotonic()
    response = requests.post(f"{gateway.url}/predict?model=tiny", data=PICTURE, timeout=10)
    assert response.json()["label"] == "red"
    return time.monotonic() - started


@pytest.mark.parametrize("begun", [b"", request()[:40], request()[:-10]], ids=["silent", "half a head", "half a body"])
def test_clients_who_stop_in_the_middle_keep_nobody_waiting(gateway, begun):
    """A third of the threads that a process has."""
    with connections(gateway, 20) as socks:
        for sock in socks:
            sock.sendall(begun)
        assert max(quickly(gateway) for _ in range(10)) < 1.5
        socks[0].sendall(request()[len(begun) :])
        assert next(answers(socks[0], 1))[0] == 200


def test_more_silent_connections_than_threads_keep_nobody_waiting(gateway):
    with connections(gateway, 200) as socks:
        assert max(quickly(gateway) for _ in range(5)) < 1.5
        socks[-1].sendall(request())
        assert next(answers(socks[-1], 1))[0] == 200


@pytest.fixture
def calm(gateway):
    """When nothing was refused for a while: requests are read otherwise then."""
    time.sleep(SECONDS)
    return gateway


@pytest.mark.parametrize("path", PATHS)
def test_a_request_that_comes_in_pieces(calm, path):
    sent = request(path=path)
    pieces = [sent[:40], sent[40:-500], *(sent[at : at + 100 or None] for at in range(-500, 0, 100))]
    with connections(calm, 1) as (sock,):
        for _ in range(3):  # what follows on a connection is read otherwise
            for piece in pieces:
                sock.sendall(piece)
                time.sleep(0.03)  # longer than a thread waits for another request
            assert next(answers(sock, 1))[0] == 200


@pytest.mark.parametrize("path", WAYS)
def test_an_answer_comes_in_one_piece(gateway, path):
    with connections(gateway, 1) as (sock,):
        for count in range(1, 4):
            sock.sendall(request(path=path))
            assert next(answers(sock, 1))[0] == 200
            told = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160)
            assert struct.unpack_from("I", told, 152)[0] == count  # tcpi_data_segs_in of linux/tcp.h


def test_a_client_who_is_gone_after_an_answer_leaves_nothing(gateway):
    for _ in range(200):  # more than there are threads
        with connections(gateway, 1) as (sock,):
            sock.sendall(request(b"no picture"))
            assert next(answers(sock, 1))[0] == 415
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0" + bytes(4))  # with a reset
    assert quickly(gateway) < 1


@pytest.mark.parametrize("path", PATHS)
def test_one_connection_for_many_requests_waiting_between_them_or_not(gateway, path):
    with connections(gateway, 1) as (sock,):
        for pause in (0, 0, 0.001, 0.05, 0.2, 0):  # shorter and longer than a thread stays with a connection
            time.sleep(pause)
            sock.sendall(request(path=path))
            assert next(answers(sock, 1))[0] == 200


@pytest.mark.parametrize("path", PATHS)
def test_requests_sent_before_the_answers_have_come(gateway, path):
    with connections(gateway, 1) as (sock,):
        sock.sendall(request(path=path) + request(b"no picture", path) + request(path=path, Connection="close"))
        assert [status for status, _ in answers(sock, 3)] == [200, 415, 200]
        assert sock.recv(1) == b""


@pytest.mark.parametrize("path", PATHS)
def test_a_body_in_chunks(gateway, path):
    with connections(gateway, 1) as (sock,):
        chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(PICTURE), PICTURE)
        sock.sendall(request(chunks, path, **{"Content-Length": None, "Transfer-Encoding": "chunked"}))
        assert next(answers(sock, 1))[0] == 200


@pytest.mark.parametrize("path", PATHS)
def test_refused_clients_who_go_on_are_answered_on_the_same_connection(gateway, path):
    with connections(gateway, 1) as (sock,):
        for body, status in ((b"", 415), (PICTURE[: len(PICTURE) // 2], 422), (PICTURE, 200)):
            sock.sendall(request(body, path))
            assert next(answers(sock, 1))[0] == status


def test_what_is_not_http_is_told_so_and_not_cut_off(gateway):
    """To close with something unread resets the connection, and with some systems the answer is gone with it."""
    with connections(gateway, 1) as (sock,):
        sock.sendall(b"NONSENSE\r\n\r\n" + bytes(50_000))
        assert next(answers(sock, 1))[0] == 400
        assert sock.recv(1) == b""
