"""A small network to train in tests, and drawn pictures in a folder."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bundle.picture import Resize
from training.data import Catalogue, Record, Source
from training.models import Base, Classifier

SIZE = 32
# What an image processor of transformers stores.
PROCESSOR = {"size": {"height": 32, "width": 32}, "resample": 2, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2] * 3}
TRANSFORMERS = {
    "resnet": ("ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}),
    "convnext": ("ConvNextConfig", {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}),
    "vit": (
        "ViTConfig",
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": 32,
            "patch_size": 8,
        },
    ),
}
QUIET = {"quiet": True, "workers": 0, "threads": 1, "device": "cpu"}


class Network(nn.Module):
    """float32 [N, 3, H, W] -> float32 [N, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(self.block(before, 16) for before in (3, 16, 16)))

    @staticmethod
    def block(before: int, after: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).mean((2, 3))


def base(classes: int, seed: int = 0) -> Base:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Classifier(Network(), 16, [127.0], [64.0])
        model.new_head(classes)
    return Base("small", model.eval(), Resize(SIZE, SIZE, "crop", SIZE), "0" * 64, "CC0-1.0", True)


def folder(
    root: Path, names: tuple[str, ...] = ("blue", "red", "yellow"), train: int = 12, validation: int = 6
) -> Path:
    """root/train/blue/0.jpg ..."""
    from drawn import drawing  # takes seconds to import, which programs of tests that only read can do without

    for name in names:
        for i in range(train + validation):
            path = root / ("train" if i < train else "validation") / name / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(drawing(name, i, 96))
    return root


def unread(root: Path) -> Catalogue:
    """The catalogue of such a folder, its pictures not looked at."""
    names = sorted(folder.name for folder in (root / "train").iterdir())
    files = sorted(root.glob("*/*/*"))
    records = [
        Record(
            str(path.relative_to(root)), names.index(path.parts[-2]), path.parts[-3], path.name, "", path.stat().st_size
        )
        for path in files
    ]
    return Catalogue("unread", tuple(names), tuple(records), (), (), "0" * 64, Source(str(root)))


def save_transformer(path: Path, kind: str) -> Any:
    """A tiny untrained classifier of three classes, as transformers stores one; the model in eval mode."""
    import transformers

    name, settings = TRANSFORMERS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, name)(**settings, num_labels=3)
        model = transformers.AutoModelForImageClassification.from_config(config)
        for module in model.modules():  # statistics that are not those of no data
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
    model.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return model.eval()
