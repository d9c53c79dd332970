"""AUC by generator, distortion, level, number of distortions, source and image size.

Every row has `auc` with its interval `low` and `high`; the numbers of images `n`, `real` and `ai` that it is
taken over (`n` of a generator: of its images; its AUC is against all real images); and at 0.5 `accuracy`,
`real_accuracy` and `ai_accuracy`, None where scores are outside [0, 1].
"""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import pandas as pd

from featdistill.distortions.libraries import LIBRARIES
from featdistill.evaluation.intervals import auc_interval
from featdistill.evaluation.metrics import ACCURACIES, accuracies, are_probabilities, checked

# Longer sides in px. The challenge's images measure 256 to 4096, half of them up to about 1024.
_SIZES = {512: "1 to 512 px", 1024: "513 to 1024 px", 2048: "1025 to 2048 px", np.inf: "from 2049 px"}

Table = dict[str, dict]


def breakdowns(frame: pd.DataFrame) -> dict[str, Table]:
    """Return all breakdowns of a split.

    Args:
        frame: `label`, `score`, `is_distorted`, `generator`, `source`, `chain`, `width`, `height` as
            `labels.join` returns them.

    Returns:
        `generators`: the images of each against all real ones. `distortions`: the images whose chain contains
        it. `distortion_levels`: name -> level -> the images whose chain contains both. `levels`: by the
        strongest distortion of the chain whose level is known. `chain_lengths`. `sources`: the images of
        each; one with a single class is set against all images of the other (`against`). `sizes`: by the
        longer side, where the manifest has widths and heights.
    """
    label, score = checked(frame["label"], frame["score"])
    is_probability = are_probabilities(score)

    def table(groups: dict) -> dict:
        return {str(name): row(rows) for name, rows in groups.items()}

    def row(rows: np.ndarray) -> dict:
        """Return the row of a table for the images with these numbers."""
        labels, scores = label[rows], score[rows]
        auc, low, high = auc_interval(labels, scores)
        counts = {"n": len(rows), "real": int((labels == 0).sum()), "ai": int((labels == 1).sum())}
        shares = accuracies(labels, scores) if is_probability else dict.fromkeys(ACCURACIES)
        return {"auc": auc, "low": low, "high": high, **counts, **shares}

    real, ai = np.flatnonzero(label == 0), np.flatnonzero(label == 1)
    made_by = _rows_of(frame["generator"].where(label == 1, ""))
    generators = table({name: np.concatenate([real, rows]) for name, rows in made_by.items()})
    chains = [[(name, level_of(name, scale)) for name, scale in chain] for chain in frame["chain"]]
    distortion_levels: dict[str, Table] = {}
    steps = ({step for step in chain if step[1] is not None} for chain in chains)
    for (name, level), rows in _rows_by_key(steps).items():
        distortion_levels.setdefault(name, {})[str(level)] = row(rows)
    strongest = ({max(level or 0 for _, level in chain)} - {0} if chain else () for chain in chains)
    lengths = (
        [0] if state == 0 else [len(chain)] if state == 1 and chain else []
        for state, chain in zip(frame["is_distorted"], chains, strict=True)
    )
    sources, against = {}, {}
    for name, rows in _rows_of(frame["source"]).items():
        is_ai = label[rows] == 1
        other = real if is_ai.all() else ai if not is_ai.any() else rows[:0]
        sources[name] = np.concatenate([rows, other])
        against[name] = "all real" if is_ai.all() else "itself" if is_ai.any() else "all AI"
    longer = frame[["width", "height"]].max(axis=1, skipna=False)
    size = pd.cut(longer, [0, *_SIZES], labels=list(_SIZES.values()))
    sizes = {name: np.flatnonzero(size == name) for name in _SIZES.values()}
    return {
        "generators": {name: {**one, "n": one["ai"]} for name, one in generators.items()},
        "distortions": table(_rows_by_key({name for name, _ in chain} for chain in chains)),
        "distortion_levels": distortion_levels,
        "levels": table(_rows_by_key(strongest)),
        "chain_lengths": table(_rows_by_key(lengths)),
        "sources": {name: {**one, "against": against[name]} for name, one in table(sources).items()},
        "sizes": table({name: rows for name, rows in sizes.items() if len(rows)}),
    }


@lru_cache(maxsize=65536)
def level_of(name: str, scale: float) -> int | None:
    """Return the level, 1 to 5, at which a library's operation has this scale; None where it has none.

    The challenge's libraries are searched first. A scale that an operation draws around a level's belongs to
    that level.
    """
    for library in ("official", "evaluation", "extended", "extras"):
        operation = LIBRARIES[library].get(name)
        if operation is None or not isinstance(scale, (int, float)):
            continue
        gaps = [abs(scale - known) for known in operation.scales]
        nearest = int(np.argmin(gaps))
        if gaps[nearest] <= operation.spread + 1e-9:
            return nearest + 1
    return None


def _rows_of(names: pd.Series) -> dict[str, np.ndarray]:
    """Return for each name, sorted and without the empty one, the numbers of its rows."""
    return {name: rows for name, rows in names.groupby(names.to_numpy(dtype=object)).indices.items() if name}


def _rows_by_key(keys: Iterable[Iterable]) -> dict:
    """Return for each key, sorted, the numbers of the rows that have it."""
    rows_of: dict = {}
    for row, keys_of_row in enumerate(keys):
        for key in keys_of_row:
            rows_of.setdefault(key, []).append(row)
    return {key: np.array(rows_of[key]) for key in sorted(rows_of)}
