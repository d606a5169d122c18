"""Which models there are, as their servers tell it: picture bytes -> the manifest and logits of who answered.

During a rollout, pods with another input or other classes answer side by side. Every answer
carries its bundle's digest, and is read with that bundle's manifest and no other.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle import picture, wire
from bundle.manifest import BundleError, Manifest, parse
from gateway import errors
from gateway.client import Client, Split
from gateway.join import UNDECODED, Asked, Join, Told

KEPT = 8  # manifests a model: more versions than a rollout ever has side by side
CALLS = 64  # of a model under way at once, at most
Tell = Callable[[str, float], None]  # a stage and the seconds it took
MISMATCH = object()  # the outcome of a picture that another version of its model was asked for


class Model:
    """One model's name and the manifests that its servers have answered with."""

    def __init__(
        self, name: str, client: Client | Split, decoding: Executor, max_pixels: int, seconds: float = 1.5
    ) -> None:
        """seconds: that a call to the model server may take; a picture's own, with what it waited for it: see Join."""
        self.name, self._seconds = name, seconds
        self._client, self._decoding, self._max_pixels = client, decoding, max_pixels
        self._manifests: OrderedDict[str, Manifest] = OrderedDict()  # by digest, the oldest learned first
        self._latest: Manifest | None = None  # of the last answer: the next picture is decoded for it
        self._join = Join(self._together, CALLS, seconds)
        self._lock = threading.Lock()

    def manifest(self, deadline: float) -> Manifest:
        """The manifest of the last answer; asks where there was none. Raises what Client.predictions raises."""
        return self._latest or self.current(deadline)

    def current(self, deadline: float) -> Manifest:
        """The manifest of whoever serves now. Raises what Client.predictions raises."""
        return self._ask({}, 1, deadline, "")[0]

    def check(self, deadline: float) -> None:
        """One full round trip with the manifest's own drawing. Raises a Problem where it fails."""
        manifest = self.manifest(deadline)
        pixels = manifest.input.check_pixels().tobytes()
        _, answer, _ = self._ask({manifest.input.contract: pixels}, 1, deadline, "")
        self._logits(manifest, answer, 0)
        if answer.status == "mismatch":  # another version answered: the next check asks in its terms
            raise errors.Unavailable(f"{self.name} is being replaced: try again soon")

    def predict(
        self,
        data: bytes,
        deadline: float,
        tell: Tell,
        answer: Callable[[Manifest, NDArray[np.float32]], Any],
        request_id: str = "",
        wanted: Callable[[], bool] = lambda: True,
    ) -> Any:
        """Picture bytes -> `answer` of the manifest of the bundle that answered and its logits, float32 [C].

        answer: called for all pictures of a call one after the other, by the thread that made it: what it needs is in
        the caches from the second one on. wanted: whether the caller is still there. Raises a Problem; one for a
        picture that cannot be read comes before any call.
        """
        manifest = self.manifest(deadline)
        asked, started = Asked(manifest.input.contract, deadline, request_id, wanted, answer), time.perf_counter()
        self._decoding.submit(self._put, asked, data, manifest)
        try:
            found = self._join.outcome(asked)
            if found is MISMATCH:
                found = answer(*self._again(data, asked))
        finally:
            ended = time.perf_counter()
            tell("decode", (asked.decoded or ended) - started)
            if asked.decoded:
                tell("model", ended - asked.decoded)
        return found

    def _put(self, asked: Asked, data: bytes, manifest: Manifest) -> None:
        """By a decoding thread, which has it called for too: the picture's own thread is woken once, by its answer."""
        if asked.over:
            return
        try:
            pixels = self._decode(data, manifest, asked.wanted)
        except Exception as exc:
            self._join.fail(asked, exc)
        else:
            self._join.put(asked, pixels)

    def _again(self, data: bytes, asked: Asked) -> tuple[Manifest, NDArray[np.float32]]:
        """Another version answered. With an entry for every contract known, whoever takes the second call can."""
        pixels = {asked.contract: asked.pixels}
        for other in self._known().values():
            if other.input.contract not in pixels:
                decoding = self._decoding.submit(self._decode, data, other, asked.wanted)
                try:
                    pixels[other.input.contract] = decoding.result(max(0, asked.deadline - time.monotonic()))
                except TimeoutError:
                    decoding.cancel()
                    raise errors.Overloaded(UNDECODED) from None
                finally:
                    del decoding  # or its error, this frame and the picture would hold each other
        manifest, answer, _ = self._ask(pixels, 1, asked.deadline, asked.request_id)
        logits = self._logits(manifest, answer, 0)
        if logits is None:
            raise errors.Unavailable(f"{self.name} is being replaced by yet another version: try again soon")
        return manifest, logits

    def _decode(self, data: bytes, manifest: Manifest, wanted: Callable[[], bool]) -> wire.Bytes:
        if not wanted():
            raise errors.Abandoned
        try:
            return picture.load(data, manifest.input.resize, self._max_pixels).data.cast("B")
        except picture.PictureError as exc:
            problem = errors.of_picture(exc)
        raise problem  # not within: as its context, the picture's error would keep the frames that it went through

    def _together(self, asked: Sequence[Asked]) -> tuple[list[Any], Told]:
        """One call for pictures of one contract -> the answer of each, or MISMATCH."""
        pixels = {asked[0].contract: [one.pixels for one in asked]}
        deadline = max(one.deadline for one in asked)
        ids = ",".join(one.request_id for one in asked)
        manifest, answer, took = self._ask(pixels, len(asked), deadline, ids, asked[0].seconds)
        told = Told(took, answer.seconds, answer.workers)
        if answer.status == "error" and len(asked) > 1:
            return [MISMATCH] * len(asked), told  # a server that does not know of `count`: each by itself
        outcomes: list[Any] = []
        for i, one in enumerate(asked):
            try:
                logits = self._logits(manifest, answer, i)
                outcomes.append(MISMATCH if logits is None else one.answer(manifest, logits))
            except Exception as exc:  # its own, and no other's
                outcomes.append(exc)
        return outcomes, told

    def _logits(self, manifest: Manifest, answer: wire.Answer, i: int) -> NDArray[np.float32] | None:
        if answer.status == "error" or i in answer.failed:
            raise errors.BadAnswer(f"{self.name} failed on this picture: {answer.failed.get(i, answer.error)}")
        return None if answer.logits is None else answer.logits[i]

    def _ask(
        self,
        pixels: Mapping[str, wire.Value],
        count: int,
        deadline: float,
        request_id: str,
        seconds: float | None = None,
    ) -> tuple[Manifest, wire.Answer, float]:
        """One call -> the manifest of who answered, learned now if need be, the answer and the seconds it took."""
        known = self._known()
        entries = wire.request(pixels, known, count)
        try:
            frame, took = self._client.predictions(self.name, entries, deadline, request_id, seconds or self._seconds)
            answer = wire.unpack(frame)
            self._latest = manifest = known.get(answer.digest) or self._learn(answer)
        except (wire.FrameError, BundleError) as exc:
            raise errors.BadAnswer(f"{self.name}: {exc}") from exc
        if answer.logits is not None and answer.logits.shape != (expected := (count, len(manifest.classes))):
            found = answer.logits.shape
            raise errors.BadAnswer(
                f"{self.name}: {found[1]} logits came for {expected[1]} classes, {found[0]} times for {count}"
            )
        return manifest, answer, took

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
