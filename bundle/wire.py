"""What travels between gateway and model server, inside TorchServe's map<string, bytes>.

A request holds `known`, the digests whose manifest the caller has, and for every input contract
that the caller can serve an entry `pixels:<contract>` of raw uint8 [N, H, W, 3], with N in `count`
where it is not one. The server takes the entry of its own contract; it never guesses from a byte
count. The answer is one frame:

    uint32 length | JSON header | float32 logits [N, C] (little endian) | manifest.json, if not known

    ok        logits are there, and in `failed` why some pictures have none that mean anything
    manifest  no pixels were sent: the manifest alone
    mismatch  no entry was of this model's contract: ask again with one that is
    error     this request failed; its neighbours in the batch did not
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Bytes = bytes | memoryview
Status = Literal["ok", "manifest", "mismatch", "error"]
PIXELS = "pixels:"
KNOWN = "known"
COUNT = "count"
MOST = 64  # pictures in a request
Value = Bytes | list[Bytes]  # of an entry to send: whole, or in parts that are joined on the way
_LENGTH = struct.Struct("<I")


class FrameError(ValueError):
    """The bytes are not an answer frame."""


@dataclass(frozen=True)
class Answer:
    """status, digest of the bundle that answered, logits float32 [N, C], manifest.json's bytes or b"".

    failed: {index of a picture: why it has no logits}; seconds: that a worker was busy with the request and those it
    took up together with it; workers: of this model there. Both are 0 where the server does not say.
    """

    status: Status
    digest: str
    logits: NDArray[np.float32] | None = None
    manifest: bytes = b""
    error: str = ""
    failed: Mapping[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    workers: int = 0


def request(pixels: Mapping[str, Value], known: Iterable[str], count: int = 1) -> dict[str, Value]:
    """{contract: raw pixels of `count` pictures} and known digests -> the map to send."""
    entries: dict[str, Value] = {PIXELS + contract: data for contract, data in pixels.items()}
    if count != 1:
        entries[COUNT] = str(count).encode()
    return {KNOWN: ",".join(sorted(known)).encode(), **entries}


def known(request: Mapping[str, bytes | bytearray]) -> frozenset[str]:
    """The digests whose manifest need not be sent."""
    return frozenset(bytes(request.get(KNOWN, b"")).decode("ascii", "replace").split(",")) - {""}


def count(request: Mapping[str, bytes | bytearray]) -> int:
    """Pictures in it; 0 for what is no number from 1 to MOST."""
    text = bytes(request.get(COUNT, b"1"))
    return int(text) if text.isdigit() and len(text) <= 2 and int(text) <= MOST else 0


def has_pixels(request: Mapping[str, bytes | bytearray]) -> bool:
    return any(key.startswith(PIXELS) for key in request)


def pack(answer: Answer) -> bytes:
    """logits of one picture may be [C]."""
    logits = np.zeros(0, "<f4") if answer.logits is None else np.ascontiguousarray(answer.logits, "<f4")
    header: dict[str, object] = {"status": answer.status, "digest": answer.digest}
    header |= {"logits": logits.nbytes, "manifest": len(answer.manifest)}
    if logits.ndim == 2 and len(logits) != 1:
        header["count"] = len(logits)
    if answer.error:
        header["error"] = answer.error
    if answer.failed:
        header["failed"] = answer.failed
    if answer.workers:
        header |= {"seconds": answer.seconds, "workers": answer.workers}
    head = json.dumps(header).encode()
    return b"".join((_LENGTH.pack(len(head)), head, logits.tobytes(), answer.manifest))


def unpack(frame: bytes) -> Answer:
    """Raises FrameError where the frame is not whole."""
    try:
        (length,) = _LENGTH.unpack_from(frame)
        start = _LENGTH.size + length
        header = json.loads(frame[_LENGTH.size : start])
        status, digest, error = header["status"], header["digest"], header.get("error", "")
        size, rest = header["logits"], header["manifest"]
        rows, seconds, workers = header.get("count", 1), header.get("seconds", 0.0), header.get("workers", 0)
        failed = {int(i): str(why) for i, why in header.get("failed", {}).items()}
        if status not in get_args(Status) or not isinstance(digest, str) or not isinstance(error, str):
            raise ValueError(f"status {status!r}, digest {digest!r}, error {error!r}")
        if size < 0 or size % 4 or rest < 0 or start + size + rest != len(frame):
            raise ValueError(f"{start} + {size} bytes of logits + {rest} of manifest are not {len(frame)}")
        if not isinstance(rows, int) or not all(0 <= i < rows for i in failed):
            raise ValueError(f"count {rows!r}, failed {sorted(failed)}")
        if not isinstance(workers, int) or not (workers >= 0 and 0 <= seconds < math.inf):
            raise ValueError(f"seconds {seconds!r}, workers {workers!r}")
        logits = np.frombuffer(frame, "<f4", size // 4, start).reshape(rows, -1) if status == "ok" else None
        return Answer(status, digest, logits, frame[start + size :], error, failed, seconds, workers)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise FrameError(f"the model server's answer of {len(frame)} bytes is not a frame: {exc}") from exc
