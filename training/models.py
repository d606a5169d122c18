"""What training starts from: EfficientNet-Lite with packaged weights, or an image classifier of `transformers`.

Every model is one thing here: a network that makes features of pixels, and a linear head that
makes logits of features. Quick mode trains the head alone, fine-tuning trains both.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bundle.picture import Resize
from training import efficientnet_lite
from training.export import Normalised

LITE = {f"lite{variant}": variant for variant in efficientnet_lite.VARIANTS}
# Pillow's numbers, which image processors store -> ours.
_FILTERS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}


class ModelError(ValueError):
    """A model that cannot be trained here; the message says why and which ones can."""


class Classifier(Normalised):
    """uint8 or float [N, H, W, 3] of 0 to 255 -> float32 [N, C]: normalisation, `network`, `head`.

    network: float32 [N, 3, H, W] -> features float32 [N, D].
    """

    def __init__(
        self,
        network: nn.Module,
        width: int,
        mean: float | Sequence[float],
        std: float | Sequence[float],
    ) -> None:
        super().__init__(network, mean, std)
        self.dropout = nn.Dropout(0.0)  # the loop sets it
        self.width = width
        self.new_head(1)

    def new_head(self, classes: int) -> None:
        """A head of zeros, to which all classes are equally likely."""
        self.head = nn.Linear(self.width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels as above -> float32 [N, D]."""
        return super().forward(pixels)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.features(pixels)))
        return logits.float()


@dataclass(frozen=True)
class Base:
    """A model to start from. `digest` is over its weights, without the head; `flexible`: takes any picture size."""

    name: str
    model: Classifier
    resize: Resize
    digest: str
    licence: str
    flexible: bool


def load(name: str, *, size: int = 0, rule: str = "") -> Base:
    """The model `name`, its head to be made; size (pixels) and rule (crop, pad, stretch) override its own.

    Raises ModelError where there is no such model, or it is not of the form that Classifier needs.
    """
    network: nn.Module
    mean: Sequence[float]
    std: Sequence[float]
    if name in LITE:
        network, resize = _lite(LITE[name])
        width = efficientnet_lite.HEAD
        mean, std = [efficientnet_lite.EfficientNetLite.mean], [efficientnet_lite.EfficientNetLite.std]
        licence = "Apache-2.0 (weights: ML Illustrated, after Google's EfficientNet-Lite)"
    else:
        network, width, resize, mean, std, licence = _transformers(name)
    model = Classifier(network, width, mean, std)
    digest = _digest(model)
    resize = _resize(resize, size, rule)
    flexible = name in LITE
    if not flexible:
        if found := _fails(model, resize.height, resize.width):
            raise ModelError(f"model {name} does not take pictures of {resize.height}x{resize.width}: {found}")
        flexible = not _fails(model, resize.height // 2, resize.width // 2)
    return Base(name, model.eval(), resize, digest, licence, flexible)


def freeze(model: Classifier, blocks: int) -> None:
    """Everything before the network's block number `blocks` stays as it is; 0: all is trained.

    Raises ModelError where there are fewer.
    """
    model.requires_grad_(True)
    found = _blocks(model.network)
    if not 0 <= blocks <= len(found):
        raise ModelError(f"freeze must be 0 to {len(found)}, the blocks of this model, not {blocks}")
    if not blocks:
        return
    # Parameters are registered in the order in which the data meets them: the stem comes before the blocks.
    order = list(model.network.parameters())
    place = {id(parameter): i for i, parameter in enumerate(order)}
    cut = 1 + max(place[id(parameter)] for block in found[:blocks] for parameter in block.parameters())
    for parameter in order[:cut]:
        parameter.requires_grad_(False)


def train_mode(model: nn.Module, frozen_statistics: bool) -> None:
    """model.train(), but what is frozen stays in eval mode, and batch norm too if its statistics are to stay."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
        if frozen or (frozen_statistics and isinstance(module, _BatchNorm)):
            module.eval()


def _lite(variant: int) -> tuple[efficientnet_lite.EfficientNetLite, Resize]:
    network = efficientnet_lite.pretrained(variant)
    network.dropout, network.classifier = nn.Identity(), nn.Identity()  # type: ignore[assignment]  # the head is ours
    size = efficientnet_lite.VARIANTS[variant].size
    # The whole shorter side, not 7/8 of it as for ImageNet: what people photograph fills the picture. A head on frozen
    # features of clothes, cross-validated: 88.2% right, with 7/8 86.6%, stretched 86.0%.
    return network, Resize(size, size, "crop", size)


class _Logits(nn.Module):
    """A transformers classifier as a function of one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=x).logits
        return logits


