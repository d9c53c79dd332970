"""AUC by generator, distortion, level, number of distortions, source, image size and any other column.

Every row has `auc` with its interval `low` and `high`; the numbers of images `n`, `real` and `ai` that it is
taken over (`n` of a generator: of its images; its AUC is against all real images); and at 0.5 `accuracy`,
`real_accuracy` and `ai_accuracy`, None where scores are outside [0, 1]. With a control, `content` is what it
reaches on the same images; see `stratified.next_to`.
"""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import pandas as pd

from featdistill.command_line import UserError
from featdistill.distortions.libraries import LIBRARIES
from featdistill.evaluation.metrics import ACCURACIES, accuracies, are_probabilities, checked
from featdistill.evaluation.stratified import auc_row, next_to

# Longer sides in px. The challenge's images measure 256 to 4096, half of them up to about 1024.
_SIZES = {512: "1 to 512 px", 1024: "513 to 1024 px", 2048: "1025 to 2048 px", np.inf: "from 2049 px"}
# Rows that a table of a column may have: more cannot be read.
_MAX_STRATA = 500

Table = dict[str, dict]


def breakdowns(
    frame: pd.DataFrame, control: np.ndarray | None = None, by: dict[str, pd.Series] | None = None
) -> dict[str, Table]:
    """Return all breakdowns of a split.

    Args:
        frame: `label`, `score`, `is_distorted`, `generator`, `source`, `chain`, `width`, `height` as
            `labels.join` returns them.
        control: (N,) scores to set next to all AUCs.
        by: column -> the stratum of each image; see `records.strata`.

    Returns:
        `generators`: the images of each against all real ones. `distortions`: the images whose chain contains
        it. `distortion_levels`: name -> level -> the images whose chain contains both. `levels`: by the
        strongest distortion of the chain whose level is known. `chain_lengths`. `sources`: the images of
        each; one with a single class is set against all images of the other (`against`). `sizes`: by the
        longer side, where the manifest has widths and heights. `by`: column -> the images of each stratum, in
        the strata's order, with `against` as of `sources`.

    Raises:
        UserError: a column has too many strata to break down by.
    """
    by = by or {}
    label, score = checked(frame["label"], frame["score"])
    is_probability = are_probabilities(score)

    def table(groups: dict) -> dict:
        return {str(name): row(rows) for name, rows in groups.items()}

    def row(rows: np.ndarray) -> dict:
        """Return the row of a table for the images with these numbers."""
        labels, scores = label[rows], score[rows]
        counts = {"n": len(rows), "real": int((labels == 0).sum()), "ai": int((labels == 1).sum())}
        shares = accuracies(labels, scores) if is_probability else dict.fromkeys(ACCURACIES)
        result = {**auc_row(labels, scores), **counts, **shares}
        return result if control is None else {**result, "content": next_to(labels, scores, control[rows])}

    def against_others(groups: dict[str, np.ndarray]) -> Table:
        """Return a table where a group of one class is set against all images of the other one."""
        result = {}
        for name, rows in groups.items():
            is_ai = label[rows] == 1
            other = real if is_ai.all() else ai if not is_ai.any() else rows[:0]
            against = "all real" if is_ai.all() else "itself" if is_ai.any() else "all AI"
            result[str(name)] = {**row(np.concatenate([rows, other])), "against": against}
        return result

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
    longer = frame[["width", "height"]].max(axis=1, skipna=False)
    size = pd.cut(longer, [0, *_SIZES], labels=list(_SIZES.values()))
    sizes = {name: np.flatnonzero(size == name) for name in _SIZES.values()}
    return {
        "generators": {name: {**one, "n": one["ai"]} for name, one in generators.items()},
        "distortions": table(_rows_by_key({name for name, _ in chain} for chain in chains)),
        "distortion_levels": distortion_levels,
        "levels": table(_rows_by_key(strongest)),
        "chain_lengths": table(_rows_by_key(lengths)),
        "sources": against_others(_rows_of(frame["source"])),
        "sizes": table({name: rows for name, rows in sizes.items() if len(rows)}),
        "by": {column: against_others(_rows_of_strata(column, strata)) for column, strata in by.items()},
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


def _rows_of_strata(column: str, strata: pd.Series) -> dict[str, np.ndarray]:
    """Return for each stratum the numbers of its rows."""
    names, codes = strata.cat.categories, strata.cat.codes.to_numpy()
    if len(names) > _MAX_STRATA:
        raise UserError(
            f"--by {column}: {len(names):,} different values are too many for a table; choose a column with "
            f"at most {_MAX_STRATA}"
        )
    return {name: np.flatnonzero(codes == code) for code, name in enumerate(names)}


def _rows_by_key(keys: Iterable[Iterable]) -> dict:
    """Return for each key, sorted, the numbers of the rows that have it."""
    rows_of: dict = {}
    for row, keys_of_row in enumerate(keys):
        for key in keys_of_row:
            rows_of.setdefault(key, []).append(row)
    return {key: np.array(rows_of[key]) for key in sorted(rows_of)}
