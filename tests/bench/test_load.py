"""bench.load against real servers that behave and misbehave."""

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from bench.load import GOOD, HANG_UP, HUNG_UP, LOST, TIMED_OUT, WRONG, Generator, complete

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n" + b'"beagle"'
BODY = b"picture" * 9000  # more than one segment, more than a socket takes at once


class Server:
    """One thread a connection; `answer` gets the connection and the body of each request, False ends it."""

    def __init__(self, answer: Callable[[socket.socket, bytes], bool]) -> None:
        self.answer, self.connections, self.bodies = answer, 0, []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/predict"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        data = b""
        with connection, contextlib.suppress(OSError):
            while True:
                while b"\r\n\r\n" not in data:
                    if not (more := connection.recv(1 << 16)):
                        return
                    data += more
                head, _, data = data.partition(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                while len(data) < length:
                    if not (more := connection.recv(1 << 16)):
                        return
                    data += more
                self.bodies.append(data[:length])
                if not self.answer(connection, data[:length]):
                    return
                data = data[length:]

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[socket.socket, bytes], bool]], Server]]:
    started: list[Server] = []

    def start(answer: Callable[[socket.socket, bytes], bool]) -> Server:
        started.append(Server(answer))
        return started[-1]

    yield start
    for server in started:
        server.close()


def say(text: bytes, after: float = 0.0, keep: bool = True) -> Callable[[socket.socket, bytes], bool]:
    def answer(connection: socket.socket, _: bytes) -> bool:
        time.sleep(after)
        connection.sendall(text)
        return keep

    return answer


def statuses(generator: Generator) -> Counter[int]:
    return Counter(row.status for row in generator.rows)


def test_closed_loop_keeps_its_connections_and_its_number_of_calls(serve: Callable[..., Server]) -> None:
    server = serve(say(OK, after=0.05))
    generator = Generator(server.url, [BODY, b"other"], expect=[b"beagle"] * 2)
    generator.closed(3, 1.0)
    assert server.connections == 3
    assert set(server.bodies) == {BODY, b"other"}
    assert set(statuses(generator)) == {200}
    assert 30 <= len(generator.rows) <= 63  # 3 clients, 20 calls a second each
    assert all(row.seconds >= 0.05 for row in generator.rows)


def test_closed_loop_connects_again_where_the_server_closes(serve: Callable[..., Server]) -> None:
    closing = OK.replace(b"Content-Length", b"Connection: close\r\nContent-Length")
    server = serve(say(closing, after=0.02, keep=False))
    generator = Generator(server.url, [BODY])
    generator.closed(2, 0.5)
    assert set(statuses(generator)) == {200}
    assert server.connections == len(generator.rows) > 10


def test_an_idle_connection_closed_by_the_server_is_no_failed_call(serve: Callable[..., Server]) -> None:
    server = serve(say(OK, after=0.01, keep=False))  # it says nothing of closing
    generator = Generator(server.url, [BODY])
    generator.closed(1, 0.5)
    assert set(statuses(generator)) == {200}


def test_open_loop_is_timed_from_when_a_call_was_due(serve: Callable[..., Server]) -> None:
    lock = threading.Lock()

    def one_at_a_time(connection: socket.socket, _: bytes) -> bool:
        with lock:
            return say(OK, after=0.05)(connection, b"")

    server = serve(one_at_a_time)
    generator = Generator(server.url, [BODY])
    generator.open(40, 1.0)  # twice what it can
    assert len(generator.rows) == server.connections == 40
    assert [row.due for row in sorted(generator.rows, key=lambda row: row.due)] == pytest.approx(
        [i / 40 for i in range(40)]
    )
    assert max(row.seconds for row in generator.rows) == pytest.approx(1.0, abs=0.4)  # 2 s of work, due within 1 s


def test_what_fails_is_told_apart(serve: Callable[..., Server]) -> None:
    answers = [OK, OK.replace(b"beagle", b"poodle"), OK.replace(b"200 OK", b"503 Busy"), b""]

    def answer(connection: socket.socket, body: bytes) -> bool:
        connection.sendall(answers[int(body)])
        return bool(answers[int(body)])

    server = serve(answer)
    generator = Generator(server.url, [b"0", b"1", b"2", b"3"], expect=[b"beagle"] * 4)
    generator.open(40, 1.0)
    assert statuses(generator) == {200: 10, WRONG: 10, 503: 10, LOST: 10}


def test_nobody_there_and_nobody_who_answers(serve: Callable[..., Server]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    generator = Generator(f"http://127.0.0.1:{port}/predict", [BODY])
    generator.closed(2, 0.2)
    assert set(statuses(generator)) == {LOST}
    assert len(generator.rows) < 100
    silent = serve(say(b"", after=3))
    generator = Generator(silent.url, [BODY], timeout=0.3)
    began = time.monotonic()
    generator.open(20, 0.5)
    assert statuses(generator) == {TIMED_OUT: 10}
    assert time.monotonic() - began < 2


def test_a_refusal_before_the_body_was_read_is_an_answer(serve: Callable[..., Server]) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def refuse() -> None:
        for _ in range(5):
            connection, _ = listener.accept()
            connection.recv(100)
            connection.sendall(OK.replace(b"200 OK", b"503 Busy"))
            connection.shutdown(socket.SHUT_WR)
            threading.Timer(0.3, connection.close).start()

    threading.Thread(target=refuse, daemon=True).start()
    generator = Generator(f"http://127.0.0.1:{listener.getsockname()[1]}/", [BODY * 50], timeout=3)
    generator.open(10, 0.5)
    listener.close()
    assert statuses(generator) == {503: 5}


def test_bad_pictures_and_clients_that_hang_up_are_as_many_as_asked_for(serve: Callable[..., Server]) -> None:
    def answer(connection: socket.socket, body: bytes) -> bool:
        return say(OK if body == BODY else OK.replace(b"200 OK", b"400 Bad"), after=0.1)(connection, body)

    server = serve(answer)
    generator = Generator(server.url, [BODY], bad=2, hang_up=3)
    generator.open(100, 2.0)
    assert statuses(generator) == {200: 190, 400: 4, HUNG_UP: 6}
    assert {row.kind for row in generator.rows if row.status == 200} == {GOOD}
    assert {row.kind for row in generator.rows if row.status == HUNG_UP} == {HANG_UP}


@pytest.mark.parametrize(
    ("answer", "ended", "expected"),
    [
        (OK, False, (200, True)),
        (OK[:-1], False, None),
        (OK[:20], False, None),
        (OK.replace(b"HTTP/1.1", b"HTTP/1.0"), False, (200, False)),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", False, (200, True)),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", False, None),
        (b"HTTP/1.1 503 No\r\n\r\nsorry", False, None),
        (b"HTTP/1.1 503 No\r\n\r\nsorry", True, (503, True)),
        (b"HTTP/1.1 503 No\r\nCONNECTION: Close\r\ncontent-length: 0\r\n\r\n", False, (503, False)),
    ],
)
def test_complete(answer: bytes, ended: bool, expected: tuple[int, bool] | None) -> None:
    assert complete(answer, ended) == expected
