"""Labelled pictures -> a bundle, its report, and a verdict.

    python -m training.train DATA --out build/bundles/NAME --quick
    python -m training.train DATA --out build/bundles/NAME --require 'accuracy>=0.9'
    torchrun --nproc-per-node 8 -m training.train gs://bucket/shards/*.tar --out build/bundles/NAME

Writes the bundle, OUT.report.html, OUT.report.json and OUT.curve.json. Exit codes: 0 good; 1 bad
input; 3 the gate failed (the bundle is in OUT.rejected); 75 stopped by SIGTERM: the same command
goes on where it stopped.
"""

import argparse
import dataclasses
import json
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import distributed

from bundle import manifest, picture
from bundle.cpus import whole_cpus
from bundle.manifest import BundleError, Manifest
from bundle.picture import Pixels
from training import data, evaluate, gate, metrics, models, quantize, quick, report
from training.calibration import MetricError
from training.checkpoint import CheckpointError, Checkpoints
from training.data import Catalogue, DataError, Record
from training.export import export
from training.gate import GateError
from training.loop import Fitted, Machine, Ranks, Recipe, Terminated, TrainError, fit
from training.models import Base, ModelError
from training.quantize import QuantizeError

GATE_FAILED = 3
STOPPED = os.EX_TEMPFAIL  # 75
GOLDEN = 8  # pictures of validation that the bundle carries with their answers
FIRST = 20_000  # pictures whose features the head of a fine-tuning run begins with: more change it little
REFUSALS = (
    *(BundleError, DataError, ModelError, TrainError, CheckpointError, GateError, MetricError, QuantizeError),
    OSError,
)


@dataclass(frozen=True)
class Job:
    """What is trained on, into what, and when it is good enough."""

    data: str
    out: Path
    csv: str | None
    quick: bool
    model: str
    size: int
    resize: str
    name: str
    version: str
    licence: str
    precision: float | None
    require: tuple[str, ...]
    no_worse_than: Path | None
    folds: int
    int8: bool
    checkpoints: str
    fresh: bool
    cache: Path
    validation: float
    test: float
    max_bad: float

    @property
    def out_int8(self) -> Path:
        return Path(f"{self.out}-int8")


@dataclass(frozen=True)
class Hooks:
    """What whoever started the run hears of it, in its first process."""

    # After every epoch of the loop: its number, from 1, and the accuracy on validation.
    judged: Callable[[int, float], None] = lambda epoch, accuracy: None
    # Bundle and report are there: the bundle's folder, and the exit code. Until it returns the checkpoints stay.
    finished: Callable[[Path, int], None] = lambda bundle, code: None


class _Sigterm:
    """SIGTERM ends the program, but in the loop, which asks `asked` after every step."""

    def __init__(self) -> None:
        self.in_loop, self.came = False, False

    def __call__(self, _: int, __: FrameType | None) -> None:
        self.came = True
        if not self.in_loop:
            print("train: stopped by SIGTERM; the same command begins this part again", file=sys.stderr)
            raise SystemExit(STOPPED)

    def asked(self) -> bool:
        return self.came


