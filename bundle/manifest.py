"""What a bundle is: a folder whose manifest.json names its classes, its input and every file.

A bundle is read whole or refused with the file and the reason; it is written elsewhere and
moved into place, so that no half of one is ever found under its name.
"""

import base64
import dataclasses
import hashlib
import io
import json
import math
import re
import shutil
import tempfile
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import PIL
from PIL import Image

from bundle import picture

FORMAT = 1
MANIFEST = "manifest.json"
# A DNS label: the name is used in addresses, file names and Kubernetes objects.
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class BundleError(ValueError):
    """A bundle that must not be served; the message names the file and the reason."""


@dataclass(frozen=True)
class Check:
    """A drawn JPEG (base64) and the sha256 of the pixels that `picture.load` must make of it."""

    jpeg: str
    sha256: str


@dataclass(frozen=True)
class Input:
    """What pixels the model was trained on. Its digest is the contract on the wire."""

    resize: picture.Resize
    check: Check

    @classmethod
    def drawn(cls, resize: picture.Resize, drawing: picture.Pixels) -> "Input":
        """An input whose check is this drawing, uint8 [H, W, 3], as this machine decodes it."""
        jpeg = io.BytesIO()
        Image.fromarray(drawing).save(jpeg, "JPEG", quality=50)
        pixels = picture.load(jpeg.getvalue(), resize)
        return cls(resize, Check(base64.b64encode(jpeg.getvalue()).decode(), sha256(pixels.tobytes())))

    @cached_property
    def contract(self) -> str:
        return sha256(canonical(dataclasses.asdict(self)))

    def check_pixels(self) -> picture.Pixels:
        """The check's pixels, uint8 [H, W, 3]. Raises BundleError where this decoder makes others."""
        try:
            pixels = picture.load(base64.b64decode(self.check.jpeg), self.resize)
        except ValueError as exc:
            raise BundleError(f"{MANIFEST}: input.check.jpeg: {exc}") from exc
        if sha256(pixels.tobytes()) != self.check.sha256:
            raise BundleError(
                f"{MANIFEST}: input.check: this installation (Pillow {PIL.__version__}) decodes or resizes "
                "pictures differently than the one that made the bundle: install the Pillow it names in provenance"
            )
        return pixels


@dataclass(frozen=True)
class Decision:
    """probabilities = softmax(logits / temperature); a top one below threshold is "unknown"."""

    temperature: float = 1.0
    threshold: float = 0.0
    top_k: int = 5

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf or not 0 <= self.threshold <= 1 or self.top_k < 1:
            raise ValueError("temperature must be above 0, threshold 0 to 1, top_k at least 1")


@dataclass(frozen=True)
class Manifest:
    """manifest.json. `files` has the sha256 of every other file, `digest` is over all of them."""

    name: str
    version: str
    classes: tuple[str, ...]
    input: Input
    licence: str
    files: Mapping[str, str] = field(default_factory=dict)
    decision: Decision = Decision()
    tolerance: float = 1e-3  # how far golden logits may differ; int8 needs more than fp32
    metrics: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"name {self.name!r} must be 1 to 63 of a-z, 0-9 and '-', as a DNS label")
        if not VERSION.fullmatch(self.version):
            raise ValueError(f"version {self.version!r} must be 1 to 63 of A-Z, a-z, 0-9, '.', '_' and '-'")
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise ValueError("classes must be at least two, all different")
        if any("/" in name or name == MANIFEST for name in self.files):
            raise ValueError("files are names in the bundle's own folder, without the manifest")
        if not 0 <= self.tolerance < math.inf:
            raise ValueError("tolerance must be a number, 0 or more")

    @cached_property
    def digest(self) -> str:
        """sha256 over the sorted (name, sha256) of all files, the manifest as canonical JSON."""
        files = {**self.files, MANIFEST: sha256(canonical(dataclasses.asdict(self)))}
        return sha256("".join(f"{name} {value}\n" for name, value in sorted(files.items())).encode())

    def to_json(self) -> bytes:
        return json.dumps({"digest": self.digest, **dataclasses.asdict(self)}, indent=1, ensure_ascii=False).encode()


