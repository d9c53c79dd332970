"""What an audit of the same images says about an AUC: how much of it files or contents alone explain.

The pixel-free baseline (`audit.json`) sees no pixels. The content control (`audit.json` and `content.csv`)
sees the images reduced to a few pixels and enlarged again: what they show is left, traces of a generator are
not.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from featdistill.command_line import UserError
from featdistill.records.predictions import match_names, name_list, parse_csv, to_numbers
from featdistill.records.provenance import read_record


@dataclass(frozen=True)
class Content:
    """The content control of an audit.

    Attributes:
        facts: how it was measured: `side` in px, `backbone`, `feature`, `folds`, and its AUCs.
        path: of `content.csv`.
        table: its rows: `name`, `label` (0, 1, NaN unknown), `score` (P(AI) by a head that did not see them).
    """

    facts: dict
    path: Path
    table: pd.DataFrame


def read_audit(folder: str | Path) -> dict:
    """Return the pixel-free baseline of an audit: what the files alone tell about the labels.

    Returns:
        `auc`, `low`, `high`, `verdict`, `images`, `telling` (features), `sources` (name -> `auc`, `low`,
        `high`), and `manifests`, what it was measured on.

    Raises:
        UserError: there is no `audit.json`, or it was not written by data_prep.audit.
    """
    audit = _record(folder)
    try:
        baseline = audit["baseline"]
        keys = ("auc", "low", "high", "verdict", "images", "telling")
        sources = {
            one["source"]: {key: one[key] for key in ("auc", "low", "high")} for one in baseline["sources"]
        }
        return {**{key: baseline[key] for key in keys}, "sources": sources, "manifests": audit["manifests"]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{_path(folder)} was not written by data_prep.audit; run it again") from error


def read_content(folder: str | Path) -> Content | None:
    """Return the content control of an audit, or None for an audit without one.

    Raises:
        UserError: there is no `audit.json`, or `content.csv` is missing or has other columns or values.
    """
    facts, path = _record(folder).get("content"), Path(folder) / "content.csv"
    if facts is None:
        return None
    remedy = "run data_prep.audit with --content again"
    if not isinstance(facts, dict) or not isinstance(facts.get("side"), int):
        raise UserError(f"{_path(folder)}: content must be an object with the side in px; {remedy}")
    if not path.is_file():
        raise UserError(f"{path}, which belongs to audit.json, does not exist; {remedy}")
    header, rows = parse_csv(path.read_bytes(), str(path))
    if not {"name", "label", "score"} <= set(header):
        raise UserError(f"{path} must have the columns name,label,score, not {','.join(header)}; {remedy}")
    table = pd.DataFrame(rows, columns=header, dtype=object)
    label, score = (to_numbers(table[column]) for column in ("label", "score"))
    is_wrong = ~((np.isin(label, (0, 1)) | (table["label"] == "").to_numpy()) & np.isfinite(score))
    if is_wrong.any():
        raise UserError(
            f"{path}: label must be 0, 1 or empty and score a number, unlike those of "
            f"{name_list(table['name'][is_wrong])}; {remedy}"
        )
    return Content(facts, path, pd.DataFrame({"name": table["name"], "label": label, "score": score}))


def content_scores(content: Content, frame: pd.DataFrame) -> np.ndarray:
    """Return the content control's score of each image, (N,) float64; NaN for an image it does not have.

    Args:
        frame: `name` and `label` of labeled images.

    Raises:
        UserError: a name appears twice in `content.csv`, or its label is another one.
    """
    table = content.table
    rows = match_names(frame["name"].tolist(), table["name"].tolist())
    is_there = rows >= 0
    names, known = frame["name"].to_numpy(dtype=object)[is_there], table.iloc[rows[is_there]]
    twice = known["name"].isin(table["name"][table["name"].duplicated()]).to_numpy()
    if twice.any():
        raise UserError(
            f"{content.path}: names of several images: {name_list(names[twice])}; audit the manifest of "
            "these predictions alone"
        )
    differs = np.abs(known["label"].to_numpy() - frame["label"].to_numpy()[is_there]) > 0.5
    if differs.any():
        raise UserError(
            f"{content.path}: labels are not those of the predictions for {name_list(names[differs])}; audit "
            "the manifest that is evaluated"
        )
    scores = np.full(len(frame), np.nan)
    scores[is_there] = known["score"]
    return scores


def content_meaning(content: dict) -> str:
    """Return what the content control is, for a reader who does not know it."""
    return (
        f"The content control is the AUC of a classifier that sees the same images reduced to "
        f"{content['side']} px and enlarged again: what they show is left, traces of a generator are not. "
        "An AUC that does not exceed it does not show that a detector sees such traces."
    )


def pixel_free_meaning(baseline: dict) -> str:
    """Return what the AUC of the pixel-free baseline means for other AUCs."""
    if baseline["auc"] <= 0.5:
        return "no better than guessing"
    return "an AUC close to it says little about the pixels"


def _record(folder: str | Path) -> dict:
    audit = read_record(_path(folder))
    if audit is None:
        raise UserError(f"--audit: {folder} has no audit.json; make one with python -m data_prep.audit")
    return audit


def _path(folder: str | Path) -> Path:
    return Path(folder) / "audit.json"
