"""A robustness sweep: every operation at every level on the same images, and the AUC under each.

An item is one image in one cell (an operation at a level). Items are numbered image by image, so a worker
decodes each image once per batch, and memory stays that of one image and one batch. All cells share their
images, so differences between cells are paired.

The scores of an unfinished sweep are in a journal next to `sweep.json`; the same command continues from it.
"""

import json
import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor
from torch.utils.data import Dataset

from featdistill import atomic
from featdistill.command_line import UserError, counted
from featdistill.data.loading import Broken, load_image
from featdistill.data.preprocessing import InputKey, fit
from featdistill.data.views import PLAIN, View, cut_view, cut_views
from featdistill.distortions.plan import Plan, apply_plan
from featdistill.evaluation.intervals import METHOD, auc_bounds, auc_covariance, difference_bounds
from featdistill.evaluation.metrics import roc_auc
from featdistill.images.reading import BrokenImage
from featdistill.inference.flags import load_settings
from featdistill.inference.journal import PartialScores, claim_scores, score_resumably
from featdistill.inference.predictor import Predictor, load_ensemble
from featdistill.records.manifest import read_manifest
from featdistill.records.predictions import manifest_entry
from featdistill.records.provenance import Claim, read_record
from featdistill.sweep import plan as sweep_plan
from featdistill.sweep import tables as sweep_tables
from featdistill.sweep.plan import Cell, Sample

_log = logging.getLogger(__name__)


class SweepDataset(Dataset):
    """Images in cells: item `image * width` is the undistorted image, the next ones are it in each cell.

    An item is a dict with `index` and `images`, a dict from `View.key` of `Preprocessing.key` to (3, S, S)
    uint8; or `Broken`.

    Args:
        rows: of a manifest.
        keys: the inputs of the experts.
        cells: what is done to each image.
        seed: of the operations, with the name of the image and the cell.
        distort_at: `native` (at the stored size) or `input` (resized to each of the inputs).
        views: for test-time augmentation, cut after the operation.

    Attributes:
        width: items per image.
    """

    def __init__(
        self,
        rows: pd.DataFrame,
        keys: Sequence[InputKey],
        cells: Sequence[Cell],
        seed: int = 0,
        distort_at: str = "native",
        views: Sequence[View] = PLAIN,
    ) -> None:
        self.images, self.names = rows["image"].tolist(), rows["name"].tolist()
        self.keys, self.cells, self.seed = list(dict.fromkeys(keys)), list(cells), seed
        self.at_input, self.width, self.views = distort_at == "input", 1 + len(cells), tuple(views)
        # The items of an image follow each other, so keeping the last decoded image is enough.
        self._last: tuple[int, list[np.ndarray] | BrokenImage] | None = None

    def __len__(self) -> int:
        return len(self.images) * self.width

    def __getitem__(self, index: int) -> dict[str, Any] | Broken:
        image, position = divmod(index, self.width)
        step = self.cells[position - 1].step(self.seed, self.names[image]) if position else None
        plan = (step,) if step else ()
        try:
            sources = self._sources(image)
            if self.at_input:
                images = {}
                for key, square in zip(self.keys, sources, strict=True):
                    images |= _at_input(square, plan, key, self.views)
            else:
                images = cut_views(apply_plan(sources[0], plan), self.keys, self.views)
        except BrokenImage as error:
            return Broken(index, str(error))
        return {"index": index, "images": images}

    def _sources(self, image: int) -> list[np.ndarray]:
        """Return what the operations see: the decoded image, or it fitted to each of the inputs."""
        if self._last is None or self._last[0] != image:
            try:
                pixels = load_image(self.images[image], self.names[image])
                sources = [fit(pixels, *key) for key in self.keys] if self.at_input else [pixels]
            except BrokenImage as error:
                sources = error
            self._last = image, sources
        if isinstance(self._last[1], BrokenImage):
            raise self._last[1]
        return self._last[1]


