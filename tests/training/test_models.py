"""Models to train: the packaged ones, and tiny ones of transformers made here (no hub is asked)."""

import json
import time

import numpy as np
import pytest
import torch
import transformers
from learner import PROCESSOR, TRANSFORMERS, Network, save_transformer
from torch import nn

from bundle import golden, manifest
from bundle.picture import Resize
from training import efficientnet_lite, models
from training.export import export
from training.models import Classifier, ModelError, load


@pytest.fixture(scope="module")
def pixels():
    return torch.from_numpy(golden.draw(3, 32, 32))


def test_lite_is_the_packaged_network_with_a_head_of_zeros():
    base = load("lite0")
    base.model.new_head(7)
    x = torch.from_numpy(golden.draw(2, 224, 224))
    network = efficientnet_lite.pretrained(0)
    with torch.no_grad():
        expected = network.features((x.permute(0, 3, 1, 2).float() - 127) / 128)
        assert torch.equal(base.model.features(x), expected)
        assert base.model(x).shape == (2, 7)
        assert not base.model(x).any()
    assert base.flexible
    assert base.resize == Resize(224, 224, "crop", 224)
    assert base.digest != load("lite1").digest


def test_size_and_rule_can_be_others():
    assert load("lite0", size=96).resize == Resize(96, 96, "crop", 96)
    assert load("lite0", rule="pad").resize == Resize(224, 224, "pad")
    with pytest.raises(ModelError, match="height and width must be 1 to 1446"):
        load("lite0", size=5000)


def test_an_unknown_name_is_refused_at_once_and_says_what_there_is():
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"'lite7' is not known: there are lite0, lite1, lite2, a folder"):
        load("lite7")
    assert time.monotonic() - started < 1


def test_a_name_that_the_hub_does_not_give_is_refused(monkeypatch):
    def no_hub(name):
        raise OSError("We couldn't connect to\n the hub")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", no_hub)
    with pytest.raises(ModelError, match=r"'owner/none' cannot be loaded: We couldn't connect to the hub \(there are"):
        load("owner/none")


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_a_transformers_classifier_keeps_its_answers(tmp_path, pixels, kind):
    theirs = save_transformer(tmp_path, kind)
    base = load(str(tmp_path))
    linear = [module for module in theirs.modules() if isinstance(module, nn.Linear)][-1]
    base.model.head = linear
    x = (pixels.numpy() / 255 - PROCESSOR["image_mean"]) / PROCESSOR["image_std"]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float32))).logits
        assert torch.allclose(base.model(pixels), expected, atol=1e-5)
    assert expected.std() > 1e-3
    assert base.resize == Resize(32, 32, "stretch", filter="bilinear")
    assert base.flexible == (kind != "vit")


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_a_transformers_classifier_becomes_a_bundle(tmp_path, pixels, kind):
    save_transformer(tmp_path / "model", kind)
    base = load(str(tmp_path / "model"))
    base.model.new_head(2)
    nn.init.normal_(base.model.head.weight)
    export(
        base.model.eval(), tmp_path / "bundle", name="tiny", version="1", classes=("a", "b"), resize=base.resize,
        golden_pixels=pixels.numpy(), licence=base.licence,
    )  # fmt: skip
    assert manifest.read(tmp_path / "bundle").classes == ("a", "b")


def test_weights_that_are_missing_are_refused(tmp_path):
    save_transformer(tmp_path, "resnet")
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model.safetensors")
    dropped = [key for key in weights if "stages.1" in key and key.endswith("convolution.weight")]
    save_file({k: v for k, v in weights.items() if k not in dropped}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"its file has no weights for resnet\.encoder\.stages\.1"):
        load(str(tmp_path))


def test_a_model_for_text_is_refused(tmp_path):
    transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    with pytest.raises(ModelError, match="cannot be loaded: Unrecognized configuration class"):
        load(str(tmp_path))


def test_without_a_preprocessor_it_is_refused(tmp_path):
    save_transformer(tmp_path, "resnet")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"preprocessor_config\.json"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("processor", "resize"),
    [
        ({"size": {"height": 30, "width": 40}}, Resize(30, 40, "stretch", filter="bilinear")),
        ({"size": 40, "resample": 3}, Resize(40, 40, "stretch")),
        (
            {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True},
            Resize(224, 224, "crop", 256, "bilinear"),
        ),
        (  # as MobileNet's older files
            {"size": 256, "crop_size": 224, "do_center_crop": True, "resample": 1},
            Resize(224, 224, "crop", 256, "lanczos"),
        ),
        (  # as microsoft/resnet-50 and facebook/convnext-tiny-224
            {"size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 3},
            Resize(224, 224, "crop", 256),
        ),
        ({"size": 384, "crop_pct": 1.0, "resample": 3}, Resize(384, 384, "stretch")),
    ],
)
def test_preprocessing_becomes_our_resize(processor, resize):
    assert models.preprocessing(processor, "m")[0] == resize


@pytest.mark.parametrize(
    ("processor", "mean", "std"),
    [
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, 127.5, 63.75),
        ({"do_normalize": False, "image_mean": [0.5] * 3}, 0, 255),
        ({"do_rescale": False, "do_normalize": False}, 0, 1),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, 127.5, 127.5),
    ],
)
def test_preprocessing_becomes_mean_and_std_of_pixels(processor, mean, std):
    _, means, stds = models.preprocessing({"size": 32, **processor}, "m")
    assert np.allclose(means, mean)
    assert np.allclose(stds, std)


@pytest.mark.parametrize(
    ("processor", "reason"),
    [
        ({"size": 32, "do_flip_channel_order": True}, "BGR"),
        ({"size": 32, "resample": 5}, "resample 5 is not one of"),
        (
            {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True},
            "then crops",
        ),
        ({}, "cannot do: 'height'"),
    ],
)
def test_preprocessing_that_serving_cannot_do_is_refused(processor, reason):
    with pytest.raises(ModelError, match=reason):
        models.preprocessing(processor, "m")


def test_freezing_keeps_what_comes_first():
    base = load("lite0")
    models.freeze(base.model, 3)
    network = base.model.network
    assert not any(p.requires_grad for part in (network.stem, network.blocks[:3]) for p in part.parameters())
    assert all(
        p.requires_grad for part in (network.blocks[3:], network.head, base.model.head) for p in part.parameters()
    )
    models.freeze(base.model, 0)
    assert all(p.requires_grad for p in base.model.parameters())
    models.freeze(base.model, 16)
    assert {name.split(".")[0] for name, p in network.named_parameters() if p.requires_grad} == {"head"}
    with pytest.raises(ModelError, match="freeze must be 0 to 16, the blocks of this model, not 17"):
        models.freeze(base.model, 17)


def test_train_mode_leaves_what_is_frozen():
    model = Classifier(Network(), 16, [0.0], [1.0])
    models.freeze(model, 1)
    models.train_mode(model, frozen_statistics=False)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [norm.training for norm in norms] == [False, True, True]
    assert model.dropout.training
    models.train_mode(model, frozen_statistics=True)
    assert not any(norm.training for norm in norms)
