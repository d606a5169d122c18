"""A real TorchServe and a real gunicorn, started once on free ports."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Kennel
from tiny import tiny_bundle

from local import processes, run

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"


@pytest.fixture(scope="session")
def bundle() -> Path:
    """The default bundle, made where it is missing."""
    return run.find(run.DEFAULT)


@pytest.fixture(scope="session")
def gateway(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kennel]:
    """dog-breeds, the default, and a tiny model of red, green and blue."""
    folder = tmp_path_factory.mktemp("kennel")
    tiny_bundle(folder / "tiny")
    bundles = {"dog-breeds": bundle, "tiny": folder / "tiny"}
    port, grpc_port = processes.free_ports(2)
    with (folder / "log").open("wb") as log, run.running(list(bundles.values()), port, grpc_port, log) as running:
        yield Kennel(running, bundles, folder / "log", f"127.0.0.1:{grpc_port}")


@pytest.fixture(scope="session")
def photos() -> list[tuple[bytes, int]]:
    """Photographs and their class among dog-breeds' 119: 59 dogs, 17 others."""
    if not PHOTOS.exists():
        pytest.skip(f"no photographs at {PHOTOS.parent}")
    dogs = [(path.read_bytes(), int(path.name[:4]) - 151) for path in sorted((PHOTOS / "dog").iterdir())]
    return dogs + [(path.read_bytes(), 118) for path in sorted((PHOTOS / "not-dog").iterdir())]