def run(args: Namespace) -> int:
    """Make a sweep and write `sweep.json`, `sweep.csv` and `sweep.md`; a finished one is only shown.

    Args:
        args: of `evaluate.py sweep`.

    Returns:
        1 where images could not be read, else 0.

    Raises:
        UserError: a value is wrong, or the folder holds a sweep with other settings.
    """
    cells, left_out = sweep_plan.choose_cells(args.libraries, args.operations, args.levels)
    for one in left_out:
        _log.info("%s is left out: it needs %s", one["operation"], one["missing"])
    sample = sweep_plan.sample_rows(read_manifest(args.manifest), args.sample, args.seed)
    predictor = load_ensemble(args.experts, **load_settings(args))
    out = Path(args.out) / "sweep.json"
    operations: dict[str, list[str]] = {}
    for library, operation in dict.fromkeys((cell.library, cell.operation) for cell in cells):
        operations.setdefault(library, []).append(operation)
    settings = {
        "operations": operations,
        "levels": sorted({cell.level for cell in cells}),
        "images": len(sample.rows),
        "distort_at": args.distort_at,
        "seed": args.seed,
    }
    made_by = predictor.sidecar() | {"manifest": manifest_entry(args.manifest, out), "sweep": settings}
    result = read_record(out) or {}
    # Earlier versions also recorded the draws of a bootstrap.
    state, made_by = claim_scores(
        predictor, out, made_by, result.get("made_by"), sample.rows, ignore=["sweep.draws"]
    )
    if state is Claim.FINISHED:
        _log.info("%s: finished; nothing to do", out)
    else:
        where = f"{predictor.device} in {made_by['precision']}"
        count = f"{counted(len(sample.rows), 'image')} in {counted(len(cells), 'cell')}"
        _log.info("%s on %s: %s", count, where, ", ".join(predictor.sources))
        result = _sweep(predictor, sample, cells, out, made_by, left_out)
    print(sweep_tables.summary(result), end="")
    rows = sweep_tables.csv_rows(result)
    atomic.write_text(out.with_suffix(".csv"), atomic.csv_text(sweep_tables.CSV_HEADER, rows))
    atomic.write_text(out.with_suffix(".md"), sweep_tables.markdown(result))
    return int(bool(result["unreadable"]))


def measure(
    label: np.ndarray, fused: np.ndarray, experts: dict[str, np.ndarray], cells: Sequence[Cell]
) -> dict[str, Any]:
    """Return the AUC of every cell, and their means.

    Args:
        label: (N,) 0 or 1, both of them.
        fused: (1 + cells, N) scores; the first row is of the undistorted images.
        experts: name -> (1 + cells, N) scores.

    Returns:
        `clean_auc`, `mean_robust_auc` (all cells count the same) and `mean_drop` (their difference), each
        with its 95 % `..._interval`; `libraries`: name -> `mean_robust_auc` and `mean_robust_auc_interval`;
        `clean_experts`: name -> AUC; `cells`: for each `library`, `operation`, `level`, `scale`, `auc`,
        `low`, `high`, `drop`, `drop_low`, `drop_high`, `n`, and `experts` (name -> AUC).
    """
    auc = np.array([roc_auc(label, row) for row in fused])
    covariance = auc_covariance(label, fused)
    single = {name: [roc_auc(label, row) for row in rows] for name, rows in experts.items()}

    def summary(rows: list[int]) -> dict[str, float | None]:
        """Return the mean AUC over rows and its drop from the first row, with their intervals."""
        weights = np.isin(np.arange(len(auc)), rows) / len(rows)
        change = np.eye(len(auc))[0] - weights
        mean = float(auc[rows].mean())
        drop = float(auc[0] - mean)
        bounds = auc_bounds(mean, weights @ covariance @ weights)
        drop_bounds = difference_bounds(drop, change @ covariance @ change)
        return dict(zip(sweep_tables.FIGURES, (mean, *bounds, drop, *drop_bounds), strict=True))

    def robust(rows: list[int]) -> dict[str, Any]:
        mean = summary(rows)
        return {"mean_robust_auc": mean["auc"], "mean_robust_auc_interval": [mean["low"], mean["high"]]}

    rows_of: dict[str, list[int]] = {}
    measured = []
    for row, cell in enumerate(cells, start=1):
        rows_of.setdefault(cell.library, []).append(row)
        which = {"library": cell.library, "operation": cell.operation, "level": cell.level}
        aucs = {name: values[row] for name, values in single.items()}
        measured.append({**which, "scale": cell.scale, **summary([row]), "n": len(label), "experts": aucs})
    everywhere = list(range(1, len(auc)))
    clean, overall = summary([0]), summary(everywhere)
    return {
        "clean_auc": clean["auc"],
        "clean_auc_interval": [clean["low"], clean["high"]],
        **robust(everywhere),
        "mean_drop": overall["drop"],
        "mean_drop_interval": [overall["drop_low"], overall["drop_high"]],
        "libraries": {library: robust(rows) for library, rows in rows_of.items()},
        "clean_experts": {name: values[0] for name, values in single.items()},
        "cells": measured,
    }


