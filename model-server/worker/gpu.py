"""A bundle's model.pt2 on a GPU: float16 where the golden answers stay close, one CUDA graph a batch size.

A small network is hundreds of kernels of a few microseconds each: launched one by one the GPU waits for Python. A
CUDA graph launches them all at once, copies between host and GPU included. A compiler would join more of them, but
the image holds none, and what AOTInductor compiles ahead is for one generation of GPUs where a bundle is for any.
"""

import operator
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.export.passes import move_to_device_pass
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights

from bundle.golden import ROUNDINGS, Pictures, Run, Verify
from bundle.manifest import BundleError

ATEN = torch.ops.aten
# Batch sizes with a graph of their own: between them the next larger one runs.
SIZES = (1, 2, 4, 8, 16, 32, 64)
CASTS = {"fp16": torch.float16, "bf16": torch.bfloat16}


def runner(folder: Path, device: str, shape: tuple[int, int, int], classes: int, verify: Verify) -> Run:
    """The fastest way to run the bundle on a CUDA device that gives its golden answers: pixels of `shape` -> logits.

    PRECISION: fp16, bf16 or fp32. Whatever it is, float32 must give the bundle's answers to the bundle's own tolerance,
    serves where the other is not close to them, and answers for a picture that leaves float16's range. What no CUDA
    graph can be made of is run kernel by kernel. Raises BundleError.
    """
    exact = eager(program(folder, device), device)
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    verify(exact, 0)
    cast = CASTS.get(os.environ.get("PRECISION", "fp16"), torch.float32)
    for kind in dict.fromkeys((cast, torch.float32)):
        try:
            graphs = _verified(mixed(fold(program(folder, device)), kind), device, shape, classes, kind, verify)
            return partial(_mended, graphs, exact)
        except Exception as exc:  # not close enough, no memory, or what capturing does not bear: torch has many names
            print(f"not served as CUDA graphs of {kind}: {exc}", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
    return exact


def _verified(
    module: fx.GraphModule,
    device: str,
    shape: tuple[int, int, int],
    classes: int,
    kind: torch.dtype,
    verify: Verify,
) -> Run:
    """Apart, so that nothing is left of graphs that failed when others are made."""
    graphs = Graphs(module, device, shape, classes, kind)
    graphs.verify(verify, 0 if kind is torch.float32 else ROUNDINGS * torch.finfo(kind).eps)
    return graphs


def _mended(graphs: Run, exact: Run, pixels: Pictures) -> NDArray[np.float32]:
    logits = graphs(pixels)
    for i in map(int, np.flatnonzero(~np.isfinite(logits).all(axis=1))):
        logits[i] = exact(pixels[i : i + 1])
    return logits


def program(folder: Path, device: str) -> fx.GraphModule:
    """model.pt2's graph. Raises BundleError."""
    if not (folder / "model.pt2").exists():
        raise BundleError("model.pt2: is missing, as in int8 bundles, which are for CPUs: on a GPU serve the fp32 one")
    try:
        module = move_to_device_pass(torch.export.load(folder / "model.pt2"), device).module()
    except Exception as exc:  # a damaged zip, another version's format: torch has no one exception for them
        raise BundleError(f"model.pt2: torch {torch.__version__} cannot load it: {exc}") from exc
    assert isinstance(module, fx.GraphModule)
    return module


def eager(module: fx.GraphModule, device: str) -> Run:
    """As it is, kernel by kernel."""

    def run(pixels: Pictures) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = module(torch.from_numpy(np.array(pixels)).to(device)).float().cpu().numpy()
            return logits

    return run


def fold(module: fx.GraphModule) -> fx.GraphModule:
    """The same function in fewer passes over memory, in place.

    Batch norms become part of the convolution before them, and so does even padding. Convolutions of single pixels
    become matrix products, whose bias costs nothing: a convolution's is added in a pass of its own.
    """
    for node in module.graph.find_nodes(op="call_function", target=ATEN.conv2d.default):
        values = _arguments(node)
        after, before = list(node.users), values["input"]
        if not _stored(values["weight"], values["bias"]):
            continue
        if len(after) == 1 and after[0].target is ATEN.batch_norm.default and _stored(*after[0].args[1:5]):
            norm = _arguments(after[0])
            mean, variance, scale, shift = (
                _tensor(module, norm[name]) for name in ("running_mean", "running_var", "weight", "bias")
            )
            kernel, bias = (_tensor(module, values[name]) for name in ("weight", "bias"))
            kernel, bias = fuse_conv_bn_weights(kernel, bias, mean, variance, norm["eps"], scale, shift)
            with module.graph.inserting_before(node):
                for name, value in (("weight", kernel), ("bias", bias)):
                    module.register_parameter(f"{node.name}_folded_{name}", torch.nn.Parameter(value, False))
                    values[name] = module.graph.get_attr(f"{node.name}_folded_{name}")
            after[0].replace_all_uses_with(node)
            module.graph.erase_node(after[0])
        if before.target is ATEN.pad.default and (sides := _even(before)):
            values["input"] = before.args[0]
            values["padding"] = [a + b for a, b in zip(values["padding"], sides, strict=True)]
        if values["bias"] is not None and _is_pointwise(_tensor(module, values["weight"]), values):
            node.target = _pointwise
            values = {name: values[name] for name in ("input", "weight", "bias")}
        node.args, node.kwargs = tuple(values.values()), {}
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def mixed(module: fx.GraphModule, cast: torch.dtype) -> fx.GraphModule:
    """To be run under autocast, in place: weights of that type from the start, the classifier in float32.

    Its logits would otherwise be rounded, after a sum that costs nothing beside the convolutions. Weights that are
    computed stay as they are: autocast casts them at every run.
    """
    convolutions, products, linears = (
        module.graph.find_nodes(op="call_function", target=target)
        for target in (ATEN.conv2d.default, _pointwise, ATEN.linear.default)
    )
    for node in [*convolutions, *products, *linears[:-1]]:
        for part in node.args[1:3]:
            if part is not None and _stored(part):
                parameter = _tensor(module, part)
                layout = torch.channels_last if parameter.dim() == 4 else torch.preserve_format
                parameter.data = parameter.data.to(cast, memory_format=layout)
    for node in linears[-1:]:
        node.target = _linear
    module.recompile()
    return module


def _is_pointwise(kernel: Tensor, values: dict[str, Any]) -> bool:
    plain = {"stride": 1, "padding": 0, "dilation": 1}
    alone = all(set(values[name]) == {value} for name, value in plain.items())
    return alone and values["groups"] == 1 and kernel.shape[2:] == (1, 1)


def _pointwise(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """Of [N, C, H, W] in the order of channels_last, so that nothing is moved."""
    count, _, height, width = x.shape
    rows = functional.linear(x.permute(0, 2, 3, 1).flatten(0, 2), kernel.flatten(1), bias)
    return rows.reshape(count, height, width, -1).permute(0, 3, 1, 2)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return functional.linear(x.float(), weight, bias)


class Graphs:
    """One CUDA graph a batch size: from pinned memory to the GPU, through the model, and back."""

    def __init__(
        self,
        module: fx.GraphModule,
        device: str,
        shape: tuple[int, int, int],
        classes: int,
        cast: torch.dtype = torch.float32,
    ) -> None:
        """cast: autocast's type; float32 is none."""
        self._module, self._device, self._cast = module, device, cast
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._pixels = torch.empty((SIZES[-1], *shape), dtype=torch.uint8, pin_memory=True)
        self._logits = torch.empty((SIZES[-1], classes), pin_memory=True)
        self._rows, self._answers = self._pixels.numpy(), self._logits.numpy()
        # The largest first: the others then fit into its memory. They never run at the same time.
        self._pool = torch.cuda.graph_pool_handle()
        self.graphs = {size: self._capture(size) for size in reversed(SIZES)}

    def __call__(self, pixels: Pictures) -> NDArray[np.float32]:
        """Pictures uint8 [H, W, 3], SIZES[-1] of them at most -> float32 [N, C]."""
        return self._run(pixels, next(size for size in SIZES if size >= len(pixels)))

    def verify(self, verify: Verify, close: float) -> None:
        """Every one of the graphs: their algorithms may differ."""
        for size in SIZES:

            def run(pixels: Pictures, size: int = size) -> NDArray[np.float32]:
                parts = range(0, len(pixels), size)
                return np.concatenate([self._run(pixels[start : start + size], size) for start in parts])

            verify(run, close)

    def _run(self, pixels: Pictures, size: int) -> NDArray[np.float32]:
        for row, picture in zip(self._rows, pixels, strict=False):
            row[:] = picture
        with torch.cuda.stream(self._stream):
            self.graphs[size].replay()
            self._done.record()
        self._done.synchronize()  # asleep: the CPU has other workers to run
        return self._answers[: len(pixels)].copy()

    def _forward(self, size: int) -> Tensor:
        with torch.autocast("cuda", self._cast, enabled=self._cast != torch.float32, cache_enabled=False):
            pixels = self._pixels[:size].to(self._device, non_blocking=True)
            logits: Tensor = self._module(pixels).float()
            return logits

    def _capture(self, size: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode():
            with torch.cuda.stream(self._stream):
                for _ in range(3):  # what is made or chosen at a first run must not be part of the graph
                    self._forward(size)
            self._stream.synchronize()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                self._logits[:size].copy_(self._forward(size), non_blocking=True)
        return graph


def _arguments(node: fx.Node) -> dict[str, Any]:
    """By their names, those left out too."""
    names = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((each.name for each in names), node.args, strict=False)) | node.kwargs
    return {each.name: given.get(each.name, each.default_value) for each in names}


def _stored(*nodes: Any) -> bool:
    """Whether each is a parameter, a buffer or none, and not computed."""
    return all(node is None or node.op == "get_attr" for node in nodes)


def _tensor(module: fx.GraphModule, node: fx.Node | None) -> Any:
    return None if node is None else operator.attrgetter(str(node.target))(module)


def _even(pad: fx.Node) -> tuple[int, int] | None:
    """Zeros above and on the left, where there are as many below and on the right; else None."""
    values = _arguments(pad)
    if values["mode"] != "constant" or values["value"] or len(values["pad"]) != 4:
        return None
    left, right, top, bottom = values["pad"]
    return (top, left) if (top, left) == (bottom, right) else None
