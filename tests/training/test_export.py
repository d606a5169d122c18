"""A bundle's models answer as the network that was trained, or there is no bundle."""

import pytest
import torch
from torch import nn

from bundle import golden, manifest
from bundle.manifest import BundleError
from bundle.picture import Resize
from training.export import Normalised, export


class Apart(nn.Module):
    """What is exported of it answers with logits that are so much less."""

    def __init__(self, apart: float, largest: float) -> None:
        super().__init__()
        self.apart = apart
        self.register_buffer("logits", torch.tensor([largest, 0.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = 0 * x.mean((1, 2, 3))[:, None] + self.logits
        return logits if torch.compiler.is_exporting() else logits + self.apart


@pytest.mark.parametrize("largest", [1, 50])
@pytest.mark.parametrize(("of_bound", "kept"), [(0.8, True), (1.2, False)])
def test_logits_may_be_apart_by_their_rounding_alone(tmp_path, largest, of_bound, kept):
    module = Normalised(Apart(of_bound * (1e-4 + 1e-5 * largest), largest), 127.0, 128.0).eval()
    told = {"name": "apart", "version": "1", "classes": ["a", "b"], "licence": "CC0-1.0"}
    told |= {"resize": Resize(32, 32, "stretch"), "golden_pixels": golden.draw(2, 32, 32)}
    if kept:
        export(module, tmp_path / "apart", **told)
        manifest.read(tmp_path / "apart")
        return
    with pytest.raises(BundleError, match=r"model\.(onnx|pt2): its logits differ from the module's by .*, more than"):
        export(module, tmp_path / "apart", **told)
    assert not (tmp_path / "apart").exists()
