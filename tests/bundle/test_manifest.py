"""bundle.manifest: what is written is read again, and whatever else is there is refused."""

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bundle import golden, manifest, picture
from bundle.manifest import BundleError, Check, Decision, Input, Manifest, copy, parse, read, write
from bundle.picture import Resize

INPUT = Input.drawn(Resize(16, 16, "crop", 18), golden.draw(1, 40, 50)[0])
MADE = Manifest(
    name="dogs-2",
    version="1.0",
    classes=("hündin", "rüde", "welpe"),
    input=INPUT,
    licence="Apache-2.0",
    decision=Decision(1.5, 0.25, 2),
    metrics={"accuracy": 0.9, "by class": {"rüde": [1, 2.5], "hündin": None}},
    provenance={"seed": 7},
)
FILES = {"model.onnx": b"graph" * 100, "golden.npz": b"pictures"}


def fill(folder: Path) -> Manifest:
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return MADE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "store" / "dogs", fill)
    return tmp_path / "store" / "dogs"


def edited(change: Callable[[dict[str, Any]], Any]) -> bytes:
    value = json.loads(MADE.to_json())
    change(value)
    return json.dumps(value).encode()


def altered(where: str, new: Any) -> bytes:
    """manifest.json with the value at a path such as input.resize.height replaced, or removed if new is ..."""
    *path, last = where.split(".")

    def change(value: Any) -> None:
        for key in path:
            value = value[key]
        if new is ...:
            del value[last]
        else:
            value[last] = new

    return edited(change)


# Written and read


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = write(tmp_path / "a" / "b", fill)
    assert read(tmp_path / "a" / "b") == written
    assert written.files == {name: manifest.sha256(data) for name, data in FILES.items()}
    assert written == replace(MADE, files=written.files)
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {*FILES, "manifest.json"}


@pytest.mark.parametrize(
    "loose",
    [
        replace(MADE, decision=Decision(temperature=1, threshold=0)),
        replace(MADE, tolerance=1),
        replace(MADE, classes=["a", "b"]),  # type: ignore[arg-type]
        replace(MADE, metrics={"confusion": ((1, 2), (3, 4)), "at": {2: "x", 10: "y"}}),
    ],
    ids=["integers", "tolerance", "list", "tuples and numbered keys"],
)
def test_what_json_tells_apart_differently_than_python_is_read_all_the_same(tmp_path: Path, loose: Manifest) -> None:
    written = write(tmp_path / "new", lambda folder: loose)
    assert read(tmp_path / "new") == written


def test_a_copy_is_the_same_bundle(folder: Path, tmp_path: Path) -> None:
    assert copy(folder, tmp_path / "other") == read(folder) == read(tmp_path / "other")


