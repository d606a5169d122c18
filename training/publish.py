"""A bundle and what belongs to it into a bucket, or a folder, so that no half of one is ever found there."""

from pathlib import Path
from typing import Any

from bundle import manifest
from bundle.manifest import MANIFEST, BundleError, Manifest
from training.sources import DataError, explained, open_address


def publish(bundle: Path, address: str) -> Manifest:
    """Put a bundle at `address`, a folder or gs://bucket/path; one of the same digest stays as it is.

    Into a bucket its files go beside it first, to ADDRESS.incoming. Whoever reads in the moment when they take
    their places finds no manifest, or files that it does not describe, and refuses both. Raises BundleError for a
    bundle that is none, BundleError or DataError where something else lies at `address` or it cannot be written.
    """
    made = manifest.read(bundle)
    filesystem, root = open_address(address)
    with explained(address, writing=True):
        there = _there(filesystem, root)
    if there and there.digest == made.digest:
        return made
    if "://" not in address:
        return manifest.copy(bundle, Path(root))
    with explained(address, writing=True):
        filesystem.invalidate_cache()  # of what was there when it was last looked at
        names = {name.removeprefix(f"{root}/") for name in filesystem.find(root)}
        ours = {MANIFEST, *there.files} if there else set(made.files)  # without a manifest: what an ended swap left
        if not there and names - ours:
            raise DataError(f"{address}: holds something that is not a bundle; name another folder")
        for name in made.files:
            filesystem.put_file(str(bundle / name), f"{root}.incoming/{name}")
        for name in sorted(names & ours, key=lambda name: name != MANIFEST):  # without it no bundle is there
            filesystem.rm_file(f"{root}/{name}")
        for name in made.files:
            filesystem.cp_file(f"{root}.incoming/{name}", f"{root}/{name}")  # within the bucket
        filesystem.pipe_file(f"{root}/{MANIFEST}", (bundle / MANIFEST).read_bytes())
        for name in made.files:
            filesystem.rm_file(f"{root}.incoming/{name}")
    return made


def put(file: Path, address: str) -> None:
    """A file to `address`, here or gs://bucket/path/name. Raises DataError."""
    filesystem, path = open_address(address)
    with explained(address, writing=True):
        if "://" not in address:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        filesystem.put_file(str(file), path)


def _there(filesystem: Any, root: str) -> Manifest | None:
    """The manifest of the bundle at `root`, if one is there."""
    try:
        return manifest.parse(filesystem.cat_file(f"{root}/{MANIFEST}"))
    except (FileNotFoundError, BundleError):
        return None
