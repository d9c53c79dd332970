"""Heads on features that are computed once: fitted along a path of regularizations, chosen by folds.

A head is a logistic regression or a small multilayer perceptron of scikit-learn on standardized features. Its
standardization is folded into its first layer, so that it reads the features as they are and can be the head
of an expert. Several views of an image are several training rows that are always on the same side of a fold.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.neural_network import MLPClassifier

from featdistill.command_line import UserError, one_of
from featdistill.records.logits import probabilities

KINDS = ("linear", "mlp")
FOLDS = 5
# Inverse strengths of regularization, scikit-learn's C, from strong to weak.
STRENGTHS = tuple(float(value) for value in np.logspace(-7, 0, 20))
# Penalties of the perceptron, scikit-learn's alpha, from strong to weak.
PENALTIES = (10.0, 1.0, 0.1, 0.001)
_MLP_EPOCHS = 30
# Rows that are scored at once: float64 copies of all rows would double the memory.
_CHUNK = 8192
# Up to so many values, a regression is fitted in float64, where the optimizer is never stopped by rounding.
_FLOAT64_VALUES = 1 << 25

# Which of N images are trained on, (N,) bool -> features (N, V, D) of the training views, and (S, W, D) of
# the scored images and views. A feature that is chosen on the training images, such as the most telling
# tokens, depends on them.
Features = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class HeadOptions:
    """What is fitted.

    Attributes:
        kind: `linear` (logistic regression) or `mlp` (one hidden layer with ReLU).
        path: regularizations to try, from strong to weak: C of the regression, alpha of the perceptron; None
            for `STRENGTHS` or `PENALTIES`.
        hidden: width of the perceptron's hidden layer.
        seed: of the perceptron.
    """

    kind: str = "linear"
    path: tuple[float, ...] | None = None
    hidden: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("head", self.kind, KINDS)

    @property
    def strengths(self) -> tuple[float, ...]:
        return self.path or (STRENGTHS if self.kind == "linear" else PENALTIES)


@dataclass(frozen=True)
class Head:
    """A fitted head.

    Attributes:
        layers: one or two pairs of weight (out, in) and bias (out,), float32, with ReLU in between.
        strength: its regularization, see `HeadOptions.path`.
    """

    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    strength: float

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Return the logits of features (..., D), float64 of shape (...)."""
        flat = x.reshape(-1, x.shape[-1])
        result = np.empty(len(flat))
        layers = [(weight.astype(np.float64), bias) for weight, bias in self.layers]
        for start in range(0, len(flat), _CHUNK):
            values = flat[start : start + _CHUNK].astype(np.float64)
            for number, (weight, bias) in enumerate(layers):
                values = (np.maximum(values, 0) if number else values) @ weight.T + bias
            result[start : start + _CHUNK] = values[:, 0]
        return result.reshape(x.shape[:-1])


def fit_heads(
    x: np.ndarray,
    y: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    options: HeadOptions | None = None,
    overwrite: bool = False,
) -> list[Head]:
    """Fit one head for each regularization of the path.

    Args:
        x: (N, D) or, with V views of each image, (N, V, D), float16 or float32, finite.
        y: (N,) 0 real, 1 AI-generated.
        weights: (N,) above 0, how much each image counts; None: all alike.
        overwrite: standardize float32 features in place, which saves the memory of a copy.

    Raises:
        UserError: a class is missing, or a feature is not finite.
    """
    options = options or HeadOptions()
    y = np.asarray(y).astype(np.int8)
    if len(np.unique(y)) < 2:
        raise UserError(
            f"a head needs real and AI-generated training images; all {len(y)} have the same label"
        )
    views = 1 if x.ndim == 2 else x.shape[1]
    rows = x.reshape(-1, x.shape[-1]).astype(np.float32, copy=not overwrite)
    mean, scale = _standardize(rows)
    y = np.repeat(y, views)
    if weights is not None:
        weights = np.repeat(np.asarray(weights, dtype=np.float64), views)
        weights = (weights / weights.mean()).astype(np.float32)
    path = _linear_path if options.kind == "linear" else _mlp_path
    return [
        Head(_folded(layers, mean, scale), strength)
        for layers, strength in zip(path(rows, y, weights, options), options.strengths, strict=True)
    ]


