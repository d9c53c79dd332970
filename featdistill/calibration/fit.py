"""Fit a calibrator on labeled predictions, and check on held-out images what its promise becomes.

The thresholds are conformal, one per class and group, and the worst group decides: the highest threshold for
AI, the lowest for real. Where the threshold for real is above the one for AI, any one threshold between them
keeps both promises, and the middle is taken: no image needs to be unsure.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from featdistill import __version__
from featdistill.calibration.calibrator import PLATT, Calibrator, mapped, verdicts_of
from featdistill.calibration.conformal import images_needed, lower_threshold, upper_threshold
from featdistill.calibration.mapping import FITS
from featdistill.calibration.rates import calibration_error, verdict_rates
from featdistill.calibration.reading import ALL, Rows
from featdistill.command_line import UserError

FOLDS = 5
AS_THEY_ARE = "as they are"
# Numbers of the rows to fit on, and of those held out.
Fold = tuple[np.ndarray, np.ndarray]


def fit(rows: Rows, fpr: float, fnr: float | None = None, seed: int = 0) -> Calibrator:
    """Fit thresholds and probabilities.

    Args:
        fpr: the share of real images called AI that is promised, at most.
        fnr: the same for AI-generated images called real; by default `fpr`. Without AI-generated images there
            is no such promise.
        seed: of the folds that are held out.

    Raises:
        UserError: a class or group has too few images for its promise, or scores of real images are higher.
    """
    if fnr is not None and not rows.label.any():
        raise UserError("--fnr is a promise about AI-generated images, and there are none; leave it out")
    fnr = (fnr or fpr) if rows.label.any() else None
    everything = np.arange(len(rows.label))
    details = _thresholds(rows, everything, fpr, fnr)
    high, low = _decisive(details)
    folds = _folds(rows, seed)
    held_out = _held_out_probabilities(rows, folds)
    label = rows.label[[row for _, held in folds for row in held]]
    errors = {name: calibration_error(label, found) for name, found in held_out.items()}
    method, parameters = None, {}
    if rows.label.any():
        if FITS[PLATT](rows.logits, rows.label)["slope"] <= 0:
            raise UserError(
                "real images score higher than AI-generated ones; check the labels and the experts"
            )
        method = min(FITS, key=lambda name: errors[name]["log_loss"]) if errors else PLATT
        parameters = FITS[method](rows.logits, rows.label)
    facts = {
        "thresholds": details,
        "groups_of_images": len(set(rows.group)),
        "held_out_errors": errors,
        "held_out": _held_out_rates(rows, folds, fpr, fnr),
        "assumes": rows.assumes,
        "seed": seed,
        "featdistill": __version__,
    }
    real, ai = (int((rows.label == label).sum()) for label in (0, 1))
    return Calibrator(
        rows.made_for, high, low, fpr, fnr, method, parameters, real, ai, list(rows.by), rows.data, facts
    )


def _thresholds(rows: Rows, chosen: np.ndarray, fpr: float, fnr: float | None) -> dict[str, dict]:
    """Return for each class `real` and `ai` and each of its groups `n` and `threshold`.

    Raises:
        UserError: a group has too few images.
    """
    result: dict[str, dict] = {}
    for side, label, rate, flag, cut in (
        ("real", 0, fpr, "--fpr", upper_threshold),
        ("ai", 1, fnr, "--fnr", lower_threshold),
    ):
        if rate is None:
            continue
        own = chosen[rows.label[chosen] == label]
        logits = pd.Series(rows.logits[own]).groupby(rows.stratum[own])
        sizes, needed = logits.size(), images_needed(rate)
        if len(sizes) == 0 or sizes.min() < needed:
            what = "real" if label == 0 else "AI-generated"
            few = "there are none" if len(sizes) == 0 else f"{sizes.idxmin()} has {sizes.min()}"
            each = " in each group" if rows.by else ""
            raise UserError(
                f"{flag} {rate:g} needs at least {needed} {what} images{each}; {few}; add images, "
                f"or promise a larger {flag}"
            )
        result[side] = {
            str(name): {"n": len(values), "threshold": cut(values.to_numpy(), rate)}
            for name, values in logits
        }
    return result


def _decisive(details: dict[str, dict]) -> tuple[float, float | None]:
    """Return the thresholds for AI and for real: of the worst groups, and one where the two have crossed."""
    high = max(one["threshold"] for one in details["real"].values())
    if "ai" not in details:
        return high, None
    low = min(one["threshold"] for one in details["ai"].values())
    return (high, low) if low <= high else ((low + high) / 2,) * 2


def _folds(rows: Rows, seed: int) -> list[Fold]:
    """Return the row numbers of each fold's rest and held-out part; none where there are too few groups."""
    groups = [len(set(rows.group[rows.label == label])) for label in np.unique(rows.label)]
    if (count := min(FOLDS, *groups)) < 2:
        return []
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    folds = list(splitter.split(rows.logits, rows.label, rows.group))
    return [fold for fold in folds if len(set(rows.label[fold[0]])) == len(groups)]


def _held_out_probabilities(rows: Rows, folds: Sequence[Fold]) -> dict[str, np.ndarray]:
    """Return P(AI) of held-out images, fold by fold: `as they are` and by each method; nothing without AI."""
    if not folds or not rows.label.any():
        return {}
    found = {
        name: [
            mapped(name, fit(rows.logits[rest], rows.label[rest]), rows.logits[held]) for rest, held in folds
        ]
        for name, fit in FITS.items()
    }
    found = {AS_THEY_ARE: [mapped(None, {}, rows.logits[held]) for _, held in folds]} | found
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _held_out_rates(rows: Rows, folds: Sequence[Fold], fpr: float, fnr: float | None) -> dict[str, Any]:
    """Return the rates of verdicts on images that the thresholds were not fitted on.

    Returns:
        `folds`; `rates`: name of the group, or `ALL` -> `verdict_rates`. Or a `reason` why it was not.
    """
    if not folds:
        return {"reason": "there are too few groups of images to hold some out"}
    label, verdicts = [], []
    for rest, held in folds:
        try:
            high, low = _decisive(_thresholds(rows, rest, fpr, fnr))
        except UserError as error:
            return {"reason": f"with a fold held out, {error}"}
        label.append(rows.label[held])
        verdicts.append(verdicts_of(rows.logits[held], high, low))
    labels, found = np.concatenate(label), np.concatenate(verdicts)
    stratum = rows.stratum[np.concatenate([held for _, held in folds])]
    parts = {ALL: np.arange(len(labels))} | pd.Series(stratum).groupby(stratum).indices
    return {
        "folds": len(folds),
        "rates": {str(name): verdict_rates(labels[part], found[part]) for name, part in parts.items()},
    }
