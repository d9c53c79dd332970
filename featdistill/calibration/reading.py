"""The images to calibrate on: labeled predictions, or predictions of real images of a new place."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from featdistill import atomic
from featdistill.calibration.calibrator import made_for
from featdistill.command_line import UserError
from featdistill.evaluation.splits import label_sources
from featdistill.records.labels import join, label_rows, read_labels
from featdistill.records.logits import logits_of
from featdistill.records.parts import content_sha256
from featdistill.records.predictions import read_predictions, read_sidecar
from featdistill.records.provenance import differences
from featdistill.records.strata import column_strata

_log = logging.getLogger(__name__)
# The only stratum without `by`.
ALL = "all images"


@dataclass(frozen=True)
class Rows:
    """Images to calibrate on.

    Attributes:
        logits: (N,) float64.
        label: (N,) 0 or 1.
        group: (N,) images with the same value are never on both sides of a hold-out.
        stratum: (N,) name of the group that keeps the promise by itself.
        by: the columns that `stratum` is made of.
        made_for: see `Calibrator`.
        data: names and hashes of the files.
        assumes: what must hold for the promise beyond that images are like those here; may be empty.
    """

    logits: np.ndarray
    label: np.ndarray
    group: np.ndarray
    stratum: np.ndarray
    by: Sequence[str]
    made_for: dict[str, Any] | None
    data: list[dict[str, Any]]
    assumes: str = ""


def read_rows(
    predictions: Sequence[str],
    labels: list[str] | None,
    real: Sequence[str] = (),
    by: Sequence[str] = (),
) -> Rows:
    """Read predictions and their labels, or predictions of real images without labels.

    Args:
        labels: see `splits.label_sources`.
        real: predictions of images of a new place that are known, or assumed, to be real. They take the place
            of the real images of `predictions`, which may be empty.
        by: columns of the labels whose values are groups.

    Raises:
        UserError: a file or column cannot be used, the files are from different ensembles, scores are not
            probabilities, or there are no real images.
    """
    paths = [*predictions, *real]
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise UserError("a predictions file is named twice: its images would count twice")
    if real and by:
        raise UserError("--by needs the labels of the real images; leave it out with --without-labels")
    sources = label_sources(list(predictions), labels) if predictions else []
    parts, data, first = [], [], None
    for path, source in [*zip(predictions, sources, strict=True), *((path, None) for path in real)]:
        frame = read_predictions(path)
        if not frame["score"].between(0, 1).all():
            raise UserError(f"{path}: the scores are not probabilities; a calibrator needs P(AI) from 0 to 1")
        sidecar = made_for(read_sidecar(path))
        if sidecar is None:
            _log.warning("%s does not record its experts: scores of others will not be noticed", path)
        if parts and (changes := differences(first or {}, sidecar or {})):
            raise UserError(f"{path} and {paths[0]} are from different ensembles: {changes[0]}")
        first = sidecar
        used = {"predictions": Path(path).name, "predictions_sha256": atomic.sha256_of(path)}
        if source is None:
            frame = frame[["name", "score"]].assign(label=0, group="")
        else:
            truth = read_labels(source, by)
            frame = join(frame, truth, label_rows(frame, truth))
            frame = frame[frame["label"] == 1] if real else frame[frame["label"] >= 0]
            used |= {"labels": Path(source).name, "labels_sha256": content_sha256(source)}
        parts.append(frame.assign(file=str(path)).reset_index(drop=True))
        data.append(used | {"images": len(frame)})
    rows = pd.concat(parts, ignore_index=True)
    label = rows["label"].to_numpy(np.int64)
    if not (label == 0).any():
        raise UserError(f"{', '.join(paths)}: no real images; the promise is about them")
    group = rows["group"].where(rows["group"] != "", rows["file"] + ":" + rows["name"])
    strata = [_strata(rows, column, ", ".join(map(str, sources))) for column in by]
    stratum = [", ".join(cells) for cells in zip(*strata, strict=True)] if by else [ALL] * len(rows)
    assumes = ""
    if real:
        assumes = f"All images of {', '.join(Path(path).name for path in real)} are real"
        ai = "AI-generated images there score like those it was calibrated on"
        assumes += f", and {ai}." if label.any() else "."
    return Rows(
        logits_of(rows["score"].to_numpy(np.float64)),
        label,
        group.to_numpy(dtype=object),
        np.array(stratum, dtype=object),
        list(by),
        first,
        data,
        assumes,
    )


def _strata(rows: pd.DataFrame, column: str, where: str) -> list[str]:
    cells = column_strata(pd.DataFrame({column: rows[f"column {column}"]}), column, where)
    return [f"{column} {'unknown' if pd.isna(cell) else cell}" for cell in cells]
