"""`make run` and `make predict` as people use them."""

import contextlib
import csv
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
import requests
from servers import gone
from tiny import picture, tiny_bundle

from bundle import manifest
from local import predict, processes, run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "tiny"
    tiny_bundle(folder)
    return folder


@contextlib.contextmanager
def start(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """As from a terminal, where Ctrl-C is heard; one that a failed test leaves behind is killed."""
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "local.run", *map(str, arguments)],
        cwd=processes.ROOT,
        env=processes.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_run_prints_a_curl_line_that_works_and_ctrl_c_leaves_no_process(tiny):
    port, grpc_port = processes.free_ports(2)
    with start("--models", f"{tiny}", "--port", port, "--grpc-port", grpc_port) as process:
        printed = ""
        while "Ctrl-C" not in printed:
            line = process.stdout.readline()
            assert line, printed
            printed += line
        assert f"http://127.0.0.1:{port}" in printed
        assert re.search(r"first answer \d+ s", printed)
        curl = re.search(r"curl .*", printed)[0]
        answer = subprocess.run(curl, shell=True, cwd=processes.ROOT, capture_output=True, text=True, timeout=20).stdout
        assert '"model":"tiny"' in answer

        with start("--models", f"{tiny}", "--port", port) as second:
            assert f"port {port} is taken" in second.communicate(timeout=30)[0]
            assert second.returncode != 0

        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 4  # start program, JVM, worker, gateway and its process
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert gone(family)


def test_a_bundle_in_a_bucket_is_fetched_once_and_served(tiny, bucket):
    digest = manifest.read(tiny).digest
    for path in tiny.iterdir():
        bucket.pipe_file(f"pets/models/tiny/{path.name}", path.read_bytes())
    port, grpc_port = processes.free_ports(2)
    address = f"gs://pets/models/tiny#sha256={digest}"
    kept = run.CACHE / digest
    shutil.rmtree(kept, ignore_errors=True)
    with start("--models", address, "--port", port, "--grpc-port", grpc_port) as process:
        printed = ""
        while "Ctrl-C" not in printed:
            line = process.stdout.readline()
            assert line, printed
            printed += line
        assert f"Fetching {address}" in printed
        assert "Starting tiny" in printed
        answer = requests.post(f"http://127.0.0.1:{port}/predict", data=picture("blue"), timeout=10).json()
        assert (answer["label"], answer["digest"]) == ("blue", digest)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    bucket.rm("pets/models", recursive=True)
    assert run.find(address) == kept
    with start("--models", "gs://pets/models/tiny") as process:
        assert "fetch: gs://pets/models/tiny: its manifest.json does not exist" in process.communicate(timeout=60)[0]
        assert process.returncode == 1
    shutil.rmtree(kept)


def test_killed_outright_it_leaves_no_process_either(tiny):
    port, grpc_port = processes.free_ports(2)
    with start("--models", f"{tiny}", "--port", port, "--grpc-port", grpc_port) as process:
        while "Ctrl-C" not in (line := process.stdout.readline()):
            assert line
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert gone(family, 30)


def test_a_bundle_that_does_not_exist_or_is_damaged_is_named(tiny, tmp_path):
    with pytest.raises(run.BundleError, match="cats: is no bundle"):
        run.find("cats")
    tiny_bundle(tmp_path / "bad")
    (tmp_path / "bad" / "model.onnx").unlink()
    with start("--models", tmp_path / "bad") as process:
        assert "run: model.onnx: is missing" in process.communicate(timeout=30)[0]
        assert process.returncode == 1


def test_a_port_that_somebody_got_but_does_not_listen_on_yet_is_not_given_again(monkeypatch):
    [before] = processes.free_ports(1)

    class Given(socket.socket):
        ports = iter((before, 40_001, 40_002, before, 40_003))

        def getsockname(self):
            return "127.0.0.1", next(self.ports)

    monkeypatch.setattr(socket, "socket", Given)
    assert processes.free_ports(2, 40_001) == [40_002, 40_003]


def test_two_bundles_of_one_name_are_refused(tiny, tmp_path):
    tiny_bundle(tmp_path / "other", version="2")
    with start("--models", f"{tiny},{tmp_path / 'other'}") as process:
        printed = process.communicate(timeout=30)[0]
    assert process.returncode == 1
    assert "two bundles are named 'tiny'" in printed


def test_a_photo_is_answered_as_a_table(gateway, tmp_path, capsys):
    (tmp_path / "x.png").write_bytes(picture("green"))
    predict.main(["--photo", str(tmp_path / "x.png"), "--url", gateway.url, "--model", "tiny"])
    printed = capsys.readouterr().out
    assert printed.startswith("x.png: green   (tiny 1, ")
    assert re.search(r"^  green +99\.\d%  #{29,30}$", printed, re.MULTILINE) or "100.0%" in printed


def test_a_folder_becomes_a_csv_that_goes_on_where_it_stopped(gateway, tmp_path, capsys):
    photos = tmp_path / "photos"
    (photos / "deeper").mkdir(parents=True)
    for i, colour in enumerate(["red", "green", "blue"]):
        (photos / "deeper" / f"{i}.png").write_bytes(picture(colour))
    (photos / "broken.jpg").write_bytes(b"hello")
    arguments = ["--dir", str(photos), "--url", gateway.url, "--model", "tiny"]
    predict.main(arguments)
    (photos / "later.png").write_bytes(picture("red"))
    predict.main(arguments)
    with (tmp_path / "photos.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["file"], row["label"]) for row in rows] == [
        ("broken.jpg", ""),
        ("deeper/0.png", "red"),
        ("deeper/1.png", "green"),
        ("deeper/2.png", "blue"),
        ("later.png", "red"),
    ]
    assert "are not a picture" in rows[0]["error"]
    assert "5 pictures, 4 of them from before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--photo", "/nowhere.jpg"], "is not a file"),
        (["--dir", "/nowhere"], "is not a folder"),
        (["--photo", __file__, "--url", "http://127.0.0.1:9"], "start one with `make run`"),
    ],
)
def test_what_is_missing_is_said(arguments, sentence):
    with pytest.raises(SystemExit, match=sentence):
        predict.main(arguments)
