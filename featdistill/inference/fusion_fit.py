"""Fit the weights and temperatures of an ensemble on labeled predictions.

    python -m featdistill fuse --predictions val.csv --out fusion.json --method logit_mean

The result is a file for `predict.py --fusion`, which also states what the fit achieves on fitted and on
held-out rows.

The fit minimizes the log loss in two steps. Each expert alone gets the temperature that calibrates it; an
expert that is no better than chance at any temperature gets the weight 0. The others get weights >= 0 with
the penalty `strength * sum((w - mean(w))^2)`, which pulls them together; the strength is the one with the
lowest loss on held-out folds. For `logit_mean` the sum of the weights is free, and becomes part of the
temperatures. No intercept is fitted, because a `Fusion` has none: an expert whose logits are all shifted to
one side counts as a poor one, whatever its AUC.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedGroupKFold

from featdistill import __version__, atomic
from featdistill.command_line import UserError, counted
from featdistill.evaluation.metrics import roc_auc
from featdistill.evaluation.splits import label_sources
from featdistill.inference.fusion import FORMAT_VERSION, METHODS, Fusion
from featdistill.records import labels
from featdistill.records.logits import logits_of, probabilities
from featdistill.records.predictions import read_sidecar
from featdistill.text_tables import table

# For losses below log(2), from weights that are almost free to weights that are almost equal.
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class Labeled:
    """Labeled rows.

    Attributes:
        logits: (experts, N) float64.
        label: (N,) 0 or 1.
        group: (N,) of text.
        is_distorted: (N,) 1, 0, or -1 where it is unknown.
    """

    names: list[str]
    logits: np.ndarray
    label: np.ndarray
    group: np.ndarray
    is_distorted: np.ndarray

    def rows(self, mask: np.ndarray) -> "Labeled":
        """Return the rows of a mask (N,)."""
        columns = (self.label[mask], self.group[mask], self.is_distorted[mask])
        return Labeled(self.names, self.logits[:, mask], *columns)


@dataclass(frozen=True)
class Fitted:
    """The result of a fit on all rows.

    Attributes:
        temperature_alone: temperature that calibrates each expert alone; None if it is no better than chance.
        strength: of the pull to equal weights, with the lowest of `losses`, the mean held-out log losses.
        held_out: (N,) P(AI) of each row by a fusion that was fitted, strength included, without its `fold`.
    """

    fusion: Fusion
    temperature_alone: dict[str, float | None]
    strength: float
    losses: dict[float, float]
    held_out: np.ndarray
    fold: np.ndarray


def fit(rows: Labeled, method: str = "logit_mean", folds: int = 5, seed: int = 0) -> Fitted:
    """Fit temperatures and weights, and score each row with a fusion that was fitted without its fold.

    To score a fold, the strength is chosen by the losses on the other folds, with fits that leave out two.

    Raises:
        UserError: a label is in too few groups for the folds, of which there must be at least 3.
    """
    fold = assign_folds(rows, folds, seed)
    parts = [rows.rows(fold == number) for number in range(folds)]
    left_out = [frozenset(out) for count in (1, 2) for out in combinations(range(folds), count)]
    fusions = {out: fit_strengths(rows.rows(~np.isin(fold, list(out))), method) for out in left_out}

    def score(strength: float, number: int, *excluded: int) -> np.ndarray:
        return fusions[frozenset({number, *excluded})][strength].apply(parts[number].logits, rows.names)

    def choose(*excluded: int) -> tuple[float, dict[float, float]]:
        losses = {}
        for strength in STRENGTHS:
            numbers = [number for number in range(folds) if number not in excluded]
            each = [log_loss(parts[number].label, score(strength, number, *excluded)) for number in numbers]
            losses[strength] = float(np.mean(each))
        # The strongest among equals.
        return min(reversed(STRENGTHS), key=losses.__getitem__), losses

    held_out = np.empty(len(rows.label))
    for number in range(folds):
        held_out[fold == number] = score(choose(number)[0], number)
    strength, losses = choose()
    alone = [fit_temperature(logits, rows.label) for logits in rows.logits]
    fusion = fit_strengths(rows, method, (strength,))[strength]
    return Fitted(fusion, dict(zip(rows.names, alone, strict=True)), strength, losses, held_out, fold)


def fit_strengths(rows: Labeled, method: str, strengths: Sequence[float] = STRENGTHS) -> dict[float, Fusion]:
    """Return the fusion that fits the rows best, for each strength of the pull to equal weights."""
    alone = [fit_temperature(logits, rows.label) for logits in rows.logits]
    useful = np.array([temperature is not None for temperature in alone])
    temperature = np.array([1.0 if value is None else value for value in alone])
    if not useful.any():
        return dict.fromkeys(strengths, Fusion(method))
    calibrated = (rows.logits / temperature[:, None])[useful]
    fusions = {}
    for strength in strengths:
        weights = np.zeros(len(alone))
        weights[useful] = fit_weights(calibrated, rows.label, method, strength)
        total = weights.sum()
        # The weights of a `Fusion` have the sum 1: the rest is a matter of temperature.
        by_name = dict(zip(rows.names, (weights / total).tolist(), strict=True))
        divisors = dict(zip(rows.names, (temperature / total).tolist(), strict=True))
        fusions[strength] = Fusion(method, by_name, divisors)
    return fusions


def fit_temperature(logits: np.ndarray, label: np.ndarray) -> float | None:
    """Return the temperature that minimizes an expert's log loss; None if it is no better than chance.

    Better means by more than 0.5 log(N) in the likelihood of all N rows, the price of one parameter in the
    Bayesian information criterion. Otherwise the temperature of noise would be unbounded, and its weight
    meaningless. Both arguments are (N,).
    """
    size = float(np.abs(logits).mean())
    if size == 0:
        return None
    inverse = fit_weights(logits[None] / size, label, "logit_mean")[0]
    gain = math.log(2) - _cross_entropy(inverse * logits / size, _targets(label))
    return size / float(inverse) if gain * len(label) > 0.5 * math.log(len(label)) else None


def fit_weights(calibrated: np.ndarray, label: np.ndarray, method: str, strength: float = 0.0) -> np.ndarray:
    """Return the weights >= 0 of calibrated logits (experts, N) with the lowest penalized loss.

    For `probability_mean` their sum is 1; for `logit_mean` it is free.
    """
    count, target = len(calibrated), _targets(label)
    of_label = probabilities(np.where(label == 1, calibrated, -calibrated))

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        if method == "logit_mean":
            logit = weights @ calibrated
            value = _cross_entropy(logit, target)
            slope = calibrated @ (probabilities(logit) - target) / len(target)
        else:
            # The tiny number keeps rows finite on which all experts are certain and wrong.
            mean = weights @ of_label + np.finfo(np.float64).tiny
            value, slope = -np.log(mean).mean(), -(of_label / mean).mean(axis=1)
        away = weights - weights.mean()
        return value + strength * (away @ away), slope + 2 * strength * away

    sum_is_one = {"type": "eq", "fun": lambda weights: weights.sum() - 1}
    result = minimize(
        loss,
        np.full(count, 1 / count),
        jac=True,
        method="SLSQP",
        bounds=[(0, None)] * count,
        constraints=() if method == "logit_mean" else sum_is_one,
        options={"ftol": 1e-12, "maxiter": 1000},
    )
    return np.maximum(result.x, 0)


def _cross_entropy(logit: np.ndarray, target: np.ndarray) -> float:
    return float((np.logaddexp(0, logit) - target * logit).mean())


def _targets(label: np.ndarray) -> np.ndarray:
    """Return Platt's targets (1999, section 2.2), which keep the scale of a perfect expert finite."""
    ai = int((label == 1).sum())
    return np.where(label == 1, (ai + 1) / (ai + 2), 1 / (len(label) - ai + 2))


