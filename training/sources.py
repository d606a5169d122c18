"""Where labelled pictures lie: a folder by class, a folder and a CSV, or tar shards; here or in a bucket.

Nothing is decoded here: a listing gives each picture's key, its label as written and where its bytes are.
"""

import logging
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import fsspec

from bundle.remote import reason

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
# What people call them, in folder names, shard names and CSV columns.
SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
    "testing": "test",
}
SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
TIMEOUT_S = 60  # a request to a bucket; gcsfs retries it up to six times
# What is read at once: enough that requests to a bucket overlap, little enough to hold in memory.
CHUNK, CHUNK_BYTES = 32, 16 << 20


class DataError(ValueError):
    """Data that must not be trained on; the message names what is wrong, where, and what would be right."""


class Place(Protocol):
    """Where a picture's bytes are: `size` bytes from `offset` of the file that `key` names."""

    @property
    def key(self) -> str: ...
    @property
    def offset(self) -> int: ...
    @property
    def size(self) -> int: ...


P = TypeVar("P", bound=Place)


@dataclass(frozen=True, slots=True)
class Found:
    """A picture that was listed, not yet decoded. `data`: its bytes, where listing had to read them."""

    key: str
    label: str  # as written; "" where there is none
    split: Split | None  # as given
    size: int
    offset: int = 0
    data: bytes | None = None


@dataclass(frozen=True)
class Source:
    """Reads pictures by key, relative to `root`. Small, and can be sent to other processes."""

    root: str
    shards: bool = False

    def file(self, place: Place) -> str:
        """The file, relative to `root`, that holds a picture: shard.tar/member -> shard.tar."""
        return place.key[: place.key.index(".tar/") + len(".tar")] if self.shards else place.key

    def read(self, places: Sequence[Place]) -> list[bytes | Exception]:
        """The bytes of each, or why not. Requests to a bucket run at the same time."""
        filesystem, root = open_address(self.root)
        paths = [f"{root}/{self.file(place)}" for place in places]
        starts = [place.offset for place in places]
        ends = [place.offset + place.size for place in places]
        with explained(self.root):
            read: list[bytes | Exception] = filesystem.cat_ranges(paths, starts, ends, on_error="return")
        return read


def open_address(address: str) -> tuple[Any, str]:
    """fsspec's filesystem and path of a local or gs:// address. Raises DataError where it has none."""
    # Without it gcsfs starts its gRPC clients for zonal buckets, which no emulator answers.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback for every error that it then raises
    options = {"requests_timeout": TIMEOUT_S} if address.startswith(("gs://", "gcs://")) else {}
    try:
        filesystem, path = fsspec.core.url_to_fs(os.path.expanduser(address), **options)
    except (ValueError, ImportError) as exc:
        raise DataError(f"{address}: cannot be read ({exc}): name a local path or gs://bucket/path") from exc
    return filesystem, path.rstrip("/") or "/"


@contextmanager
def explained(address: str, *, writing: bool = False) -> Iterator[None]:
    """Turns whatever a filesystem raises into DataError, naming `address`."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as exc:  # gcsfs, aiohttp and google-auth raise their own, without a common base
        raise DataError(f"{address}: {reason(exc, writing=writing)}") from exc


def check_name(address: str, name: str) -> None:
    """Raises DataError for a file's name that could not be written to a report: control characters, not UTF-8."""
    if not name.isprintable() and any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        raise DataError(f"{address}: the name {name!a} has control characters or is not UTF-8: rename it")


def chunks(places: Iterable[P]) -> Iterator[list[P]]:
    """In order, at most CHUNK pictures and, but for a single larger one, CHUNK_BYTES at a time."""
    chunk: list[P] = []
    held = 0
    for place in places:
        if chunk and (len(chunk) == CHUNK or held + place.size > CHUNK_BYTES):
            yield chunk
            chunk, held = [], 0
        chunk.append(place)
        held += place.size
    if chunk:
        yield chunk
