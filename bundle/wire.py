"""What travels between gateway and model server, inside TorchServe's map<string, bytes>.

A request holds `known`, the digests whose manifest the caller has, and for every input contract
that the caller can serve an entry `pixels:<contract>` of raw uint8 [H, W, 3]. The server takes
the entry of its own contract; it never guesses from a byte count. The answer is one frame:

    uint32 length | JSON header | float32 logits (little endian) | manifest.json, if not known

    ok        logits are there
    manifest  no pixels were sent: the manifest alone
    mismatch  no entry was of this model's contract: ask again with one that is
    error     this item failed; its neighbours in the batch did not
"""

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Status = Literal["ok", "manifest", "mismatch", "error"]
PIXELS = "pixels:"
KNOWN = "known"
_LENGTH = struct.Struct("<I")


class FrameError(ValueError):
    """The bytes are not an answer frame."""


@dataclass(frozen=True)
class Answer:
    """status, digest of the bundle that answered, logits float32 [C], manifest.json's bytes or b""."""

    status: Status
    digest: str
    logits: NDArray[np.float32] | None = None
    manifest: bytes = b""
    error: str = ""


def request(pixels: Mapping[str, bytes], known: Iterable[str]) -> dict[str, bytes]:
    """{contract: raw pixels} and known digests -> the map to send."""
    entries = {PIXELS + contract: data for contract, data in pixels.items()}
    return {KNOWN: ",".join(sorted(known)).encode(), **entries}


def known(request: Mapping[str, bytes | bytearray]) -> frozenset[str]:
    """The digests whose manifest need not be sent."""
    return frozenset(bytes(request.get(KNOWN, b"")).decode("ascii", "replace").split(",")) - {""}


def has_pixels(request: Mapping[str, bytes | bytearray]) -> bool:
    return any(key.startswith(PIXELS) for key in request)


def pack(answer: Answer) -> bytes:
    logits = b"" if answer.logits is None else np.ascontiguousarray(answer.logits, "<f4").tobytes()
    header = {"status": answer.status, "digest": answer.digest, "logits": len(logits), "manifest": len(answer.manifest)}
    if answer.error:
        header["error"] = answer.error
    head = json.dumps(header).encode()
    return b"".join((_LENGTH.pack(len(head)), head, logits, answer.manifest))


def unpack(frame: bytes) -> Answer:
    """Raises FrameError where the frame is not whole."""
    try:
        (length,) = _LENGTH.unpack_from(frame)
        start = _LENGTH.size + length
        header = json.loads(frame[_LENGTH.size : start])
        status, digest, error = header["status"], header["digest"], header.get("error", "")
        size, rest = header["logits"], header["manifest"]
        if status not in get_args(Status) or not isinstance(digest, str) or not isinstance(error, str):
            raise ValueError(f"status {status!r}, digest {digest!r}, error {error!r}")
        if size < 0 or size % 4 or rest < 0 or start + size + rest != len(frame):
            raise ValueError(f"{start} + {size} bytes of logits + {rest} of manifest are not {len(frame)}")
        logits = np.frombuffer(frame, "<f4", size // 4, start) if status == "ok" else None
        return Answer(status, digest, logits, frame[start + size :], error)
    except (struct.error, ValueError, KeyError, TypeError, RecursionError) as exc:
        raise FrameError(f"the model server's answer of {len(frame)} bytes is not a frame: {exc}") from exc