def cross_fit(
    features: Features | np.ndarray,
    y: np.ndarray,
    fold: np.ndarray,
    *,
    scored_fold: np.ndarray | None = None,
    weights: Callable[[np.ndarray], np.ndarray | None] | None = None,
    excluded: Callable[[np.ndarray], np.ndarray] | None = None,
    options: HeadOptions | None = None,
    progress: Callable[[], object] = lambda: None,
) -> np.ndarray:
    """Score images by heads that were trained without their fold, for each regularization.

    Args:
        features: (N, D) or (N, V, D), trained on and scored; or what gives both for the training images.
        y, fold: (N,) the labels of the images that are trained on, and the part that each is held out with.
        scored_fold: (S,) the fold of each scored image, -1 for none; None: they are those trained on.
        weights: which images are trained on, (N,) bool -> how much each of these counts, see `fit_heads`.
        excluded: which images are held out, (N,) bool -> images that must not be trained on either, (N,)
            bool.
        progress: called after each fold.

    Returns:
        (K, S, W) float64 logits of K regularizations and W views; NaN for images without a fold.

    Raises:
        UserError: as `fit_heads`, or there is only one fold.
    """
    options = options or HeadOptions()
    scored_fold = fold if scored_fold is None else scored_fold
    parts = np.unique(fold)
    if len(parts) < 2:
        raise UserError("held-out scores need at least two folds; all training images are in the same one")
    logits = None
    for part in parts:
        held = fold == part
        seen = ~held & ~excluded(held) if excluded else ~held
        x, scored = features(seen) if callable(features) else (features, features)
        scored = scored[:, None] if scored.ndim == 2 else scored
        counts = weights(seen) if weights else None
        heads = fit_heads(x[seen], y[seen], weights=counts, options=options, overwrite=True)
        if logits is None:
            logits = np.full((len(heads), *scored.shape[:2]), np.nan)
        held = scored_fold == part
        values = scored[held]
        for number, head in enumerate(heads):
            logits[number, held] = head.logits(values)
        progress()
    return logits


def out_of_fold_scores(
    x: np.ndarray,
    y: np.ndarray,
    fold: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    options: HeadOptions | None = None,
) -> np.ndarray:
    """Return P(AI) of every image, (N,) float64, by a head that was trained without its fold.

    The regularization of each fold's head is the one that is best on the other folds. Arguments are those of
    `cross_fit`, except that `x` is (N, D) and `weights` (N,).
    """
    logits = cross_fit(
        x, y, fold, weights=None if weights is None else lambda seen: weights[seen], options=options
    )
    return probabilities(chosen_logits(logits, y, fold)[:, 0])


