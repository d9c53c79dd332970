"""From predictions and labels to the result of a split: metrics, intervals, experts, breakdowns."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from featdistill.command_line import UserError, nearest
from featdistill.evaluation.audits import Content, content_scores
from featdistill.evaluation.breakdowns import breakdowns
from featdistill.evaluation.experts import per_expert
from featdistill.evaluation.intervals import auc_interval
from featdistill.evaluation.metrics import accuracies, best_threshold, headline, parts_of
from featdistill.evaluation.stratified import auc_row, count_pairs, next_to
from featdistill.records.labels import count_unreadable, join, label_rows, labeled, read_labels, source_of
from featdistill.records.predictions import read_predictions, read_sidecar
from featdistill.records.strata import column_strata

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """The predicted images of a split whose label is known.

    Attributes:
        name: the name of its predictions file, without extension.
        predictions, labels: the two files.
        frame: of `labels.join`; empty where no label is known.
        unreadable, unlabeled: how many images are left out because they could not be read or have no label.
    """

    name: str
    predictions: Path
    labels: Path
    frame: pd.DataFrame
    unreadable: int = 0
    unlabeled: int = 0


def load_splits(
    predictions: list[str], labels: list[str] | None = None, columns: Iterable[str] = ()
) -> list[Split]:
    """Read predictions files and their labels.

    Args:
        labels: see `label_sources`.
        columns: further columns of the labels to read; see `labels.read_labels`.

    Raises:
        UserError: as `label_sources`, two splits have the same name, a prediction has no label row, a label
            row has no prediction, or no split has labels.
    """
    sources = label_sources(predictions, labels)
    names = [Path(path).stem for path in predictions]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"two predictions files are called {name}; rename one, it is the name of its split"
            )
    truths = {source: read_labels(source, columns) for source in dict.fromkeys(sources)}
    frames = [read_predictions(path) for path in predictions]
    for path, frame in zip(predictions, frames, strict=True):
        if frame.empty:
            raise UserError(f"{path} has a header and no rows; predict again")
    rows = [label_rows(frame, truths[source]) for frame, source in zip(frames, sources, strict=True)]
    shared = labels is not None and len(labels) == 1
    splits = []
    for name, path, source, frame, covered in zip(names, predictions, sources, frames, rows, strict=True):
        # One label file may hold several splits: rows that a file with other images covers are not missing.
        others = [other for other in rows if shared and not np.isin(other, covered).any()]
        unreadable = count_unreadable(frame, truths[source], np.concatenate([covered, *others]))
        joined = join(frame, truths[source], covered)
        known = (joined["label"] >= 0).to_numpy()
        with_label = joined[known].reset_index(drop=True)
        splits.append(Split(name, Path(path), source, with_label, unreadable, int((~known).sum())))
    if all(split.frame.empty for split in splits):
        raise UserError(f"no split has labels: {', '.join(names)}; pass their label files with --labels")
    return splits


def label_sources(predictions: list[str], labels: list[str] | None) -> list[Path]:
    """Return the label file of each predictions file.

    Args:
        labels: one file for each of `predictions`, one for all, or None for the manifests in the sidecars.

    Raises:
        UserError: there is another number of label files, or a sidecar names no manifest.
    """
    if labels and len(labels) not in (1, len(predictions)):
        raise UserError(
            f"{len(labels)} label files for {len(predictions)} predictions; pass one for each or one for all"
        )
    files = [None] * len(predictions) if not labels else labels * (len(predictions) // len(labels))
    return [source_of(path, file) for path, file in zip(predictions, files, strict=True)]


def score_split(
    split: Split,
    threshold: tuple[float, str] | None = None,
    pixel_free: dict | None = None,
    *,
    content: Content | None = None,
    strata: str | None = None,
    by: Sequence[str] = (),
) -> dict:
    """Return the result of a split with labels.

    Args:
        threshold: its value and the name of the images that it was chosen on.
        pixel_free: of `read_audit`; its AUC of each source is added as `pixel_free_auc`.
        content: a control that is set next to every AUC, as `content`; see `stratified.next_to`.
        strata: a column; also the AUCs over the pairs within its strata.
        by: further columns to break the AUCs down by.

    Returns:
        `unreadable`, `unlabeled`, `made_from` (expert -> SHA-256 of its weights; None without a sidecar),
        what `metrics.headline` returns, `intervals` (each of `metrics.AUCS` -> [low, high]), `threshold`
        (`value`, `chosen_on` and the accuracies at it), `experts` from `experts.per_expert`, those of
        `breakdowns`, `content` (each of `metrics.AUCS` -> control) and
        `within_strata` (see `_within_strata`).

    Raises:
        UserError: a column cannot be used; see `records.strata`.
    """
    frame = split.frame
    label, score, is_distorted = (frame[name].to_numpy() for name in ("label", "score", "is_distorted"))
    control = None if content is None else content_scores(content, frame)
    if control is not None and np.isnan(control).all():
        _log.warning("%s: the content control of the audit has none of its images", split.name)
        control = None
    scores = {name: frame[f"expert {name}"].to_numpy() for name in frame.attrs["experts"]}
    experts = per_expert(label, score, is_distorted, scores, control)
    result = {
        "unreadable": split.unreadable,
        "unlabeled": split.unlabeled,
        "made_from": (read_sidecar(split.predictions) or {}).get("experts"),
        **headline(label, score, is_distorted),
        "experts": experts,
        **breakdowns(frame, control, {column: _strata_of(split, column) for column in by}),
        "intervals": {**experts["ensemble"]["intervals"], "auc": list(auc_interval(label, score)[1:])},
    }
    if control is not None:
        parts = parts_of(is_distorted, len(label))
        result["content"] = {
            name: next_to(label[rows], score[rows], control[rows]) for name, rows in parts.items()
        }
    if strata is not None:
        result["within_strata"] = _within_strata(split, strata, control)
    if threshold is not None:
        value, chosen_on = threshold
        result["threshold"] = {"value": value, "chosen_on": chosen_on, **accuracies(label, score, value)}
    if pixel_free:
        for name, row in result["sources"].items():
            row["pixel_free_auc"] = pixel_free["sources"].get(name, {}).get("auc")
    return result


def _strata_of(split: Split, column: str) -> pd.Series:
    rows = pd.DataFrame({column: split.frame[f"column {column}"]})
    return column_strata(rows, column, f"{split.labels} (images of {split.name})")


def _within_strata(split: Split, column: str, control: np.ndarray | None) -> dict:
    """Return the AUCs of a split over the pairs within the strata of a column.

    Returns:
        `column`; `unknown`: images whose stratum is not known; `metrics.AUCS` and for each expert, in
        `experts`, the same: `auc`, `low`, `high`, what `count_pairs` returns, and with a control `content`.
    """
    frame, strata = split.frame, _strata_of(split, column).cat.codes.to_numpy()
    label = frame["label"].to_numpy()
    parts = parts_of(frame["is_distorted"].to_numpy(), len(label))
    if not count_pairs(label, strata)["pairs"]:
        raise UserError(
            f"--strata {column}: no stratum of {split.name} holds real and AI-generated images; choose a "
            "column that both classes share"
        )

    def within(score: np.ndarray) -> dict:
        return {name: row(score[rows], rows) for name, rows in parts.items()}

    def row(score: np.ndarray, rows: np.ndarray) -> dict:
        result = auc_row(label[rows], score, strata[rows]) | count_pairs(label[rows], strata[rows])
        if control is not None:
            result["content"] = next_to(label[rows], score, control[rows], strata[rows])
        return result

    experts = {name: within(frame[f"expert {name}"].to_numpy()) for name in frame.attrs["experts"]}
    unknown = int((strata < 0).sum())
    return {"column": column, "unknown": unknown, **within(frame["score"].to_numpy()), "experts": experts}


def choose_threshold(chosen_on: list[str], splits: list[Split]) -> tuple[float, str]:
    """Return the threshold with the best balanced accuracy on other images, and their name.

    Args:
        chosen_on: the name of one of the splits, or a predictions file and, unless its sidecar names them,
            its labels.

    Raises:
        UserError: there is no such split or file, or its images are of one class.
    """
    frames = {split.name: split.frame for split in splits}
    name = chosen_on[0]
    if len(chosen_on) > 2:
        raise UserError("--threshold-from takes the name of a split, or predictions and their labels")
    if len(chosen_on) == 1 and name in frames:
        frame = frames[name]
    elif len(chosen_on) == 1 and not Path(name).is_file():
        raise UserError(
            f"--threshold-from: '{name}' is neither a file nor a split{nearest(name, frames)}; "
            f"the splits are {', '.join(frames)}"
        )
    else:
        frame = labeled(*chosen_on)
    value = best_threshold(frame["label"].to_numpy(), frame["score"].to_numpy())
    if value is None:
        raise UserError(f"--threshold-from {name}: choosing a threshold needs real and AI-generated images")
    return value, name


def official_metrics(splits: dict[str, dict]) -> dict[str, float | None]:
    """Return the challenge's metrics by its names.

    They are those of the splits val and val_hard, or where one is missing, of the only other split of its
    kind.
    """
    result = {}
    for suffix, is_hard in (("auc", False), ("hard_auc", True)):
        of_kind = {name: split for name, split in splits.items() if ("hard" in name) == is_hard}
        chosen = of_kind.get("val_hard" if is_hard else "val")
        if chosen is None and len(of_kind) == 1:
            chosen = next(iter(of_kind.values()))
        if chosen is not None:
            result.update({f"{kind}_{suffix}": chosen[f"{kind}_auc"] for kind in ("clean", "robust")})
    return result