def main(arguments: Sequence[str] | None = None, hooks: Hooks = Hooks()) -> int:
    sigterm = _Sigterm()
    before = signal.signal(signal.SIGTERM, sigterm)
    try:
        job, recipe, machine = parse(arguments)
        return run(job, recipe, machine, _join(machine), sigterm, hooks)
    except Terminated as exc:
        print(f"train: stopped by SIGTERM, {exc}; the same command goes on", file=sys.stderr)
        return STOPPED
    except REFUSALS as exc:
        print(f"train: {exc}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
        if distributed.is_initialized():
            distributed.destroy_process_group()


def run(job: Job, recipe: Recipe, machine: Machine, ranks: Ranks, sigterm: _Sigterm, hooks: Hooks) -> int:
    """All stages, one after the other -> the exit code. Of several processes the first does all but the loop."""
    alone = ranks.rank == 0
    _check_output(job)
    base = models.load(job.model, size=job.size, rule=job.resize)
    models.freeze(base.model, recipe.freeze)
    catalogue = _catalogue(job, machine, ranks)
    _check_questions(job, catalogue)
    base.model.new_head(len(catalogue.classes))

    checked: dict[str, Any] = {}

    def begin() -> None:
        sigterm.in_loop = False
        checked.update(_train_head(job, base, catalogue, recipe, machine))
        sigterm.in_loop = not job.quick

    if job.quick:
        if not alone:
            return 0
        begin()
        fitted = None
    else:
        checkpoints = Checkpoints(job.checkpoints, _identity(base, catalogue, recipe, ranks))
        if job.fresh and alone:
            checkpoints.clear()
        sigterm.in_loop = True
        fitted = fit(
            base,
            catalogue,
            recipe,
            machine,
            checkpoints,
            ranks=ranks,
            begin=begin,
            stop=sigterm.asked,
            judged=hooks.judged,
        )
        sigterm.in_loop = False
        if not alone:
            return 0
    code = _finish(job, base, catalogue, recipe, ranks, fitted, checked)
    if job.int8 and code == 0:
        _to_int8(job, catalogue, machine)
    hooks.finished(Path(f"{job.out}.rejected") if code else job.out, code)
    if fitted and code == 0:
        checkpoints.clear()
    return code


def _train_head(job: Job, base: Base, catalogue: Catalogue, recipe: Recipe, machine: Machine) -> dict[str, Any]:
    """Train base.model's head on features of the network as it is -> what was found out on the way."""
    records = catalogue.of("train")
    if not job.quick:
        records = records[:: -(-len(records) // FIRST)]
    threads = machine.threads or whole_cpus()
    rows = quick.features(
        base,
        catalogue,
        records,
        cache=job.cache,
        workers=machine.processes,
        threads=threads,
        device=machine.on,
        quiet=machine.quiet,
    )
    labels = np.array([record.label for record in records], np.int64)
    classes = len(catalogue.classes)
    head = quick.train_head(rows, labels, classes, recipe.seed)
    head.put_into(base.model)
    found: dict[str, Any] = {"strength": head.strength, "cross_validated_accuracy": head.accuracy}
    if not machine.quiet:
        print(f"head: {head.accuracy:.4f} right in cross-validation, L2 {head.strength:.2g}", file=sys.stderr)
    if job.folds:
        # Copies of one picture stay together, or a fold would be asked what it was taught.
        first = {copy: one for one, copy, _ in catalogue.copies}
        same = {key: i for i, key in enumerate(sorted({first.get(record.key, record.key) for record in records}))}
        found["folds"] = evaluate.folds(
            labels,
            lambda train, held: quick.train_head(rows[train], labels[train], classes, recipe.seed).logits(rows[held]),
            job.folds,
            seed=recipe.seed,
            groups=[same[first.get(record.key, record.key)] for record in records],
        )
    return found


def _finish(
    job: Job,
    base: Base,
    catalogue: Catalogue,
    recipe: Recipe,
    ranks: Ranks,
    fitted: Fitted | None,
    found: dict[str, Any],
) -> int:
    """Export, measure as served, decide, report, judge -> the exit code."""
    job.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=job.out.parent, prefix=f".{job.out.name}-") as scratch:
        raw, candidate = Path(scratch) / "raw", Path(scratch) / "candidate"
        export(
            base.model.to("cpu").eval(),
            raw,
            name=job.name,
            version=job.version or _version(job, base, catalogue),
            classes=catalogue.classes,
            resize=base.resize,
            golden_pixels=_golden(catalogue, base),
            licence=job.licence or base.licence,
            provenance=_provenance(job, base, catalogue, recipe, ranks, fitted, found),
        )
        predictions = evaluate.predict(raw, catalogue, "validation")
        decision = evaluate.calibrate(predictions, job.precision)
        summary = metrics.summarise(predictions, decision.temperature, decision.threshold)
        figures = {key: summary[key] for key in ("pictures", *metrics.SCALARS)}

        def decided(folder: Path) -> Manifest:
            undecided = manifest.read(raw)
            for file in undecided.files:
                shutil.copyfile(raw / file, folder / file)
            return dataclasses.replace(undecided, decision=decision, metrics={"validation": figures})

        made = manifest.write(candidate, decided)
        other = evaluate.predict(job.no_worse_than, catalogue, "validation") if job.no_worse_than else None
        summary, unmet = evaluate.judge(
            job.out,
            predictions,
            catalogue,
            made,
            requirements=job.require,
            other=other,
            cross_validation=found.get("folds"),
        )
        target = Path(f"{job.out}.rejected") if unmet else job.out
        manifest.copy(candidate, target)
    if fitted:
        curve = {"loss": fitted.losses, "validation_accuracy": fitted.accuracies, "best_epoch": fitted.best_epoch}
        Path(f"{job.out}.curve.json").write_text(json.dumps(curve))
    print(f"{report.headline(summary)}. Bundle: {target}. Report: {job.out}.report.html")
    for sentence in unmet:
        print(f"train: the gate failed: {sentence}", file=sys.stderr)
    return GATE_FAILED if unmet else 0


def _to_int8(job: Job, catalogue: Catalogue, machine: Machine) -> None:
    try:
        _, said = quantize.quantize(job.out, job.out_int8, catalogue, progress=not machine.quiet)
    except QuantizeError as exc:  # the fp32 bundle is there, and good
        said = [f"there is no int8: {exc}"]
    for sentence in said:
        print(f"train: {sentence}")


def _catalogue(job: Job, machine: Machine, ranks: Ranks) -> Catalogue:
    """Read by the first process, sent to the others."""
    found: list[Catalogue | None] = [None]
    if ranks.rank == 0:
        found[0] = data.catalogue(
            job.data,
            job.csv,
            validation=job.validation,
            test=job.test,
            max_bad=job.max_bad,
            workers=max(1, machine.processes),
            progress=not machine.quiet,
        )
    if ranks.count > 1:
        distributed.broadcast_object_list(found, 0)
    assert found[0] is not None
    return found[0]


def _check_output(job: Job) -> None:
    """What would be found out only at the end otherwise."""
    for folder in (job.out, Path(f"{job.out}.rejected"), *([job.out_int8] if job.int8 else [])):
        manifest.check_target(folder)
    try:
        Manifest(job.name, (job.version or "v") + "-int8" * job.int8, ("a", "b"), typing.cast(Any, None), "")
    except ValueError as exc:
        raise BundleError(f"the bundle's {exc}") from exc
    if job.no_worse_than:
        manifest.read(job.no_worse_than)  # its classes are compared once the data's are known
    if job.folds and not job.quick:
        raise TrainError("--folds needs --quick: a fine-tuning run is trained once, not so many times")


def _check_questions(job: Job, catalogue: Catalogue) -> None:
    """What is asked about the result must have an answer with this data. Raises the error of whoever asks."""
    for text in job.require:
        gate.parse(text, catalogue.classes)
    if job.int8:
        quantize.parts(catalogue)
    if job.no_worse_than:
        evaluate.known_labels(manifest.read(job.no_worse_than), catalogue, catalogue.of("validation", evaluation=True))
    if job.folds:
        evaluate.check_folds(np.array([record.label for record in catalogue.of("train")], np.int64), job.folds)


def _golden(catalogue: Catalogue, base: Base) -> Pixels:
    """Up to GOLDEN pictures of validation, of as many classes as can be: uint8 [K, H, W, 3]."""
    by_class: dict[int, list[Record]] = {}
    for record in catalogue.of("validation", evaluation=True):
        by_class.setdefault(record.label, []).append(record)
    depth = max(map(len, by_class.values()))
    chosen = [of[i] for i in range(depth) for of in by_class.values() if i < len(of)][:GOLDEN]
    return np.stack([picture.load(catalogue.read(record), base.resize) for record in chosen])


def _identity(base: Base, catalogue: Catalogue, recipe: Recipe, ranks: Ranks) -> dict[str, Any]:
    """What a run that goes on must have in common with the one that stopped."""
    settings = dataclasses.asdict(recipe)
    return {
        "data": catalogue.digest,
        "model": base.name,
        "weights": base.digest,
        "resize": dataclasses.asdict(base.resize),
        "processes": ranks.count,
    } | settings


def _provenance(
    job: Job,
    base: Base,
    catalogue: Catalogue,
    recipe: Recipe,
    ranks: Ranks,
    fitted: Fitted | None,
    found: dict[str, Any],
) -> dict[str, Any]:
    made: dict[str, Any] = {
        "data": {
            "address": catalogue.address,
            "digest": catalogue.digest,
            **{split: len(catalogue.of(split)) for split in data.SPLITS},
            "unreadable": len(catalogue.unreadable),
        },
        "model": {"name": base.name, "weights_sha256": base.digest},
        "seed": recipe.seed,
        "hardware": {
            "cpus": whole_cpus(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
            "processes": ranks.count,
            "processor": platform.machine(),
        },
    }
    if fitted:
        made["recipe"] = dataclasses.asdict(recipe)
        made["best_epoch"] = fitted.best_epoch
    else:
        made["quick"] = {key: value for key, value in found.items() if key != "folds"}
    return made


def _version(job: Job, base: Base, catalogue: Catalogue) -> str:
    """The same for the same run: model, way and data."""
    model = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(base.name).name).strip("._-")[:32]
    return f"{model}-{'quick' if job.quick else 'tuned'}-{catalogue.digest[:8]}"


def _join(machine: Machine) -> Ranks:
    """This process's place under torchrun, or alone."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks()
    ranks = Ranks(*(int(os.environ.get(key, "0")) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    if ranks.count > 1:
        # The others wait while the first reads the data and trains the head.
        distributed.init_process_group("nccl" if machine.on == "cuda" else "gloo", timeout=timedelta(hours=6))
    return ranks


def parse(arguments: Sequence[str] | None) -> tuple[Job, Recipe, Machine]:
    """The command line. Raises SystemExit for one that is none, and TrainError for a recipe that is none."""
    parser = argparse.ArgumentParser(
        prog="train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="folder by class, folder of files with --csv, or tar shards; here or gs://")
    parser.add_argument("--out", type=Path, required=True, help="where the bundle goes")
    parser.add_argument("--csv", help="file and label of every picture")
    parser.add_argument("--quick", action="store_true", help="train the head alone: minutes without a GPU")
    parser.add_argument(
        "--model", default="lite0", help="lite0, lite1, lite2, or a transformers classifier's folder or hub name"
    )
    parser.add_argument("--size", type=int, default=0, help="pixels, height and width; 0: the model's own")
    parser.add_argument("--resize", choices=["crop", "pad", "stretch"], default="", help="the model's own if left out")
    parser.add_argument("--name", default="", help="of the bundle; the last part of --out if left out")
    parser.add_argument("--version", default="", help="of the bundle; from model and data if left out")
    parser.add_argument("--licence", default="", help="of the bundle; the model's if left out")
    parser.add_argument(
        "--precision", type=float, help="wanted of the answers: below the threshold for it they are unknown"
    )
    parser.add_argument("--require", nargs="+", action="extend", default=[], metavar="METRIC>=VALUE")
    parser.add_argument("--no-worse-than", type=Path, metavar="BUNDLE", help="tested on the same pictures")
    parser.add_argument("--folds", type=int, default=0, help="also cross-validate so many times, with --quick")
    parser.add_argument("--int8", action="store_true", help="also OUT-int8, if it answers as OUT does")
    parser.add_argument("--checkpoints", default="", help="folder or gs://; OUT.checkpoints if left out")
    parser.add_argument("--fresh", action="store_true", help="begin anew where a checkpoint is")
    parser.add_argument("--cache", type=Path, default=Path("build/cache"), help="folder for features, between runs")
    parser.add_argument("--validation", type=float, default=0.1, help="share, where no split is given")
    parser.add_argument("--test", type=float, default=0.1, help="share, where no split is given")
    parser.add_argument("--max-bad", type=float, default=0.02, help="share of pictures that may be unreadable")
    for kind, title in ((Recipe, "recipe"), (Machine, "machine")):
        _add_options(parser.add_argument_group(title, (kind.__doc__ or "").split(":")[0].rstrip(".")), kind)
    args = vars(parser.parse_args(arguments))
    recipe = Recipe(**{field.name: args.pop(field.name) for field in dataclasses.fields(Recipe)})
    machine = Machine(**{field.name: args.pop(field.name) for field in dataclasses.fields(Machine)})
    out: Path = args["out"]
    args["require"] = tuple(args["require"])
    args["name"] = args["name"] or re.sub(r"[^a-z0-9]+", "-", out.name.lower()).strip("-")
    args["checkpoints"] = args["checkpoints"] or f"{out}.checkpoints"
    if not machine.scalars:
        machine = dataclasses.replace(machine, scalars=f"{out}.scalars")
    return Job(**args), recipe, machine


def _add_options(group: Any, kind: Any) -> None:
    """An option for every field of a settings class, with its default and its help."""
    types = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        flag, default = f"--{field.name.replace('_', '-')}", field.default
        text = f"{field.metadata['help']} ({default})" if default not in ("", False, True) else field.metadata["help"]
        if types[field.name] is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
        else:
            convert = types[field.name] if types[field.name] in (int, float) else str
            group.add_argument(flag, type=convert, default=default, help=text)


if __name__ == "__main__":
    sys.exit(main())