def chosen_logits(logits: np.ndarray, y: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Return for each fold the logits of the regularization that is best on the other folds, (N, W).

    Args:
        logits: of `cross_fit`.
    """
    result = np.empty(logits.shape[1:])
    for part in np.unique(fold):
        result[fold == part] = logits[best(logits, y, fold, without=part), fold == part]
    return result


def best(logits: np.ndarray, y: np.ndarray, fold: np.ndarray, without: int | None = None) -> int:
    """Return the regularization with the highest held-out AUC, the mean over views and over images' folds.

    A fold with one class is compared with the held-out images of the other class in all other folds. Of equal
    ones, the strongest wins.

    Args:
        logits: of `cross_fit`.
        without: a fold that has no influence on the choice.
    """
    used = np.ones(len(y), bool) if without is None else fold != without
    scores, y, fold = logits[:, used], np.asarray(y)[used], fold[used]
    aucs, sizes = [], []
    for part in np.unique(fold):
        inside = fold == part
        sizes.append(inside.sum())
        labels = np.unique(y[inside])
        if len(labels) == 1:
            inside = inside | (y != labels[0])
        is_defined = len(np.unique(y[inside])) == 2
        aucs.append(_aucs(scores[:, inside], y[inside]).mean(axis=1) if is_defined else np.zeros(len(scores)))
    # Rounded, so that the last bits of a sum do not decide between regularizations that rank alike.
    return int(np.argmax(np.average(aucs, axis=0, weights=sizes).round(6)))


def grouped_folds(
    y: np.ndarray, group: Sequence[str] | np.ndarray, folds: int = FOLDS, seed: int = 0
) -> np.ndarray:
    """Assign whole groups to folds that have about the same share of each class.

    Args:
        y: (N,) 0 or 1.
        group: (N,) names or numbers.

    Returns:
        (N,) int64 from 0 to `folds` - 1; fewer folds if a class has fewer groups.

    Raises:
        UserError: a class has fewer than two groups.
    """
    y, group = np.asarray(y).astype(np.int8), np.unique(np.asarray(group), return_inverse=True)[1]
    count = min([folds, *(len(np.unique(group[y == label])) for label in (0, 1))])
    if count < 2:
        raise UserError(
            "folds need real and AI-generated training images, each in at least two groups (manifest column "
            "group)"
        )
    result = np.zeros(len(y), np.int64)
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    for number, (_, held) in enumerate(splitter.split(y, y, group)):
        result[held] = number
    return result


def _aucs(scores: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the AUC of (K, N, W) scores over N images, (K, W)."""
    ranks = rankdata(scores, axis=1)
    ai = int((y == 1).sum())
    total = ranks[:, y == 1].sum(axis=1)
    return (total - ai * (ai + 1) / 2) / (ai * (len(y) - ai))


def _standardize(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standardize (N, D) float32 in place; return mean and scale (D,) float64, scale 1 for constants."""
    mean = rows.mean(axis=0, dtype=np.float64)
    rows -= mean.astype(np.float32)
    # Of centered values, so that large means cost no digits; no square of all rows at once.
    square = sum(
        np.einsum("nd,nd->d", part, part, dtype=np.float64)
        for part in (rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK))
    )
    scale = np.sqrt(square / len(rows))
    if not (np.isfinite(mean).all() and np.isfinite(scale).all()):
        raise UserError("features are not finite for some training images; embed them again")
    # What varies only in its last bits is constant: scaled up, it would be noise.
    scale[scale <= 1e-6 * np.abs(mean)] = 1.0
    scale[scale == 0] = 1.0
    rows /= scale.astype(np.float32)
    return mean.astype(np.float32).astype(np.float64), scale.astype(np.float32).astype(np.float64)


def _folded(
    layers: list[tuple[np.ndarray, np.ndarray]], mean: np.ndarray, scale: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Make the first layer read features that are not standardized."""
    (weight, bias), *rest = layers
    weight = (weight / scale).astype(np.float32)
    bias = bias - weight.astype(np.float64) @ mean
    return tuple((w.astype(np.float32), b.astype(np.float32)) for w, b in ((weight, bias), *rest))


def _linear_path(
    rows: np.ndarray, y: np.ndarray, weights: np.ndarray | None, options: HeadOptions
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Fit a logistic regression for each C; each starts where the last, stronger regularized one ended."""
    if rows.size <= _FLOAT64_VALUES:
        rows, weights = rows.astype(np.float64), None if weights is None else weights.astype(np.float64)
    model = LogisticRegression(warm_start=True, max_iter=1000, tol=1e-4)
    path = []
    with warnings.catch_warnings():
        # In float32, the optimizer says so where rounding does not let it get any closer.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for strength in options.strengths:
            model.set_params(C=strength).fit(rows, y, weights)
            path.append([(model.coef_.astype(np.float64), model.intercept_.astype(np.float64))])
    return path


def _mlp_path(
    rows: np.ndarray, y: np.ndarray, weights: np.ndarray | None, options: HeadOptions
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    path = []
    for penalty in options.strengths:
        model = MLPClassifier(
            (options.hidden,), alpha=penalty, max_iter=_MLP_EPOCHS, random_state=options.seed
        )
        with warnings.catch_warnings():
            # The number of epochs is part of the head, not a limit that it should not reach.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(rows, y, weights)
        pairs = zip(model.coefs_, model.intercepts_, strict=True)
        path.append([(w.T.astype(np.float64), b.astype(np.float64)) for w, b in pairs])
    return path
