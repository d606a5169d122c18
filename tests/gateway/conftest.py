import handler
import pytest
from fake_torchserve import FakeTorchServe
from tiny import tiny_bundle


@pytest.fixture
def torchserve():
    server = FakeTorchServe()
    yield server
    server.end()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Two versions of one model: other classes, another input size."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_bundle(folder / "1", version="1")
    tiny_bundle(folder / "2", ("rouge", "vert", "bleu"), version="2", size=48)
    return {version: handler.Model(folder / version) for version in "12"}
