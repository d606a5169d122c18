"""Between a folder here and the bucket: data up, only what changed; bundles up and down, never half of one."""

import base64
import hashlib
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
from google.cloud.storage.retry import DEFAULT_RETRY

from bundle import manifest
from bundle.manifest import MANIFEST, BundleError, Manifest
from vertex.cloud import Cloud, CloudError

AT_ONCE = 10  # as many connections as the library keeps
FILE_S = 300
RETRY_S = 120.0  # a request that fails in passing is tried again for so long
PROGRESS_S = 2.0
REPORTS = ("report.html", "report.json", "curve.json")


@dataclass(frozen=True)
class Uploaded:
    files: int
    sent: int
    bytes: int


def upload(cloud: Cloud, folder: Path, prefix: str, *, prune: bool = False, files: Sequence[Path] = ()) -> Uploaded:
    """Make gs://bucket/`prefix`/ hold what the folder holds: what is there already is not sent again.

    `files`: only these. Without `prune`, objects that have no file here stop it before anything is sent: training
    would see them. Raises CloudError; what was sent until then stays, and the same command goes on after it.
    """
    paths = sorted(files or (path for path in folder.rglob("*") if path.is_file()))
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not paths:
        raise CloudError(f"{folder}: holds no files")
    bucket = _bucket(cloud)
    where = f"gs://{bucket.name}/{prefix}"
    with cloud.explained(f"looking at {where}"):
        there = {one.name: one for one in bucket.list_blobs(prefix=f"{prefix}/", timeout=FILE_S)}
    names = {f"{prefix}/{path.relative_to(folder).as_posix()}": path for path in paths}
    if (gone := [] if files else sorted(set(there) - set(names))) and not prune:
        raise CloudError(
            f"{where} holds {len(gone)} files that {folder} does not, {gone[0]} first: training would see them. "
            "PRUNE=1 deletes them there; or give the folder another name"
        )
    changed = [(name, path) for name, path in names.items() if not _same(there.get(name), path)]
    total, sent, last = sum(path.stat().st_size for _, path in changed), 0, time.monotonic()
    print(f"data: {len(paths)} files, {len(changed)} to send ({total / 1e6:,.1f} MB) to {where}", file=sys.stderr)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        waiting = {pool.submit(_send, cloud, bucket, name, path): path for name, path in changed}
        try:
            for count, done in enumerate(as_completed(waiting), 1):
                sent += done.result()
                if time.monotonic() - last > PROGRESS_S:
                    last = time.monotonic()
                    print(f"data: {count} of {len(changed)}, {sent / 1e6:,.1f} MB", file=sys.stderr)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    with cloud.explained(f"deleting from {where}"):
        for name in gone:
            there[name].delete(timeout=FILE_S)
    return Uploaded(len(paths), len(changed), sent)


def upload_bundle(cloud: Cloud, folder: Path) -> tuple[str, Manifest]:
    """A bundle to bundles/ in the bucket under its digest, manifest.json last -> its address and manifest."""
    try:
        made = manifest.read(folder)
    except BundleError as exc:
        raise CloudError(str(exc)) from exc
    prefix = f"bundles/{made.name}-{made.digest[:12]}"
    bucket = _bucket(cloud)
    for name in (*made.files, MANIFEST):
        with cloud.explained(f"looking at gs://{bucket.name}/{prefix}/{name}"):
            there = bucket.get_blob(f"{prefix}/{name}", timeout=FILE_S)
        if not _same(there, folder / name):
            _send(cloud, bucket, f"{prefix}/{name}", folder / name)
    return f"gs://{bucket.name}/{prefix}", made


def bring_back(cloud: Cloud, base: str, out: Path, kind: str, reports: Path) -> Manifest | None:
    """The bundle in `base`/`kind` to `out`, and what `base` holds of REPORTS to `reports`.*; None: no bundle is there.

    Read as a whole, and moved into place only then. Raises CloudError for one that is incomplete or altered.
    """
    bucket, prefix = cloud.storage.bucket(base.split("/")[2]), "/".join(base.rstrip("/").split("/")[3:])
    with cloud.explained(f"fetching {base}{kind}"):
        if not bucket.blob(f"{prefix}/{kind}/{MANIFEST}").exists(timeout=FILE_S):
            return None
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
            fetched = Path(scratch) / "bundle"
            fetched.mkdir()
            for one in bucket.list_blobs(prefix=f"{prefix}/{kind}/", timeout=FILE_S):
                name = one.name.rpartition("/")[2]
                if name and one.name == f"{prefix}/{kind}/{name}":
                    one.download_to_filename(str(fetched / name), timeout=FILE_S, retry=_retry())
            try:
                made = manifest.copy(fetched, out)
            except BundleError as exc:
                raise CloudError(f"{base}{kind} is not taken for a bundle: {exc}") from exc
            for name in REPORTS:
                if (report := bucket.blob(f"{prefix}/{name}")).exists(timeout=FILE_S):
                    report.download_to_filename(str(fetched / name), timeout=FILE_S, retry=_retry())
                    (fetched / name).replace(f"{reports}.{name}")
    return made


def _bucket(cloud: Cloud) -> Any:
    with cloud.explained(f"looking for the bucket {cloud.settings.bucket}"):
        return cloud.storage.get_bucket(cloud.settings.bucket, timeout=FILE_S)


def _send(cloud: Cloud, bucket: Any, name: str, path: Path) -> int:
    """An object appears when it is whole."""
    with cloud.explained(f"sending {path} to gs://{bucket.name}/{name}"):
        try:
            bucket.blob(name).upload_from_filename(str(path), timeout=FILE_S, checksum="crc32c", retry=_retry())
            return path.stat().st_size
        except OSError as exc:
            if isinstance(exc, ConnectionError) or not exc.strerror:
                raise
            raise CloudError(f"{path}: cannot be read ({exc.strerror})") from exc


def _retry() -> Any:
    return DEFAULT_RETRY.with_timeout(RETRY_S)


def _same(there: Any, path: Path) -> bool:
    """By content; what was composed of parts has no MD5, only a CRC32C."""
    if there is None or there.size != path.stat().st_size:
        return False
    digest = hashlib.md5() if there.md5_hash else google_crc32c.Checksum()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return bool((there.md5_hash or there.crc32c) == base64.b64encode(digest.digest()).decode())
