"""From predictions and labels to all that is known of a split: metrics, intervals, experts, breakdowns."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from featdistill.command_line import UserError, nearest, progress
from featdistill.evaluation.bootstrap import Resampling, auc_interval
from featdistill.evaluation.breakdowns import Breakdowns
from featdistill.evaluation.experts import per_expert
from featdistill.evaluation.metrics import accuracies, best_threshold, headline, parts_of
from featdistill.records.labels import count_unreadable, join, label_rows, labelled, read_labels, source_of
from featdistill.records.predictions import read_predictions

BREAKDOWNS = (
    "generators",
    "distortions",
    "distortion_levels",
    "levels",
    "chain_lengths",
    "sources",
    "sizes",
)


@dataclass(frozen=True)
class Split:
    """The predicted images of a split whose label is known.

    Attributes:
        name: what its predictions file is called.
        predictions, labels: the two files.
        frame: as `labels.join` gives it; empty where no label is known.
        unreadable, unlabelled: how many images are left out, and why.
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
        labels: one file for each of `predictions`, one for all, or None: the manifests in the sidecars.

    Raises:
        UserError: the number of label files fits neither, two splits have one name, a prediction has no label
            row, a label row has no prediction, or no split has labels.
    """
    if labels and len(labels) not in (1, len(predictions)):
        raise UserError(
            f"{len(labels)} label files for {len(predictions)} predictions; give one for each or one for all"
        )
    names = [Path(path).stem for path in predictions]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two predictions files are called {name}; splits go by that name, rename one")
    sources = [
        source_of(path, labels[place % len(labels)] if labels else None)
        for place, path in enumerate(predictions)
    ]
    truths = {source: read_labels(source) for source in dict.fromkeys(sources)}
    frames = [read_predictions(path) for path in predictions]
    for path, frame in zip(predictions, frames, strict=True):
        if frame.empty:
            raise UserError(f"{path} holds a header and no rows; predict again")
    rows = [label_rows(frame, truths[source]) for frame, source in zip(frames, sources, strict=True)]
    shared = labels is not None and len(labels) == 1
    splits = []
    for name, path, source, frame, own in zip(names, predictions, sources, frames, rows, strict=True):
        # One label file may hold several splits: what a file with other images covers is not missing here.
        others = [other for other in rows if shared and not np.isin(other, own).any()]
        unreadable = count_unreadable(frame, truths[source], np.concatenate([own, *others]))
        joined = join(frame, truths[source], own)
        known = (joined["label"] >= 0).to_numpy()
        kept = joined[known].reset_index(drop=True)
        splits.append(Split(name, Path(path), source, kept, unreadable, int((~known).sum())))
    if all(split.frame.empty for split in splits):
        raise UserError(f"no split has labels: {', '.join(names)}; give their label files with --labels")
    return splits


def score_split(
    split: Split,
    resampling: Resampling,
    threshold: tuple[float, str] | None = None,
    pixel_free: dict | None = None,
) -> dict:
    """Return all that is known of a split with labels.

    Args:
        threshold: the value and the name of the images that it was chosen on.
        pixel_free: of `read_audit`; its AUC of a source is set beside ours as `pixel_free_auc`.

    Returns:
        `unreadable`, `unlabelled`, what `metrics.headline` returns, `intervals` (each of `metrics.AUCS` ->
        [low, high]), `threshold` (`value`, `chosen_on` and the accuracies at it), `experts` from
        `metrics.per_expert`, and `BREAKDOWNS`.
    """
    frame = split.frame
    label, score, is_distorted = (frame[name].to_numpy() for name in ("label", "score", "is_distorted"))
    result = {"unreadable": split.unreadable, "unlabelled": split.unlabelled}
    result |= headline(label, score, is_distorted)
    scores = {name: frame[f"expert {name}"].to_numpy() for name in frame.attrs["experts"]}
    # Only sets that take a while have a bar.
    steps = 2 + len(BREAKDOWNS)
    shown = len(frame) * resampling.draws > 10**8
    with progress(steps * len(frame), split.name, show=shown) as bar:
        for name, part in _parts(frame, label, score, is_distorted, scores, resampling):
            result[name] = part
            bar.update(len(frame))
    result["intervals"] = {**result["experts"]["ensemble"]["intervals"], "auc": list(result.pop("interval"))}
    if threshold is not None:
        value, chosen_on = threshold
        result["threshold"] = {"value": value, "chosen_on": chosen_on, **accuracies(label, score, value)}
    for name, row in result["sources"].items() if pixel_free else ():
        row["pixel_free_auc"] = pixel_free["sources"].get(name, {}).get("auc")
    return result


def choose_threshold(asked: list[str], splits: list[Split]) -> tuple[float, str]:
    """Return the threshold of the best balanced accuracy on other images, and what they are called.

    Args:
        asked: the name of one of the splits, or a predictions file and, unless its sidecar names them, its
            labels.

    Raises:
        UserError: there is no such split or file, or its images are of one class.
    """
    frames = {split.name: split.frame for split in splits}
    if len(asked) > 2:
        raise UserError("--threshold-from takes the name of a split, or predictions and their labels")
    if len(asked) == 1 and asked[0] in frames:
        frame = frames[asked[0]]
    elif len(asked) == 1 and not Path(asked[0]).is_file():
        raise UserError(
            f"--threshold-from: '{asked[0]}' is no file and no split{nearest(asked[0], frames)}; "
            f"the splits are {', '.join(frames)}"
        )
    else:
        frame = labelled(*asked)
    value = best_threshold(frame["label"].to_numpy(), frame["score"].to_numpy())
    if value is None:
        raise UserError(f"--threshold-from {asked[0]}: a threshold takes real and AI-generated images")
    return value, asked[0]


def read_audit(folder: str | Path) -> dict:
    """Return the pixel-free baseline of an audit: what files alone tell of the labels.

    Returns:
        `auc`, `low`, `high`, `verdict`, `images`, `telling` (features), `sources` (name -> `auc`, `low`,
        `high`), and `manifests`, what it was measured on.

    Raises:
        UserError: there is no `audit.json`, or it is none.
    """
    path = Path(folder) / "audit.json"
    if not path.is_file():
        raise UserError(f"--audit {folder} holds no audit.json; make one with python -m data_prep.audit")
    try:
        audit = json.loads(path.read_text(encoding="utf-8"))
        baseline = audit["baseline"]
        keys = ("auc", "low", "high", "verdict", "images", "telling")
        sources = {
            one["source"]: {key: one[key] for key in ("auc", "low", "high")} for one in baseline["sources"]
        }
        return {**{key: baseline[key] for key in keys}, "sources": sources, "manifests": audit["manifests"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no audit of data_prep.audit; make it again") from error


def official_metrics(splits: dict[str, dict]) -> dict[str, float | None]:
    """Return the challenge's metrics by its names.

    They come from the splits called val and val_hard; without them, from the only other split of its
    kind, if there is just one.
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


def _parts(
    frame: pd.DataFrame,
    label: np.ndarray,
    score: np.ndarray,
    is_distorted: np.ndarray,
    experts: dict[str, np.ndarray],
    resampling: Resampling,
) -> Iterator[tuple[str, object]]:
    overall = auc_interval(label, score, resampling)
    yield "interval", overall
    found = per_expert(label, score, is_distorted, experts, resampling)
    yield "experts", found
    breakdowns = Breakdowns(frame, resampling)
    for metric, bounds in {**found["ensemble"]["intervals"], "auc": overall}.items():
        breakdowns.remember(parts_of(is_distorted, len(label))[metric], bounds)
    for name in BREAKDOWNS:
        yield name, getattr(breakdowns, name)()