def test_a_damaged_bundle_is_not_copied(folder: Path, tmp_path: Path) -> None:
    (folder / "model.onnx").write_bytes(b"other")
    with pytest.raises(BundleError, match=r"model.onnx: was altered"):
        copy(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_bundle_is_replaced_whole(folder: Path) -> None:
    def other(new: Path) -> Manifest:
        (new / "weights").write_bytes(b"new")
        return replace(MADE, version="2")

    write(folder, other)
    assert read(folder).version == "2"
    assert {path.name for path in folder.iterdir()} == {"weights", "manifest.json"}
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_bundle_and_nothing_else(folder: Path, failure: type[BaseException]) -> None:
    def fail(new: Path) -> Manifest:
        fill(new)
        raise failure

    before = read(folder)
    for target in (folder, folder.parent / "new"):
        with pytest.raises(failure):
            write(target, fail)
    assert read(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("made", ["file", "folder"])
def test_something_that_is_not_a_bundle_is_kept(tmp_path: Path, made: str) -> None:
    target = tmp_path / "thesis"
    kept = target if made == "file" else target / "chapter1"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("years of work")
    with pytest.raises(BundleError, match=r"thesis: holds something that is not a bundle"):
        write(target, fill)
    assert kept.read_text() == "years of work"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert write(tmp_path / "empty", fill) == read(tmp_path / "empty")


# The digest


def test_the_digest_is_of_the_content_not_the_text() -> None:
    value = json.loads(MADE.to_json())

    def backwards(item: Any) -> Any:
        return {key: backwards(item[key]) for key in reversed(item)} if isinstance(item, dict) else item

    for text in (json.dumps(backwards(value)), json.dumps(value, indent=7), json.dumps(value, separators=(",", ":"))):
        assert parse(text.encode()) == MADE
        assert parse(text.encode()).digest == MADE.digest


@pytest.mark.parametrize(
    "other",
    [
        replace(MADE, name="cats"),
        replace(MADE, version="1.1"),
        replace(MADE, classes=MADE.classes[::-1]),
        replace(MADE, input=replace(INPUT, resize=Resize(16, 16, "pad"))),
        replace(MADE, licence="MIT"),
        replace(MADE, files={"model.onnx": "00"}),
        replace(MADE, decision=Decision()),
        replace(MADE, tolerance=0.1),
        replace(MADE, metrics={}),
        replace(MADE, provenance={"seed": 8}),
    ],
    ids=["name", "version", "classes", "input", "licence", "files", "decision", "tolerance", "metrics", "provenance"],
)
def test_the_digest_changes_with_everything_and_the_contract_only_with_the_input(other: Manifest) -> None:
    assert other.digest != MADE.digest
    assert (other.input.contract != INPUT.contract) == (other.input != INPUT)


@pytest.mark.parametrize(
    "other",
    [
        *(
            replace(INPUT, resize=replace(INPUT.resize, **change))
            for change in (
                {"height": 15},
                {"width": 15},
                {"shorter_side": 19},
                {"filter": "bilinear"},
                {"rule": "pad", "shorter_side": 0},
            )
        ),
        replace(INPUT, check=replace(INPUT.check, jpeg="AAAA")),
        replace(INPUT, check=replace(INPUT.check, sha256="00")),
    ],
    ids=["height", "width", "shorter side", "filter", "rule", "jpeg", "sha256"],
)
def test_the_contract_changes_with_everything_in_the_input(other: Input) -> None:
    assert other.contract != INPUT.contract


# What is refused


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.onnx").unlink(), "model.onnx: is missing or cannot be read"),
        (
            lambda folder: (folder / "model.onnx").write_bytes(FILES["model.onnx"][:-1]),
            "model.onnx: was altered or cut",
        ),
        (lambda folder: (folder / "golden.npz").write_bytes(b"pictureS"), "golden.npz: was altered or cut off"),
        (lambda folder: (folder / "golden.npz").write_bytes(b""), "golden.npz: was altered or cut off"),
        (lambda folder: (folder / "manifest.json").unlink(), "dogs: is no bundle, its manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_bytes(b""), "manifest.json: Expecting value"),
    ],
)
def test_a_damaged_bundle_is_refused_with_file_and_reason(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(BundleError, match=message):
        read(folder)


@pytest.mark.parametrize("missing", ["nowhere", "file", "folder"])
def test_what_is_no_bundle_is_refused(tmp_path: Path, missing: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(BundleError, match=rf"{missing}: is no bundle, its manifest.json cannot be read"):
        read(tmp_path / missing)


@pytest.mark.parametrize("name", ["", ".", "..", "a\0b", "x" * 300])
def test_files_that_no_folder_can_hold_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "manifest.json").write_bytes(replace(MADE, files={name: "00"}).to_json())
    with pytest.raises(BundleError, match="is missing or cannot be read"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (MADE.to_json()[:-1], "Expecting"),
        (MADE.to_json()[: len(MADE.to_json()) // 2], "line"),
        (b"", "Expecting value"),
        (b'"\xff"', "decode"),
        (b"[" * 100_000, "recursion"),
        (b"[]", "the file must be an object, not list"),
        (b"3", "the file must be an object, not int"),
        (MADE.to_json().replace(b"1.5", b"1.6"), "was altered: its digest is .*, but it says"),
        (altered("classes", ["hündin", "rüde"]), "was altered: its digest"),
        (altered("metrics.accuracy", 0.99), "was altered: its digest"),
        (altered("digest", "00"), "was altered: its digest is .*, but it says 00"),
        (altered("digest", ...), "digest is missing"),
        (altered("colour", "brown"), "colour is not a known key"),
        (altered("input.resize.colour", 1), r"input\.resize\.colour is not a known key"),
        (altered("licence", ...), "licence is missing"),
        (altered("input.check.sha256", ...), r"input\.check\.sha256 is missing"),
        (altered("name", 7), "name must be str, not int"),
        (altered("classes", "hündin"), "classes must be a list, not str"),
        (altered("classes", ["a", 7]), r"classes\[1\] must be str, not int"),
        (altered("input", []), "input must be an object, not list"),
        (altered("input.resize.height", "16"), r"input\.resize\.height must be int, not str"),
        (altered("input.resize.height", True), r"input\.resize\.height must be int, not bool"),
        (altered("input.resize.height", 16.0), r"input\.resize\.height must be int, not float"),
        (
            altered("input.resize.rule", "squash"),
            r"input\.resize\.rule must be one of crop, pad, stretch, not 'squash'",
        ),
        (altered("input.resize.height", 0), r"input\.resize\.height and width must be 1 to 1446"),
        (altered("files", []), "files must be an object, not list"),
        (altered("files", {"model.onnx": 7}), r"files\.model\.onnx must be str, not int"),
        (altered("files", {"../model.onnx": "00"}), "files are names in the bundle's own folder"),
        (altered("files", {"manifest.json": "00"}), "files are names in the bundle's own folder"),
        (altered("decision.temperature", "hot"), r"decision\.temperature must be float, not str"),
        (altered("decision.temperature", 0), r"decision\.temperature must be above 0"),
        (altered("decision.temperature", float("nan")), r"decision\.temperature must be above 0"),
        (altered("decision.temperature", float("inf")), r"decision\.temperature must be above 0"),
        (altered("decision.temperature", 10**400), "too large"),
        (altered("decision.threshold", 1.01), r"decision\.temperature must be above 0, threshold 0 to 1"),
        (altered("decision.top_k", 0), "top_k at least 1"),
        (altered("tolerance", float("nan")), "tolerance must be a number, 0 or more"),
        (altered("tolerance", -1), "tolerance must be a number, 0 or more"),
        (altered("metrics", None), "metrics must be an object, not NoneType"),
        (altered("format", 2), "format 2 is not known here: this Kennel reads format 1"),
        (edited(lambda value: value.update(format=2, shape=[1])), "format 2 is not known here"),
        (altered("format", "1"), "format 1 is not known here"),
        (altered("name", "Dogs"), "name 'Dogs' must be 1 to 63 of a-z, 0-9 and '-'"),
        (altered("name", "dogs-"), "name 'dogs-' must be"),
        (altered("name", "d" * 64), "name 'd+' must be"),
        (altered("version", ""), "version '' must be 1 to 63 of"),
        (altered("version", "../1"), r"version '\.\./1' must be"),
        (altered("version", "1\n"), r"version '1\\n' must be"),
        (altered("classes", ["dog"]), "classes must be at least two, all different"),
        (altered("classes", ["dog", "dog"]), "classes must be at least two, all different"),
        (altered("classes", ["\ud800", "dog"]), "surrogates"),
    ],
)
def test_a_wrong_manifest_is_refused_with_the_key_and_the_reason(data: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=f"^manifest.json: .*{message}"):
        parse(data)


# The check of the decoder


def test_this_decoder_gives_the_check_s_pixels() -> None:
    pixels = INPUT.check_pixels()
    assert np.array_equal(pixels, picture.load(base64.b64decode(INPUT.check.jpeg), INPUT.resize))
    assert pixels.std() > 1


def test_a_decoder_that_gives_other_pixels_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    load = picture.load

    def other(*args: Any) -> picture.Pixels:
        pixels = load(*args).copy()
        pixels[3, 5, 1] ^= 1
        return pixels

    monkeypatch.setattr(picture, "load", other)
    with pytest.raises(BundleError, match=r"manifest.json: input.check: this installation \(Pillow .*\) decodes or"):
        INPUT.check_pixels()


@pytest.mark.parametrize("jpeg", ["", "A", "AAAA", "/9j/4AAQSkZJRg==", INPUT.check.jpeg[:400]])
def test_a_damaged_check_is_refused(jpeg: str) -> None:
    with pytest.raises(BundleError, match=r"manifest.json: input.check.jpeg: "):
        replace(INPUT, check=Check(jpeg, INPUT.check.sha256)).check_pixels()
