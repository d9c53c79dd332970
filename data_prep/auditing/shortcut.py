"""The pixel-free baseline: how well an image's file alone predicts its label, on held-out images.

Gradient-boosted trees see the features of `features.py` and no pixels. Every image is scored by trees that
were trained without its group, and the ROC AUC of these scores is what a detector can reach on the same
images without having learned anything about generated images. Its interval is a bootstrap over whole groups.
"""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import StratifiedGroupKFold

from data_prep.auditing.features import CATEGORICAL, FEATURES, codes
from featdistill.evaluation.metrics import roc_auc

FOLDS = 5
# Above it, with the whole interval, the files tell so much that an AUC on these data means little by itself.
WARN_ABOVE = 0.6
RESAMPLINGS = 1000
_CONFIDENCE = 0.95
# Stumps and small trees find a threshold or a set of categories in one feature; larger ones fit its noise.
_ROUNDS, _ROUNDS_ALONE, _LEAVES, _LEAVES_ALONE = 100, 40, 15, 6


@dataclass
class Baseline:
    """Results of the pixel-free classifier."""

    auc: float | None = None  # over all labeled images
    low: float | None = None  # of the 95 % interval
    high: float | None = None
    undefined: str = ""  # why there is no AUC
    images: int = 0
    groups: int = 0
    sources: list[dict] = field(default_factory=list)  # source, real, ai, against, auc, low, high
    # The most telling first: feature; auc_alone, of trees that see only this feature; auc_lost, the loss of
    # the overall AUC when its values are shuffled.
    features: list[dict] = field(default_factory=list)

    def verdict(self) -> str:
        """Return `shortcut`, `possible`, `none`, or `undefined`."""
        if self.auc is None:
            return "undefined"
        if self.low > WARN_ABOVE:
            return "shortcut"
        return "possible" if self.auc > WARN_ABOVE else "none"

    def telling(self, limit: int = 5) -> list[str]:
        """Return the features that predict the label alone, or the best one if none does."""
        strong = [row["feature"] for row in self.features if (row["auc_alone"] or 0) > WARN_ABOVE]
        return (strong or [row["feature"] for row in self.features[:1]])[:limit]


def measure_baseline(table: pd.DataFrame, seed: int = 0) -> Baseline:
    """Measure the baseline.

    Args:
        table: `FEATURES`, and `label` (0 or 1), `source` and `group` (text, not empty), one row per image;
            each image should occur once.
    """
    label = table["label"].to_numpy(dtype=np.int8)
    group = pd.factorize(table["group"])[0]
    result = Baseline(images=len(table), groups=len(np.unique(group)))
    folds = min([FOLDS, *(len(np.unique(group[label == one])) for one in (0, 1))])
    if folds < 2:
        result.undefined = "it needs real and AI-generated images, each in at least two groups"
        return result
    fold = np.zeros(len(label), dtype=np.int64)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for number, (_, held) in enumerate(splitter.split(label, label, group)):
        fold[held] = number
    if any(len(np.unique(label[fold != number])) < 2 for number in range(folds)):
        result.undefined = "the groups cannot be divided into parts that hold both labels"
        return result
    columns = {
        name: codes(table[name]) if name in CATEGORICAL else table[name].to_numpy(dtype=np.float64)
        for name in FEATURES
    }
    names = [name for name, values in columns.items() if len(np.unique(values)) > 1]
    score, shuffled = _score(columns, names, label, fold, seed, shuffle=True)
    auc = auc_interval(label, score, group, seed)
    for name in names:
        alone = roc_auc(label, _score(columns, [name], label, fold, seed)[0])
        lost = auc[0] - roc_auc(label, shuffled[name])
        result.features.append({"feature": name, "auc_alone": _4(alone), "auc_lost": _4(lost)})
    result.features.sort(key=lambda row: (-row["auc_alone"], -row["auc_lost"], row["feature"]))
    result.sources = _per_source(table["source"].to_numpy(dtype=object), label, score, group, seed)
    result.auc, result.low, result.high = map(_4, auc)
    return result


def auc_interval(
    label: np.ndarray, score: np.ndarray, group: np.ndarray, seed: int
) -> tuple[float | None, float | None, float | None]:
    """Return the AUC and its 95 % interval, by sampling whole groups with replacement.

    Args:
        label, score, group: (N,); groups are integers.
    """
    auc = roc_auc(label, score)
    if auc is None:
        return None, None, None
    _, rank = np.unique(score, return_inverse=True)
    _, member = np.unique(group, return_inverse=True)
    levels, groups = rank.max() + 1, member.max() + 1
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLINGS):
        weight = np.bincount(rng.integers(0, groups, groups), minlength=groups)[member]
        ai = np.bincount(rank, weight * label, levels)
        real = np.bincount(rank, weight * (1 - label), levels)
        if ai.any() and real.any():
            drawn.append((ai * (np.cumsum(real) - real / 2)).sum() / (ai.sum() * real.sum()))
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]) if drawn else (auc, auc)
    return auc, float(low), float(high)


def _score(
    columns: dict[str, np.ndarray],
    names: list[str],
    label: np.ndarray,
    fold: np.ndarray,
    seed: int,
    shuffle: bool = False,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Score each image by trees trained without its fold; with `shuffle`, also with each feature shuffled."""
    score = np.full(len(label), 0.5)
    shuffled = {name: np.full(len(label), 0.5) for name in names} if shuffle else {}
    if not names:
        return score, shuffled
    values = np.stack([columns[name] for name in names], axis=1)
    alone = len(names) == 1
    rng = np.random.default_rng(seed)
    for number in np.unique(fold):
        seen, held = fold != number, fold == number
        trees = HistGradientBoostingClassifier(
            max_iter=_ROUNDS_ALONE if alone else _ROUNDS,
            max_leaf_nodes=_LEAVES_ALONE if alone else _LEAVES,
            # A twentieth of the images, so that a few dozen are enough; 20 is the usual value.
            min_samples_leaf=int(np.clip(seen.sum() // 20, 2, 20)),
            categorical_features=[name in CATEGORICAL for name in names],
            early_stopping=False,
            random_state=seed,
        )
        trees.fit(values[seen], label[seen])
        score[held] = trees.predict_proba(values[held])[:, 1]
        for column, name in enumerate(names if shuffle else []):
            changed = values[held]
            changed[:, column] = rng.permutation(changed[:, column])
            shuffled[name][held] = trees.predict_proba(changed)[:, 1]
    # The order in which threads add may differ.
    return score.round(9), shuffled


def _per_source(
    source: np.ndarray, label: np.ndarray, score: np.ndarray, group: np.ndarray, seed: int
) -> list[dict]:
    """Return the AUC of each source: within it if it has both labels, else against all of the other label."""
    rows = []
    for name in sorted(set(source.tolist())):
        inside = source == name
        labels = np.unique(label[inside])
        both = len(labels) == 2
        chosen = inside if both else inside | (label != labels[0])
        auc, low, high = map(_4, auc_interval(label[chosen], score[chosen], group[chosen], seed))
        against = "itself" if both else ("all real" if labels[0] else "all AI")
        counts = {"real": int((label[inside] == 0).sum()), "ai": int((label[inside] == 1).sum())}
        rows.append({"source": name, **counts, "against": against, "auc": auc, "low": low, "high": high})
    return rows


def _4(value: float | None) -> float | None:
    return None if value is None else round(float(value), 4)
