"""What a GPU runs: the changes of the program on a CPU, the CUDA graphs where there is a GPU."""

import gpu
import handler
import numpy as np
import pytest
import torch
from convolutional import CLASSES, SHAPE, made
from torch import nn
from torch.nn import functional

from bundle import golden, wire
from bundle.manifest import BundleError

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return made(tmp_path_factory.mktemp("gpu") / "tiny")


class Computed(nn.Module):
    """Weights that are computed at every run, as transformers' BiT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, len(CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.conv.weight - self.conv.weight.mean()
        return self.head(self.norm(functional.conv2d(x, weight, self.conv.bias)).mean((2, 3)))


def targets(module):
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


def test_batch_norms_and_even_padding_become_part_of_convolutions_and_single_pixels_products(bundle):
    before, after = gpu.program(bundle, "cpu"), gpu.fold(gpu.program(bundle, "cpu"))
    pixels = golden.draw(5, *SHAPE[:2], seed=3)
    np.testing.assert_allclose(gpu.eager(after, "cpu")(pixels), gpu.eager(before, "cpu")(pixels), rtol=0, atol=1e-5)
    assert [targets(module).count("aten.batch_norm.default") for module in (before, after)] == [4, 1]
    assert [targets(module).count("aten.pad.default") for module in (before, after)] == [2, 1]
    assert [targets(module).count("aten.conv2d.default") for module in (before, after)] == [4, 3]


def test_weights_that_are_computed_stay_as_they_are():
    torch.manual_seed(0)
    example = torch.rand(2, *SHAPE[2:], *SHAPE[:2])
    before, after = (torch.export.export(Computed().eval(), (example,)).module() for _ in range(2))
    after.load_state_dict(before.state_dict())
    with torch.inference_mode():
        expected = before(example)
        torch.testing.assert_close(gpu.fold(after)(example), expected)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(gpu.mixed(after, torch.bfloat16)(example), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("cast", gpu.CASTS.values())
def test_what_is_cast_stays_close_and_its_logits_are_not_rounded(bundle, cast):
    run = gpu.eager(gpu.mixed(gpu.fold(gpu.program(bundle, "cpu")), cast), "cpu")
    with torch.autocast("cpu", cast):
        golden.check(bundle, run, len(CLASSES), 0, gpu.ROUNDINGS * torch.finfo(cast).eps)
        logits = run(golden.draw(5, *SHAPE[:2]))
        with pytest.raises(BundleError, match="logits differ by"):
            golden.check(bundle, run, len(CLASSES), 0, torch.finfo(cast).eps / 100)
    assert (torch.from_numpy(logits).to(cast).float().numpy() != logits).any()


def test_a_picture_that_leaves_the_range_of_float16_is_answered_by_float32():
    fast = lambda _: np.array([[1, 2], [np.inf, 0], [np.nan, 1]], np.float32)  # noqa: E731
    asked = []

    def exact(pixels):
        asked.extend(pixels)
        return np.array([[7, 8]], np.float32)

    assert gpu._mended(fast, exact, [0, 1, 2]).tolist() == [[1, 2], [7, 8], [7, 8]]
    assert asked == [1, 2]


def test_a_program_that_cannot_be_loaded_is_refused(tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"not a zip")
    with pytest.raises(BundleError, match=r"model\.pt2: torch .* cannot load it"):
        gpu.program(tmp_path, "cpu")


class Emulated:
    """gpu.Graphs on a CPU: the same arithmetic, kernel by kernel."""

    def __init__(self, module, device, shape, classes, cast):
        self._run, self._cast = gpu.eager(module, device), cast

    def __call__(self, pixels):
        with torch.autocast("cpu", self._cast, enabled=self._cast != torch.float32):
            return self._run(pixels)

    def verify(self, verify, close):
        verify(self, close)


@pytest.fixture
def run(monkeypatch):
    """What `runner` chooses for a bundle without a GPU."""
    monkeypatch.setattr(gpu, "Graphs", Emulated)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)

    def choose(folder, precision="fp16"):
        monkeypatch.setenv("PRECISION", precision)
        verify = lambda run, close: golden.check(folder, run, len(CLASSES), 1e-3, close)  # noqa: E731
        return gpu.runner(folder, "cpu", SHAPE, len(CLASSES), verify)(golden.draw(5, *SHAPE[:2]))

    return choose


def test_the_precision_that_is_set_runs_where_it_is_close(bundle, run, capsys):
    exact = gpu.eager(gpu.program(bundle, "cpu"), "cpu")(golden.draw(5, *SHAPE[:2]))
    away = [float(np.abs(run(bundle, precision) - exact).max()) for precision in ("bf16", "fp16", "fp32")]
    assert away[0] > 2 * away[1] > 20 * away[2]
    assert not capsys.readouterr().err


def test_where_it_is_not_float32_runs_and_says_so(tmp_path, run, capsys):
    folder = made(tmp_path / "loud", 1e6)
    exact = gpu.eager(gpu.program(folder, "cpu"), "cpu")(golden.draw(5, *SHAPE[:2]))
    np.testing.assert_allclose(run(folder), exact, rtol=0, atol=1e-3)
    assert "not served as CUDA graphs of torch.float16: the model does not give the answers" in capsys.readouterr().err


def test_what_no_graph_can_be_made_of_runs_kernel_by_kernel(bundle, run, monkeypatch, capsys):
    monkeypatch.setattr(Emulated, "__init__", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    exact = gpu.eager(gpu.program(bundle, "cpu"), "cpu")(golden.draw(5, *SHAPE[:2]))
    np.testing.assert_array_equal(run(bundle), exact)
    assert capsys.readouterr().err.count("out of memory") == 2


@needs_gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_every_number_of_pictures_gets_its_own_answers(bundle, monkeypatch, precision, capsys):
    monkeypatch.setenv("PRECISION", precision)
    model = handler.Model(bundle, "cuda:0")
    pictures = golden.draw(150, *SHAPE[:2], seed=9)
    expected = gpu.eager(gpu.program(bundle, "cpu"), "cpu")(pictures)
    close = gpu.ROUNDINGS * torch.finfo(gpu.CASTS[precision]).eps if precision in gpu.CASTS else 1e-4
    for count in (1, 2, 3, 5, 31, 64, 150):
        shares = [count] if count <= wire.MOST else [50, 60, 40]
        entries, start = [], 0
        for share in shares:
            data = pictures[start : start + share].tobytes()
            entries.append(wire.request({model.manifest.input.contract: data}, [], share))
            start += share
        logits = np.concatenate([wire.unpack(frame).logits for frame in model.answer(entries)])
        assert (np.abs(logits - expected[:count]).max(1) <= close * np.ptp(expected, axis=1).max()).all()
    assert not capsys.readouterr().err


@needs_gpu
def test_where_float16_is_not_close_float32_is_served_and_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PRECISION", "fp16")
    model = handler.Model(made(tmp_path / "loud", 1e6), "cuda:0")
    assert "not served as CUDA graphs of torch.float16: " in capsys.readouterr().err
    assert np.isfinite(model.run(golden.draw(3, *SHAPE[:2]))).all()
