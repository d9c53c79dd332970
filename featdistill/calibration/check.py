"""What a calibrator's promise became on the labeled images of a split: `evaluate.py --calibrator`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from featdistill.calibration.calibrator import AI, REAL, Calibrator, share
from featdistill.calibration.rates import calibration_error, verdict_rates
from featdistill.calibration.stability import flip_rates, flip_sentence
from featdistill.calibration.verdict_files import copies_path, read_copies
from featdistill.command_line import UserError, counted
from featdistill.evaluation.metrics import are_probabilities
from featdistill.evaluation.splits import Split
from featdistill.records.logits import logits_of, probabilities
from featdistill.records.predictions import read_sidecar
from featdistill.records.strata import strata

_TITLES = {"fpr": ("real images", "called AI"), "fnr": ("AI-generated images", "called real")}
# More rows of a column cannot be read in a table.
_MAX_GROUPS = 100


def check_split(split: Split, calibrator: Calibrator, by: Sequence[str] = ()) -> dict[str, Any]:
    """Return the verdicts' rates on a split.

    Args:
        by: further columns, read with the split, to give the rates of their groups.

    Returns:
        `promise`; `promised`: `fpr` and `fnr`; `fpr`, `fnr` and `unsure`, see `rates.verdict_rates`;
        `coverage`, the share decided, and `decided_right`, the share of those whose verdict is right (None
        if none is decided); `before` and `after`, see `rates.calibration_error`; `groups`: column -> group ->
        the rates; `flips`: of re-delivered copies, see `stability.flip_rates`, or None where
        `predict.py --stability` has left none; `sentences`: what became of the promise, in words.

    Raises:
        UserError: the scores are from another ensemble or are not probabilities.
    """
    calibrator.check(read_sidecar(split.predictions), str(split.predictions))
    frame = split.frame
    label, score = frame["label"].to_numpy(), frame["score"].to_numpy(np.float64)
    if not are_probabilities(score):
        raise UserError(f"{split.predictions}: the scores are not probabilities; --calibrator needs P(AI)")
    logits = logits_of(score)
    verdicts = calibrator.verdicts(logits)
    rates = verdict_rates(label, verdicts)
    decided = np.isin(verdicts, (AI, REAL))
    copies = read_copies(split.predictions)
    flips, near = None, False
    if copies:
        path = copies_path(split.predictions)
        made_from = read_sidecar(path) or {}
        calibrator.check(made_from, str(path))
        near = "near" in made_from.get("redelivery", {})
        known = frame[frame["name"].isin(copies)]
        own = [copies[name] for name in known["name"]]
        flips = flip_rates(known["score"].to_numpy(np.float64), own, calibrator)
    right = (verdicts == AI) == (label == 1)
    return {
        "promise": calibrator.promise(),
        "promised": {"fpr": calibrator.fpr, "fnr": calibrator.fnr},
        **rates,
        "coverage": float(decided.mean()),
        "decided_right": float(right[decided].mean()) if decided.any() else None,
        "before": calibration_error(label, probabilities(logits)),
        "after": calibration_error(label, calibrator.probability(logits)),
        "groups": {column: _rates_of(cells, label, verdicts) for column, cells in _groups(frame, by).items()},
        "sentences": [*sentences(rates, calibrator), *([flip_sentence(flips, near)] if flips else [])],
        "flips": flips,
    }


def sentences(rates: Mapping[str, dict], calibrator: Calibrator) -> list[str]:
    """Return for each promise whether the rate found keeps it, breaks it, or cannot tell."""
    result = []
    for key, promised in (("fpr", calibrator.fpr), ("fnr", calibrator.fnr)):
        found, (images, wrong) = rates[key], _TITLES[key]
        if promised is None or found["rate"] is None:
            continue
        rate, low, high = (f"{100 * found[key]:.1f} %" for key in ("rate", "low", "high"))
        text = f"{rate} of {counted(found['n'], images[:-1])} are {wrong} (95 %: {low} to {high}), "
        text += f"{share(promised)} was promised"
        if found["low"] > promised:
            text = f"The promise fails here: {text}. These images are not like those it was calibrated on."
        elif found["high"] <= promised:
            text = f"The promise holds here: {text}."
        else:
            text = f"Within chance of the promise: {text}."
        result.append(text)
    return result


def _groups(frame: pd.DataFrame, by: Sequence[str]) -> dict[str, pd.Series]:
    """Return column -> the group of each image, for `is_distorted`, `source` and further columns."""
    columns = {"is_distorted": frame["is_distorted"].map({0: "clean", 1: "distorted"})}
    columns["source"] = frame["source"].where(frame["source"] != "")
    columns |= {column: strata(frame[f"column {column}"]) for column in by if column not in columns}
    return {column: cells for column, cells in columns.items() if 1 < cells.nunique() <= _MAX_GROUPS}


def _rates_of(cells: pd.Series, label: np.ndarray, verdicts: np.ndarray) -> dict[str, dict]:
    groups = cells.groupby(cells, observed=True).indices
    return {str(name): verdict_rates(label[rows], verdicts[rows]) for name, rows in groups.items()}
