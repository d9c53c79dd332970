"""The content control: how well the classes can be told apart by what images show.

A logistic regression sees a frozen backbone's feature of each image after it was reduced to 28 px and
enlarged again, which leaves no trace of a generator. Where it tells the classes apart, so can a detector that
has learned nothing about generated images; an AUC on the same images has to be compared with the control's.
"""

from dataclasses import dataclass

import numpy as np

from featdistill.command_line import UserError


@dataclass(frozen=True)
class Scores:
    """P(AI) of every image by what it shows.

    Attributes:
        score: (N,) float64, NaN where an image could not be read.
        held: (N,) whether an image was scored by the head of all others, and not by folds.
        folds: how the others were divided, in words.
    """

    score: np.ndarray
    held: np.ndarray
    folds: str


def control_scores(
    values: np.ndarray,
    label: np.ndarray,
    held: np.ndarray,
    group: np.ndarray,
    fold: np.ndarray | None = None,
    seed: int = 0,
) -> Scores:
    """Score images by heads that have not seen them, nor any image of their groups.

    Labeled images that are not held out are divided into folds; all others are scored by a head that was
    trained on these. If these lack a class, all labeled images are divided into folds. A column of folds is
    used if each group is in one of them. (Groups may be pairs of both classes that show the same; a head that
    has seen only the other one of a pair would be misled.)

    Args:
        values: (N, D) float32, NaN where an image could not be read.
        label: (N,) float64, 0, 1 or NaN.
        held: (N,) bool.
        group: (N,) text, not empty.
        fold: (N,) text, the folds of training images; empty text: none.

    Raises:
        UserError: a class has fewer than two groups.
    """
    # Imported late: scikit-learn takes a while to import.
    from featdistill.bank import heads
    from featdistill.records.logits import probabilities

    usable = np.isfinite(values).all(axis=1)
    labeled = usable & ~np.isnan(label)
    training = labeled & ~held
    if len(np.unique(label[training])) < 2:
        training = labeled
    group = np.unique(group, return_inverse=True)[1]
    x, y, groups = values[training], label[training].astype(np.int8), group[training]
    if fold is not None and _is_division(fold[training], groups):
        parts, folds = np.unique(fold[training], return_inverse=True)[1], "column fold"
    else:
        parts = heads.grouped_folds(y, groups, seed=seed)
        folds = f"{len(np.unique(parts))} folds of groups"
    logits = heads.cross_fit(x, y, parts)
    score = np.full(len(label), np.nan)
    score[training] = probabilities(heads.chosen_logits(logits, y, parts)[:, 0])
    rest = usable & ~training
    if rest.any():
        seen = ~np.isin(groups, group[rest])
        if len(np.unique(y[seen])) < 2:
            raise UserError("--content: all training images share a group with held-out ones")
        options = heads.HeadOptions()
        path = options.strengths[: heads.best(logits, y, parts) + 1]
        head = heads.fit_heads(x[seen], y[seen], options=heads.HeadOptions(path=path))[-1]
        score[rest] = probabilities(head.logits(values[rest]))
    return Scores(score, rest, folds)


def _is_division(fold: np.ndarray, group: np.ndarray) -> bool:
    """Tell whether folds (N,) divide whole groups (N,) into at least two parts, and every image has one."""
    parts = np.unique(fold, return_inverse=True)[1]
    pairs = np.unique(np.stack([parts, group]), axis=1).shape[1]
    return bool((fold != "").all()) and parts.max() > 0 and pairs == len(np.unique(group))
