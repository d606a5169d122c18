"""A bundle into an emulated bucket, ended at any moment."""

import pytest
from drawn import bundle_of

from bundle import manifest
from bundle.manifest import MANIFEST, BundleError, Decision
from training.data import DataError
from training.publish import publish, put
from training.sources import open_address

ADDRESS = "gs://pets/bundles/mine"


@pytest.fixture
def two(tmp_path):
    """An old and a new bundle of other classes."""
    bundle_of(tmp_path / "old", ("blue", "red"), Decision())
    bundle_of(tmp_path / "new", ("blue", "red", "green"), Decision())
    return tmp_path / "old", tmp_path / "new"


def there(bucket, folder):
    """The digest of the bundle in the bucket, read and checked as whoever serves it does."""
    bucket.invalidate_cache()
    folder.mkdir()
    for path in bucket.find("pets/bundles/mine"):
        bucket.get_file(path, str(folder / path.rsplit("/", 1)[1]))
    return manifest.read(folder).digest


@pytest.mark.parametrize("last", [b"\r", b"\n", b"\r\n", b"-", b""])
def test_the_emulated_bucket_keeps_the_last_byte(bucket, tmp_path, last):
    file = tmp_path / "events"
    file.write_bytes(b"\n\r\n\r" + last)
    put(file, "gs://pets/events")
    assert bucket.cat_file("pets/events") == file.read_bytes()


def test_into_a_bucket_and_over_another_one(bucket, two, tmp_path):
    old, new = two
    assert publish(old, ADDRESS).digest == there(bucket, tmp_path / "1")
    bucket.pipe_file("pets/bundles/mine/notes.txt", b"not the bundle's")
    assert publish(new, ADDRESS).digest == there(bucket, tmp_path / "2") != manifest.read(old).digest
    assert {name.split("/")[-1] for name in bucket.find("pets/bundles")} == {
        *manifest.read(new).files, MANIFEST, "notes.txt"
    }  # fmt: skip


def test_the_same_is_not_uploaded_again(bucket, two, monkeypatch):
    publish(two[0], ADDRESS)
    for name in ("put_file", "pipe_file", "cp_file", "rm_file"):
        monkeypatch.setattr(open_address(ADDRESS)[0], name, None)
    publish(two[0], ADDRESS)
    with pytest.raises(DataError):
        publish(two[1], ADDRESS)


@pytest.mark.parametrize("upload", ["put_file", "rm_file", "cp_file", "pipe_file"])
@pytest.mark.parametrize("call", [1, 2])
def test_ended_at_any_moment_no_half_is_taken_for_a_bundle_and_the_next_try_is_whole(
    bucket, two, tmp_path, monkeypatch, upload, call
):
    old, new = two
    publish(old, ADDRESS)
    filesystem = open_address(ADDRESS)[0]
    real, calls = getattr(filesystem, upload), iter(range(1, 99))

    def ends(*arguments, **options):
        if next(calls) == call:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(filesystem, upload, ends)
        try:
            publish(new, ADDRESS)
        except KeyboardInterrupt:
            if upload == "put_file" or (upload, call) == ("rm_file", 1):  # the long part, and the swap's first moment
                assert there(bucket, tmp_path / "1") == manifest.read(old).digest
            else:
                with pytest.raises(BundleError, match=r"manifest\.json"):
                    there(bucket, tmp_path / "1")
        else:
            assert (upload, call) == ("pipe_file", 2)  # it is called once
    publish(new, ADDRESS)
    assert there(bucket, tmp_path / "2") == manifest.read(new).digest
    assert not bucket.find("pets/bundles/mine.incoming")


def test_something_else_is_not_written_over(bucket, two, tmp_path):
    bucket.pipe_file("pets/bundles/mine/thesis.txt", b"mine")
    with pytest.raises(DataError, match=f"{ADDRESS}: holds something that is not a bundle; name another folder"):
        publish(two[0], ADDRESS)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/thesis.txt").write_text("mine")
    with pytest.raises(BundleError, match="holds something that is not a bundle"):
        publish(two[0], str(tmp_path / "kept"))


def test_into_a_folder_too(two, tmp_path):
    for bundle in two:
        publish(bundle, str(tmp_path / "there/model"))
        assert manifest.read(tmp_path / "there/model") == manifest.read(bundle)
    put(two[0] / MANIFEST, str(tmp_path / "report/x.json"))
    assert (tmp_path / "report/x.json").exists()


def test_a_bucket_that_is_not_there(bucket, two):
    with pytest.raises(DataError, match="gs://nobody/x: does not exist: check the path, or the bucket's name"):
        publish(two[0], "gs://nobody/x")
    with pytest.raises(DataError, match=r"gs://nobody/x/report\.html: does not exist"):
        put(two[0] / MANIFEST, "gs://nobody/x/report.html")
