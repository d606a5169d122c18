"""Calls that come as a crowd's do: at random, at a rate that may change, over HTTP or as a gateway's over gRPC.

    python -m capacity.load --http http://127.0.0.1:8080/predict --bodies photo.jpg --rate 0:20,60:100 --log calls.tsv
    python -m capacity.load --grpc 127.0.0.1:7070 --bundle build/bundles/dog-breeds --clients 16 --seconds 5 --log ...

Arrivals are Poisson: even ones, as bench.load has them, never meet, and would let a replica look better than it is.
Latency counts from the moment a call was due. The log is bench.load's.
"""

import argparse
import contextlib
import itertools
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bench.load import GOOD, LOST, TIMED_OUT, Generator, Row, write
from bundle.golden import draw
from bundle.manifest import Manifest
from bundle.manifest import read as read_bundle
from capacity.measured import Floats
from gateway.client import Client
from gateway.errors import Overloaded, Problem, TimedOut
from gateway.models import Model
from gateway.settings import Settings

MOST = 512  # pictures under way to a model server: more than one that keeps the objective ever has
DEADLINE = Settings.deadline_seconds
Knots = Sequence[tuple[float, float]]  # second, calls a second; straight lines between them


def arrivals(knots: Knots, seed: int) -> Floats:
    """Seconds at which calls are due: a Poisson process of that rate, by the inverse of its integral."""
    grid = np.arange(knots[0][0], knots[-1][0], 0.01)
    due = np.cumsum(np.interp(grid, [second for second, _ in knots], [rate for _, rate in knots])) * 0.01
    random, found = np.random.default_rng(seed), np.zeros(0)
    while not len(found) or found[-1] < due[-1]:
        gaps = random.exponential(size=int(due[-1] - (found[-1] if len(found) else 0)) + 100)
        found = np.concatenate([found, np.cumsum(gaps) + (found[-1] if len(found) else 0)])
    seconds: Floats = np.interp(found[found < due[-1]], due, grid)
    return seconds


class Decoded(Model):
    """A gateway's model, for pictures that are pixels already."""

    def _decode(self, data: bytes, *_: Any) -> bytes:
        return data


class Gateway:
    """Calls of a model server with drawn pixels, as one gateway makes them that has nothing else to do."""

    def __init__(self, target: str, manifest: Manifest) -> None:
        resize = manifest.input.resize
        self._pixels = [picture.tobytes() for picture in draw(8, resize.height, resize.width, seed=5)]
        self._model = Decoded(manifest.name, Client(target, MOST), ThreadPoolExecutor(), 0)
        self._number, self.rows = itertools.count(), list[Row]()

    def first_answer(self) -> None:
        """Asks until there is one."""
        while True:
            with contextlib.suppress(Problem):
                self._model.current(time.monotonic() + 2)
                return
            time.sleep(0.02)

    def at(self, times: Iterable[float]) -> None:
        """As bench.load's."""
        start = time.perf_counter()
        with ThreadPoolExecutor(MOST) as threads:
            for due in times:
                while (wait := due - (time.perf_counter() - start)) > 0:
                    time.sleep(wait)
                threads.submit(self._call, start, due)

    def closed(self, clients: int, seconds: float) -> None:
        """As bench.load's."""
        start = time.perf_counter()

        def client() -> None:
            while (now := time.perf_counter() - start) < seconds:
                self._call(start, now)

        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _call(self, start: float, due: float) -> None:
        pixels = self._pixels[next(self._number) % len(self._pixels)]
        try:
            self._model.predict(pixels, time.monotonic() + DEADLINE, lambda *_: None, lambda *_: None)
            status = 200
        except Overloaded:
            status = 503
        except TimedOut:
            status = TIMED_OUT
        except Problem:
            status = LOST
        self.rows.append(Row(due, time.perf_counter() - start - due, status, GOOD))


def knots(text: str) -> Knots:
    """second:rate,second:rate,... Raises ValueError, as argparse wants it."""
    found = [(float(second), float(rate)) for second, rate in (part.split(":") for part in text.split(","))]
    if len(found) < 2 or any(a[0] >= b[0] for a, b in itertools.pairwise(found)) or min(r for _, r in found) < 0:
        raise ValueError
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="capacity.load", description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--http", help="URL that takes a picture")
    where.add_argument("--grpc", help="host:port of a model server")
    parser.add_argument("--bodies", type=Path, nargs="+", default=[], help="pictures, sent in turn")
    parser.add_argument("--bundle", type=Path, help="what the model server serves")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--rate", type=knots, help="second:rate,second:rate,...")
    how.add_argument("--clients", type=int, help="who call again as soon as they have their answer")
    how.add_argument("--first-answer", action="store_true", help="print the Unix seconds when a model server has one")
    parser.add_argument("--seconds", type=float, default=5.0, help="of --clients")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--say", action="store_true", help="print the Unix seconds when the first call could be due")
    parser.add_argument("--log", type=Path, help="a row a call: due, seconds, status, kind")
    args = parser.parse_args(arguments)
    load: Generator | Gateway
    if args.http:
        if not args.bodies:
            parser.error("--http needs --bodies: pictures to send")
        load = Generator(args.http, [path.read_bytes() for path in args.bodies])
    else:
        if not args.bundle:
            parser.error("--grpc needs --bundle: what the model server serves")
        load = Gateway(args.grpc, read_bundle(args.bundle))
        if args.first_answer:
            load.first_answer()
            print(time.time(), flush=True)
            return
    if args.say:
        print(time.time(), flush=True)
    if args.clients:
        load.closed(args.clients, args.seconds)
    else:
        load.at(arrivals(args.rate, args.seed).tolist())
    if args.log:
        write(args.log, load.rows)


if __name__ == "__main__":
    main()
