"""The same from gs://, against an emulator; and a bucket that refuses, which the emulator cannot."""

import io
import json
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from bundle.golden import draw
from training import scan, sources
from training.data import Catalogue, DataError, catalogue


def drawing(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(draw(1, 48, 64, seed)[0]).save(file, "PNG")
    return file.getvalue()


def read(address: str, csv: str | None = None, workers: int = 0) -> Catalogue:
    return catalogue(address, csv, validation=0.25, workers=workers, progress=False)


FILES = {f"{kind}/{i} [x].png": drawing(2 * i + (kind == "dog")) for i in range(12) for kind in ("big cat", "dog")}


def test_a_folder_and_a_csv(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, data in FILES.items():
        bucket.pipe_file(f"pets/data/{name}", data)
    found = read("gs://pets/data/")
    assert found.classes == ("big cat", "dog")
    assert {one.key: data for one, data in found.pictures(found.records)} == FILES
    assert found.read(found.records[3]) == FILES[found.records[3].key]
    # In processes of their own, each with its own client.
    monkeypatch.setattr(scan, "FEW", 1)
    monkeypatch.setattr(sources, "CHUNK", 12)
    assert read("gs://pets/data", workers=1).records == found.records
    rows = "".join(f"{name[:-4]},{name[:3]}\n" for name in FILES)
    bucket.pipe_file("pets/labels.csv", f"id,breed\n{rows}".encode())
    table = read("gs://pets/data", "gs://pets/labels.csv")
    assert table.classes == ("big", "dog")
    assert [one.sha256 for one in table.records] == [one.sha256 for one in found.records]
    bucket.rm_file("pets/data/dog/3 [x].png")
    with pytest.raises(DataError, match=r"dog/3 \[x\].png: does not exist"):
        list(found.pictures(found.records))


def test_shards(bucket: Any) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for i, (name, data) in enumerate(FILES.items()):
            for suffix, content in (("png", data), ("cls", name[:3].encode())):
                info = tarfile.TarInfo(f"{i}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    bucket.pipe_file("pets/shards/a-000.tar", packed.getvalue())
    for pattern in ("gs://pets/shards/a-{000..000}.tar", "gs://pets/*/a-*.tar"):
        found = read(pattern)
        assert found.classes == ("big", "dog")
        assert found.records[0].key == "a-000.tar/0.png"
        assert sorted(data for _, data in found.pictures(found.records)) == sorted(FILES.values())


@pytest.mark.parametrize("name", ["gs://pets/nothing", "gs://nobody/data", "gs://pets/nothing.tar"])
def test_what_is_not_there(bucket: Any, name: str) -> None:
    with pytest.raises(DataError, match=f"{name}: does not exist"):
        read(name)


class Refuses(BaseHTTPRequestHandler):
    """Answers as the JSON API does: cloud.google.com/storage/docs/json_api/v1/status-codes."""

    status, text = 403, "kennel@x.iam.gserviceaccount.com does not have storage.objects.list access to the bucket."

    def do_GET(self) -> None:
        body = json.dumps({"error": {"code": self.status, "message": self.text, "errors": []}}).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Anonymous(Refuses):
    status, text = 401, "Anonymous caller does not have storage.objects.list access to the bucket."


@pytest.mark.parametrize("handler", [Refuses, Anonymous])
@pytest.mark.parametrize("name", ["data", "data/*.tar", "data/a.tar", "data/{0..1}.tar"])
def test_a_bucket_without_rights(
    address: Any, handler: type[Refuses], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            address(server)
            with pytest.raises(
                DataError, match=r"gs://private/data\S*: no right to read it .* roles/storage.objectViewer"
            ):
                read(f"gs://private/{name}")
            with pytest.raises(DataError, match=r"gs://private/labels.csv: no right to read it"):
                read("gs://private/data", "gs://private/labels.csv")
        finally:
            server.shutdown()
    assert "gcsfs" not in [each.name for each in caplog.records]  # no traceback of its own beside our sentence
