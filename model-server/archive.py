"""Bundle -> .mar in a model store, with torch-model-archiver.

python model-server/archive.py BUNDLE [BUNDLE...] --store FOLDER
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from model_archiver.model_archiver import ModelArchiver
from model_archiver.model_archiver_config import ModelArchiverConfig

from bundle.manifest import MANIFEST, BundleError, read

HANDLER = Path(__file__).with_name("handler.py")
# What TorchServe takes from nowhere but the archive. Calls whose caller is gone are dropped from the
# queue (the gateway's MODEL_SECONDS, and a little); a worker that cannot load is given up.
CONFIG = """\
clientTimeoutInMills: {timeout}
maxRetryTimeoutInSec: 20
responseTimeout: 30
startupTimeout: 120
"""


def archive(bundle: Path, store: Path, model_seconds: float = 1.5) -> Path:
    """Write <store>/<name>.mar, whole or not at all. Raises BundleError for a bundle that must not be served."""
    manifest = read(bundle)
    store.mkdir(parents=True, exist_ok=True)
    files = [str(bundle / name) for name in (MANIFEST, *manifest.files)]
    with tempfile.TemporaryDirectory(dir=store, prefix=".archive-") as scratch:
        config = Path(scratch) / "model-config.yaml"
        config.write_text(CONFIG.format(timeout=round(1000 * model_seconds + 500)))
        # The archiver collects its files in the temporary directory under the model's name:
        # one of its own keeps two runs from deleting each other's.
        old, tempfile.tempdir = tempfile.tempdir, scratch
        try:
            ModelArchiver.generate_model_archive(
                ModelArchiverConfig(
                    model_name=manifest.name,
                    version=manifest.version,
                    handler=str(HANDLER),
                    extra_files=",".join(files),
                    config_file=str(config),
                    export_path=scratch,
                    archive_format="zip-store",  # weights do not compress
                )
            )
        finally:
            tempfile.tempdir = old
        target = store / f"{manifest.name}.mar"
        os.replace(Path(scratch) / target.name, target)
    return target


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--store", type=Path, required=True)
    seconds = float(os.environ.get("MODEL_SECONDS", "1.5"))
    parser.add_argument("--model-seconds", type=float, default=seconds, help="that a caller waits (MODEL_SECONDS)")
    args = parser.parse_args(arguments)
    for bundle in args.bundles:
        try:
            print(archive(bundle, args.store, args.model_seconds))
        except BundleError as exc:
            sys.exit(f"archive: {bundle}: {exc}")


if __name__ == "__main__":
    main()