def parse(data: bytes) -> Manifest:
    """manifest.json's bytes -> Manifest. Raises BundleError with the key and the reason."""
    try:
        value = json.loads(data)
        if not isinstance(value, dict):
            raise TypeError(f"the file must be an object, not {type(value).__name__}")
        if (found := value.get("format", FORMAT)) != FORMAT:  # before the keys, which it may have others of
            raise ValueError(f"format {found} is not known here: this Kennel reads format {FORMAT}")
        if (says := value.pop("digest", None)) is None:
            raise ValueError("digest is missing")
        manifest: Manifest = _build(Manifest, value, "")
        if manifest.digest != says:
            raise ValueError(f"was altered: its digest is {manifest.digest}, but it says {says}")
    except (ValueError, TypeError, OverflowError, RecursionError) as exc:
        raise BundleError(f"{MANIFEST}: {exc}") from exc
    return manifest


def read(folder: Path) -> Manifest:
    """Read and verify a bundle. Raises BundleError with the file and the reason."""
    try:
        manifest = parse((folder / MANIFEST).read_bytes())
    except OSError as exc:
        raise BundleError(f"{folder}: is no bundle, its {MANIFEST} cannot be read ({exc.strerror})") from exc
    for name, expected in manifest.files.items():
        try:
            found = sha256((folder / name).read_bytes())
        except (OSError, ValueError) as exc:  # ValueError: a name that no file can have
            raise BundleError(f"{name}: is missing or cannot be read ({exc})") from exc
        if found != expected:
            raise BundleError(f"{name}: was altered or cut off: its sha256 is {found}, the manifest says {expected}")
    return manifest


def write(folder: Path, make: Callable[[Path], Manifest]) -> Manifest:
    """Make a bundle: `make` fills an empty folder and describes it; only then is it moved to `folder`.

    A bundle already at `folder` is replaced; anything else there is kept and raises BundleError.
    """
    check_target(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        made = make(new)
        files = {path.name: sha256(path.read_bytes()) for path in sorted(new.iterdir())}
        # As it will be read, or the digest would differ: 1 for a float becomes 1.0, a tuple a list.
        value = json.loads(json.dumps(dataclasses.asdict(made) | {"files": files}))
        manifest: Manifest = _build(Manifest, value, "")
        (new / MANIFEST).write_bytes(manifest.to_json())
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    return manifest


def check_target(folder: Path) -> None:
    """Raises BundleError where `write` would refuse: for a folder that holds something else than a bundle."""
    if folder.exists() and not (folder / MANIFEST).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BundleError(f"{folder}: holds something that is not a bundle; name another folder")


def copy(source: Path, target: Path) -> Manifest:
    """Copy a bundle, verified, into place as `write` does."""
    manifest = read(source)

    def fill(folder: Path) -> Manifest:
        for name in manifest.files:
            shutil.copyfile(source / name, folder / name)
        return manifest

    return write(target, fill)


def canonical(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _build(kind: Any, value: Any, where: str) -> Any:
    """JSON value -> the annotated type, exactly: every mismatch names its key."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where.rstrip('.')} must be an object, not {type(value).__name__}")
        hints = typing.get_type_hints(kind)
        if unknown := sorted(set(value) - set(hints)):
            raise ValueError(f"{where}{unknown[0]} is not a known key")
        made = {key: _build(hints[key], item, f"{where}{key}.") for key, item in value.items()}
        missing = [
            f.name
            for f in dataclasses.fields(kind)
            if f.name not in made and f.default is f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ValueError(f"{where}{missing[0]} is missing")
        try:
            return kind(**made)
        except ValueError as exc:
            raise ValueError(f"{where}{exc}") from exc
    where = where.rstrip(".")
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, not {type(value).__name__}")
        return tuple(_build(args[0], item, f"{where}[{i}].") for i, item in enumerate(value))
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{where} must be one of {', '.join(args)}, not {value!r}")
        return value
    if origin is not None:  # Mapping[str, ...]
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object, not {type(value).__name__}")
        return value if args[1] is Any else {k: _build(args[1], v, f"{where}.{k}.") for k, v in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} must be {kind.__name__}, not {type(value).__name__}")
    return value
