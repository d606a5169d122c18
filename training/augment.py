"""Augmentation as batched tensor operations on the device, and mixing of pictures with their labels.

Every random number comes from torch's global generator, which the loop seeds for each step: the
same step of the same run draws the same numbers, whether or not it was interrupted before.
"""

from functools import cache
from typing import Literal

import torch
from kornia import augmentation as kornia
from torch import Tensor, nn
from torch.nn.functional import interpolate, one_hot

Level = Literal["none", "light", "strong"]


def augment(pixels: Tensor, height: int, width: int, level: Level) -> Tensor:
    """uint8 [N, h, w, 3] -> float32 [N, height, width, 3] of 0 to 255, another crop of each picture, some mirrored.

    none: the pixels as they are, scaled if they must be.
    """
    with torch.no_grad():
        x = pixels.permute(0, 3, 1, 2).float()
        if level != "none":
            x = 255 * _chain(height, width, level)(x / 255)
        elif x.shape[2:] != (height, width):
            x = interpolate(x, (height, width), mode="bilinear", antialias=True)
        return x.permute(0, 2, 3, 1)


def mix(
    pixels: Tensor, labels: Tensor, classes: int, *, mixup: float, cutmix: float, share: float
) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix of a share of all batches -> pixels float32 [N, H, W, 3] and targets float32 [N, classes].

    mixup, cutmix: alpha of Beta(alpha, alpha), 0 to leave it out. Mixup: Zhang et al. 2018
    (arXiv:1710.09412); cutmix: Yun et al. 2019 (arXiv:1905.04899). The partner is the next
    picture of the batch, which is in random order already.
    """
    targets = one_hot(labels, classes).float()
    share = share if mixup > 0 or cutmix > 0 else 0.0
    whether, which = torch.rand(2).tolist()  # on the CPU, so that no device waits for it
    if whether >= share or len(pixels) < 2:
        return pixels, targets
    whole = mixup > 0 and (cutmix <= 0 or which < 0.5)
    alpha = mixup if whole else cutmix
    kept = float(torch.distributions.Beta(alpha, alpha).sample())
    if whole:
        pixels = kept * pixels + (1 - kept) * pixels.roll(1, 0)
    else:
        height, width = pixels.shape[1:3]
        cut_height, cut_width = (round(side * (1 - kept) ** 0.5) for side in (height, width))
        top = int(torch.randint(0, height - cut_height + 1, ()))
        left = int(torch.randint(0, width - cut_width + 1, ()))
        window = (slice(None), slice(top, top + cut_height), slice(left, left + cut_width))
        partner = pixels.roll(1, 0)
        pixels = pixels.clone()
        pixels[window] = partner[window]
        kept = 1 - cut_height * cut_width / (height * width)  # what the rounded window leaves
    return pixels, kept * targets + (1 - kept) * targets.roll(1, 0)


@cache
def _chain(height: int, width: int, level: Level) -> nn.Sequential:
    """float32 [N, 3, h, w] of 0 to 1 -> [N, 3, height, width]. Crops and jitter as for ImageNet, milder."""
    smallest = 0.35 if level == "light" else 0.2  # share of the picture's area
    operations: list[nn.Module] = [
        kornia.RandomResizedCrop((height, width), scale=(smallest, 1.0), cropping_mode="resample"),
        kornia.RandomHorizontalFlip(),
        # No hue: it takes five times as long as all the rest, and colour often tells classes apart.
        kornia.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.0, p=0.8),
    ]
    if level == "strong":
        operations += [
            kornia.RandomAffine(degrees=10, shear=5, padding_mode="reflection", p=0.5),
            kornia.RandomGrayscale(p=0.1),
            kornia.RandomErasing(scale=(0.02, 0.2), p=0.25),
        ]
    return nn.Sequential(*operations)
