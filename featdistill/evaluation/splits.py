"""From predictions and labels to the result of a split: metrics, intervals, experts, breakdowns."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from featdistill.command_line import UserError, nearest
from featdistill.evaluation.breakdowns import breakdowns
from featdistill.evaluation.experts import per_expert
from featdistill.evaluation.intervals import auc_interval
from featdistill.evaluation.metrics import accuracies, best_threshold, headline
from featdistill.records.labels import count_unreadable, join, label_rows, labeled, read_labels, source_of
from featdistill.records.predictions import read_predictions
from featdistill.records.provenance import read_record


@dataclass(frozen=True)
class Split:
    """The predicted images of a split whose label is known.

    Attributes:
        name: the name of its predictions file, without extension.
        predictions, labels: the two files.
        frame: of `labels.join`; empty where no label is known.
        unreadable, unlabelled: how many images are left out because they could not be read or have no label.
    """

    name: str
    predictions: Path
    labels: Path
    frame: pd.DataFrame
    unreadable: int = 0
    unlabelled: int = 0


def load_splits(predictions: list[str], labels: list[str] | None = None) -> list[Split]:
    """Read predictions files and their labels.

    Args:
        labels: see `label_sources`.

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
    truths = {source: read_labels(source) for source in dict.fromkeys(sources)}
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
    split: Split, threshold: tuple[float, str] | None = None, pixel_free: dict | None = None
) -> dict:
    """Return the result of a split with labels.

    Args:
        threshold: its value and the name of the images that it was chosen on.
        pixel_free: of `read_audit`; its AUC of each source is added as `pixel_free_auc`.

    Returns:
        `unreadable`, `unlabelled`, what `metrics.headline` returns, `intervals` (each of `metrics.AUCS` ->
        [low, high]), `threshold` (`value`, `chosen_on` and the accuracies at it), `experts` from
        `metrics.per_expert`, and those of `breakdowns`.
    """
    frame = split.frame
    label, score, is_distorted = (frame[name].to_numpy() for name in ("label", "score", "is_distorted"))
    scores = {name: frame[f"expert {name}"].to_numpy() for name in frame.attrs["experts"]}
    experts = per_expert(label, score, is_distorted, scores)
    result = {
        "unreadable": split.unreadable,
        "unlabelled": split.unlabelled,
        **headline(label, score, is_distorted),
        "experts": experts,
        **breakdowns(frame),
        "intervals": {**experts["ensemble"]["intervals"], "auc": list(auc_interval(label, score)[1:])},
    }
    if threshold is not None:
        value, chosen_on = threshold
        result["threshold"] = {"value": value, "chosen_on": chosen_on, **accuracies(label, score, value)}
    if pixel_free:
        for name, row in result["sources"].items():
            row["pixel_free_auc"] = pixel_free["sources"].get(name, {}).get("auc")
    return result


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


def read_audit(folder: str | Path) -> dict:
    """Return the pixel-free baseline of an audit: what the files alone tell about the labels.

    Returns:
        `auc`, `low`, `high`, `verdict`, `images`, `telling` (features), `sources` (name -> `auc`, `low`,
        `high`), and `manifests`, what it was measured on.

    Raises:
        UserError: there is no `audit.json`, or it was not written by data_prep.audit.
    """
    path = Path(folder) / "audit.json"
    audit = read_record(path)
    if audit is None:
        raise UserError(f"--audit: {folder} has no audit.json; make one with python -m data_prep.audit")
    try:
        baseline = audit["baseline"]
        keys = ("auc", "low", "high", "verdict", "images", "telling")
        sources = {
            one["source"]: {key: one[key] for key in ("auc", "low", "high")} for one in baseline["sources"]
        }
        return {**{key: baseline[key] for key in keys}, "sources": sources, "manifests": audit["manifests"]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} was not written by data_prep.audit; run it again") from error


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
