"""Checkpoints in a folder, on a full disk, and in a bucket of an emulator."""

import os
import shutil
import socket
import subprocess
import time

import pytest
import torch

from training import checkpoint
from training.checkpoint import CheckpointError, Checkpoints

STATE = {"step": 3, "weights": torch.arange(5.0), "losses": torch.tensor([1.0, 0.5], dtype=torch.float64), "best": {}}
RUN = {"lr": 0.1, "data": "abc", "size": (1, 2)}


def same(state):
    return state["step"] == 3 and torch.equal(state["weights"], STATE["weights"]) and state["best"] == {}


def test_what_was_saved_last_is_loaded(tmp_path):
    checkpoints = Checkpoints(str(tmp_path / "c"), RUN)
    assert checkpoints.load() is None
    checkpoints.save(0, {"step": 0})
    checkpoints.save(3, STATE)
    assert same(Checkpoints(str(tmp_path / "c"), dict(RUN)).load())
    assert sorted(os.listdir(tmp_path / "c")) == ["latest.json", "state-000000003.pt"]
    checkpoints.clear()
    assert checkpoints.load() is None
    assert not (tmp_path / "c").exists()


def test_one_killed_while_writing_leaves_the_last(tmp_path, monkeypatch):
    checkpoints = Checkpoints(str(tmp_path), RUN)
    checkpoints.save(3, STATE)

    def dies(self, target):
        raise KeyboardInterrupt

    for killed_at in (1, 2):  # before the state has its name, and before the pointer has
        calls = iter(range(1, 3))
        replace = checkpoint.Path.replace
        monkeypatch.setattr(
            checkpoint.Path,
            "replace",
            lambda self, to, calls=calls, at=killed_at, do=replace: (
                dies(self, to) if next(calls) == at else do(self, to)
            ),
        )
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(4, {"step": 4})
        monkeypatch.undo()
        assert same(checkpoints.load())
    checkpoints.save(5, {**STATE, "step": 3})
    assert sorted(os.listdir(tmp_path)) == ["latest.json", "state-000000005.pt"]


def test_another_run_is_refused_by_name(tmp_path):
    Checkpoints(str(tmp_path), RUN).save(3, STATE)
    with pytest.raises(CheckpointError, match=r"another run: lr was 0\.1, now it is 0\.2\. Start with what it was"):
        Checkpoints(str(tmp_path), RUN | {"lr": 0.2}).load()
    with pytest.raises(CheckpointError, match=r"data was abc, now it is xyz, and 1 more differ\."):
        Checkpoints(str(tmp_path), RUN | {"data": "xyz", "size": (1, 3)}).load()
    with pytest.raises(CheckpointError, match="extra was None, now it is 1"):
        Checkpoints(str(tmp_path), RUN | {"extra": 1}).load()


def test_a_damaged_one_is_refused(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), RUN)
    checkpoints.save(3, STATE)
    state = tmp_path / "state-000000003.pt"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"state-000000003\.pt: cannot be read: .*: begin anew with --fresh"):
        checkpoints.load()
    (tmp_path / "latest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"latest\.json: cannot be read"):
        checkpoints.load()


def test_it_holds_no_code(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), RUN)
    checkpoints.save(3, {"step": os.getcwd})
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoints.load()


def test_no_room_is_found_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 199_000_000))
    Checkpoints(str(tmp_path), RUN).prepare(99_000_000)
    with pytest.raises(
        CheckpointError, match="200 MB are needed for checkpoints, the old and the new one, and 199 MB are"
    ):
        Checkpoints(str(tmp_path), RUN).prepare(100_000_000)


def test_a_place_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "c").write_text("")
    with pytest.raises(CheckpointError, match="no checkpoint can be written there"):
        Checkpoints(str(tmp_path / "c"), RUN).prepare(1)


@pytest.fixture
def full_disk(tmp_path):
    """A folder on a disk of 1 MB."""
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]).returncode:
        pytest.skip("a small disk is mounted by root only")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_full_disk_keeps_the_last(full_disk):
    checkpoints = Checkpoints(str(full_disk), RUN)
    with pytest.raises(CheckpointError, match=r"10 MB are needed for checkpoints.* and 1 MB are free: make room"):
        checkpoints.prepare(5_000_000)
    checkpoints.save(3, STATE)
    with pytest.raises(CheckpointError, match=r"the checkpoint of step 4 was not written: no space is left"):
        checkpoints.save(4, {"weights": torch.zeros(1_000_000)})
    assert same(checkpoints.load())


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """gs://models on an emulator of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["gcp-storage-emulator", "start", "--host", "127.0.0.1", "--port", str(port), "--in-memory"]
    program = shutil.which(command[0]) or str(checkpoint.Path(os.sys.executable).parent / command[0])
    server = subprocess.Popen(
        [program, *command[1:], "--default-bucket", "models"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        yield "gs://models"
    server.terminate()
    server.wait(10)


@pytest.mark.slow
def test_a_bucket_holds_the_last(bucket):
    checkpoints = Checkpoints(f"{bucket}/run", RUN)
    checkpoints.prepare(10**15)  # a bucket has room
    assert checkpoints.load() is None
    checkpoints.save(0, {"step": 0})
    checkpoints.save(3, STATE)
    assert same(checkpoints.load())
    names = checkpoint.open_address(f"{bucket}/run")[0].find("models/run")
    assert sorted(name.rsplit("/", 1)[1] for name in names) == ["latest.json", "state-000000003.pt"]
    with pytest.raises(CheckpointError, match="another run"):
        Checkpoints(f"{bucket}/run", {}).load()
    checkpoints.clear()
    assert checkpoints.load() is None


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_refused(bucket):
    with pytest.raises(CheckpointError, match=r"gs://none/run: the checkpoint of step 0 was not written"):
        Checkpoints("gs://none/run", RUN).save(0, STATE)
