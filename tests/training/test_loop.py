"""The loop on a small network and drawn pictures."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, replace
from pathlib import Path

import learner
import numpy as np
import pytest
import torch
from drawn import catalogue

from training import loop
from training.checkpoint import Checkpoints
from training.loop import Machine, Recipe, Terminated, TrainError, fit, schedule

MACHINE = Machine(**learner.QUIET)
RECIPE = Recipe(epochs=3, batch=4, lr=0.01, start_size=1.0, end_size=1.0, freeze_norm=False)
PLAIN = Recipe(
    epochs=2, batch=8, lr=0.01, augment="none", mixup=0, cutmix=0, dropout=0, freeze_norm=True, start_size=1, end_size=1
)
NAMES = ("blue", "red", "yellow")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def drawn():
    return catalogue(4, 8, NAMES)


def learn(drawn, recipe=RECIPE, **more):
    return fit(learner.base(3), drawn, recipe, MACHINE, **more)


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_it_learns(drawn):
    fitted = learn(drawn, replace(RECIPE, epochs=12))
    assert len(fitted.losses) == 12 * 6
    assert np.mean(fitted.losses[-6:]) < 0.75 * np.mean(fitted.losses[:6])
    assert fitted.accuracies[fitted.best_epoch - 1] == max(fitted.accuracies) > 0.8
    assert not fitted.model.training
    assert fitted.images_per_second > 0


# Of the run below, with torch 2.13 and kornia 0.9 on x86-64: what a change of the loop, of the order of
# pictures, of augmentation or of the optimiser's settings changes.
GOLDEN = [
    1.0986, 1.0982, 1.0816, 1.0814, 1.0467, 1.0691, 1.1285, 1.0433, 0.9760, 1.1359,
    1.0157, 0.9186, 1.1728, 1.1298, 0.9725, 0.9646, 0.9323, 0.9181, 1.1564, 0.9751,
]  # fmt: skip


def test_golden_loss_curve(drawn):
    recipe = replace(RECIPE, epochs=4, accumulate=1, augment="strong", start_size=0.5, mix_share=0.7)
    losses = learn(drawn, recipe).losses[:20]
    assert np.allclose(losses, GOLDEN, atol=5e-4), [round(loss, 4) for loss in losses]


def test_the_seed_decides(drawn):
    assert learn(drawn).losses == learn(drawn).losses
    assert learn(drawn).losses != learn(drawn, replace(RECIPE, seed=1)).losses


def test_stopped_and_started_again_it_is_the_same_run(drawn, tmp_path):
    whole = learn(drawn)
    checkpoints = Checkpoints(str(tmp_path), {})
    for stops in (1, 6, 7, 3):  # in the first epoch, at its end, after it
        asked = itertools.count(1)
        with pytest.raises(Terminated, match=r"checkpoint of step \d+ in "):
            learn(drawn, checkpoints=checkpoints, stop=lambda asked=asked, stops=stops: next(asked) == stops)
    assert checkpoints.load()["step"] == 17
    again = learn(drawn, checkpoints=checkpoints)
    assert again.losses == whole.losses
    assert again.accuracies == whole.accuracies
    assert equal(again.model, whole.model)
    once_more = learn(drawn, checkpoints=checkpoints)  # nothing is left to do
    assert equal(once_more.model, whole.model)


def test_no_right_to_write_is_found_before_the_first_step(drawn, tmp_path):
    steps = []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="no checkpoint can be written there"):
        learn(drawn, checkpoints=Checkpoints(str(tmp_path / "file"), {}), on_step=steps.append)
    assert not steps


def test_begin_is_called_for_a_new_run_only(drawn, tmp_path):
    checkpoints = Checkpoints(str(tmp_path), {})
    called = []
    with pytest.raises(Terminated):
        learn(drawn, checkpoints=checkpoints, begin=lambda: called.append(1), stop=lambda: True)
    learn(drawn, checkpoints=checkpoints, begin=lambda: called.append(2))
    assert called == [1]


def test_accumulated_batches_are_one_large_batch(drawn):
    large = learn(drawn, PLAIN)
    small = learn(drawn, replace(PLAIN, batch=4, accumulate=2))
    assert np.allclose(large.losses, small.losses, atol=1e-5)
    assert len(large.losses) == 6


def test_frozen_blocks_and_statistics_stay(drawn):
    before = learner.base(3).model
    after = learn(drawn, replace(PLAIN, freeze=2)).model
    for i, block in enumerate(after.network.blocks):
        assert equal(block, before.network.blocks[i]) == (i < 2)
    assert torch.equal(after.network.blocks[2][1].running_mean, before.network.blocks[2][1].running_mean)
    moved = learn(drawn, replace(PLAIN, freeze_norm=False)).model
    assert not torch.equal(moved.network.blocks[2][1].running_mean, before.network.blocks[2][1].running_mean)


def test_the_average_becomes_the_model(drawn):
    last = learn(drawn, replace(PLAIN, ema=0, epochs=1))
    averaged = learn(drawn, replace(PLAIN, ema=0.9, epochs=1))
    assert last.losses == averaged.losses
    start = learner.base(3).model.head.weight
    assert 0 < (averaged.model.head.weight - start).norm() < (last.model.head.weight - start).norm()


def test_the_best_epoch_is_kept_and_patience_ends_the_run(drawn, monkeypatch):
    accuracies = iter([0.3, 0.6, 0.6, 0.5, 0.4, 0.9])
    heads = []

    def judged(average, *_):
        heads.append(average.head.weight.clone())
        return next(accuracies)

    monkeypatch.setattr(loop, "_accuracy", judged)
    fitted = learn(drawn, replace(RECIPE, epochs=20, patience=2))
    assert fitted.accuracies == (0.3, 0.6, 0.6, 0.5, 0.4)
    assert fitted.best_epoch == 3
    assert torch.equal(fitted.model.head.weight, heads[2])


def test_pictures_grow(drawn):
    base = replace(learner.base(3), resize=replace(learner.base(3).resize, height=224, width=224, shorter_side=224))
    sizes = [loop._size(base, Recipe(epochs=6, start_size=0.6, end_size=1.0), epoch) for epoch in range(6)]
    assert sizes == [(128, 128), (160, 160), (192, 192), (192, 192), (224, 224), (224, 224)]
    assert loop._size(base, Recipe(epochs=6, start_size=0.5, end_size=0.86), 5) == (192, 192)
    assert loop._size(replace(base, flexible=False), Recipe(start_size=0.5), 0) == (224, 224)


def test_the_learning_rate_rises_and_falls():
    shares = [schedule(step, 100, 0.1) for step in range(100)]
    assert shares[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert shares[10] == 1
    assert shares[55] == pytest.approx(0.5)
    assert shares == sorted(shares[:10]) + sorted(shares[10:], reverse=True)
    assert 0 < shares[-1] < 0.001
    assert schedule(0, 1, 0.0) == 1


def test_a_loss_that_is_no_number_ends_the_run(drawn):
    with pytest.raises(TrainError, match=r"the loss of step \d+ is no finite number: use a smaller --lr"):
        learn(drawn, replace(PLAIN, lr=1e30, warmup=0, clip=math.inf, epochs=4))


def test_compile_without_a_compiler_is_refused(drawn, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(TrainError, match=r"--compile needs a C\+\+ compiler, and none is on PATH"):
        fit(learner.base(3), drawn, RECIPE, replace(MACHINE, compile=True))


def test_nothing_to_train_on_is_refused(drawn):
    with pytest.raises(TrainError, match="0 pictures to train on, 12 to validate"):
        learn(catalogue(4, 0, NAMES))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"epochs": 0}, "at least 1"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"mix_share": 1.5}, "must be 0 to 1"),
        ({"augment": "wild"}, "none, light or strong"),
        ({"freeze": -1}, "must not be below 0"),
        ({"start_size": 0.0}, "start-size"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, sentence):
    with pytest.raises(TrainError, match=sentence):
        Recipe(**settings)


# A program that trains as the tests above do, for those that start and end processes.
PROGRAM = textwrap.dedent("""
    import hashlib, json, os, sys
    from pathlib import Path
    import learner
    from torch import distributed
    from training.checkpoint import Checkpoints
    from training.loop import Machine, Ranks, Recipe, fit

    out, settings = sys.argv[1], json.loads(sys.argv[2])
    ranks = Ranks(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if ranks.count > 1:
        distributed.init_process_group("gloo")
    machine = Machine(**learner.QUIET | {"checkpoint_every": 0.0, "workers": 1})
    checkpoints = Checkpoints(out + ".checkpoints", {}) if settings.pop("checkpoints") else None
    data = learner.unread(Path(sys.argv[3]))
    fitted = fit(learner.base(3), data, Recipe(**settings), machine, checkpoints, ranks=ranks)
    if ranks.rank == 0:
        weights = b"".join(value.numpy().tobytes() for value in fitted.model.state_dict().values())
        with open(out, "w") as file:
            json.dump({"losses": fitted.losses, "weights": hashlib.sha256(weights).hexdigest()}, file)
    if ranks.count > 1:
        distributed.destroy_process_group()
""")


def started(out: Path, recipe: Recipe, checkpoints: bool, *launcher: str) -> subprocess.Popen:
    settings = json.dumps({**asdict(recipe), "checkpoints": checkpoints})
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    program = out.parent / "program.py"
    program.write_text(PROGRAM)
    if not (data := out.parent / "pictures").exists():
        learner.folder(data, NAMES, 8, 4)
    return subprocess.Popen(
        [sys.executable, *launcher, str(program), str(out), settings, str(data)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )


def ended(process: subprocess.Popen, out: Path) -> dict:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    return json.loads(out.read_text())


@pytest.mark.slow
def test_two_processes_are_one_with_the_doubled_batch(tmp_path):
    recipe = replace(PLAIN, batch=4, epochs=4)
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = ended(started(tmp_path / "two", recipe, False, *run), tmp_path / "two")
    one = learn(learner.unread(tmp_path / "pictures"), replace(recipe, batch=8))
    assert len(one.losses) == 12
    assert np.abs(np.subtract(one.losses, two["losses"])).max() < 1e-5


@pytest.mark.slow
def test_killed_ten_times_it_is_the_same_run(tmp_path):
    recipe = replace(RECIPE, epochs=40, accumulate=2, batch=2, augment="strong")  # 240 steps, a few seconds
    whole = ended(started(tmp_path / "whole", recipe, True), tmp_path / "whole")

    random = np.random.default_rng(0)
    latest = tmp_path / "killed.checkpoints/latest.json"

    def reached() -> int:
        return json.loads(latest.read_text())["step"] if latest.exists() else -1

    steps = [reached()]
    for _ in range(10):
        process = started(tmp_path / "killed", recipe, True)
        # By what it has done, not by the clock: a tenth of the work, about, and some part of a step more.
        target = steps[-1] + 1 + random.integers(15)
        while reached() < target:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.002)
        time.sleep(0.05 * random.random())
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
        steps.append(reached())
    assert steps == sorted(set(steps)), "every start went on where the last one was killed"
    killed = ended(started(tmp_path / "killed", recipe, True), tmp_path / "killed")
    assert killed == whole
