"""What people send that is no picture: each its own 4xx, and the next good request unharmed."""

import random
import shutil
import socket
import struct
import subprocess
import time
import zlib

import pytest
import requests
from tiny import WAYS, picture


def huge_png() -> bytes:
    """30,000 x 30,000 pixels in about 100 kB, by hand: no memory for the picture is ever taken."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + 30_000 // 8)) for _ in range(30_000)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


JPEG = picture("red", 300, 200, "JPEG")
HEIC = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(100)


@pytest.mark.parametrize(
    ("data", "status", "sentence"),
    [
        (b"", 415, "is empty (0 bytes)"),
        (b"Hello, what dog is this?", 415, "are not a picture"),
        (JPEG[: len(JPEG) // 2], 422, "cut off or damaged"),
        (huge_png(), 413, "pixels: send a smaller one"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 415, "SVG is a drawing"),
        (HEIC, 415, "save the picture as JPEG"),
    ],
    ids=["empty", "text", "truncated", "30000x30000", "svg", "heic"],
)
@pytest.mark.parametrize(("path", "form"), [*((path, False) for path in WAYS), (WAYS[0], True)])
def test_no_picture_is_refused_with_a_sentence(gateway, data, status, sentence, path, form):
    sent = {"files": {"image": ("x.jpg", data)}} if form else {"data": data}
    answer = requests.post(f"{gateway.url}{path}", **sent, timeout=10)
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert sentence in answer.json()["detail"]
    assert good(gateway)


def good(gateway) -> bool:
    return requests.post(f"{gateway.url}/predict?model=tiny", data=picture("blue")).json()["label"] == "blue"


@pytest.mark.parametrize("attempt", range(5))
def test_a_body_of_60_mb_gets_its_413_as_a_response_in_requests(gateway, attempt):
    answer = requests.post(f"{gateway.url}/predict", data=bytes(60_000_000), timeout=30)
    assert answer.status_code == 413
    assert "send a smaller picture" in answer.json()["detail"]
    assert good(gateway)


@pytest.mark.parametrize("expect", [[], ["-H", "Expect:"]], ids=["100-continue", "at once"])
@pytest.mark.parametrize("how", ["--data-binary", "-F"])
def test_and_in_curl(gateway, tmp_path, how, expect):
    if not shutil.which("curl"):
        pytest.skip("no curl here")
    (tmp_path / "large").write_bytes(bytes(60_000_000))
    what = f"image=@{tmp_path / 'large'}" if how == "-F" else f"@{tmp_path / 'large'}"
    command = ["curl", "-s", "-S", *expect, "-o", "-", "-w", " %{http_code}", how, what, f"{gateway.url}/predict"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(" 413")


def test_a_chunked_body_counts_too(gateway):
    answer = requests.post(f"{gateway.url}/predict", data=(bytes(1 << 20) for _ in range(40)), timeout=30)
    assert answer.status_code == 413
    chunks = (JPEG[i : i + 100] for i in range(0, len(JPEG), 100))
    assert requests.post(f"{gateway.url}/predict?model=tiny", data=chunks).json()["label"] == "red"


def test_a_client_that_hangs_up_in_the_middle_harms_nobody(gateway):
    host, port = gateway.url.removeprefix("http://").split(":")
    for _ in range(20):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
    assert good(gateway)


def test_two_hundred_mutated_photographs_are_pictures_or_refused(gateway, photos):
    rng, session = random.Random(0), requests.Session()
    statuses = []
    for i in range(200):
        data = bytearray(photos[i % len(photos)][0])
        kind = i % 4
        if kind == 0:
            del data[rng.randrange(1, len(data)) :]
        elif kind == 1:
            for _ in range(rng.choice([1, 10, 100])):
                data[rng.randrange(len(data))] = rng.randrange(256)
        elif kind == 2:  # the header is where decoders trust most
            for _ in range(3):
                data[rng.randrange(min(600, len(data)))] = rng.randrange(256)
        else:
            at = rng.randrange(len(data))
            data[at:at] = data[at // 2 : at // 2 + 50]
        answer = session.post(f"{gateway.url}{WAYS[i // 4 % 2]}", data=bytes(data), timeout=20)
        statuses.append(answer.status_code)
        assert answer.status_code in (200, 413, 415, 422), answer.text
        if answer.status_code != 200:
            assert "send" in answer.json()["detail"]
    assert 200 in statuses
    assert 422 in statuses
    assert good(gateway)


def test_clients_that_do_not_close_their_side_hold_up_nobody(gateway):
    """gunicorn's own threaded worker waits for each of them on its main thread, two seconds at a time."""
    host, port = gateway.url.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(10)]
    try:
        for client in idle:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: kennel\r\nConnection: close\r\n\r\n")
        for client in idle:
            assert client.recv(12) == b"HTTP/1.1 200"
        started = time.monotonic()
        assert good(gateway)
        assert time.monotonic() - started < 1.5
    finally:
        for client in idle:
            client.close()
