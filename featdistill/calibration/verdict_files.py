"""Verdicts next to a predictions file: `scores.csv` -> `scores.verdicts.csv`, for people and spreadsheets.

The columns are `name`, `score`, `probability` (calibrated) and `verdict`, and for stability `copies`, `mean`,
`spread`, `flips` and `reversals` (see `featdistill.calibration.stability`), which are empty for an image
without copies. A JSON file of the same name plus `.json` says what they come from, and has the promise.
"""

from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np

from featdistill import atomic
from featdistill.calibration.calibrator import Calibrator
from featdistill.calibration.stability import Stability
from featdistill.records.logits import logits_of
from featdistill.records.predictions import read_predictions
from featdistill.records.provenance import Claim, claim, read_record

STABILITY_COLUMNS = ("copies", "mean", "spread", "flips", "reversals")


def verdicts_path(predictions: str | Path) -> Path:
    """Return the path of the verdicts for predictions: `val.csv` -> `val.verdicts.csv`."""
    path = Path(predictions)
    return path.with_name(f"{path.stem}.verdicts.csv")


def refuse_foreign(predictions: str | Path) -> None:
    """Raise a `UserError` if a foreign file is where verdicts would be; asked before images are scored."""
    out = verdicts_path(predictions)
    recorded = read_record(_record_of(out))
    claim(out, recorded, recorded or {}, occupied=out.exists(), remedy="remove it")


def write_verdicts(
    predictions: str | Path,
    calibrator: Calibrator | None,
    stability: Mapping[str, Stability] | None = None,
    made_from: Mapping[str, Any] | None = None,
) -> Path:
    """Write the verdicts of a predictions file, and return their path; finished ones are left alone.

    Args:
        predictions: the file.
        calibrator: without one there are no columns `probability` and `verdict`.
        stability: by name.
        made_from: what the stability was made from.

    Raises:
        UserError: there is a file that was made from something else.
    """
    out = verdicts_path(predictions)
    record = _record_of(out)
    requested: dict[str, Any] = {"predictions_sha256": atomic.sha256_of(Path(predictions))}
    if calibrator:
        requested |= calibrator.settings()
    if stability is not None:
        requested["stability"] = dict(made_from or {})
    recorded = read_record(record) if out.exists() else None
    state = claim(out, recorded, requested, finished=out.is_file(), occupied=out.exists(), remedy="remove it")
    if state is Claim.FINISHED:
        return out
    frame = read_predictions(predictions)
    logits = logits_of(frame["score"].to_numpy())
    columns: dict[str, list] = {"name": frame["name"].tolist(), "score": frame["score"].tolist()}
    if calibrator:
        columns["probability"] = calibrator.probability(logits).tolist()
        columns["verdict"] = calibrator.verdicts(logits).tolist()
    if stability is not None:
        known = [stability.get(name) for name in columns["name"]]
        values = [astuple(one) if one else ("",) * len(STABILITY_COLUMNS) for one in known]
        rows = [["" if value is None else value for value in row] for row in values]
        columns |= dict(zip(STABILITY_COLUMNS, zip(*rows, strict=True), strict=True)) if rows else {}
    atomic.write_json(record, requested)
    atomic.write_text(out, atomic.csv_text([*columns], zip(*columns.values(), strict=True)))
    return out


def _record_of(verdicts: Path) -> Path:
    return verdicts.with_name(f"{verdicts.name}.json")


def copies_path(predictions: str | Path) -> Path:
    """Return the path of the predictions for re-delivered copies: `val.csv` -> `val.copies.csv`."""
    path = Path(predictions)
    return path.with_name(f"{path.stem}.copies.csv")


def read_copies(predictions: str | Path) -> dict[str, np.ndarray]:
    """Return name -> P(AI) of the copies of each image that has some; empty without a file of them."""
    path = copies_path(predictions)
    if not path.is_file():
        return {}
    copies = read_predictions(path)
    groups = copies["score"].groupby(copies["name"].str.rpartition("#")[0], sort=False)
    return {name: group.to_numpy() for name, group in groups}
