"""The load generator: closed loop (clients that wait) or open loop (calls at a rate, whatever comes back).

    python -m bench.load http://127.0.0.1:8080/predict photo.jpg --clients 32 --seconds 10 --log calls.tsv

One thread over epoll and raw sockets. wrk has no open loop and no latency by status, h2load (1.52) never ends
where a server closes its connections and leaves waiting for a connection out of its times; hey has neither. This
one costs 0.15 ms of CPU a call with a body of 40 kB, which every record states as measured; images/s are wrk's
(Mosec, 32 clients, three turns each: 78 to 109 and 81 to 115).

Open loop: every call is another user, with a connection of its own, timed from the moment it was due; so a server
that accepts nothing, or a late generator, makes the latency longer and not the load smaller.
"""

import argparse
import contextlib
import json
import resource
import selectors
import socket
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

LOST, TIMED_OUT, HUNG_UP, WRONG = 0, -1, -2, -3  # in the place of an HTTP status
GOOD, BAD, HANG_UP = 0, 1, 2  # kinds of a call
HANG_UP_SECONDS = 0.02  # after which a client that hangs up does: while its picture is being worked on
HUNDRED = 100


@dataclass
class Call:
    """One request under way."""

    due: float
    kind: int
    body: int
    request: memoryview
    sock: socket.socket
    reused: bool
    answer: bytearray = field(default_factory=bytearray)
    over: bool = False


@dataclass(frozen=True)
class Row:
    """One call that ended: seconds since the start, seconds it took, HTTP status or one of the above, its kind."""

    due: float
    seconds: float
    status: int
    kind: int


@dataclass
class Generator:
    """Calls one address. `rows` has every call that ended, in that order."""

    url: str
    bodies: Sequence[bytes]  # sent in turn
    content_type: str = "image/jpeg"
    expect: Sequence[bytes] = ()  # for each body, what every right answer contains
    timeout: float = 10.0  # seconds after which a client gives up
    bad: int = 0  # of a hundred calls, how many send half a picture
    hang_up: int = 0  # of a hundred calls, how many are given up after HANG_UP_SECONDS
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        url = urlsplit(self.url)
        self._address = (url.hostname or "127.0.0.1", url.port or 80)
        self._head = f"POST {url.path} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: {self.content_type}\r\n"
        self._selector = selectors.DefaultSelector()
        self._requests: dict[tuple[int, bool, bool], bytes] = {}
        self._made, self._running = 0, 0
        self._waiting: deque[Call] = deque()  # by the time they were made, which is that of their timeouts
        self._hanging: deque[Call] = deque()

    def closed(self, clients: int, seconds: float) -> None:
        """Each client calls again as soon as it has its answer."""
        self._begin()
        self._until, self._keep = seconds, True
        for _ in range(clients):
            self._call(self._now(), None)
        while self._running:
            self._turn(0.1)

    def open(self, rate: float, seconds: float) -> None:
        """`rate` calls a second, evenly; then waits for the answers that are missing."""
        self.at(i / rate for i in range(round(rate * seconds)))

    def at(self, times: Iterable[float]) -> None:
        """Calls at these seconds from now, in order; then waits for the answers that are missing."""
        self._begin()
        self._until, self._keep = 0.0, False
        for due in times:
            while (wait := due - self._now()) > 0:
                self._turn(min(wait, 0.1))
            self._call(due, None)
            self._turn(0)
        while self._running:
            self._turn(0.1)

    def _begin(self) -> None:
        self._start = time.perf_counter()

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def _call(self, due: float, sock: socket.socket | None) -> None:
        place, body = self._made % HUNDRED, self._made % len(self.bodies)
        self._made += 1
        # Spread over the hundred, by a step that has no divisor in common with it.
        mixed = place * 37 % HUNDRED
        kind = BAD if mixed < self.bad else HANG_UP if mixed < self.bad + self.hang_up else GOOD
        reused = sock is not None
        if sock is None:
            sock = socket.socket()
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(BlockingIOError):
                sock.connect(self._address)
        call = Call(due, kind, body, memoryview(self._request(body, kind)), sock, reused)
        self._running += 1
        self._waiting.append(call)
        if kind == HANG_UP:
            self._hanging.append(call)
        if reused:
            self._send(call)
        else:
            self._selector.register(sock, selectors.EVENT_WRITE, call)

    def _request(self, number: int, kind: int) -> bytes:
        key = (number, kind == BAD, self._keep)
        if key not in self._requests:
            body = self.bodies[number]
            body = body[: len(body) // 2] if kind == BAD else body
            close = "" if self._keep else "Connection: close\r\n"
            self._requests[key] = f"{self._head}{close}Content-Length: {len(body)}\r\n\r\n".encode() + body
        return self._requests[key]

    def _turn(self, wait: float) -> None:
        """What has happened on the sockets, and whose time is over."""
        for key, events in self._selector.select(wait):
            call: Call = key.data
            if events & selectors.EVENT_WRITE:
                self._send(call)
            if events & selectors.EVENT_READ and not call.over:
                self._receive(call)
        now = self._now()
        while self._hanging and (self._hanging[0].over or now - self._hanging[0].due > HANG_UP_SECONDS):
            self._end(self._hanging.popleft(), HUNG_UP)
        while self._waiting and (self._waiting[0].over or now - self._waiting[0].due > self.timeout):
            self._end(self._waiting.popleft(), TIMED_OUT)

    def _send(self, call: Call) -> None:
        try:
            call.request = call.request[call.sock.send(call.request) :]
        except BlockingIOError:
            pass
        except OSError:
            if not self._answered(call):
                self._end(call, LOST)
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if call.request else 0)
        try:
            self._selector.modify(call.sock, events, call)
        except KeyError:
            self._selector.register(call.sock, events, call)

    def _answered(self, call: Call) -> bool:
        """Whether an answer had come before the server closed the connection under the request."""
        with contextlib.suppress(OSError):
            while data := call.sock.recv(1 << 16):
                call.answer += data
        if (found := complete(call.answer, ended=True)) is None:
            return False
        self._finish(call, found[0], keep=False)
        return True

    def _receive(self, call: Call) -> None:
        try:
            data = call.sock.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            self._end(call, LOST)
            return
        call.answer += data
        found = complete(call.answer, ended=not data)
        if found:
            self._finish(call, found[0], keep=found[1] and bool(data))
        elif not data:
            self._end(call, LOST)

    def _finish(self, call: Call, status: int, keep: bool) -> None:
        if status == 200 and call.kind == GOOD and self.expect and self.expect[call.body] not in call.answer:
            status = WRONG
        self._end(call, status, keep and self._keep and not call.request)

    def _end(self, call: Call, status: int, keep: bool = False) -> None:
        if call.over:
            return
        call.over, now = True, self._now()
        self._running -= 1
        if not keep:
            with contextlib.suppress(KeyError):
                self._selector.unregister(call.sock)
            call.sock.close()
        if status == LOST and call.reused and not call.answer and now < self._until:
            self._call(call.due, None)  # the server closed an idle connection just then: as every client, once more
            return
        self.rows.append(Row(call.due, now - call.due, status, call.kind))
        if now < self._until:
            if status == LOST:
                time.sleep(0.01)  # nobody is there: do not spin
            self._call(now, call.sock if keep else None)
        elif keep:
            self._selector.unregister(call.sock)
            call.sock.close()