def assign_folds(rows: Labeled, folds: int, seed: int) -> np.ndarray:
    """Return the fold of each row, (N,): a group is in one fold, and labels are spread evenly.

    The order of the rows does not matter.

    Raises:
        UserError: a label is in too few groups for the folds.
    """
    for label in (0, 1):
        groups = len(set(rows.group[rows.label == label]))
        if groups < folds:
            raise UserError(
                f"label {label} is in {counted(groups, 'group')} of the labeled rows, too few for --folds "
                f"{folds}; use more rows, or fewer folds"
            )
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    fold = np.empty(len(rows.label), dtype=np.int64)
    for number, (_, held_out) in enumerate(splitter.split(rows.label, rows.label, rows.group)):
        fold[held_out] = number
        if len(set(rows.label[held_out])) < 2:
            raise UserError("a fold has images of one label only; use fewer folds, or another --seed")
    return fold


def read_labeled(
    predictions: list[str], label_files: list[str] | None
) -> tuple[Labeled, list[dict[str, Any]]]:
    """Read predictions of ours and the labels of their images, by name.

    Args:
        label_files: see `label_sources`.

    Returns:
        The labeled rows, and for each file of predictions the names and hashes of the files.

    Raises:
        UserError: the number of label files does not fit, the files have different experts, a column does not
            hold probabilities, or a name has no label.
    """
    if len({os.path.realpath(path) for path in predictions}) < len(predictions):
        raise UserError("a predictions file is named twice: its rows would count twice")
    parts, files = [], []
    for path, source in zip(predictions, label_sources(predictions, label_files), strict=True):
        part = labels.labeled(path, source)
        parts.append(part)
        experts, first = (", ".join(sorted(frame.attrs["experts"])) for frame in (part, parts[0]))
        if experts != first:
            raise UserError(f"{path} has the experts {experts}, {predictions[0]} has {first}")
        for name in part.attrs["experts"]:
            if not part[f"expert {name}"].between(0, 1).all():
                raise UserError(f"{path}: column {name} has numbers outside [0, 1], not probabilities")
        used = {"predictions": Path(path).name, "predictions_sha256": atomic.sha256_of(path)}
        used |= {"labels": source.name, "labels_sha256": atomic.sha256_of(source)}
        files.append(used | {"experts": (read_sidecar(path) or {}).get("experts")})
    names = parts[0].attrs["experts"]
    if len(names) < 2:
        raise UserError(f"{predictions[0]} has columns of {counted(len(names), 'expert')}; a fit needs two")
    rows = pd.concat(parts, ignore_index=True)
    # A row without a group is its own group, as in a hold-out.
    group = rows["group"].where(rows["group"] != "", "name:" + rows["name"])
    logits = logits_of(rows[[f"expert {name}" for name in names]].to_numpy(dtype=np.float64).T)
    label, is_distorted = (rows[name].to_numpy(np.int64) for name in ("label", "is_distorted"))
    return Labeled(names, logits, label, group.to_numpy(dtype=object), is_distorted), files


