"""MODEL_URI -> checked bundle -> .mar in MODEL_STORE: the model server's init container.

    MODEL_URI=gs://bucket/bundles/mine#sha256=0123... MODEL_STORE=/models python model-server/fetch.py
    python model-server/fetch.py gs://bucket/bundles/mine CACHE

The second form leaves the bundle's folder in CACHE, named by its digest, and prints its path last. A URI is a
bundle's folder behind file://, https:// or gs:// (any file system that fsspec knows); several are separated by
spaces. #sha256= is the bundle's digest, as its manifest and every prediction name it.
"""

import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from archive import archive

from bundle.manifest import MANIFEST, BundleError, Manifest, parse, read
from bundle.remote import reason

DIGEST = re.compile(r"sha256=([0-9a-f]{64})")


def fetch(uri: str, folder: Path) -> None:
    """Write the bundle behind `uri` into `folder`, checked. Raises BundleError with the place and the reason."""
    address, _, fragment = uri.partition("#")
    files, root, manifest = look(uri)
    if not fragment:
        log(f"{address}: without #sha256={manifest.digest} behind it: checked against its own manifest only")
    elif fragment != f"sha256={manifest.digest}":
        raise BundleError(f"{address}: is sha256={manifest.digest}, not {fragment}: another bundle lies there")
    folder.mkdir()
    for name in (MANIFEST, *manifest.files):
        started = time.monotonic()
        try:
            files.get_file(f"{root}/{name}", str(folder / name))
        except Exception as exc:
            raise BundleError(f"{address}: {name} {reason(exc)}") from exc
        log(f"{name}: {(folder / name).stat().st_size:,} bytes in {time.monotonic() - started:.1f} s")
    read(folder)


def look(uri: str) -> tuple[Any, str, Manifest]:
    """File system, path and manifest of the bundle behind `uri`. Raises BundleError."""
    # Without it gcsfs starts its gRPC clients for zonal buckets, which plain buckets do not need.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec

    address, _, fragment = uri.partition("#")
    if fragment and not DIGEST.fullmatch(fragment):
        raise BundleError(f"{uri}: #{fragment} is not #sha256= and 64 hexadecimal digits, as a manifest's digest has")
    try:
        files, root = fsspec.url_to_fs(address)
        return files, root, parse(files.cat_file(f"{root}/{MANIFEST}"))
    except BundleError as exc:
        raise BundleError(f"{address}: {exc}") from exc
    except Exception as exc:  # gcsfs, aiohttp and google-auth raise their own, without a common base
        raise BundleError(f"{address}: its {MANIFEST} {reason(exc)}") from exc


def keep(uri: str, cache: Path) -> Path:
    """The bundle behind `uri` as a folder in `cache`, fetched unless it is there. Raises BundleError."""
    pinned = DIGEST.fullmatch(uri.partition("#")[2])
    folder = cache / (pinned[1] if pinned else look(uri)[2].digest)
    if folder.exists():
        try:
            read(folder)
            return folder
        except BundleError as exc:
            log(f"{folder}: {exc}: fetched again")
            shutil.rmtree(folder)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as scratch:
        fetch(uri, Path(scratch) / "bundle")
        (Path(scratch) / "bundle").rename(folder)
    return folder


def fetch_all(uris: str, store: Path) -> None:
    """Every bundle into the store, whose former .mar files go. Raises BundleError; the store is then as it was."""
    store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=store, prefix=".fetch-") as scratch:
        for i, uri in enumerate(uris.split()):
            folder = Path(scratch) / str(i)
            fetch(uri, folder)
            ready = archive(folder, Path(scratch) / "ready", float(os.environ.get("MODEL_SECONDS", "1.5")))
            log(f"{uri}: checked, {ready.name}")
        for old in store.glob("*.mar"):
            old.unlink()
        for mar in (Path(scratch) / "ready").iterdir():
            mar.replace(store / mar.name)


def log(message: str, logger: str = "fetch") -> None:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    print(json.dumps({"time": stamp, "level": "INFO", "logger": logger, "message": message}), flush=True)


def main(arguments: Sequence[str] = ()) -> None:
    uris, store = os.environ.get("MODEL_URI", ""), os.environ.get("MODEL_STORE", "")
    if not arguments and (not uris.split() or not store):
        sys.exit("fetch: MODEL_URI (a bundle's folder) and MODEL_STORE (a folder to write to) must be set")
    try:
        if arguments:
            uri, cache = arguments
            print(keep(uri, Path(cache)))
        else:
            fetch_all(uris, Path(store))
    except (BundleError, OSError) as exc:
        sys.exit(f"fetch: {exc}")


if __name__ == "__main__":
    main(sys.argv[1:])
