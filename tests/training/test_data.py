"""Folders, CSVs and shards become a catalogue, or a sentence that says what is wrong."""

import errno
import hashlib
import io
import json
import math
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bundle.golden import draw
from training import scan, sources
from training.data import Catalogue, DataError, catalogue
from training.shards import END

Write = Callable[[Mapping[str, bytes]], Path]


def drawing(seed: int, format: str = "PNG", mirrored: bool = False, **options: Any) -> bytes:
    """A small picture's bytes."""
    pixels = draw(1, 48, 64, seed)[0]
    file = io.BytesIO()
    Image.fromarray(pixels[:, ::-1] if mirrored else pixels).save(file, format, **options)
    return file.getvalue()


def pets(count: int = 12, first: int = 0) -> dict[str, bytes]:
    return {
        f"{kind}/{i}.png": drawing(2 * i + (kind == "dog"))
        for i in range(first, first + count)
        for kind in ("cat", "dog")
    }


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes files below a folder, which it returns."""

    def to(files: Mapping[str, bytes]) -> Path:
        for name, data in files.items():
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return tmp_path / "data"

    return to


def read(address: Path | str, csv: Path | str | None = None, **options: Any) -> Catalogue:
    return catalogue(
        str(address), str(csv) if csv else None, **{"validation": 0.25, "workers": 0, "progress": False} | options
    )


def refused(address: Path | str, csv: Path | str | None = None, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(address, csv, **options)
    return str(caught.value)


def shard(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(files: Mapping[str, bytes]) -> list[tuple[str, bytes]]:
    """A folder by class as members of a shard."""
    members = []
    for name, data in files.items():
        label, _, file = name.partition("/")
        stem = f"{label}-{Path(file).stem}"
        members += [(f"{stem}.png", data), (f"{stem}.cls", label.encode())]
    return members


def by_content(found: Catalogue) -> dict[str, tuple[str, str]]:
    return {one.sha256: (found.classes[one.label], one.split) for one in found.records}


def test_a_folder_by_class(write: Write) -> None:
    files = pets()
    root = write({**files, "README.md": b"hello", "cat/.DS_Store": b"x", "cat/Thumbs.db": b"x", ".git/objects/a": b"x"})
    found = read(root)
    assert found.classes == ("cat", "dog")
    assert [one.key for one in found.records] == sorted(files)
    assert {one.key: found.classes[one.label] for one in found.records} == {name: name[:3] for name in files}
    assert all(found.of(split) for split in ("train", "validation", "test"))
    assert sum(len(found.of(split)) for split in ("train", "validation", "test")) == len(files)
    assert not found.unreadable
    assert not found.copies
    assert dict(found.pictures(found.records)) == {one: files[one.key] for one in found.records}
    assert all(found.read(one) == files[one.key] for one in found.records)
    assert all(one.sha256 == hashlib.sha256(files[one.key]).hexdigest() for one in found.records)


def test_the_digest_knows_names_labels_splits_and_bytes(write: Write) -> None:
    root = write(pets())
    digests = [read(root).digest]
    assert read(f"{root}/").digest == digests[0]
    digests.append(read(root, test=0).digest)
    (root / "cat/0.png").rename(root / "cat/0b.png")
    digests.append(read(root).digest)
    (root / "cat/0b.png").rename(root / "dog/0b.png")
    digests.append(read(root).digest)
    (root / "dog/0b.png").write_bytes(drawing(99))
    digests.append(read(root).digest)
    assert len(set(digests)) == 5


def test_pictures_keep_their_split_when_others_come(write: Write) -> None:
    before = read(write(pets()))
    after = read(write(pets(20)))
    assert len(after.records) == 40
    splits = {one.key: one.split for one in after.records}
    assert all(splits[one.key] == one.split for one in before.records)
    larger = {one.key: one.split for one in read(before.address, validation=0.5).records}
    assert all(larger[one.key] == one.split for one in after.records if one.split != "train")


@pytest.mark.parametrize("name", ["validation", "valid", "Val"])
def test_given_splits_are_used(write: Write, name: str) -> None:
    root = write({**{f"train/{k}": v for k, v in pets(6).items()}, **{f"{name}/{k}": v for k, v in pets(3, 6).items()}})
    found = read(root)
    assert found.classes == ("cat", "dog")
    assert {one.key for one in found.of("validation")} == {f"{name}/{key}" for key in pets(3, 6)}
    assert len(found.of("train")) == 12
    assert not found.of("test")


def test_validation_is_taken_from_train_where_it_is_not_given(write: Write) -> None:
    root = write({**{f"train/{k}": v for k, v in pets(20).items()}, **{f"test/{k}": v for k, v in pets(3, 20).items()}})
    found = read(root)
    assert {one.key.split("/")[0] for one in found.of("validation")} == {"train"}
    assert {one.key for one in found.of("test")} == {f"test/{key}" for key in pets(3, 20)}
    assert 0 < len(found.of("validation")) < len(found.of("train"))


def test_a_class_may_be_called_train(write: Write) -> None:
    root = write({name.replace("cat", "train").replace("dog", "bus"): data for name, data in pets().items()})
    assert read(root).classes == ("bus", "train")


def test_links_are_followed_and_loops_left(write: Write, tmp_path: Path) -> None:
    root = write({name: data for name, data in pets().items() if name.startswith("dog")})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name, data in pets().items():
        if name.startswith("cat"):
            (elsewhere / Path(name).name).write_bytes(data)
    (root / "cat").symlink_to(elsewhere)
    (root / "dog/loop").symlink_to(root)
    (root / "dog/gone.png").symlink_to("nowhere")
    found = read(root, max_bad=0.1)
    assert [one.key for one in found.records] == sorted(pets())
    assert [key for key, _ in found.unreadable] == ["dog/gone.png"]


def test_a_csv_and_a_folder(write: Write, tmp_path: Path) -> None:
    root = write(
        {f"{i:03}.png": drawing(i) for i in range(24)} | {"sub/x.y.png": drawing(50), "unnamed.png": drawing(51)}
    )
    rows = [f"{i:03}, {'big dog' if i % 2 else 'cat'}" for i in range(23)] + ["023.png,cat", "", '"sub/x.y","cat"']
    csv = tmp_path / "labels.csv"
    csv.write_text("\ufeffid,breed\n" + "\n".join(rows))
    found = read(root, csv)
    assert found.classes == ("big dog", "cat")
    assert {one.key: found.classes[one.label] for one in found.records} == {
        **{f"{i:03}.png": "big dog" if i % 2 and i < 23 else "cat" for i in range(24)},
        "sub/x.y.png": "cat",
    }
    csv.write_text("\n".join(rows))
    assert read(root, csv) == found  # a header is not needed
    csv.write_text("file,split,label\n000,train,cat")
    assert "must come after" in refused(root, csv)
    splits = ["train"] * 10 + ["val"] * 8 + ["test"] * 6
    csv.write_text("file,label,size,Split\n" + "".join(f"{i:03},{i % 2},1,{split}\n" for i, split in enumerate(splits)))
    found = read(root, csv)
    assert [one.split for one in found.records] == ["train"] * 10 + ["validation"] * 8 + ["test"] * 6


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            b"id,breed\n0,cat\n1,dog\nx7,cat\nx8,dog\n",
            "2 of 4 rows name files that are not in {root}: the first is row 4, 'x7'",
        ),
        (b"id,breed\n0\n", "row 2 has 1 columns, not 2"),
        (b"id;breed\n0;cat\n1;dog\n", "row 2 has 1 columns"),
        (b"id,breed\n", "a header and no rows"),
        (b"", "is empty"),
        (b"id,breed\n0,\xff\n", "is no CSV in UTF-8"),
        (b'id,breed\n0,"cat\n', "is no CSV in UTF-8"),
        (b"id,breed\n0,cat\n0.png,dog\n", "rows 2 and 3 disagree about '0.png'"),
        (b"id,breed\n0,cat\n1,\n", "row 3 has no label"),
        (b"id,breed,split\n0,cat,train\n1,dog,other\n", "row 3: split 'other' is none of"),
        (b"id,breed\ntwice,cat\n0,dog\n", "row 2: 'twice' may be twice.jpg or twice.png"),
        (b"id,breed\n0,cat\n1,cat\n", "has one class only, 'cat'"),
        (b"id,breed\n0,cat\n1,cat\n2,dog\n", "the class 'dog' has 1 picture: "),
    ],
)
def test_a_csv_that_is_wrong(write: Write, tmp_path: Path, text: bytes, reason: str) -> None:
    root = write({f"{i}.png": drawing(i) for i in range(4)} | {"twice.png": b"", "twice.jpg": b""})
    csv = tmp_path / "labels.csv"
    csv.write_bytes(text)
    assert reason.format(root=root) in refused(root, csv)


def test_a_csv_that_is_not_there(write: Write, tmp_path: Path) -> None:
    assert f"{tmp_path}/no.csv: does not exist" in refused(write(pets()), tmp_path / "no.csv")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "does not exist"),
        ({"notes.txt": b"hello"}, "has no pictures: wanted a folder a class"),
        ({"a-000.tar": b""}, "name {root}/*.tar"),
        ({"1.png": drawing(1), "2.png": drawing(2)}, "its pictures lie in no class folder"),
        ({"cat/1.png": drawing(1), "cat/2.png": drawing(2)}, "has one class only, 'cat'"),
        ({"cat/1.png": b"", "cat/2.png": b"", "dog/3.png": b""}, "the class 'dog' has 1 picture: "),
        ({**pets(), "bird/.hidden": b""}, "the class folder 'bird' is empty"),
        ({f"{kind}/{i}.jpg": b"no" for kind in "ab" for i in range(9)}, "18 of 18 pictures (100.0%) cannot be read"),
        ({**pets(), "train/cat/1.png": b"", "test/cat/1.png": b""}, "has 'cat' beside the split folders test, train"),
        ({f"{split}/{i}.png": drawing(i) for i in (1, 2) for split in ("train/cat", "val/dog")},
         "the class 'dog' has no picture in train"),
        ({f"{kind}/{i}.png": drawing(i) for i in (1, 2) for kind in "ab"}, "has 4 pictures, but none is in validation"),
        ({**{f"train/{k}": v for k, v in pets(3).items()}, **{f"val/{k}": v for k, v in pets(2).items()}},
         "all 4 pictures in validation are copies"),
    ],
)  # fmt: skip
def test_a_folder_that_is_wrong(write: Write, files: dict[str, bytes], reason: str) -> None:
    root = write(files)
    assert reason.format(root=root) in refused(root, validation=0.05)


def test_an_empty_folder_a_file_and_wrong_settings(tmp_path: Path) -> None:
    assert "has no pictures" in refused(tmp_path)
    (tmp_path / "x.zip").touch()
    assert "is a file: name a folder" in refused(tmp_path / "x.zip")
    assert "must be shares" in refused(tmp_path, validation=0.6, test=0.6)
    assert "Install s3fs" in refused("s3://bucket/path")


def test_a_folder_without_rights(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(pets())
    scandir = os.scandir

    def denied(path: str) -> Any:  # tests may run as root, who may read everything
        if str(path).endswith("/cat"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert "no right to read it" in refused(root)


@pytest.mark.parametrize(
    "label", ["golden retriever", "Ærø & søn", "日本犬", "👩‍🔬", "<b>bold", '"quoted"', "=1+1", "{0..9}[x]*?", "-rf"]
)
def test_labels_may_be_odd(write: Write, label: str) -> None:
    found = read(write({name.replace("cat", label): data for name, data in pets().items()}))
    assert found.classes == tuple(sorted([label, "dog"]))
    assert found.read(found.records[0])


def test_spaces_around_a_label_and_its_unicode_form_do_not_count(write: Write) -> None:
    found = read(write({name.replace("cat", " cafe\u0301  bar "): data for name, data in pets().items()}))
    assert found.classes == ("caf\u00e9 bar", "dog")


@pytest.mark.parametrize(
    ("label", "other", "reason"),
    [
        ("cat ", "cat", "the labels 'cat' and 'cat ' differ only in spaces"),
        ("cafe\u0301", "caf\u00e9", "differ only in spaces or in how a letter is encoded"),
        ("a\tb", "c", "the name 'a\\tb' has control characters"),
        ("a\nb", "c", "control characters"),
        ("a\u202eb", "c", "the label 'a\\u202eb' has the character U+202E"),
        ("\ufeffa", "c", "U+FEFF"),
        ("\udcff", "c", "is not UTF-8"),
        ("  ", "c", "nothing but spaces"),
    ],
)
def test_labels_that_cannot_be_told_or_shown(write: Write, label: str, other: str, reason: str) -> None:
    root = write({name.replace("cat", label).replace("dog", other): data for name, data in pets(3).items()})
    said = refused(root)
    assert reason in said
    said.encode()  # it can be written to any log


def test_unreadable_pictures_are_listed_up_to_a_share(write: Write) -> None:
    jpeg = drawing(70, "JPEG")
    bad = {"cat/cut.jpg": jpeg[:-100], "cat/empty.jpg": b"", "dog/text.png": b"hello", "loose.png": drawing(71)}
    root = write({**pets(), **bad})
    found = read(root, max_bad=0.2)
    assert {key: reason.partition(":")[0] for key, reason in found.unreadable} == {
        "cat/cut.jpg": "the JPEG picture is cut off or damaged (image file is truncated (63 bytes not processed))",
        "cat/empty.jpg": "the picture is empty (0 bytes)",
        "dog/text.png": "these 5 bytes are not a picture that can be read",
        "loose.png": "lies in no class folder",
    }
    assert len(found.records) == 24
    said = refused(root)
    assert "4 of 28 pictures (14.3%) cannot be read, more than 2.0%" in said
    assert "\n  cat/empty.jpg: the picture is empty" in said
    (root / "bird").mkdir()
    for name in "ab":
        (root / f"bird/{name}.png").write_bytes(b"no")
    assert "the class 'bird' has 0 pictures that can be read, of 2" in refused(root, max_bad=0.5)


def test_copies_are_reported_and_those_across_splits_kept_out_of_evaluation(write: Write) -> None:
    train, validation = pets(4), pets(4, 4)
    root = write({
        **{f"train/{k}": v for k, v in train.items()},
        **{f"val/{k}": v for k, v in validation.items()},
        **{f"test/{k}": v for k, v in pets(2, 8).items()},
        "train/dog/wrong.png": train["cat/0.png"],
        "val/cat/same.png": train["cat/1.png"],
        "val/cat/mirrored.jpg": drawing(4, "JPEG", mirrored=True, quality=60),
        "test/cat/again.webp": drawing(8, "WEBP", quality=80),
    })  # fmt: skip
    found = read(root)
    assert set(found.copies) == {
        ("train/cat/0.png", "train/dog/wrong.png", "same bytes"),
        ("train/cat/1.png", "val/cat/same.png", "same bytes"),
        ("train/cat/2.png", "val/cat/mirrored.jpg", "near copy"),
        ("test/cat/again.webp", "val/cat/4.png", "near copy"),
    }
    assert {one.key: one.excluded for one in found.records if one.excluded} == {
        "val/cat/same.png": "copy of train/cat/1.png in train",
        "val/cat/mirrored.jpg": "copy of train/cat/2.png in train",
        "test/cat/again.webp": "copy of val/cat/4.png in validation",
    }
    assert len(found.of("validation")) == 10
    assert {one.key for one in found.of("validation", evaluation=True)} == {f"val/{key}" for key in validation}


def test_evaluating_asks_for_less(write: Write) -> None:
    root = write({"cat/1.png": drawing(1), "cat/2.png": drawing(2)})
    found = read(root, validation=1, test=0, training=False)
    assert [one.split for one in found.records] == ["validation"] * 2


def test_shards_hold_what_the_folder_holds(write: Write, tmp_path: Path) -> None:
    files = pets()
    of_folder = read(write(files))
    members = samples(files)
    for i in range(3):
        shard(tmp_path / f"shards/pets-{i:03}.tar", members[16 * i : 16 * (i + 1)])
    expected = by_content(of_folder)
    for pattern in ("pets-{000..002}.tar", "*.tar", "pets-00[012].tar", "pets-{000,001,002}.tar"):
        found = read(f"{tmp_path}/shards/{pattern}")
        assert by_content(found) == expected
    assert found.records[0].key == "pets-000.tar/cat-0.png"
    backwards = found.records[::-1]
    streamed = list(found.pictures(backwards))
    assert [one.key for one, _ in streamed] == [key for i in range(3) for key in (
        f"pets-{i:03}.tar/{name}" for name, _ in members[16 * i : 16 * (i + 1)] if name.endswith(".png"))]  # fmt: skip
    assert all(hashlib.sha256(data).hexdigest() == one.sha256 for one, data in streamed)
    assert hashlib.sha256(found.read(found.records[7])).hexdigest() == found.records[7].sha256
    # One shard with all of them is another source with the same pictures.
    assert by_content(read(shard(tmp_path / "one.tar", members))) == expected


def test_shards_with_json_folders_and_what_is_not_a_picture(tmp_path: Path) -> None:
    members = []
    for i in range(24):
        label = {"label": i % 2 if i < 12 else str(i % 2), "author": "me"}
        members += [(f"a.b/{i}.json", json.dumps(label).encode()), (f"a.b/{i}.jpg", drawing(i, "JPEG"))]
        members += [(f"a.b/{i}.seg.png", b"mask"), (f"a.b/._{i}.jpg", b"mac"), (f"a.b/{i}.txt", b"a caption")]
    members += [("none.jpg", drawing(60, "JPEG")), ("odd.jpg", drawing(61, "JPEG")), ("odd.json", b'{"label": [1]}')]
    found = read(shard(tmp_path / "x.tar", members), max_bad=0.1)
    assert found.classes == ("0", "1")
    assert len(found.records) == 24
    assert [key for key, _ in found.unreadable] == ["x.tar/none.jpg", "x.tar/odd.jpg"]
    assert all("wanted NAME.cls" in reason for _, reason in found.unreadable)


def test_shards_named_by_split(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.tar", samples(pets(6)))
    shard(tmp_path / "val-0.tar", samples(pets(3, 6)))
    found = read(f"{tmp_path}/{{train,val}}-0.tar")
    assert (len(found.of("train")), len(found.of("validation")), len(found.of("test"))) == (12, 6, 0)
    shard(tmp_path / "more-0.tar", samples(pets(3, 9)))
    assert "more-0.tar names no split, others do" in refused(f"{tmp_path}/*.tar")


def test_shards_that_are_wrong(tmp_path: Path) -> None:
    whole = shard(tmp_path / "a.tar", samples(pets()))
    cut = tmp_path / "cut.tar"
    for bad in (whole.read_bytes()[:20_000], whole.read_bytes()[: 512 * 30], drawing(1) * 10, b"", bytes(512)):
        cut.write_bytes(bad)
        assert f"{cut}: is no tar file, or cut off" in refused(cut)
    cut.write_bytes(b"x" * 2000 + bytes(END))
    assert f"{cut}: is no tar file, or damaged" in refused(cut)
    assert "b-0.tar: does not exist" in refused(f"{tmp_path}/b-{{0..3}}.tar")
    assert "no tar shard is called so" in refused(f"{tmp_path}/b-*.tar")
    (tmp_path / "c.tar.gz").touch()
    assert "not compressed" in refused(f"{tmp_path}/c.tar*")
    twice = shard(tmp_path / "twice.tar", samples(pets()) + samples({"cat/0.png": drawing(80)}))
    assert "'twice.tar/cat-0.png' is there twice" in refused(twice)
    assert "has no pictures" in refused(shard(tmp_path / "none.tar", [("a.cls", b"1")]))
    assert "has one class only" in refused(
        shard(tmp_path / "one.tar", samples({"a/1.png": drawing(1), "a/2.png": drawing(2)}))
    )


def test_processes_see_what_one_sees(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "FEW", 1)
    monkeypatch.setattr(sources, "CHUNK", 5)
    root = write({**pets(), "cat/bad.png": b"no"})
    assert read(root, workers=2, max_bad=0.1) == read(root, max_bad=0.1)
    packed = shard(tmp_path / "a.tar", samples(pets()))
    assert read(packed, workers=1) == read(packed)


def test_a_worker_that_dies_is_told(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "FEW", 1)
    monkeypatch.setattr(scan, "_start", _die)
    assert "was ended from outside" in refused(write(pets()), workers=1)


def _die() -> None:
    os._exit(9)


def test_workers_end_with_a_killed_parent() -> None:
    program = (
        "import os, time; from concurrent.futures import ProcessPoolExecutor; from multiprocessing import get_context\n"
        "from training import scan\n"
        "pool = ProcessPoolExecutor(1, get_context('spawn'), scan._start)\n"
        "print(pool.submit(os.getpid).result(), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout
        status = Path(f"/proc/{int(parent.stdout.readline())}/stat")
        assert status.exists()
        parent.kill()
    deadline = time.monotonic() + 10
    while status.exists() and status.read_text().rsplit(")")[-1].split()[0] != "Z":
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.02)


def test_progress_is_plain_lines_in_a_log(
    write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "LINE_S", 0)
    read(write(pets(2)), training=False, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("pictures: 1 of 4, ")
    assert lines[-1].startswith("pictures: 4 in ")
    read(write(pets(2)), training=False)
    assert capsys.readouterr() == ("", "")


def test_importing_is_light() -> None:
    """Every worker process imports it."""
    program = (
        "import sys, training.data; print([m for m in ('torch', 'gcsfs', 'aiohttp', 'scipy') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


@pytest.mark.slow
def test_20_gb_of_shards_are_catalogued_and_streamed_in_little_memory(tmp_path: Path) -> None:
    """At most 2.5 GB for a process and its workers together; the repeats are links to one shard, with other names."""
    bitmaps = [io.BytesIO() for _ in range(24)]
    for i, bitmap in enumerate(bitmaps):
        Image.fromarray(draw(1, 840, 1120, i)[0]).save(bitmap, "BMP")
    members = [(f"{i}.{suffix}", data) for i, bitmap in enumerate(bitmaps)
               for suffix, data in (("bmp", bitmap.getvalue()), ("cls", str(i % 2).encode()))]  # fmt: skip
    first = shard(tmp_path / "a-000.tar", members)
    count = math.ceil(20e9 / first.stat().st_size)
    for i in range(1, count):
        (tmp_path / f"a-{i:03}.tar").symlink_to(first)
    program = (
        "import sys; from training.data import catalogue\n"
        "if __name__ == '__main__':\n"
        "    found = catalogue(sys.argv[1], workers=2)\n"
        "    print(len(found.records), len(found.copies), sum(len(data) for _, data in found.pictures(found.records)))"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    peak = 0
    arguments = [sys.executable, str(script), f"{tmp_path}/a-*.tar"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.getcwd()}) as process:
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            time.sleep(0.2)
        assert process.stdout
        answer = process.stdout.read().split()
    read_bytes = count * sum(len(bitmap.getvalue()) for bitmap in bitmaps)
    print(f"{read_bytes / 1e9:.1f} GB, {count * 24} pictures, peak {peak / 1e9:.2f} GB")
    assert [int(each) for each in answer] == [24 * count, 24 * (count - 1), read_bytes]
    assert 0 < peak < 2.5e9


def resident(process: int) -> int:
    """Bytes of memory of a process and its children (Linux)."""
    try:
        total = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:  # it has just ended
        return 0
    return total + sum(resident(int(child)) for child in children)