def _sweep(
    predictor: Predictor,
    sample: Sample,
    cells: Sequence[Cell],
    out: Path,
    made_by: dict[str, Any],
    left_out: Sequence[dict[str, str]],
) -> dict[str, Any]:
    """Score a sample in all cells, continuing from the journal of `out`, and write the result to `out`.

    Args:
        made_by: what decides the result.
        left_out: operations that cannot be applied, for the record.

    Returns:
        What was written: what `measure` returns, `images`, `real`, `ai`, `unlabeled`, `distorted` (counts),
        `unreadable` (a list of `name` and `reason`), `left_out`, `intervals` and `made_by`.

    Raises:
        UserError: no images of both classes could be read, or an expert's scores are not finite.
    """
    # In the key order of a journal, so a continued sweep writes the same file.
    made_by = json.loads(json.dumps(made_by, sort_keys=True))
    keys = [expert.preprocessing.key for expert in predictor.experts.values()]
    settings = made_by["sweep"]
    dataset = SweepDataset(
        sample.rows, keys, cells, settings["seed"], settings["distort_at"], predictor.views
    )
    partial = PartialScores(out, made_by, len(keys), len(dataset))
    score_resumably(predictor, dataset, partial, "sweep")
    # An image that is broken in one cell is left out of all: the cells are compared on the same images.
    reasons: dict[int, str] = {}
    for item in sorted(partial.broken):
        reasons.setdefault(item // dataset.width, partial.broken[item])
    names, readable = sample.rows["name"].tolist(), np.ones(len(sample.rows), bool)
    readable[list(reasons)] = False
    label = sample.rows["label"].to_numpy(dtype=np.int64)[readable]
    if len(np.unique(label)) < 2:
        raise UserError(
            f"{len(reasons)} of {len(names)} images could not be read, and the others are of one class; "
            f"the first is {names[next(iter(reasons))]}: {next(iter(reasons.values()))}"
        )
    logits = partial.logits.reshape(len(keys), len(names), dataset.width)[:, readable].transpose(0, 2, 1)
    for name, scores in zip(predictor.names, logits, strict=True):
        if not np.isfinite(scores).all():
            raise UserError(f"the scores of expert {name} are not finite; check its weights")
    fused = predictor.fusion.apply(logits.reshape(len(keys), -1), predictor.names)
    single = dict(zip(predictor.names, logits, strict=True))
    result = {
        **measure(label, fused.reshape(logits.shape[1:]), single, cells),
        "images": len(label),
        "real": int((label == 0).sum()),
        "ai": int((label == 1).sum()),
        "unlabeled": sample.unlabeled,
        "distorted": sample.distorted,
        "unreadable": [{"name": names[row], "reason": reason} for row, reason in reasons.items()],
        "left_out": list(left_out),
        "intervals": METHOD,
        "made_by": made_by,
    }
    atomic.write_json(out, result)
    partial.remove()
    return result


def _at_input(square: np.ndarray, plan: Plan, key: InputKey, views: Sequence[View]) -> dict[tuple, Tensor]:
    # Some operations change the size.
    cuts = {view.key(key): view for view in views}
    distorted = apply_plan(square, plan)
    return {name: cut_view(distorted, len(square), "squash", view=view) for name, view in cuts.items()}
