"""Images that are there twice where they should not be: in two manifests, or on both sides of a hold-out."""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from data_prep.duplicates.near import near_pairs

MOST_LISTED = 500
# A part with such a word in its name is held out: holdout, val, val_hard, public_test, all.holdout, ..
_HELD_OUT = re.compile(r"(?:^|[^a-z])(?:hold-?_?out|held-?_?out|val|valid|validation|test)(?:$|[^a-z])")


def is_held_out(manifest: str, split: str) -> bool:
    """Tell by a row's `split`, or without one by the name of its manifest, whether it is held out."""
    return bool(_HELD_OUT.search((split or Path(manifest).stem).lower()))


def find_leaks(rows: pd.DataFrame, hashes: Sequence[int | None], bits: int) -> dict:
    """Find images that look alike, or are the same byte for byte.

    Args:
        rows: `name`, `label`, `digest` (text, empty where unreadable), `manifest` (a name each), `held_out`
            (bool), a row an image, indexed by 0..N-1.
        hashes: perceptual hash of each row, None where it has none.
        bits: largest distance of images that look alike.

    Returns:
        `bits`; numbers of pairs: `pairs`, `across_manifests`, `across_holdout`, `two_labels`,
        `equal_bytes_two_labels`; `listed`: those across manifests, hold-out or labels, the worst first, at
        most `MOST_LISTED`, as dicts.
    """
    found = _with_equal_bytes(near_pairs(hashes, bits), rows["digest"])
    first, second, distance = found.T
    digest, label = rows["digest"].to_numpy(dtype=object), rows["label"].fillna(-1).to_numpy(dtype=np.int64)
    held, source = rows["held_out"].to_numpy(dtype=bool), pd.factorize(rows["manifest"])[0]
    equal = digest[first] == digest[second]
    across = source[first] != source[second]
    border = held[first] != held[second]
    labels = (label[first] != label[second]) & (label[first] >= 0) & (label[second] >= 0)
    worth = np.flatnonzero(across | border | labels)
    order = np.lexsort((second[worth], first[worth], distance[worth], ~labels[worth], ~border[worth]))
    listed = [
        {
            "first": rows["name"][first[k]],
            "second": rows["name"][second[k]],
            "manifests": sorted({rows["manifest"][first[k]], rows["manifest"][second[k]]}),
            "bits": int(distance[k]),
            "equal_bytes": bool(equal[k]),
            "across_holdout": bool(border[k]),
            "two_labels": bool(labels[k]),
        }
        for k in worth[order][:MOST_LISTED]
    ]
    return {
        "bits": bits,
        "pairs": len(found),
        "across_manifests": int(across.sum()),
        "across_holdout": int(border.sum()),
        "two_labels": int(labels.sum()),
        "equal_bytes_two_labels": int((labels & equal).sum()),
        "listed": listed,
    }


def _with_equal_bytes(pairs: np.ndarray, digest: pd.Series) -> np.ndarray:
    """Add images of equal bytes that are no pairs yet since they are flat: each with the one before."""
    known = digest[digest != ""]
    known = known[known.duplicated(keep=False)]
    added = [
        (one, other, 0) for same in known.groupby(known).groups.values() for one, other in pairwise(same)
    ]
    together = np.concatenate([pairs, np.array(added, dtype=np.int64).reshape(-1, 3)])
    _, where = np.unique(together[:, :2], axis=0, return_index=True)
    return together[np.sort(where)]
