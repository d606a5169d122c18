"""Which pictures are copies of another: the same bytes, or re-encoded, resized or mirrored.

A thumbnail of 12 x 12 pixels keeps what these change little: over 2,100 such copies of 300 photographs of clothes the
root mean square difference stays below 3.3 of 255 grey levels, while the closest two different ones among all 3,409
differ by 7.7. Of 3,500 copies of 500 photographs all were found; no two different photographs were taken for copies.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bundle import picture
from bundle.manifest import sha256
from training.sources import SPLITS

SIDE = 12  # pixels of a thumbnail
# Decoded larger, or the blocks that JPEGs are scaled by while decoding shift against a mirrored copy's.
DECODE = picture.Resize(64, 64, "stretch", filter="bilinear")
LIMIT = 5.0  # grey levels, root mean square: between the two numbers above
# Two nearly empty pictures are alike without being copies: the limit is also this share of their contrast.
SHARE = 0.25
BLANK = 2.0  # contrast in grey levels below which a picture has nothing to recognise it by
BLOCK = 512  # rows compared at once

Thumbnails = NDArray[np.uint8]  # [N, SIDE, SIDE, 3]
Features = NDArray[np.float32]  # [N, 24]
Indices = NDArray[np.int64]


def thumbnail(image: Image.Image) -> bytes:
    """RGB image of any size -> uint8 [SIDE, SIDE, 3], as bytes."""
    return image.resize((SIDE, SIDE), Image.Resampling.BILINEAR).tobytes()


def unpack(packed: bytes | bytearray) -> Thumbnails:
    """What `thumbnail` gave, one after another -> uint8 [N, SIDE, SIDE, 3]."""
    return np.frombuffer(packed, np.uint8).reshape(-1, SIDE, SIDE, 3)


@dataclass(frozen=True)
class Copies:
    """What `find` found, as indices into what it was given."""

    pairs: tuple[tuple[int, int, bool], ...]  # the first one alike, the later one, whether their bytes are the same
    across: Mapping[int, int]  # the one in the later split -> one alike in an earlier split


def find(digests: Sequence[str], splits: Sequence[int], thumbnails: Thumbnails) -> Copies:
    """Copies among N pictures, given of each the sha256, the split as an index into SPLITS, and the thumbnail.

    Every picture that has a copy before it is named once, with the first, so there are at most N pairs.
    """
    count = len(digests)
    indices = np.arange(count)
    first_same = _first(digests)
    once = indices[first_same == indices]
    # One of equal thumbnails stands for all: sets with many repeats would have too many pairs to list.
    blank = _contrast(thumbnails[once]) < BLANK
    prints = (str(i) if b else sha256(thumbnails[i].tobytes()) for i, b in zip(once.tolist(), blank, strict=True))
    group = indices.copy()
    group[once] = once[_first(prints)]
    group = group[first_same]
    compared = once[~blank & (group[once] == once)]
    pairs = compared[near(thumbnails[compared])]

    # The first of each group in each split, and the first of it and of the groups near it.
    first = np.full((count, len(SPLITS)), count)
    np.minimum.at(first, (group, np.asarray(splits, np.int64)), indices)
    alike = first.copy()
    for one, other in (pairs.T, pairs.T[::-1]):
        np.minimum.at(alike, one, first[other])
    partner = np.where(first_same < indices, first_same, alike.min(axis=1)[group])
    across = {}
    for i in indices[np.asarray(splits) > 0].tolist():
        earlier = [one for one in alike[group[i], : splits[i]].tolist() if one < count]
        if earlier:
            across[i] = earlier[0]
    return Copies(
        tuple((int(partner[i]), i, bool(first_same[i] < i)) for i in indices[partner < indices].tolist()), across
    )


def _first(values: Iterable[str]) -> Indices:
    """For each value the index at which it came first."""
    seen: dict[str, int] = {}
    return np.fromiter((seen.setdefault(value, i) for i, value in enumerate(values)), np.int64)


def near(thumbnails: Thumbnails) -> Indices:
    """Pairs [P, 2], each i < j, sorted, of near copies among thumbnails [N, SIDE, SIDE, 3].

    Few pairs are compared whole: first features of a thumbnail are, whose distance is never more than the thumbnails'
    own, mirrored or not; and only of those that differ by less than LIMIT in each of two features.
    """
    features = _features(thumbnails)
    limits = np.minimum(LIMIT, SHARE * _contrast(thumbnails))
    found = [np.empty((0, 2), np.int64)]
    for i, j in _candidates(features):
        found += [_verified(thumbnails, limits, i[s : s + BLOCK], j[s : s + BLOCK]) for s in range(0, len(i), BLOCK)]
    pairs = np.sort(np.concatenate(found), axis=1)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _candidates(features: Features) -> Iterator[tuple[Indices, Indices]]:
    """Pairs (i, j) of rows of [N, F] that are no further apart than LIMIT, each once, some at a time."""
    first, second = np.argsort(-features.var(axis=0), kind="stable")[:2] if len(features) else (0, 1)
    strip = np.floor(features[:, first] / LIMIT).astype(np.int64)
    order = np.lexsort((features[:, second], strip))
    features, strip = features[order], strip[order]
    # The product of two such rows is -distance**2 / 2: one multiplication of matrices does nearly all the work.
    half = (features**2).sum(1, keepdims=True) / -2
    left, right = np.hstack([features, half, np.ones_like(half)]), np.hstack([features, np.ones_like(half), half])
    for value in np.unique(strip).tolist():
        for other in (value, value + 1):
            a, a_end, b, b_end = np.searchsorted(strip, [value, value + 1, other, other + 1]).tolist()
            for start in range(a, a_end, BLOCK):
                stop = min(start + BLOCK, a_end)
                bounds = [features[start, second] - LIMIT, features[stop - 1, second] + LIMIT]
                low, high = (b + np.searchsorted(features[b:b_end, second], bounds)).tolist()
                low = max(low, start) if value == other else low
                for part in range(low, high, 32 * BLOCK):  # bounds memory
                    # 0.5: what float32 rounds off numbers of 255**2
                    close = left[start:stop] @ right[part : min(part + 32 * BLOCK, high)].T >= -(LIMIT**2) / 2 - 0.5
                    i, j = np.divmod(np.flatnonzero(close), close.shape[1])
                    i, j = i + start, j + part
                    kept = (i < j) | (value != other)
                    yield order[i[kept]], order[j[kept]]


def _verified(thumbnails: Thumbnails, limits: NDArray[np.float32], i: Indices, j: Indices) -> Indices:
    """Those of the pairs (i, j) whose thumbnails, one of them mirrored or not, differ by less than their limit."""
    one, other = thumbnails[i].astype(np.float32), thumbnails[j].astype(np.float32)
    square = np.minimum(((one - other) ** 2).mean((1, 2, 3)), ((one - other[:, :, ::-1]) ** 2).mean((1, 2, 3)))
    kept = np.sqrt(square) < np.minimum(limits[i], limits[j])
    return np.stack([i[kept], j[kept]], axis=1)


def _features(thumbnails: Thumbnails) -> Features:
    """[N, 24]: low frequencies of a discrete cosine transform, and of the colours.

    All of it is orthonormal and scaled so that distances are root mean squares of grey levels. Mirroring changes the
    sign of odd horizontal frequencies: their absolute value is the same for both, and never further apart.
    """
    colours = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]], np.float32)
    colours /= np.linalg.norm(colours, axis=1, keepdims=True)
    k, x = np.mgrid[0:4, 0:SIDE]
    cosines = (np.cos(np.pi * (2 * x + 1) * k / (2 * SIDE)) * np.sqrt(np.where(k, 2, 1) / SIDE)).astype(np.float32)
    cosines /= np.float32(np.sqrt(SIDE))
    colours /= np.float32(np.sqrt(3))
    features = np.empty((len(thumbnails), 24), np.float32)
    for start in range(0, len(thumbnails), 16 * BLOCK):
        block = thumbnails[start : start + 16 * BLOCK].astype(np.float32)
        planes = np.einsum("uy,nyxc,vx,kc->nkuv", cosines, block, cosines, colours, optimize=True)
        planes[..., 1::2] = np.abs(planes[..., 1::2])
        features[start : start + 16 * BLOCK] = np.concatenate(
            [planes[:, 0].reshape(-1, 16), planes[:, 1:, :2, :2].reshape(-1, 8)], axis=1
        )
    return features


def _contrast(thumbnails: Thumbnails) -> NDArray[np.float32]:
    """[N]: standard deviation over a thumbnail's pixels, grey levels, of all three colours."""
    contrast = np.empty(len(thumbnails), np.float32)
    for start in range(0, len(thumbnails), 16 * BLOCK):
        block = thumbnails[start : start + 16 * BLOCK].reshape(-1, SIDE * SIDE, 3).astype(np.float32)
        block -= block.mean(1, keepdims=True)
        contrast[start : start + 16 * BLOCK] = np.sqrt(np.einsum("npc,npc->n", block, block) / block[0].size)
    return contrast
