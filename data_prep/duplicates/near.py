"""Images that look alike although their bytes differ: stored again, scaled, slightly edited.

The perceptual hash of an image has 64 bits: which of the 8 x 8 lowest frequencies of its 32 x 32 gray
thumbnail exceed their median. Compression and scaling hardly change it; cropping, mirroring and rotation do,
and such copies are not found. Two images are near-duplicates if few bits differ.
"""

from collections.abc import Iterable
from itertools import pairwise

import cv2
import numpy as np

from data_prep.writing.parallel import map_in_order
from featdistill.images import reading as image_io

HASH_BITS = 64
# From 12 bits on, unrelated pictures match: of 4.4 million pairs of different photographs and drawings, 21
# did at 12 bits and one at 4. A copy at JPEG quality 50, or at half the size, differs by 0 or 2.
MAX_DISTANCE_BITS = 10
# A thumbnail with less contrast (standard deviation, in gray levels of 255) has no structure to hash.
FLAT_CONTRAST = 2.0
_THUMBNAIL_PX = 32
_FREQUENCIES = 8


def _cosines() -> np.ndarray:
    """Return the first rows of the DCT-II basis as integers, so that no hash depends on rounding."""
    frequency, position = np.arange(_FREQUENCIES)[:, None], np.arange(_THUMBNAIL_PX)[None]
    basis = np.cos(np.pi * frequency * (2 * position + 1) / (2 * _THUMBNAIL_PX))
    return np.rint(4096 * basis).astype(np.int64)


_BASIS = _cosines()


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Return the (32, 32) uint8 gray thumbnail of an image, (H, W, 3) uint8."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return cv2.resize(gray, (_THUMBNAIL_PX, _THUMBNAIL_PX), interpolation=cv2.INTER_AREA)


def is_flat(small: np.ndarray) -> bool:
    """Tell whether a thumbnail has too little contrast for a hash."""
    return float(small.std()) < FLAT_CONTRAST


def perceptual_hash(small: np.ndarray) -> int | None:
    """Return the 64-bit hash of a thumbnail, None if it is flat."""
    if is_flat(small):
        return None
    spectrum = (_BASIS @ small.astype(np.int64) @ _BASIS.T).ravel()
    bits = np.packbits(spectrum > np.median(spectrum))
    return int.from_bytes(bits.tobytes(), "big")


def hash_images(locations: list[str], workers: int) -> tuple[list[int | None], dict[int, str]]:
    """Return the hashes, None for flat or broken images, and reasons by position for the broken ones."""
    results = map_in_order(_hash_one, locations, workers, "hash")
    faults = {position: fault for position, (_, fault) in enumerate(results) if fault}
    return [hashed for hashed, _ in results], faults


def near_pairs(hashes: Iterable[int | None], bits: int) -> np.ndarray:
    """Return all pairs of positions whose hashes differ in at most `bits` bits.

    Hashes are cut into `bits + 1` bands; two that differ in `bits` bits agree in at least one band, so only
    hashes with an equal band are compared. Half a million images take seconds at 4 bits and minutes at 8.

    Returns:
        (N, 3) int64: first position, second (larger) position, distance in bits; sorted.
    """
    hashes = list(hashes)
    positions = np.array([place for place, value in enumerate(hashes) if value is not None], dtype=np.int64)
    values = np.array([value for value in hashes if value is not None], dtype=np.uint64)
    unique, which = np.unique(values, return_inverse=True)
    first, second, distance = _unique_pairs(unique, bits)
    # From distinct hashes back to the positions with these hashes; equal hashes are pairs at distance 0.
    order = np.argsort(which, kind="stable")
    starts = np.searchsorted(which[order], np.arange(len(unique) + 1))
    members = [positions[order[start:end]] for start, end in pairwise(starts)]
    rows = [np.zeros((0, 3), np.int64)]
    for equal in members:
        if len(equal) > 1:
            one, other = np.triu_indices(len(equal), 1)
            rows.append(np.stack([equal[one], equal[other], np.zeros(len(one), np.int64)], axis=1))
    for one, other, far in zip(first, second, distance, strict=True):
        a, b = np.meshgrid(members[one], members[other], indexing="ij")
        rows.append(np.stack([a.ravel(), b.ravel(), np.full(a.size, far)], axis=1))
    pairs = np.concatenate(rows)
    pairs[:, :2] = np.sort(pairs[:, :2], axis=1)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _unique_pairs(unique: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (first, second, distance) of all pairs of distinct hashes within `bits`."""
    edges = [HASH_BITS * band // (bits + 1) for band in range(bits + 2)]
    found = [np.zeros(0, np.int64)]
    for low, high in pairwise(edges):
        if high - low == HASH_BITS:
            break  # distinct hashes are never at distance 0
        band = (unique >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(band, kind="stable")
        band = band[order]
        # The end of each position's run of equal bands; step k compares positions that are k apart.
        end = np.searchsorted(band, band, side="right")
        here = np.arange(len(unique))
        step = 1
        while len(here := here[here + step < end[here]]):
            one, other = order[here], order[here + step]
            close = np.bitwise_count(unique[one] ^ unique[other]) <= bits
            one, other = one[close], other[close]
            found.append(np.minimum(one, other) * len(unique) + np.maximum(one, other))
            step += 1
    keys = np.unique(np.concatenate(found))
    first, second = np.divmod(keys, max(len(unique), 1))
    return first, second, np.bitwise_count(unique[first] ^ unique[second]).astype(np.int64)


def _hash_one(location: str) -> tuple[int | None, str]:
    try:
        return perceptual_hash(thumbnail(image_io.read_image(location))), ""
    except image_io.BrokenImage as error:
        return None, str(error)
