"""Batches of decoded pictures, in an order that depends on the seed and the step alone.

Pictures are read and decoded in worker processes. What fits into a set amount of memory is kept
decoded and shared by all of them, so that each picture is decoded once a run.
"""

import mmap
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from bundle import picture
from bundle.picture import Pixels, Resize
from training.data import Catalogue, DataError, Record

Batch = tuple[Tensor, Tensor]  # uint8 [N, H, W, 3], int64 [N]

MARGIN = 8 / 7  # 256 pixels for 224, as is usual for ImageNet


@dataclass(frozen=True)
class Order(Sampler[list[int]]):
    """Indices of every batch of one rank from step `start` to `steps`; a step has `accumulate` batches.

    Each epoch is a new permutation. What does not fill a step is left out of the epoch; fewer
    pictures than a step needs are repeated.
    """

    pictures: int
    batch: int
    steps: int
    start: int = 0
    accumulate: int = 1
    ranks: int = 1
    rank: int = 0
    seed: int = 0

    @property
    def epoch_steps(self) -> int:
        return max(1, self.pictures // self._whole)

    @property
    def _whole(self) -> int:
        """Pictures of a step, over all ranks."""
        return self.batch * self.accumulate * self.ranks

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.empty(0, np.int64)
        for step in range(self.start, self.steps):
            now, place = divmod(step, self.epoch_steps)
            if now != epoch:
                epoch, order = now, np.random.default_rng((self.seed, now)).permutation(self.pictures)
                order = np.resize(order, max(self.pictures, self._whole))  # repeats where there are too few
            for part in range(self.accumulate):
                first = place * self._whole + (part * self.ranks + self.rank) * self.batch
                yield order[first : first + self.batch].tolist()


class Pictures(Dataset[Batch]):
    """Labelled pictures as uint8 [H, W, 3], fetched a batch at a time. `keep`: bytes that may be held decoded."""

    def __init__(self, catalogue: Catalogue, records: Sequence[Record], to: Resize, keep: int = 0) -> None:
        self.catalogue, self.records, self.to = catalogue, records, to
        self.labels = np.array([record.label for record in records], np.int64)
        shape = (len(records), to.height, to.width, 3)
        self.kept: Pixels | None = None
        if 0 < np.prod(shape) <= keep:
            # Anonymous and shared: workers forked later see what the others wrote. Pages cost memory once written.
            self.kept = np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), np.uint8).reshape(shape)
            self.known = np.frombuffer(mmap.mmap(-1, len(records)), np.uint8)

    def __len__(self) -> int:
        return len(self.records)

    def __getitems__(self, indices: list[int]) -> Batch:
        pixels = np.empty((len(indices), self.to.height, self.to.width, 3), np.uint8)
        missing: dict[str, list[int]] = {}
        for place, index in enumerate(indices):
            if self.kept is not None and self.known[index]:
                pixels[place] = self.kept[index]
            else:
                missing.setdefault(self.records[index].key, []).append(place)
        wanted = [self.records[indices[places[0]]] for places in missing.values()]
        for record, data in self.catalogue.pictures(wanted):
            try:
                decoded = picture.load(data, self.to)
            except picture.PictureError as exc:
                raise DataError(f"{record.key}: was readable before, now it is not: {exc}") from exc
            places = missing[record.key]
            pixels[places] = decoded
            if self.kept is not None:
                self.kept[indices[places[0]]] = decoded
                self.known[indices[places[0]]] = 1
        return torch.from_numpy(pixels), torch.from_numpy(self.labels[indices])


def stored(serving: Resize) -> Resize:
    """What training keeps of a picture to cut random crops from: a little larger than serving, and no narrower."""
    longest = max(serving.height, serving.width)
    share = max(MARGIN, serving.shorter_side / longest)
    shorter = round(longest * share) if serving.rule == "crop" else 0
    return Resize(round(serving.height * share), round(serving.width * share), serving.rule, shorter, serving.filter)


def loader(pictures: Pictures, batches: Iterable[list[int]], workers: int, pin: bool = False) -> DataLoader[Batch]:
    """Batches in the sampler's order, decoded ahead in `workers` processes that stay."""
    return DataLoader(
        pictures,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        worker_init_fn=_in_worker,
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers else None,  # shares what is kept
    )


def in_turn(count: int, batch: int, rank: int = 0, ranks: int = 1) -> list[list[int]]:
    """Every index of this rank once, in order, in batches."""
    mine = range(rank, count, ranks)
    return [list(mine[first : first + batch]) for first in range(0, len(mine), batch)]


def _as_it_is(batch: Any) -> Any:
    return batch


def _in_worker(_: int) -> None:
    # What the run does on these is not the workers' business: it ends them itself.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
