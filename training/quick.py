"""Quick mode: the network stays as it is, its features are computed once, and only the head is trained.

Features are those of the very pixels that will be served, through ONNX Runtime on a CPU (three times
as fast as torch there). They are kept on disk by picture, so that pictures added later are all that is
computed anew. The head is a logistic regression; how strongly it is regularised is chosen by
cross-validation on the training pictures, so validation stays unseen.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bundle.manifest import canonical, sha256
from training.batches import Pictures, in_turn, loader
from training.data import Catalogue, Record
from training.export import onnx_runner, to_onnx
from training.models import Base, Classifier
from training.progress import Progress

Floats = NDArray[np.float32]
BATCH = 32
FEW = 500  # pictures for which torch is done sooner than the export to ONNX, some 15 s
FOLDS = 5
# L2 strengths tried, strongest first, until one is worse than the one before: half its product with the squared
# norm of the weights, which are of features with deviation 1, is added to the mean loss.
STRENGTHS = tuple(float(10.0**e) for e in np.arange(0.0, -4.1, -0.5))


@dataclass(frozen=True)
class Head:
    """weight float32 [C, D], bias float32 [C]; the strength chosen and the accuracy it had in cross-validation."""

    weight: Tensor
    bias: Tensor
    strength: float
    accuracy: float

    def put_into(self, model: Classifier) -> None:
        with torch.no_grad():
            model.head.weight.copy_(self.weight)
            model.head.bias.copy_(self.bias)

    def logits(self, features: Floats) -> Floats:
        """Features float32 [N, D] -> float32 [N, C]."""
        logits: Floats = (torch.from_numpy(features) @ self.weight.T + self.bias).numpy()
        return logits


def features(
    base: Base,
    catalogue: Catalogue,
    records: Sequence[Record],
    *,
    cache: Path | None = None,
    workers: int = 0,
    threads: int = 1,
    device: str = "cpu",
    quiet: bool = False,
) -> Floats:
    """The network's features of the pictures as they will be served, float32 [N, D].

    cache: a folder for what was computed before. Raises DataError where a picture can no longer be read.
    """
    path = cache and cache / f"features-{_identity(base, catalogue)}.npz"
    known = _read(path)
    todo = list({one.sha256: one for one in records if one.sha256 not in known}.values())
    if todo:
        run = _runner(base, device, threads, len(todo))
        batches = loader(Pictures(catalogue, todo, base.resize), in_turn(len(todo), BATCH), workers)
        with Progress("features", -(-len(todo) // BATCH), quiet=quiet) as progress:
            for i, (pixels, _) in enumerate(batches):
                rows = run(pixels)
                known |= {one.sha256: row for one, row in zip(todo[i * BATCH :], rows, strict=False)}
                progress.step(len(pixels))
        if path:
            _write(path, known)
    return np.stack([known[one.sha256] for one in records])


def train_head(features: Floats, labels: NDArray[np.int64], classes: int, seed: int = 0) -> Head:
    """Logistic regression with L2 on features [N, D] and labels [N]; the seed draws cross-validation's parts."""
    with _one_thread():
        return _train_head(features, labels, classes, seed)


def _train_head(features: Floats, labels: NDArray[np.int64], classes: int, seed: int) -> Head:
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    x, y = torch.from_numpy((features - mean) / deviation), torch.from_numpy(labels)
    fewest = int(np.bincount(labels, minlength=classes).min())
    strength, accuracy = 10**-1.5, float("nan")  # where a class cannot be in two parts; of many the middle one
    if fewest > 1:
        parts = list(StratifiedKFold(min(FOLDS, fewest), shuffle=True, random_state=seed).split(features, labels))
        strength, accuracy = _choose(x, y, classes, parts)
    weight, bias = _solve(x, y, strength, _nothing(classes, x))
    weight = weight / torch.from_numpy(deviation)
    return Head(weight, bias - weight @ torch.from_numpy(mean), strength, accuracy)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of small products: beside other work, waiting for a second thread took ten times as long as they."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _choose(x: Tensor, y: Tensor, classes: int, parts: Sequence[tuple[Any, Any]]) -> tuple[float, float]:
    """The strength with the least loss on what was held out, and the accuracy there."""
    solutions = [_nothing(classes, x)] * len(parts)
    best, chosen, accuracy = float("inf"), STRENGTHS[0], 0.0
    for strength in STRENGTHS:
        loss, right = 0.0, 0
        for i, (train, held) in enumerate(parts):
            solutions[i] = _solve(x[train], y[train], strength, solutions[i])
            logits = x[held] @ solutions[i][0].T + solutions[i][1]
            loss += float(cross_entropy(logits, y[held], reduction="sum"))
            right += int((logits.argmax(1) == y[held]).sum())
        if loss >= best:
            break
        best, chosen, accuracy = loss, strength, right / len(y)
    return chosen, accuracy


def _solve(x: Tensor, y: Tensor, strength: float, start: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    weight, bias = (tensor.clone().requires_grad_() for tensor in start)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=200, tolerance_grad=1e-4, tolerance_change=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        solver.zero_grad()
        loss = cross_entropy(x @ weight.T + bias, y) + strength / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    solver.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def _nothing(classes: int, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(classes, x.shape[1]), torch.zeros(classes)


class _Features(nn.Module):
    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.features(pixels)


def _runner(base: Base, device: str, threads: int, pictures: int) -> Callable[[Tensor], Floats]:
    """uint8 [N, H, W, 3] -> float32 [N, D], for so many pictures."""
    network = _Features(base.model).eval()
    if device != "cpu" or pictures < FEW:
        network.to(device)

        def by_torch(pixels: Tensor) -> Floats:
            with torch.no_grad():
                rows: Floats = network(pixels.to(device)).float().cpu().numpy()
            return rows

        return by_torch
    with tempfile.TemporaryDirectory() as folder:
        to_onnx(network, Path(folder) / "features.onnx", base.resize)
        run = onnx_runner(Path(folder) / "features.onnx", threads)
    return lambda pixels: run(pixels.numpy())


def _identity(base: Base, catalogue: Catalogue) -> str:
    """Of features that may share a file: of the same weights, the same pixels and the same place."""
    return sha256(canonical([base.digest, asdict(base.resize), catalogue.address]))[:16]


def _read(path: Path | None) -> dict[str, Floats]:
    if path is None:
        return {}
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return dict(zip(file["sha256"].tolist(), file["rows"], strict=True))
    except Exception:  # not there, or damaged, for which numpy and zipfile raise much: computed anew
        return {}


def _write(path: Path, known: dict[str, Floats]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        np.savez(file, sha256=np.array(list(known)), rows=np.stack(list(known.values())))
    os.replace(new, path)