def report(rows: Labeled, fitted: Fitted, files: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Return the fusion and what it achieves as plain JSON, which `fusion.read_fusion` reads.

    `scores` has AUC and log loss of each expert, of both equal means, and of the fit on the fitted and on the
    held-out rows; `held_out_gain` is the mean gain in AUC over the better equal mean on the held-out folds.
    """
    method = fitted.fusion.method
    equal = {name: Fusion(name).apply(rows.logits, rows.names) for name in METHODS}
    score = {name: probabilities(logits) for name, logits in zip(rows.names, rows.logits, strict=True)}
    score |= {f"{name}, equal weights": value for name, value in equal.items()}
    score[f"{method}, fitted, the same rows"] = fitted.fusion.apply(rows.logits, rows.names)
    score[f"{method}, fitted, held-out rows"] = fitted.held_out
    frame = pd.DataFrame({**equal, "fitted": fitted.held_out, "label": rows.label})
    folds = []
    for _, part in frame.groupby(fitted.fold):
        aucs = {f"{name}_auc": roc_auc(part["label"], part[name]) for name in (*METHODS, "fitted")}
        folds.append({"rows": len(part), **aucs})
    rival = max(METHODS, key=lambda name: np.mean([fold[f"{name}_auc"] for fold in folds]))
    gains = [fold["fitted_auc"] - fold[f"{rival}_auc"] for fold in folds]
    error = float(np.std(gains, ddof=1) / math.sqrt(len(gains)))
    return {
        "version": FORMAT_VERSION,
        **fitted.fusion.describe(),
        "temperature_alone": fitted.temperature_alone,
        "fitted_on": {"rows": len(rows.label), "ai": int(rows.label.sum()), "files": files},
        "strength": fitted.strength,
        "held_out_log_loss": [{"strength": key, "loss": loss} for key, loss in fitted.losses.items()],
        "seed": seed,
        "folds": folds,
        "held_out_gain": {"over": rival, "auc": float(np.mean(gains)), "standard_error": error},
        "scores": {
            name: {"auc": roc_auc(rows.label, value), "log_loss": float(log_loss(rows.label, value))}
            for name, value in score.items()
        },
        "featdistill": __version__,
    }


def score_table(content: dict[str, Any]) -> str:
    """Return the scores of a `report` as a table; `alone` means the temperature of an expert alone."""
    alone = content["temperature_alone"]
    rows = []
    for name, score in content["scores"].items():
        cells = [name, f"{score['auc']:.5f}", f"{score['log_loss']:.4f}", "", "", ""]
        if name in alone:
            weight = (content["weights"] or {}).get(name, 1 / len(alone))
            divisor = (content["temperature"] or {}).get(name, 1.0)
            cells[3:5] = f"{weight:.3f}", f"{divisor:.4g}"
            cells[5] = "none" if alone[name] is None else f"{alone[name]:.4g}"
        rows.append(cells)
    return table(("", "AUC", "log loss", "weight", "temperature", "alone"), rows)
