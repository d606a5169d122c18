"""The training loop: from a model with a head to a finer one.

Nothing depends on what came before a step but the state that checkpoints hold: the order of the
pictures is a function of seed and epoch, and every random number of a step (augmentation, mixing,
dropout) comes from a generator seeded by (seed, step, rank). So there is no generator to save, and
a run that was killed and started again is the run that was not.
"""

import contextlib
import copy
import dataclasses
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from bundle.cpus import whole_cpus
from training.augment import Level, augment, mix
from training.batches import Batch, Order, Pictures, in_turn, loader, stored
from training.checkpoint import Checkpoints
from training.data import Catalogue
from training.models import Base, Classifier, freeze, train_mode
from training.progress import Progress


class TrainError(ValueError):
    """A run that cannot go on; the message says why and what to change."""


class Terminated(Exception):
    """SIGTERM came; the state is in the checkpoint."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """What decides the result of a run. A checkpoint belongs to one recipe."""

    epochs: int = _option(8, "times each picture is seen")
    batch: int = _option(32, "pictures at once on each device")
    accumulate: int = _option(1, "batches whose gradients are added up for one step")
    lr: float = _option(5e-4, "highest learning rate")
    weight_decay: float = _option(0.02, "of AdamW, for weights but not for biases and norms")
    warmup: float = _option(0.1, "share of the steps until the highest learning rate; cosine after it")
    clip: float = _option(5.0, "largest norm of the gradient")
    label_smoothing: float = _option(0.1, "probability given to all classes alike")
    mixup: float = _option(0.2, "alpha of mixup, 0: none")
    cutmix: float = _option(1.0, "alpha of cutmix, 0: none")
    mix_share: float = _option(0.3, "share of the batches that are mixed")
    augment: Level = field(default="light", metadata={"help": "none, light or strong"})
    dropout: float = _option(0.2, "share of the features dropped before the head")
    ema: float = _option(0.99, "decay a step of the averaged weights, 0: the last ones; they become the bundle")
    freeze: int = _option(0, "first blocks of the network that stay as they are")
    freeze_norm: bool = _option(True, "batch norm keeps the statistics it came with")
    start_size: float = _option(0.7, "picture size of the first epoch, as a share of serving's")
    end_size: float = _option(
        0.86, "picture size of the last third: a little below serving's 1, as random crops enlarge"
    )
    patience: int = _option(0, "epochs without a better validation accuracy until the run ends, 0: never")
    seed: int = _option(0, "of order, augmentation and mixing")

    def __post_init__(self) -> None:
        wrong = {
            "epochs, batch and accumulate must be at least 1": min(self.epochs, self.batch, self.accumulate) >= 1,
            "lr must be above 0": 0 < self.lr < math.inf,
            "clip must be above 0": self.clip > 0,
            "warmup, label-smoothing, mix-share, dropout and ema must be 0 to 1": all(
                0 <= share <= 1 for share in (self.warmup, self.label_smoothing, self.mix_share, self.dropout, self.ema)
            ),
            "start-size must be above 0, end-size at least that and at most 1": 0
            < self.start_size
            <= self.end_size
            <= 1,
            "augment must be none, light or strong": self.augment in ("none", "light", "strong"),
            "freeze, patience, mixup, cutmix, weight-decay and seed must not be below 0": min(
                self.freeze, self.patience, self.mixup, self.cutmix, self.weight_decay, self.seed
            )
            >= 0,
        }
        for sentence, right in wrong.items():
            if not right:
                raise TrainError(sentence)


@dataclass(frozen=True)
class Machine:
    """Where and how fast a run goes: what may be another when it is continued."""

    device: str = _option("", "cpu or cuda; a GPU if there is one")
    workers: int = _option(-1, "processes that decode pictures, -1: one a CPU")
    threads: int = _option(0, "of torch on a CPU, 0: its own choice; another number may give other last bits")
    compile: bool = _option(False, "torch.compile; needs a C++ compiler")
    keep: int = _option(1_000_000_000, "bytes of decoded pictures that may be held in memory")
    checkpoint_every: float = _option(120.0, "seconds between checkpoints; more where writing takes over a 20th of it")
    scalars: str = _option("", "folder for TensorBoard, here or gs://")
    quiet: bool = _option(False, "no progress")

    @property
    def on(self) -> str:
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def processes(self) -> int:
        return whole_cpus() if self.workers < 0 else self.workers


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    count: int = 1
    local: int = 0


@dataclass(frozen=True)
class Fitted:
    """The averaged weights of the best epoch, on the CPU; loss of every step; validation accuracy of every epoch."""

    model: Classifier
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    best_epoch: int
    images_per_second: float


def fit(
    base: Base,
    catalogue: Catalogue,
    recipe: Recipe,
    machine: Machine,
    checkpoints: Checkpoints | None = None,
    *,
    ranks: Ranks = Ranks(),
    begin: Callable[[], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    judged: Callable[[int, float], None] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Fitted:
    """Train base.model on the split train, judged on validation after every epoch.

    begin: called before the first step of a run that is not continued, to change base.model.
    stop: asked after every step; where it says yes a checkpoint is written and Terminated raised.
    judged: called by the first process after every epoch with its number, from 1, and the validation accuracy.
    on_step: called after every step with the number of steps done.
    Raises TrainError, ModelError, CheckpointError and DataError.
    """
    device = torch.device(f"cuda:{ranks.local}" if machine.on == "cuda" else machine.on)
    if machine.threads:
        torch.set_num_threads(machine.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    train = Pictures(catalogue, catalogue.of("train"), _kept_size(base, recipe), machine.keep)
    order = Order(len(train), recipe.batch, 0, 0, recipe.accumulate, ranks.count, ranks.rank, recipe.seed)
    validation = Pictures(catalogue, catalogue.of("validation", evaluation=True), base.resize, machine.keep // 4)
    if not len(train) or not len(validation):
        raise TrainError(f"{catalogue.address}: {len(train)} pictures to train on, {len(validation)} to validate with")
    steps = recipe.epochs * order.epoch_steps

    model = base.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    model.dropout.p = recipe.dropout
    freeze(model, recipe.freeze)
    if checkpoints and ranks.rank == 0:
        checkpoints.prepare(_bytes(model))
    state = checkpoints.load() if checkpoints else None
    if state is None:
        if begin and ranks.rank == 0:
            begin()
        if ranks.count > 1:
            for tensor in model.state_dict().values():
                distributed.broadcast(tensor, 0)
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(_groups(model, recipe.weight_decay), lr=recipe.lr, fused=device.type == "cuda")
    run = _Run(model, average, optimizer)
    if state is not None:
        run.restore(state)
    if checkpoints and ranks.rank == 0 and state is None:
        checkpoints.save(0, run.state())  # where there is no right to write, it is found before the work

    net = _parallel(model, device, machine.compile, ranks)
    train_mode(net, recipe.freeze_norm)
    batches = iter(
        loader(train, dataclasses.replace(order, steps=steps, start=run.step), machine.processes, device.type == "cuda")
    )
    judge = loader(validation, in_turn(len(validation), 64, ranks.rank, ranks.count), min(2, machine.processes))
    pending: list[Tensor] = []  # of each step: its loss and whether a rank was asked to stop
    every = 1 if device.type == "cpu" else 10  # steps until a GPU is waited for
    saved, cost = time.monotonic(), 0.0
    pictures = recipe.batch * recipe.accumulate * ranks.count
    first = ranks.rank == 0
    scalars, quiet = machine.scalars if first else "", machine.quiet or not first
    with Progress("train", steps, start=run.step, scalars=scalars, quiet=quiet) as progress:
        while run.step < steps and not run.over(recipe.patience):
            epoch = run.step // order.epoch_steps
            lr = recipe.lr * schedule(run.step, steps, recipe.warmup)
            torch.manual_seed(_seed(recipe.seed, run.step, ranks.rank))
            size = _size(base, recipe, epoch)
            loss = update(net, optimizer, batches, recipe, len(catalogue.classes), lr, size, device)
            _follow(average, model, min(recipe.ema, (1 + run.step) / (10 + run.step)))  # a short memory at first
            run.step += 1
            progress.step(pictures, f"loss {run.losses[-1]:.3f}" if run.losses else "")

            pending.append(_shared(loss, stop(), ranks))
            last = run.step % order.epoch_steps == 0
            stopped = False
            if len(pending) == every or last:
                read = torch.stack(pending).tolist()
                pending.clear()
                for i, (value, _) in enumerate(read, run.step - len(read)):
                    progress.scalar("train/loss", value, i)
                if not all(math.isfinite(value) for value, _ in read):
                    raise TrainError(f"the loss of step {run.step} is no finite number: use a smaller --lr than {lr:g}")
                run.losses += [value for value, _ in read]
                stopped = any(asked for _, asked in read)
                progress.scalar("train/lr", lr, run.step - 1)
            if last:
                run.judged(_accuracy(average, judge, device, ranks))
                progress.scalar("validation/accuracy", run.accuracies[-1], run.step)
                if judged and first:
                    judged(epoch + 1, run.accuracies[-1])
                progress.say(f"epoch {epoch + 1}/{recipe.epochs}: validation accuracy {run.accuracies[-1]:.4f}")
            if checkpoints and ranks.rank == 0 and not pending:
                now = time.monotonic()
                due = now - saved >= max(machine.checkpoint_every, 20 * cost)
                if due or stopped or run.step == steps or run.over(recipe.patience):
                    checkpoints.save(run.step, run.state())
                    saved, cost = time.monotonic(), time.monotonic() - now
            if on_step:
                on_step(run.step)
            if stopped:
                raise Terminated(
                    f"checkpoint of step {run.step} in {checkpoints.address}" if checkpoints else "no checkpoint"
                )
        rate = progress.rate
    return run.fitted(rate)


def update(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    recipe: Recipe,
    classes: int,
    lr: float,
    size: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """One step: `recipe.accumulate` batches forwards and backwards, one change of the weights -> the mean loss."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    total = torch.zeros((), device=device)
    for part in range(recipe.accumulate):
        pixels, labels = (tensor.to(device, non_blocking=True) for tensor in next(batches))
        x = augment(pixels, *size, recipe.augment)
        x, targets = mix(x, labels, classes, mixup=recipe.mixup, cutmix=recipe.cutmix, share=recipe.mix_share)
        alone = part < recipe.accumulate - 1 and isinstance(net, DistributedDataParallel)
        with net.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]  # DDP's
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = net(x)
            loss = cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing) / recipe.accumulate
            loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], recipe.clip)
    optimizer.step()
    optimizer.zero_grad()
    return total


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the highest learning rate: linear up over `warmup` of the steps, then half a cosine down."""
    up = max(1, round(warmup * steps))
    if step < up:
        return (step + 1) / up
    return 0.5 * (1 + math.cos(math.pi * (step - up) / max(1, steps - up)))


class _Run:
    """What changes while a run goes on, and nothing else: what a checkpoint holds."""

    def __init__(self, model: Classifier, average: Classifier, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.average, self.optimizer = model, average, optimizer
        self.step = 0
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch = 0

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "best_epoch": self.best_epoch,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "accuracies": torch.tensor(self.accuracies, dtype=torch.float64),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.step, self.best, self.best_epoch = state["step"], state["best"], state["best_epoch"]
        self.losses, self.accuracies = state["losses"].tolist(), state["accuracies"].tolist()
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])

    def judged(self, accuracy: float) -> None:
        self.accuracies.append(accuracy)
        if accuracy >= max(self.accuracies):  # of equals the later, which was trained for longer
            self.best = {name: value.detach().cpu().clone() for name, value in self.average.state_dict().items()}
            self.best_epoch = len(self.accuracies)

    def over(self, patience: int) -> bool:
        return 0 < patience <= len(self.accuracies) - self.best_epoch

    def fitted(self, rate: float) -> Fitted:
        self.model.load_state_dict(self.best)
        model = self.model.to("cpu", memory_format=torch.contiguous_format).eval().requires_grad_(False)  # type: ignore[call-overload]
        return Fitted(model, tuple(self.losses), tuple(self.accuracies), self.best_epoch, rate)


def _bytes(model: Classifier) -> int:
    """About what a checkpoint takes: weights, their average and the best, and two moments of what is trained."""
    weights: int = sum(tensor.nbytes for tensor in model.state_dict().values())
    trained: int = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return 3 * weights + 2 * trained


@torch.no_grad()
def _follow(average: Classifier, model: Classifier, decay: float) -> None:
    """One step of the exponential moving average, of weights and of batch norm's statistics."""
    pairs = list(zip(average.state_dict().values(), model.state_dict().values(), strict=True))
    floats = [(mine, its) for mine, its in pairs if mine.is_floating_point()]
    torch._foreach_lerp_([mine for mine, _ in floats], [its for _, its in floats], 1 - decay)
    for mine, its in pairs:
        if not mine.is_floating_point():
            mine.copy_(its)


