"""Labelled pictures, read once: which there are, in which split, which cannot be read and which are copies."""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from bundle.cpus import whole_cpus
from bundle.manifest import canonical
from training import duplicates, folders, shards, sources
from training.scan import scan, shown
from training.sources import SPLITS, DataError, Found, Source, Split

__all__ = ["SPLITS", "Catalogue", "DataError", "Record", "Source", "Split", "catalogue", "shown"]
NOWHERE = Source("")


@dataclass(frozen=True, slots=True)
class Record:
    """One readable picture: `size` bytes from `offset` of its file."""

    key: str  # unique in its source, stable: relative path, or shard/member
    label: int  # index into Catalogue.classes
    split: Split
    sha256: str  # of these bytes
    excluded: str = ""  # why it is kept out of evaluation ("copy of <key> in train"), else ""
    size: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Catalogue:
    """All that is known of a set of pictures; made by `catalogue`."""

    address: str
    classes: tuple[str, ...]  # sorted
    records: tuple[Record, ...]  # sorted by key
    unreadable: tuple[tuple[str, str], ...]  # (key, reason)
    copies: tuple[tuple[str, str, str], ...]  # (key, key, "same bytes" or "near copy"), each copy with the first alike
    digest: str  # sha256 over the sorted (key, class, split, sha256)
    source: Source = NOWHERE  # reads the bytes; small, so that worker processes can have it alone

    def of(self, split: Split, evaluation: bool = False) -> tuple[Record, ...]:
        """The records of a split; `evaluation` leaves out those that are excluded from it."""
        return tuple(one for one in self.records if one.split == split and not (evaluation and one.excluded))

    def pictures(self, records: Sequence[Record]) -> Iterator[tuple[Record, bytes]]:
        """Each record with its bytes: in order for folders, in the shards' order for shards; some MB at a time.

        Raises DataError where a picture can no longer be read.
        """
        if self.source.shards:
            records = sorted(records, key=lambda record: (self.source.file(record), record.offset))
        for chunk in sources.chunks(records):
            for record, data in zip(chunk, self.source.read(chunk), strict=True):
                yield record, self._checked(record, data)

    def read(self, record: Record) -> bytes:
        """The bytes of one picture. Raises DataError where it can no longer be read."""
        return self._checked(record, self.source.read([record])[0])

    def _checked(self, record: Record, data: bytes | Exception) -> bytes:
        if isinstance(data, Exception):
            with sources.explained(f"{self.address}: {record.key}"):
                raise data
        return data


def catalogue(
    address: str,
    csv: str | None = None,
    *,
    validation: float = 0.1,
    test: float = 0.1,
    max_bad: float = 0.02,
    workers: int | None = None,
    progress: bool = True,
    training: bool = True,
) -> Catalogue:
    """Read every picture at `address` once: a folder by class, a folder and a CSV, or tar shards; local or gs://.

    validation, test: shares by content hash where no splits are given (validation's alone where only that is not).
    max_bad: largest share of pictures that may be unreadable. workers: processes that decode, by default one a CPU;
    none are started for 0, or for a few hundred pictures.
    training: False asks for less, for evaluating a model: one class, or no picture to learn from, will do.
    About 1 kB a picture is held, and never all pictures. Raises DataError.
    """
    if not (0 <= validation <= 1 and 0 <= test <= 1 and validation + test <= 1 and 0 <= max_bad <= 1):
        raise DataError(f"validation {validation:g}, test {test:g} and max_bad {max_bad:g} must be shares from 0 to 1")
    found: Iterable[Found]
    if csv is None and shards.is_shards(address):
        (source, found), total = shards.shards(address), None
    else:
        source, listed = folders.table(address, csv) if csv else folders.folder(address)
        found, total = listed, len(listed)
        counts = Counter(one.label for one in listed)
        _check_classes(address, _names(counts), counts, counts, training)

    labels: Counter[str] = Counter()
    places: list[tuple[Found, str]] = []
    thumbnails = bytearray()
    unreadable = []
    scanned = scan(source, found, whole_cpus() if workers is None else workers)
    for one, seen in shown(scanned, total, "pictures", progress):
        labels[one.label] += 1
        if isinstance(seen, str):
            unreadable.append((one.key, seen))
        else:
            places.append((one, seen[0]))
            thumbnails += seen[1]
    unreadable.sort()
    _check_readable(address, len(places), unreadable, max_bad)
    names = _names(labels)
    _check_classes(address, names, Counter(one.label for one, _ in places), labels, training)

    splits = _splits(places, validation, test)
    digests = [digest for _, digest in places]
    copies = duplicates.find(digests, [SPLITS.index(split) for split in splits], duplicates.unpack(thumbnails))
    excluded = {i: f"copy of {places[j][0].key} in {splits[j]}" for i, j in copies.across.items()}
    classes = tuple(sorted(set(names.values())))
    index = {label: classes.index(name) for label, name in names.items()}
    records = [
        Record(one.key, index[one.label], split, digest, excluded.get(i, ""), one.size, one.offset)
        for i, ((one, digest), split) in enumerate(zip(places, splits, strict=True))
    ]
    pairs = [(records[i].key, records[j].key, "same bytes" if same else "near copy") for i, j, same in copies.pairs]
    records.sort(key=lambda record: record.key)
    if twice := next((a.key for a, b in pairwise(records) if a.key == b.key), ""):
        raise DataError(f"{address}: the name {twice!r} is there twice in one shard: make the shard again")
    if training:
        _check_splits(address, classes, records, validation)
    digest = _digest(classes, records)
    return Catalogue(address, classes, tuple(records), tuple(unreadable), tuple(sorted(pairs)), digest, source)


