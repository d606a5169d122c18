"""MODEL_URI to a model store: from a folder, a real web server and a bucket of a real emulator."""

import functools
import http.server
import threading

import fetch
import pytest
from tiny import DAMAGES, tiny_bundle

from bundle.manifest import BundleError


@pytest.fixture
def bundle(tmp_path):
    return tmp_path / "web/tiny", tiny_bundle(tmp_path / "web/tiny")


@pytest.fixture
def web(tmp_path):
    """The address of a server of tmp_path/web."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    (tmp_path / "web").mkdir(exist_ok=True)
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path / "web")
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("scheme", ["file", "http"])
def test_a_bundle_becomes_an_archive(tmp_path, bundle, web, scheme, pinned, capsys):
    folder, manifest = bundle
    address = f"file://{folder}" if scheme == "file" else f"{web}/tiny"
    fetch.fetch_all(address + (f"#sha256={manifest.digest}" if pinned else ""), tmp_path / "store")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["tiny.mar"]
    said = capsys.readouterr().out
    assert "model.onnx: " in said
    assert ("own manifest only" in said) != pinned


def test_from_a_bucket(tmp_path, bundle, bucket):
    folder, manifest = bundle
    for path in folder.iterdir():
        bucket.pipe_file(f"pets/models/tiny/{path.name}", path.read_bytes())
    fetch.fetch_all(f"gs://pets/models/tiny#sha256={manifest.digest}", tmp_path / "store")
    assert (tmp_path / "store/tiny.mar").exists()


def test_what_is_kept_is_not_fetched_again_and_what_was_damaged_is(tmp_path, bundle, bucket):
    folder, manifest = bundle
    for path in folder.iterdir():
        bucket.pipe_file(f"pets/models/tiny/{path.name}", path.read_bytes())
    kept = fetch.keep("gs://pets/models/tiny", tmp_path / "cache")
    assert kept == tmp_path / "cache" / manifest.digest
    assert fetch.read(kept) == manifest
    (kept / "model.onnx").write_bytes(b"")
    assert fetch.keep(f"gs://pets/models/tiny#sha256={manifest.digest}", tmp_path / "cache") == kept
    assert fetch.read(kept) == manifest
    bucket.rm("pets/models/tiny", recursive=True)
    assert fetch.keep(f"gs://pets/models/tiny#sha256={manifest.digest}", tmp_path / "cache") == kept
    with pytest.raises(BundleError, match=r"gs://pets/models/tiny: its manifest\.json does not exist: check the path"):
        fetch.keep("gs://pets/models/tiny", tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [manifest.digest]


def test_several_models_and_those_of_before_go(tmp_path, bundle):
    tiny_bundle(tmp_path / "web/other", name="other")
    fetch.fetch_all(f"file://{tmp_path}/web/tiny file://{tmp_path}/web/other", tmp_path / "store")
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["other.mar", "tiny.mar"]
    fetch.fetch_all(f"file://{tmp_path}/web/other", tmp_path / "store")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["other.mar"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bundle_is_refused_and_the_store_stays(tmp_path, bundle, damage):
    folder, manifest = bundle
    fetch.fetch_all(f"file://{folder}", tmp_path / "store")
    before = (tmp_path / "store/tiny.mar").read_bytes()
    damage(folder)
    with pytest.raises(BundleError, match=r"was altered|another bundle lies there"):
        fetch.fetch_all(f"file://{folder}#sha256={manifest.digest}", tmp_path / "store")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["tiny.mar"]
    assert (tmp_path / "store/tiny.mar").read_bytes() == before


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("file:///nowhere", "its manifest.json does not exist: check the path"),
        ("nothing://x/y", "its manifest.json cannot be read"),
        ("{web}/none", "its manifest.json does not exist: check the path"),
        ("http://127.0.0.1:1/tiny", "its manifest.json cannot be read"),
        ("file://{folder}#sha256=12", "is not #sha256= and 64 hexadecimal digits"),
        ("file://{folder}#md5=12", "is not #sha256= and 64 hexadecimal digits"),
        ("file://{folder}#sha256=" + 64 * "0", "another bundle lies there"),
    ],
)
def test_a_wrong_address_is_named(tmp_path, bundle, web, uri, sentence):
    with pytest.raises(BundleError, match=sentence) as caught:
        fetch.fetch_all(uri.format(web=web, folder=bundle[0]), tmp_path / "store")
    assert uri.format(web=web, folder=bundle[0]).split("#")[0] in str(caught.value)
    assert not list((tmp_path / "store").iterdir())


def test_as_a_program_the_reason_is_one_line(tmp_path, bundle, monkeypatch):
    monkeypatch.setenv("MODEL_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("MODEL_URI", raising=False)
    with pytest.raises(SystemExit, match=r"MODEL_URI .* must be set"):
        fetch.main()
    monkeypatch.setenv("MODEL_URI", "file:///nowhere")
    with pytest.raises(SystemExit, match=r"^fetch: file:///nowhere: "):
        fetch.main()