def _groups(model: Classifier, decay: float) -> list[dict[str, Any]]:
    """Weights decay; biases, norms and other vectors do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _parallel(model: Classifier, device: torch.device, compile: bool, ranks: Ranks) -> nn.Module:
    net: nn.Module = model
    if compile:
        if not any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "c++", "clang++")):
            raise TrainError("--compile needs a C++ compiler, and none is on PATH: install g++, or leave it out")
        net = torch.compile(model)  # type: ignore[assignment]
    if ranks.count > 1:
        net = DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None)
    return net


@torch.no_grad()
def _accuracy(average: Classifier, judge: Any, device: torch.device, ranks: Ranks) -> float:
    """Share of the validation pictures, of all ranks together, whose top answer is right."""
    if ranks.count > 1:
        for buffer in average.buffers():  # rank 0's are the run's
            distributed.broadcast(buffer, 0)
    counts = torch.zeros(2, dtype=torch.float64, device=device)
    for pixels, labels in judge:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            top = average(pixels.to(device)).argmax(1).cpu()
        counts += torch.tensor([int((top == labels).sum()), len(labels)], device=device)
    if ranks.count > 1:
        distributed.all_reduce(counts)
    right, all_ = counts.tolist()
    return float(right / all_)


def _shared(loss: Tensor, asked: bool, ranks: Ranks) -> Tensor:
    """[mean loss, how many were asked to stop], over all ranks."""
    values = torch.stack((loss / ranks.count, torch.full_like(loss, float(asked))))
    if ranks.count > 1:
        distributed.all_reduce(values)
    return values


def _kept_size(base: Base, recipe: Recipe) -> Any:
    return base.resize if recipe.augment == "none" else stored(base.resize)


def _size(base: Base, recipe: Recipe, epoch: int) -> tuple[int, int]:
    """Height and width in pixels at this epoch: growing for two thirds of the run (arXiv:2104.00298, section 4).

    They end below what is served, because random crops show things larger (arXiv:1906.06423, section 3):
    of clothes, one epoch at 160 pixels was best at 192.
    """
    share = min(
        recipe.end_size, recipe.start_size + (recipe.end_size - recipe.start_size) * 1.5 * epoch / recipe.epochs
    )
    if share == 1 or not base.flexible:
        return base.resize.height, base.resize.width
    height, width = (max(32, round(share * side / 32) * 32) for side in (base.resize.height, base.resize.width))
    return min(height, base.resize.height), min(width, base.resize.width)


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
