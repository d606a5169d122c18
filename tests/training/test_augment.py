import pytest
import torch

from bundle import golden
from training.augment import augment, mix


@pytest.fixture(scope="module")
def pixels():
    return torch.from_numpy(golden.draw(6, 40, 40))


@pytest.mark.parametrize("level", ["light", "strong"])
def test_the_seed_decides(pixels, level):
    def once(seed):
        torch.manual_seed(seed)
        return augment(pixels, 32, 24, level)

    assert once(1).shape == (6, 32, 24, 3)
    assert torch.equal(once(1), once(1))
    assert not torch.allclose(once(1), once(2), atol=1)
    assert once(1).min() >= 0
    assert once(1).max() <= 255.01


def test_pictures_of_a_batch_are_cut_apart(pixels):
    torch.manual_seed(0)
    same = augment(pixels[:1].repeat(6, 1, 1, 1), 32, 32, "light")
    assert min((same[i] - same[j]).abs().mean() for i in range(6) for j in range(i)) > 1


def test_without_augmentation_pixels_stay(pixels):
    assert torch.equal(augment(pixels, 40, 40, "none"), pixels.float())
    smaller = augment(pixels, 20, 20, "none")
    assert smaller.shape == (6, 20, 20, 3)
    assert torch.allclose(smaller.mean((1, 2)), pixels.float().mean((1, 2)), atol=3)


def test_mixup_mixes_pixels_as_labels():
    # Each picture is its label's colour, so what the labels say can be read from the pixels.
    labels = torch.arange(4)
    x = torch.eye(4)[labels][:, None, None, :3].expand(4, 8, 8, 3).float()
    torch.manual_seed(3)
    mixed, targets = mix(x, labels, 4, mixup=1.0, cutmix=0, share=1)
    assert torch.allclose(mixed[:, 0, 0], targets[:, :3], atol=1e-6)
    assert torch.allclose(targets.sum(1), torch.ones(4))
    assert 0.01 < targets.max(1).values.min() < 0.99


def test_cutmix_pastes_as_much_as_the_label_says():
    labels = torch.arange(4)
    x = torch.eye(4)[labels][:, None, None, :3].expand(4, 16, 16, 3).float()
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        mixed, targets = mix(x, labels, 4, mixup=0, cutmix=1.0, share=1)
        assert torch.allclose(mixed.mean((1, 2)), targets[:, :3], atol=1e-6)
        assert set(mixed.unique().tolist()) <= {0, 1}  # pasted, not blended
        seen.add(round(float(targets[0, 0]), 3))
    assert len(seen) > 10


def test_a_share_of_batches_is_mixed_and_none_without_alpha():
    x, labels = torch.rand(4, 8, 8, 3), torch.arange(4)

    def mixed(**how):
        torch.manual_seed(0)
        return sum(not torch.equal(mix(x, labels, 4, **how)[0], x) for _ in range(200))

    assert 70 < mixed(mixup=1.0, cutmix=1.0, share=0.5) < 130
    assert mixed(mixup=0, cutmix=0, share=1) == 0
    kinds = [mix(x, labels, 4, mixup=1.0, cutmix=1.0, share=1)[0] for _ in range(40)]
    pasted = sum(bool(torch.isin(kind, x).all()) for kind in kinds)
    assert 5 < pasted < 35
