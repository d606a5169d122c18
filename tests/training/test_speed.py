"""What reading, logging and checkpoints cost, against a bare loop over tensors that lie in memory already."""

import copy
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch
from learner import unread

from training import models
from training.batches import Pictures, loader, stored
from training.checkpoint import Checkpoints
from training.data import Catalogue
from training.loop import Machine, Recipe, Terminated, _follow, _size, fit, update
from training.models import Base, train_mode

CLOTHES = Path(__file__).parents[2].parent / "shared/data/clothing"
ROUNDS = 5
# Steps of two epochs: pictures are decoded in the first and kept, of the eight that a run has by default.
EPOCH, STEPS, WARM = 10, 20, 3


class Spent(NamedTuple):
    clock: float
    processors: float


def clothes(batch: int) -> Catalogue:
    """Photographs of the size that people have: EPOCH batches to train on, and one for each worker to judge by."""
    if not CLOTHES.exists():
        pytest.skip(f"{CLOTHES} is not here")
    every = unread(CLOTHES)
    return dataclasses.replace(every, records=(*every.of("train")[: EPOCH * batch], *every.of("validation")[:128]))


def shares(data: Catalogue, make: Callable[[], Base], recipe: Recipe, machine: Machine, folder: Path) -> list[Spent]:
    """What the bare loop takes as a share of what the whole one takes, each round one after the other.

    Without the step at an epoch's end, which judges the model as well, and the first of each epoch: processes
    that decode for it have begun then, once a run, and every page that is written after a fork is copied first.
    """
    device = torch.device(machine.on)
    found = []
    for turn in range(ROUNDS):
        base = make()
        base.model.new_head(len(data.classes))
        kept = Pictures(data, data.of("train"), stored(base.resize))
        batch = tuple(tensor.to(device) for tensor in next(iter(loader(kept, [list(range(recipe.batch))], 0))))
        model = base.model.to(device, memory_format=torch.channels_last)
        train_mode(model, recipe.freeze_norm)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        size = _size(base, recipe, 0)
        torch.set_num_threads(machine.threads or torch.get_num_threads())
        average = copy.deepcopy(model).eval()
        marks = []
        for _ in range(STEPS):
            update(model, optimizer, itertools.repeat(batch), recipe, len(data.classes), 1e-4, size, device)
            _follow(average, model, recipe.ema)
            marks.append(now(device))
        bare = spent(marks)

        marks = []
        with pytest.raises(Terminated):
            fit(
                base,
                data,
                recipe,
                machine,
                Checkpoints(str(folder / f"{turn}"), {}),
                stop=lambda marks=marks: len(marks) == STEPS,  # one more, which writes a checkpoint
                on_step=lambda _, marks=marks: marks.append(now(device)),
            )
        whole = spent(marks[:STEPS])
        found.append(Spent(bare[0] / whole[0], bare[1] / whole[1]))
    return found


def spent(marks: list[Spent]) -> Spent:
    """From each of these moments to the next, but for those left out."""
    steps = [i for i in range(len(marks)) if WARM <= i % EPOCH < EPOCH - 1]
    return Spent(*(sum(marks[i][kind] - marks[i - 1][kind] for i in steps) for kind in range(2)))


def now(device: torch.device) -> Spent:
    """Seconds on the clock, and of processors in this process and its workers."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children())]
    return Spent(time.perf_counter(), sum(one.user + one.system for one in times))


@pytest.mark.measurement
def test_reading_logging_and_checkpoints_cost_less_than_a_tenth(tmp_path):
    # As it comes, at the size that most steps have, but with a checkpoint within so few steps.
    recipe = Recipe(batch=16, start_size=0.86)
    machine = Machine(device="cpu", quiet=True, scalars=str(tmp_path), checkpoint_every=10)
    found = shares(clothes(recipe.batch), lambda: models.load("lite0"), recipe, machine, tmp_path)
    print("of the bare loop's speed:", ", ".join(f"{share.clock:.2f}" for share in found))
    assert statistics.median(share.clock for share in found) >= 0.9, found


@pytest.mark.measurement
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["resnet", "convnext"])
def test_on_a_gpu_too(tmp_path, kind):
    """ResNet-50 and ConvNeXt-T, untrained, at batch 256 in bf16, against one batch that stays on the device."""
    import transformers

    config = {"resnet": transformers.ResNetConfig, "convnext": transformers.ConvNextConfig}[kind]()
    model = transformers.AutoModelForImageClassification.from_config(config)
    model.save_pretrained(tmp_path / "model")
    processor = {"size": {"shortest_edge": 224}, "crop_pct": 0.875, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "model/preprocessor_config.json").write_text(json.dumps(processor))
    recipe = Recipe(batch=256, start_size=1, end_size=1, freeze_norm=False)
    machine = Machine(device="cuda", quiet=True, scalars=str(tmp_path), checkpoint_every=60)
    found = shares(clothes(recipe.batch), lambda: models.load(str(tmp_path / "model")), recipe, machine, tmp_path)
    print("of the bare loop's speed:", ", ".join(f"{share.clock:.2f}" for share in found))
    assert statistics.median(share.clock for share in found) >= 0.9, found