def complete(answer: bytes | bytearray, ended: bool) -> tuple[int, bool] | None:
    """HTTP status and whether the connection may be used again; None where something is still to come.

    ended: the server has closed its side. RFC 9112, section 6.3, without trailers.
    """
    head_end = answer.find(b"\r\n\r\n")
    if head_end < 0:
        return None
    lines = bytes(answer[:head_end]).lower().split(b"\r\n")
    headers = dict(line.split(b":", 1) for line in lines[1:])
    status, rest = int(lines[0].split()[1]), len(answer) - head_end - 4
    keep = lines[0].startswith(b"http/1.1") and headers.get(b"connection", b"").strip() != b"close"
    if b"content-length" in headers:
        done = rest >= int(headers[b"content-length"])
    elif b"chunked" in headers.get(b"transfer-encoding", b""):
        done = answer.endswith(b"0\r\n\r\n")
    else:
        done = ended
    return (status, keep) if done else None


def write(log: Path, rows: Iterable[Row]) -> None:
    """A row a call, as bench.figures reads them: due, seconds, status, kind."""
    with log.open("w") as file:
        file.writelines(f"{row.due:.6f}\t{row.seconds:.6f}\t{row.status}\t{row.kind}\n" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.load", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("bodies", type=Path, nargs="+")
    parser.add_argument("--content-type", default="image/jpeg")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--clients", type=int, help="closed loop")
    how.add_argument("--rate", type=float, help="open loop, calls a second")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--timeout", type=float, default=10.0)
    parser.add_argument("--expect", action="append", default=[], help="for each body, a part of every right answer")
    parser.add_argument("--bad", type=int, default=0)
    parser.add_argument("--hang-up", type=int, default=0)
    parser.add_argument("--log", type=Path, required=True, help="a row a call: due, seconds, status, kind")
    args = parser.parse_args(arguments)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    generator = Generator(
        args.url,
        [path.read_bytes() for path in args.bodies],
        args.content_type,
        [text.encode() for text in args.expect],
        args.timeout,
        args.bad,
        args.hang_up,
    )
    before = time.process_time()
    if args.clients:
        generator.closed(args.clients, args.seconds)
    else:
        generator.open(args.rate, args.seconds)
    cpu = time.process_time() - before
    write(args.log, generator.rows)
    print(json.dumps({"cpu_seconds": cpu, "calls": len(generator.rows)}))


if __name__ == "__main__":
    main()
