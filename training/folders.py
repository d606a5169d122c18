"""Lists the pictures of a folder by class, or of a folder and a CSV; here or in a bucket."""

import csv
import io
import os
import sys
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from training.sources import SPLIT_NAMES, SUFFIXES, DataError, Found, Source, check_name, explained, open_address

JUNK = ("thumbs.db", "desktop.ini")  # what Windows leaves in folders of pictures


def folder(address: str) -> tuple[Source, list[Found]]:
    """A folder a class, or split folders (SPLIT_NAMES) with a folder a class in each. Keys are relative paths."""
    files, folders = _files(address)
    tops = {path.split("/")[0] for path in folders}
    named = {top for top in tops if top.lower() in SPLIT_NAMES}
    splits = {SPLIT_NAMES[top.lower()] for top in named}
    # A single one among others may be a class: trains beside buses.
    split_above = bool(named) and (named == tops or len(splits) > 1)
    if split_above and (others := sorted(tops - named)):
        raise DataError(
            f"{address}: has {others[0]!r} beside the split folders {', '.join(sorted(named))}: "
            "move it away, or into the split folders if it is a class"
        )
    depth = 1 + split_above  # how many folders a picture lies in, at least
    found = []
    for path, size in files.items():
        parts = path.split("/")
        if len(parts) > depth:
            split = SPLIT_NAMES[parts[0].lower()] if split_above else None
            found.append(Found(path, sys.intern(parts[depth - 1]), split, size))
        elif path.lower().rpartition(".")[2] in SUFFIXES:
            found.append(Found(path, "", None, size))
    if not found:
        tars = [path for path in files if path.endswith(".tar")]
        right = (
            f"for its tar shards name {address.rstrip('/')}/*.tar" if tars else "wanted a folder a class, with pictures"
        )
        raise DataError(f"{address}: has no pictures: {right}")
    if not any(one.label for one in found):
        raise DataError(f"{address}: its pictures lie in no class folder: make a folder a class, or name a CSV")
    full = {tuple(one.key.split("/")[:depth]) for one in found}
    for path in folders:
        parts = path.split("/")
        if len(parts) == depth and tuple(parts) not in full:
            raise DataError(f"{address}: the class folder {path!r} is empty: remove it, or put its pictures there")
    return Source(address), found


def table(address: str, csv_address: str) -> tuple[Source, list[Found]]:
    """A folder of files and a CSV: file name with or without extension, label, and a split where a column is called so.

    The first row is a header unless it names a file. Files that the CSV does not name are left out.
    """
    rows = _rows(csv_address)
    files, _ = _files(address)
    stems: dict[str, list[str]] = {}
    for path in files:
        stems.setdefault(os.path.splitext(path)[0], []).append(path)

    def names(cell: str) -> list[str]:
        return [cell] if cell in files else stems.get(cell, [])

    if not rows:
        raise DataError(f"{csv_address}: is empty: wanted a header such as id,breed and a row a picture")
    headed = not names(rows[0][1][0])
    header = [cell.lower() for cell in rows[0][1]] if headed else []
    column = header.index("split") if "split" in header else 2 if not headed and len(rows[0][1]) > 2 else 0
    if column == 1 or "split" in header[:1]:
        raise DataError(f"{csv_address}: the column split must come after file and label, as in id,breed,split")
    found: dict[str, tuple[int, Found]] = {}
    missing = []
    for number, row in rows[headed:]:
        if len(row) < 2 or len(row) <= column:
            raise DataError(
                f"{csv_address}: row {number} has {len(row)} columns, not {max(2, column + 1)}: wanted file,label "
                "with commas between"
            )
        if not (paths := names(row[0])):
            missing.append((number, row[0]))
            continue
        if not row[1]:
            raise DataError(f"{csv_address}: row {number} has no label: wanted file,label")
        if len(paths) > 1:
            raise DataError(
                f"{csv_address}: row {number}: {row[0]!r} may be {paths[0]} or {paths[1]}: write the extension too"
            )
        if column and row[column].lower() not in SPLIT_NAMES:
            raise DataError(f"{csv_address}: row {number}: split {row[column]!r} is none of train, validation and test")
        one = Found(paths[0], row[1], SPLIT_NAMES[row[column].lower()] if column else None, files[paths[0]])
        before, same = found.setdefault(one.key, (number, one))
        if same != one:
            raise DataError(f"{csv_address}: rows {before} and {number} disagree about {row[0]!r}: keep one of them")
    if missing:
        raise DataError(
            f"{csv_address}: {len(missing)} of {len(rows) - headed} rows name files that are not in {address}: "
            f"the first is row {missing[0][0]}, {missing[0][1]!r}: correct the CSV or the folder"
        )
    if not found:
        raise DataError(f"{csv_address}: has a header and no rows: wanted a row a picture, file,label")
    return Source(address), [one for _, one in found.values()]


def _files(address: str) -> tuple[dict[str, int], list[str]]:
    """Relative path -> size in bytes of all files below `address` but hidden ones and JUNK; and all folders' paths."""
    filesystem, root = open_address(address)
    with explained(address):
        if not filesystem.isdir(root):
            filesystem.info(root)  # raises where there is nothing, or no right to look
            raise DataError(f"{address}: is a file: name a folder, or tar shards ending in .tar")
        listed = sorted(
            _walked(root) if isinstance(filesystem, LocalFileSystem) else _found(filesystem, root), key=itemgetter(0)
        )
    files, folders = {}, []
    for key, size in listed:
        parts = key.split("/")
        if any(part.startswith(".") for part in parts) or parts[-1].lower() in JUNK:
            continue
        check_name(address, key)
        if size is None:
            folders.append(key)
        else:
            files[key] = size
    return files, folders


def _walked(root: str) -> Iterator[tuple[str, int | None]]:
    """Relative path and size of each file below a local folder, None for folders. Links are followed.

    Not fsspec's find: it leaves out linked folders and, without a word, those that may not be read.
    """

    def fail(error: OSError) -> None:
        raise error

    for folder, names, files in os.walk(root, onerror=fail, followlinks=True):
        here = os.path.realpath(folder) + os.sep
        # A link to a folder that it lies in would never end.
        names[:] = [
            name for name in names if not here.startswith(os.path.realpath(os.path.join(folder, name)) + os.sep)
        ]
        for name in names:
            yield os.path.relpath(os.path.join(folder, name), root), None
        for name in files:
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                yield os.path.relpath(path, root), os.path.getsize(path)
            elif not os.path.exists(path):  # a broken link: reading it will say so; what else there is could block
                yield os.path.relpath(path, root), 0


def _found(filesystem: Any, root: str) -> Iterator[tuple[str, int | None]]:
    """As `_walked`, for a bucket."""
    for path, info in filesystem.find(root, withdirs=True, detail=True).items():
        key = path[len(root) :].strip("/")
        if key and not path.endswith("/"):  # else it is a placeholder for a folder
            yield key, info["size"] if info["type"] == "file" else None


def _rows(address: str) -> list[tuple[int, list[str]]]:
    """A CSV's rows that are not blank, each with its number from 1, cells stripped."""
    filesystem, path = open_address(address)
    with explained(address):
        data: bytes = filesystem.cat_file(path)
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        numbered = enumerate(reader, 1)
        return [(number, [cell.strip() for cell in row]) for number, row in numbered if any(map(str.strip, row))]
    except (csv.Error, UnicodeDecodeError) as exc:
        raise DataError(f"{address}: is no CSV in UTF-8 ({exc}): wanted rows such as id,breed") from exc