def _transformers(name: str) -> tuple[nn.Module, int, Resize, Sequence[float], Sequence[float], str]:
    folder = Path(name)
    if "/" not in name and not folder.is_dir():  # hub names have an owner; asking for others takes half a minute
        raise ModelError(f"model {name!r} is not known: {_known()}")
    # Here, because the import takes seconds that EfficientNet-Lite does not need.
    from transformers import AutoConfig, AutoModelForImageClassification
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        AutoConfig.from_pretrained(name)  # small: fails before weights are fetched
        processor, _ = ImageProcessingMixin.get_image_processor_dict(name)
        model, loading = AutoModelForImageClassification.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True
        )
    except Exception as exc:  # OSError, ValueError, and what the hub's client raises: not a closed set
        reason = " ".join(str(exc).split())[:600]
        raise ModelError(f"model {name!r} cannot be loaded: {reason} ({_known()})") from exc
    head, linear = _last_linear(model)
    if linear.out_features != model.config.num_labels:
        raise ModelError(f"model {name!r} does not end in a linear layer of its {model.config.num_labels} classes")
    if missing := [key for key in loading["missing_keys"] if not key.startswith(head)]:
        raise ModelError(f"model {name!r}: its file has no weights for {missing[0]} and {len(missing) - 1} others")
    parent, _, attribute = head.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.Identity())
    resize, mean, std = preprocessing(processor, name)
    licence = "the model's own: see " + (name if folder.is_dir() else f"https://huggingface.co/{name}")
    return _Logits(model), linear.in_features, resize, mean, std, licence


def preprocessing(processor: dict[str, Any], name: str) -> tuple[Resize, list[float], list[float]]:
    """preprocessor_config.json -> resize, mean and std in pixel values (0 to 255), each [3].

    Raises ModelError where `bundle.picture` cannot do what it says.
    """
    if processor.get("do_flip_channel_order") or processor.get("rescale_offset"):
        raise ModelError(f"model {name!r} wants BGR or shifted pixels, which Kennel's input does not have")
    # A processor that does not rescale sees 0 to 255, one that does not normalise has mean 0 and std 1.
    scale = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    normalise = processor.get("do_normalize", True)
    mean = processor.get("image_mean") if normalise else None
    std = processor.get("image_std") if normalise else None
    means = [float(value) / scale for value in mean or [0.0] * 3]
    stds = [float(value) / scale for value in std or [1.0] * 3]

    size = processor.get("size") or {}
    crop = processor.get("crop_size") if processor.get("do_center_crop") else None
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    if isinstance(size, int):  # older files; which side it means depends on the processor
        square = {"height": size, "width": size}
        size = {"shortest_edge": size} if crop or "crop_pct" in processor else square
    shorter = size.get("shortest_edge")
    filter = _FILTERS.get(processor.get("resample", 2))
    try:
        if filter is None:
            raise ValueError(f"resample {processor['resample']} is not one of lanczos, bilinear, bicubic")
        if not shorter:  # height and width, whatever the picture's shape
            if crop and (crop["height"], crop["width"]) != (size["height"], size["width"]):
                raise ValueError("it stretches, then crops")
            return Resize(size["height"], size["width"], "stretch", filter=filter), means, stds  # type: ignore[arg-type]
        if crop:
            return Resize(crop["height"], crop["width"], "crop", shorter, filter), means, stds  # type: ignore[arg-type]
        # ConvNeXt's processor: from 384 on the whole picture is stretched, below its centre is cut out.
        share = processor.get("crop_pct")
        if share is None or shorter >= 384:
            return Resize(shorter, shorter, "stretch", filter=filter), means, stds  # type: ignore[arg-type]
        return Resize(shorter, shorter, "crop", int(shorter / share), filter), means, stds  # type: ignore[arg-type]
    except (ValueError, KeyError, TypeError) as exc:
        raise ModelError(f"model {name!r}: its preprocessor_config.json says what Kennel cannot do: {exc}") from exc


def _resize(own: Resize, size: int, rule: str) -> Resize:
    """The model's own resize with another size or rule."""
    height, width = (size, size) if size else (own.height, own.width)
    chosen = rule or own.rule
    margin = own.shorter_side / max(own.height, own.width) if own.rule == "crop" else 1.0
    shorter = round(max(height, width) * margin) if chosen == "crop" else 0
    try:
        return Resize(height, width, chosen, shorter, own.filter)  # type: ignore[arg-type]
    except ValueError as exc:
        raise ModelError(f"size {size}, rule {chosen}: {exc}") from exc


def _fails(model: Classifier, height: int, width: int) -> str:
    """Why the model does not take this size, or ""."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, max(1, height), max(1, width), 3, dtype=torch.uint8))
    except Exception as exc:  # whatever its layers raise
        return " ".join(str(exc).split())[:300]
    return ""


def _last_linear(model: nn.Module) -> tuple[str, nn.Linear]:
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not found:
        raise ModelError("the model has no linear layer to end in")
    return found[-1]


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The network's blocks: the outermost list or sequence of at least two modules with parameters."""
    level = [network]
    while level:
        for module in level:
            blocks = [child for child in module.children() if any(True for _ in child.parameters())]
            if isinstance(module, nn.ModuleList | nn.Sequential) and len(blocks) > 1:
                return blocks
        level = [child for module in level for child in module.children()]
    return []


def _digest(model: Classifier) -> str:
    """sha256 over the names and values of everything but the head."""
    total = hashlib.sha256()
    for name, value in _tensors(model):
        total.update(name.encode())
        total.update(value.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def _tensors(model: Classifier) -> Iterator[tuple[str, Tensor]]:
    return ((name, value) for name, value in sorted(model.state_dict().items()) if not name.startswith("head."))


def _known() -> str:
    return f"there are {', '.join(LITE)}, a folder with a transformers image classifier, or its hub name OWNER/NAME"
