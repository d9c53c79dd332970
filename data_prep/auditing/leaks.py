"""Images that occur twice where they should not: in two manifests, or on both sides of a hold-out."""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from data_prep.duplicates.near import near_pairs

MAX_LISTED = 500
# Parts with such a word in their names are held out: holdout, val, val_hard, public_test, all.holdout, ..
_HELD_OUT = re.compile(r"(?:^|[^a-z])(?:hold-?_?out|held-?_?out|val|valid|validation|test)(?:$|[^a-z])")


def is_held_out(manifest: str, split: str) -> bool:
    """Tell whether a row is held out, by its `split` or, without one, by the name of its manifest."""
    return bool(_HELD_OUT.search((split or Path(manifest).stem).lower()))


def find_leaks(rows: pd.DataFrame, hashes: Sequence[int | None], bits: int) -> dict:
    """Find images that look alike, or have equal bytes.

    Args:
        rows: `name`, `label`, `digest` (empty if unreadable), `manifest` and `held_out`, indexed by 0..N-1.
        hashes: perceptual hash of each row, or None.
        bits: largest distance of images that look alike.

    Returns:
        `bits`; numbers of pairs: `pairs`, `across_manifests`, `across_holdout`, `two_labels`,
        `equal_bytes_two_labels`; `listed`: at most `MAX_LISTED` of those across manifests, hold-out or
        labels, the worst first.
    """
    pairs = _with_equal_bytes(near_pairs(hashes, bits), rows["digest"])
    first, second, distance = pairs.T
    digest, label = rows["digest"].to_numpy(dtype=object), rows["label"].fillna(-1).to_numpy(dtype=np.int64)
    held, source = rows["held_out"].to_numpy(dtype=bool), pd.factorize(rows["manifest"])[0]
    equal = digest[first] == digest[second]
    across = source[first] != source[second]
    leaks = held[first] != held[second]
    labels = (label[first] != label[second]) & (label[first] >= 0) & (label[second] >= 0)
    listed = np.flatnonzero(across | leaks | labels)
    order = np.lexsort((second[listed], first[listed], distance[listed], ~labels[listed], ~leaks[listed]))
    described = [
        {
            "first": rows["name"][first[k]],
            "second": rows["name"][second[k]],
            "manifests": sorted({rows["manifest"][first[k]], rows["manifest"][second[k]]}),
            "bits": int(distance[k]),
            "equal_bytes": bool(equal[k]),
            "across_holdout": bool(leaks[k]),
            "two_labels": bool(labels[k]),
        }
        for k in listed[order][:MAX_LISTED]
    ]
    return {
        "bits": bits,
        "pairs": len(pairs),
        "across_manifests": int(across.sum()),
        "across_holdout": int(leaks.sum()),
        "two_labels": int(labels.sum()),
        "equal_bytes_two_labels": int((labels & equal).sum()),
        "listed": described,
    }


def _with_equal_bytes(pairs: np.ndarray, digest: pd.Series) -> np.ndarray:
    """Add images with equal bytes that are not paired yet since they are flat: each with the one before."""
    known = digest[digest != ""]
    known = known[known.duplicated(keep=False)]
    added = [
        (one, other, 0) for same in known.groupby(known).groups.values() for one, other in pairwise(same)
    ]
    together = np.concatenate([pairs, np.array(added, dtype=np.int64).reshape(-1, 3)])
    _, where = np.unique(together[:, :2], axis=0, return_index=True)
    return together[np.sort(where)]
