import dataclasses

import numpy as np
import pytest
import torch
from drawn import catalogue

from bundle import picture
from bundle.picture import Resize
from training.batches import Order, Pictures, in_turn, loader, stored
from training.data import DataError

TO = Resize(24, 24, "crop", 28)


def test_every_epoch_is_another_order_of_all_pictures():
    order = Order(pictures=20, batch=4, steps=10, seed=3)
    batches = list(order)
    first, second = np.concatenate(batches[:5]), np.concatenate(batches[5:])
    assert sorted(first) == sorted(second) == list(range(20))
    assert list(first) != list(second)
    assert len(order) == 10
    assert list(first) != list(np.concatenate(list(Order(20, 4, 5, seed=4))))


def test_from_the_middle_on_it_is_the_same_order():
    whole = list(Order(pictures=23, batch=3, steps=20, accumulate=2, seed=1))
    assert list(Order(pictures=23, batch=3, steps=20, start=7, accumulate=2, seed=1)) == whole[14:]


def test_ranks_share_what_one_process_with_a_larger_batch_has():
    one = list(Order(pictures=30, batch=6, steps=12))
    two = [list(Order(pictures=30, batch=3, steps=12, ranks=2, rank=rank)) for rank in range(2)]
    assert one == [left + right for left, right in zip(*two, strict=True)]
    parts = list(Order(pictures=30, batch=3, steps=12, accumulate=2))
    assert one == [left + right for left, right in zip(parts[::2], parts[1::2], strict=True)]


def test_too_few_pictures_are_repeated():
    order = Order(pictures=3, batch=4, steps=2)
    assert order.epoch_steps == 1
    assert [len(batch) for batch in order] == [4, 4]
    assert all(set(batch) == {0, 1, 2} for batch in order)


def test_in_turn_ranks_see_each_picture_once():
    both = [index for rank in range(2) for batch in in_turn(11, 2, rank, 2) for index in batch]
    assert sorted(both) == list(range(11))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("keep", [0, 10**6])
def test_pixels_are_those_of_serving(workers, keep):
    drawn = catalogue(0, 2)
    pictures = Pictures(drawn, drawn.records, TO, keep)
    found = list(loader(pictures, [[5, 0], [7, 7], [5, 1]], workers))
    for batch, (pixels, labels) in zip([[5, 0], [7, 7], [5, 1]], found, strict=True):
        for index, one, label in zip(batch, pixels, labels, strict=True):
            assert np.array_equal(one, picture.load(drawn.read(drawn.records[index]), TO))
            assert label == drawn.records[index].label
            assert one.dtype == torch.uint8


def test_what_is_kept_is_decoded_once_for_all_workers(tmp_path):
    drawn = catalogue(0, 2)
    pictures = Pictures(drawn, drawn.records, TO, keep=10**6)
    first = list(loader(pictures, in_turn(16, 4), 2))
    gone = dataclasses.replace(drawn, content={})
    pictures.catalogue = gone  # whoever reads now fails
    again = list(loader(pictures, in_turn(16, 4), 2))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    with pytest.raises(KeyError):
        list(loader(Pictures(gone, drawn.records, TO, keep=24 * 24 * 3 * 16 - 1), in_turn(16, 4), 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_breaks_meanwhile_is_named(workers):
    drawn = catalogue(0, 1)
    drawn.content["pink/000.jpg"] = b"no more"
    with pytest.raises(DataError, match=r"pink/000\.jpg: was readable before, now it is not"):
        list(loader(Pictures(drawn, drawn.records, TO), in_turn(8, 8), workers))


@pytest.mark.parametrize(
    ("serving", "kept"),
    [
        (Resize(224, 224, "crop", 224), Resize(256, 256, "crop", 256)),
        (Resize(224, 224, "crop", 256), Resize(256, 256, "crop", 256)),
        (Resize(112, 224, "crop", 300), Resize(150, 300, "crop", 300)),
        (Resize(224, 112, "pad", filter="lanczos"), Resize(256, 128, "pad", filter="lanczos")),
    ],
)
def test_what_is_stored_is_a_little_larger(serving, kept):
    assert stored(serving) == kept
