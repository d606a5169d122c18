"""Which models there are, as their servers tell it: picture bytes -> the manifest and logits of who answered.

During a rollout, pods with another input or other classes answer side by side. Every answer
carries its bundle's digest, and is read with that bundle's manifest and no other.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
from numpy.typing import NDArray

from bundle import picture, wire
from bundle.manifest import BundleError, Manifest, parse
from gateway import errors
from gateway.client import Client, Split

KEPT = 8  # manifests a model: more versions than a rollout ever has side by side
Stage = Callable[[str], AbstractContextManager[None]]  # times what runs inside it, under a name


class Model:
    """One model's name and the manifests that its servers have answered with."""

    def __init__(self, name: str, client: Client | Split, decoding: threading.Semaphore, max_pixels: int) -> None:
        self.name = name
        self._client, self._decoding, self._max_pixels = client, decoding, max_pixels
        self._manifests: OrderedDict[str, Manifest] = OrderedDict()  # by digest, the oldest learned first
        self._latest: Manifest | None = None  # of the last answer: the next picture is decoded for it
        self._lock = threading.Lock()

    def manifest(self, deadline: float) -> Manifest:
        """The manifest of the last answer; asks where there was none. Raises what Client.predictions raises."""
        return self._latest or self.current(deadline)

    def current(self, deadline: float) -> Manifest:
        """The manifest of whoever serves now. Raises what Client.predictions raises."""
        return self._ask({}, deadline, "")[0]

    def check(self, deadline: float) -> None:
        """One full round trip with the manifest's own drawing. Raises a Problem where it fails."""
        manifest = self.manifest(deadline)
        pixels = manifest.input.check_pixels().tobytes()
        _, answer = self._ask({manifest.input.contract: pixels}, deadline, "")
        if answer.status == "mismatch":  # another version answered: the next check asks in its terms
            raise errors.Unavailable(f"{self.name} is being replaced: try again soon")

    def predict(
        self, data: bytes, deadline: float, stage: Stage, request_id: str = ""
    ) -> tuple[Manifest, NDArray[np.float32]]:
        """Picture bytes -> the manifest of the bundle that answered and its logits, float32 [C].

        Raises a Problem; one for a picture that cannot be read comes before any call.
        """
        manifest = self.manifest(deadline)
        with stage("decode"):
            pixels = {manifest.input.contract: self._pixels(data, manifest, deadline)}
        with stage("model"):
            manifest, answer = self._ask(pixels, deadline, request_id)
        if answer.status == "mismatch":
            # Another version answered. With an entry for every contract known, whoever takes the
            # second call can answer it.
            with stage("decode"):
                for other in self._known().values():
                    if other.input.contract not in pixels:
                        pixels[other.input.contract] = self._pixels(data, other, deadline)
            with stage("model"):
                manifest, answer = self._ask(pixels, deadline, request_id)
        if answer.logits is None:
            raise errors.Unavailable(f"{self.name} is being replaced by yet another version: try again soon")
        return manifest, answer.logits

    def _pixels(self, data: bytes, manifest: Manifest, deadline: float) -> bytes:
        # More decoders than CPUs would only hold more memory.
        if not self._decoding.acquire(timeout=max(0, deadline - time.monotonic())):
            raise errors.Overloaded("more pictures are waiting to be decoded than may wait: try again soon")
        try:
            return picture.load(data, manifest.input.resize, self._max_pixels).tobytes()
        except picture.PictureError as exc:
            raise errors.of_picture(exc) from exc
        finally:
            self._decoding.release()

    def _ask(self, pixels: dict[str, bytes], deadline: float, request_id: str) -> tuple[Manifest, wire.Answer]:
        """One call -> the manifest of who answered, learned now if need be, and the answer."""
        known = self._known()
        entries = wire.request(pixels, known)
        try:
            answer = wire.unpack(self._client.predictions(self.name, entries, deadline, request_id))
            self._latest = manifest = known.get(answer.digest) or self._learn(answer)
        except (wire.FrameError, BundleError) as exc:
            raise errors.BadAnswer(f"{self.name}: {exc}") from exc
        if answer.status == "error":
            raise errors.BadAnswer(f"{self.name} failed on this picture: {answer.error}")
        if answer.logits is not None and len(answer.logits) != len(manifest.classes):
            raise errors.BadAnswer(f"{self.name}: {len(answer.logits)} logits came for {len(manifest.classes)} classes")
        return manifest, answer

    def _learn(self, answer: wire.Answer) -> Manifest:
        manifest = parse(answer.manifest)
        if manifest.digest != answer.digest or manifest.name != self.name:
            raise BundleError(
                f"an answer of {answer.digest} came with the manifest of {manifest.name} {manifest.digest}"
            )
        manifest.input.check_pixels()  # this decoder gives the pixels that the model was trained on
        with self._lock:
            self._manifests[manifest.digest] = manifest
            while len(self._manifests) > KEPT:
                self._manifests.popitem(last=False)
        return manifest

    def _known(self) -> dict[str, Manifest]:
        with self._lock:
            return dict(self._manifests)
