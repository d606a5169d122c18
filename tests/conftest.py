"""A bucket for whoever reads from gs://."""

from collections.abc import Iterator
from email.message import Message
from email.parser import BytesParser
from http.server import HTTPServer
from typing import Any

import fsspec
import pytest
from gcp_storage_emulator.server import create_server  # type: ignore[import-untyped]

collect_ignore = ["vertex"]  # run in .venv/vertex: see tests/vertex/pytest.ini


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes gs:// mean a server here."""
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # google-auth would look for Google's machines
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    yield lambda server: monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_address[1]}")
    fsspec.config.conf.clear()
    fsspec.filesystem("gs").clear_instance_cache()


class Exact(BytesParser):
    """Of data that ends with \\r the emulator's parser loses that byte: gcsfs ends lines with \\n alone."""

    def parsebytes(self, text: bytes, headersonly: bool = False) -> Message:
        return super().parsebytes(text.replace(b"\r\n--==0==--", b"\r\r\n--==0==--"), headersonly)  # gcsfs' boundary


@pytest.fixture
def bucket(address: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An emulated bucket's filesystem; the bucket is gs://pets."""
    monkeypatch.setattr(HTTPServer, "request_queue_size", 128)  # its 5 make concurrent requests wait a second
    monkeypatch.setattr("gcp_storage_emulator.server.BytesParser", Exact)
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="pets")
    server.start()
    try:
        address(server._api._httpd)
        yield fsspec.filesystem("gs")
    finally:
        server.stop()
