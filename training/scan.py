"""Reads every listed picture once, in worker processes: its hash and thumbnail, or why it cannot be read."""

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import TypeVar

from tqdm import tqdm

from bundle import picture
from bundle.manifest import sha256
from training import duplicates, sources
from training.sources import DataError, Found, Source

T = TypeVar("T")
Seen = tuple[str, bytes] | str  # sha256 and thumbnail, or the reason why there are none
# So many chunks are read here before processes are started, which takes longer than a small set.
FEW = 8
LINE_S = 10  # between two lines of progress


def scan(source: Source, found: Iterable[Found], workers: int) -> Iterator[tuple[Found, Seen]]:
    """Each picture, without its data, and what was seen; in order, with two chunks a worker in memory at most."""
    chunks = sources.chunks(found)
    few = deque(islice(chunks, FEW))
    small = len(few) < FEW or workers < 1
    chunks = chain((few.popleft() for _ in range(len(few))), chunks)  # not kept: chunks may hold their pictures
    if small:
        for chunk in chunks:
            yield from _paired(chunk, _look(source, chunk))
        return
    # Not forked: the caller may have threads, of torch or of a bucket's client.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start)
    flying: deque[tuple[list[Found], Future[list[Seen]]]] = deque()
    try:
        for chunk in chunks:
            flying.append((chunk, pool.submit(_look, source, chunk)))
            if len(flying) >= 2 * workers:
                yield from _landed(flying)
        while flying:
            yield from _landed(flying)
    except BrokenProcessPool as exc:
        raise DataError(
            f"{source.root}: a process that reads its pictures could not start, or was ended from outside: "
            "was there too little memory? Ask for fewer workers"
        ) from exc
    finally:
        pool.shutdown(cancel_futures=True)


def shown(items: Iterable[T], total: int | None, what: str, progress: bool = True) -> Iterator[T]:
    """Passes items on; with progress on stderr: a bar on a terminal, elsewhere a plain line every ten seconds."""
    if not progress:
        yield from items
        return
    if sys.stderr.isatty():
        yield from tqdm(items, what, total, unit="")
        return
    start = last = time.monotonic()
    count = 0
    for count, item in enumerate(items, 1):
        yield item
        if (now := time.monotonic()) - last >= LINE_S:
            last = now
            of = f" of {total:,}" if total else ""
            print(f"{what}: {count:,}{of}, {count / (now - start):.0f}/s", file=sys.stderr, flush=True)
    print(f"{what}: {count:,} in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def _landed(flying: deque[tuple[list[Found], Future[list[Seen]]]]) -> Iterator[tuple[Found, Seen]]:
    chunk, future = flying.popleft()
    yield from _paired(chunk, future.result())


def _paired(chunk: list[Found], seen: list[Seen]) -> Iterator[tuple[Found, Seen]]:
    for one, of_it in zip(chunk, seen, strict=True):
        yield replace(one, data=None), of_it


def _start() -> None:
    """What a worker does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    # It holds both ends of its queue, so it would wait for ever for a parent that was killed.
    if parent := parent_process():
        threading.Thread(target=lambda: wait([parent.sentinel]) and os._exit(1), daemon=True).start()


def _look(source: Source, chunk: list[Found]) -> list[Seen]:
    """Runs in a worker."""
    unread = [one for one in chunk if one.data is None and one.label]
    read = dict(zip((one.key for one in unread), source.read(unread), strict=True)) if unread else {}
    return [_look_at(source, one, one.data if one.data is not None else read.get(one.key, b"")) for one in chunk]


def _look_at(source: Source, one: Found, data: bytes | Exception) -> Seen:
    if not one.label:
        return "has no label: wanted NAME.cls, or NAME.json with one" if source.shards else "lies in no class folder"
    if isinstance(data, FileNotFoundError | PermissionError) or (isinstance(data, OSError) and data.errno):
        return f"cannot be read ({data.strerror or 'it is no longer there'})"
    if isinstance(data, Exception):  # a bucket that fails after all retries says nothing about the picture
        with sources.explained(f"{source.root}/{one.key}"):
            raise data
    try:
        image = picture.decode(data, duplicates.DECODE)
    except picture.PictureError as exc:
        return str(exc)
    return sha256(data), duplicates.thumbnail(image)
