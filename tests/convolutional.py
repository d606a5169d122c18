"""A small bundle with every kind of layer that the model server changes, and whose arithmetic rounds."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from bundle import golden
from bundle.picture import Resize
from training.export import Normalised, export

SHAPE, CLASSES = (32, 32, 3), ("red", "green", "blue")


class Network(nn.Module):
    """Every case that `fold` knows: padding even and not, single pixels, with bias and without, one that two read."""

    def __init__(self, loud: float = 1.0) -> None:
        super().__init__()
        self.loud = loud
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8)
        self.deep, self.norm2 = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)
        self.mix, self.norm4 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.shared, self.norm3 = nn.Conv2d(8, 8, 1, padding=1), nn.BatchNorm2d(8)
        self.wide, self.head = nn.Linear(8, 16), nn.Linear(16, len(CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.hardtanh(self.norm1(self.first(functional.pad(x, (0, 1, 0, 1)))), 0, 6)
        x = self.norm2(self.deep(functional.pad(x * self.loud, (1, 1, 1, 1)))) / self.loud
        shared = self.shared(self.norm4(self.mix(x)))
        return self.head(self.wide((self.norm3(shared) + shared).mean((2, 3))))


def made(folder: Path, loud: float = 1.0) -> Path:
    """A bundle of that network; loud: a factor that float16 cannot hold, taken out again afterwards."""
    torch.manual_seed(0)
    network = Network(loud).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.running_mean, module.running_var, module.weight, module.bias):
                nn.init.uniform_(value, 0.5, 1.5)
    module, pixels = Normalised(network, 127.0, 128.0).eval(), golden.draw(6, *SHAPE[:2])
    resize = Resize(*SHAPE[:2], "crop", 40)
    named = {"name": "tiny", "version": "1", "classes": CLASSES, "licence": "CC0-1.0"}
    export(module, folder, **named, resize=resize, golden_pixels=pixels)
    return folder