def _names(labels: Iterable[str]) -> dict[str, str]:
    """Label as written -> class name: spaces trimmed and single, one Unicode form (macOS writes folders in another)."""
    written: dict[str, str] = {}
    for label in sorted(filter(None, labels)):
        if odd := next(filter(_unshowable, label), None):
            raise DataError(f"the label {label!a} has the character U+{ord(odd):04X}, which cannot be shown: rename it")
        name = " ".join(unicodedata.normalize("NFC", label).split())
        if not name:
            raise DataError(f"the label {label!r} is nothing but spaces: give it a name")
        if other := written.get(name):
            raise DataError(
                f"the labels {other!a} and {label!a} differ only in spaces or in how a letter is encoded: "
                "make them the same"
            )
        written[name] = label
    return {label: name for name, label in written.items()}


def _unshowable(character: str) -> bool:
    """Control characters, halves of characters, invisible marks; not the joiners that some scripts and emoji need."""
    return unicodedata.category(character) in ("Cc", "Cs", "Cf", "Zl", "Zp") and character not in "\u200c\u200d"


def _check_classes(
    address: str, names: dict[str, str], readable: Counter[str], listed: Counter[str], training: bool
) -> None:
    if not training:
        return
    if len(names) < 2:
        raise DataError(f"{address}: has one class only, {next(iter(names.values()))!r}: wanted at least two")
    if few := sorted(label for label in names if readable[label] < 2):
        n, of = readable[few[0]], listed[few[0]]
        which = f"{n} picture{'s' * (n != 1)}" + (f" that can be read, of {of}" if n != of else "")
        more = f" (and {len(few) - 1} more classes have too few)" if len(few) > 1 else ""
        raise DataError(
            f"{address}: the class {names[few[0]]!r} has {which}{more}: wanted at least two, one to learn from and "
            "one to evaluate on: add pictures or remove the class"
        )


def _check_readable(address: str, readable: int, unreadable: list[tuple[str, str]], max_bad: float) -> None:
    total = readable + len(unreadable)
    if not total:
        raise DataError(f"{address}: has no pictures")
    if len(unreadable) > max_bad * total or not readable:
        reasons = "".join(f"\n  {key}: {reason}" for key, reason in unreadable[:3])
        raise DataError(
            f"{address}: {len(unreadable)} of {total} pictures ({len(unreadable) / total:.1%}) cannot be read, "
            f"more than {max_bad:.1%}: repair or remove them. The first:{reasons}"
        )


def _splits(places: list[tuple[Found, str]], validation: float, test: float) -> list[Split]:
    """Given splits, else by content hash: a picture's place depends on its own bytes alone, so others never move it."""
    given = {one.split for one, _ in places} - {None}
    splits: list[Split] = []
    for one, digest in places:
        share = int(digest[:16], 16) / 2**64  # uniform in [0, 1)
        by_hash: Split = "test" if share < test else "validation" if share < test + validation else "train"
        if not given:
            splits.append(by_hash)
        elif one.split == "train" and by_hash == "validation" and "validation" not in given:
            splits.append("validation")
        else:
            splits.append(one.split or "train")
    return splits


def _check_splits(address: str, classes: tuple[str, ...], records: list[Record], validation: float) -> None:
    learnt = {record.label for record in records if record.split == "train"}
    if missing := [name for label, name in enumerate(classes) if label not in learnt]:
        more = f" (nor have {len(missing) - 1} more classes)" if len(missing) > 1 else ""
        raise DataError(f"{address}: the class {missing[0]!r} has no picture in train{more}: add or move pictures")
    held = [record for record in records if record.split == "validation"]
    if validation and all(record.excluded for record in held):
        reason = (
            f"all {len(held)} pictures in validation are copies of some in train" if held else "none is in validation"
        )
        raise DataError(
            f"{address}: has {len(records)} pictures, but {reason}: add pictures, raise validation's share "
            f"({validation:g}), or make the folders train and validation"
        )


def _digest(classes: tuple[str, ...], records: list[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(canonical([record.key, classes[record.label], record.split, record.sha256]) + b"\n")
    return digest.hexdigest()
