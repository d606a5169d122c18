"""Reads labelled pictures from tar shards in webdataset's form; here or in a bucket."""

import dataclasses
import json
import os
import re
import sys
import tarfile
from collections.abc import Iterator
from typing import Any

from training.sources import SPLIT_NAMES, SUFFIXES, DataError, Found, Source, Split, check_name, explained, open_address

BUFFER = 1 << 20  # bytes read from a shard at once
END = 1024  # zero bytes that end a tar file


def is_shards(address: str) -> bool:
    """A name ending in .tar, or a pattern; a folder may be called like a pattern."""
    return (address.endswith(".tar") or bool(set("*?[{") & set(address))) and not os.path.isdir(address)


def shards(address: str) -> tuple[Source, Iterator[Found]]:
    """Tar shards in webdataset's form: NAME.jpg with NAME.cls, or NAME.json and its "label". Read once, in order.

    `address` may have *, ? and braces ({000..012}, {a,b}). Keys are shard/member. A shard whose name or folder
    begins with a split's name (train-000.tar) gives its pictures' split.
    """
    paths = _expanded(address)
    filesystem, _ = open_address(address)
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    splits = [_shard_split(os.path.relpath(path, root)) for path in paths]
    if None in splits and set(splits) != {None}:
        raise DataError(
            f"{address}: {paths[splits.index(None)]} names no split, others do: "
            "begin every shard's name with train, validation or test, or none"
        )
    protocol = address.partition("://")[0] + "://" if "://" in address else ""

    def read() -> Iterator[Found]:
        for path, split in zip(paths, splits, strict=True):
            with explained(protocol + path), filesystem.open(path, "rb") as stream:
                yield from _members(stream, protocol + path, os.path.relpath(path, root), split)

    return Source(protocol + root, shards=True), read()


def _expanded(address: str) -> list[str]:
    """The paths that a glob with braces means, sorted. Raises DataError where a pattern means none."""
    paths: set[str] = set()
    for pattern in _braces(address):
        filesystem, path = open_address(pattern)
        with explained(pattern):
            matches = filesystem.glob(path) if re.search(r"[*?[]", path) else [filesystem.info(path)["name"]]
        if not matches:
            raise DataError(f"{pattern}: no tar shard is called so: check the pattern")
        paths.update(matches)
    if others := sorted(path for path in paths if not path.endswith(".tar")):
        raise DataError(f"{address}: {others[0]} does not end in .tar: shards are plain, not compressed, tar files")
    return sorted(paths)


def _braces(text: str) -> list[str]:
    """{000..012} and {a,b} expanded, as shells do."""
    if not (match := re.search(r"\{([^{}]*)\}", text)):
        return [text]
    inner = match[1]
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
        low, high = bounds[1], bounds[2]
        width = max(len(low), len(high)) if low.startswith("0") or high.startswith("0") else 0
        items = [f"{number:0{width}d}" for number in range(int(low), int(high) + 1)]
    else:
        items = inner.split(",")
    return [full for item in items for full in _braces(text[: match.start()] + item + text[match.end() :])]


def _shard_split(path: str) -> Split | None:
    for part in (re.split(r"[-_.\d]", os.path.basename(path))[0], *os.path.dirname(path).split("/")):
        if part.lower() in SPLIT_NAMES:
            return SPLIT_NAMES[part.lower()]
    return None


def _members(stream: Any, address: str, shard: str, split: Split | None) -> Iterator[Found]:
    """The pictures of one shard. Members of one NAME stand beside each other, as webdataset wants them."""
    # tarfile takes a shard that is cut off between two members for a whole one; whole ones end in zeros (POSIX pax).
    stream.seek(-min(END, stream.size), os.SEEK_END)
    if stream.size < END or any(stream.read(END)):
        raise DataError(f"{address}: is no tar file, or cut off: copy or make it again")
    stream.seek(0)
    pictures: list[Found] = []
    name, label = "", ""
    try:
        with tarfile.open(fileobj=stream, mode="r|", bufsize=BUFFER) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would keep every header
                folder, _, file = member.name.rpartition("/")
                if not member.isfile() or file.startswith("."):
                    continue
                check_name(address, member.name)
                stem, _, suffix = file.partition(".")
                if (whole := f"{folder}/{stem}") != name:
                    yield from (dataclasses.replace(picture, label=label) for picture in pictures)
                    pictures, name, label = [], whole, ""
                if (suffix := suffix.lower()) not in (*SUFFIXES, "cls", "json"):
                    continue
                data = tar.extractfile(member).read()  # type: ignore[union-attr]  # it is a file
                if suffix in SUFFIXES:
                    key = f"{shard}/{member.name}"
                    pictures.append(Found(key, "", split, member.size, member.offset_data, data))
                else:
                    label = _label(data, suffix) or label
            yield from (dataclasses.replace(picture, label=label) for picture in pictures)
    except (tarfile.TarError, EOFError) as exc:
        raise DataError(f"{address}: is no tar file, or damaged ({exc}): copy or make it again") from exc


def _label(data: bytes, suffix: str) -> str:
    """A label from NAME.cls or NAME.json; "" where it has none."""
    try:
        value = json.loads(data).get("label") if suffix == "json" else data.decode()
    except (ValueError, AttributeError):
        return ""
    return sys.intern(str(value).strip()) if isinstance(value, str) or type(value) is int else ""
