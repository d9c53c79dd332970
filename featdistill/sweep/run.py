"""A robustness sweep: each operation at each level on the same images, and the AUC that is left of it.

An item is one image in one cell (operation and level). Items are numbered image by image, so that a batch
holds cells of one image or a few, and a worker decodes each image once a batch; memory stays that of one
image and one batch. All cells share their images, so that differences between them are paired.

The scores of a sweep under way are in a journal beside `sweep.json`, from which the same command goes on.
"""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor
from torch.utils.data import Dataset

from featdistill import atomic
from featdistill.command_line import UserError
from featdistill.data.loading import Broken, load_image
from featdistill.data.preprocessing import InputKey, fit, prepare, to_planes
from featdistill.distortions.plan import Plan, apply_plan
from featdistill.evaluation.bootstrap import CONFIDENCE, Resampling, interval, model_draws
from featdistill.evaluation.metrics import roc_auc
from featdistill.images.reading import BrokenImage
from featdistill.inference.compute import full_memory_is_an_error
from featdistill.inference.journal import PartialScores, journal_headers, score_resumably
from featdistill.inference.predictor import Predictor, load_ensemble
from featdistill.records.manifest import read_manifest
from featdistill.records.predictions import difference, manifest_entry
from featdistill.sweep import plan as sweep_plan
from featdistill.sweep import tables as sweep_tables
from featdistill.sweep.plan import Cell, Sample


class SweepDataset(Dataset):
    """Images in cells: item `image * width + place`, place 0 the image as it is, then a place a cell.

    An item is a dict with `index` and `images`, a dict from `Preprocessing.key` to (3, S, S) uint8; or
    `Broken`.

    Args:
        rows: of a manifest.
        keys: the inputs wanted.
        cells: what is done to each image.
        seed: of the operations, with the name of the image and the cell.
        distort_at: `native` (the image as it is stored) or `input` (resized to each of the inputs).

    Attributes:
        width: items of an image.
    """

    def __init__(
        self,
        rows: pd.DataFrame,
        keys: Sequence[InputKey],
        cells: Sequence[Cell],
        seed: int = 0,
        distort_at: str = "native",
    ) -> None:
        self.images, self.names = rows["image"].tolist(), rows["name"].tolist()
        self.keys, self.cells, self.seed = list(dict.fromkeys(keys)), list(cells), seed
        self.at_input, self.width = distort_at == "input", 1 + len(cells)
        # The items of an image follow each other, so that one that has been decoded is enough.
        self._last: tuple[int, list[np.ndarray] | BrokenImage] | None = None

    def __len__(self) -> int:
        return len(self.images) * self.width

    def __getitem__(self, index: int) -> dict[str, Any] | Broken:
        image, place = divmod(index, self.width)
        step = self.cells[place - 1].step(self.seed, self.names[image]) if place else None
        plan = (step,) if step else ()
        try:
            sources = self._sources(image)
            if self.at_input:
                found = [_at_input(square, plan) for square in sources]
            else:
                distorted = apply_plan(sources[0], plan)
                found = [prepare(distorted, *key) for key in self.keys]
        except BrokenImage as error:
            return Broken(index, str(error))
        return {"index": index, "images": dict(zip(self.keys, found, strict=True))}

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
    """Make the sweep that the command line of `evaluate.py` asks for, and show and write what it found.

    It writes `sweep.json`, `sweep.csv` and `sweep.md`. A finished sweep is shown once more.

    Returns:
        1 where images could not be read, else 0.

    Raises:
        UserError: a value is wrong, or the folder holds another sweep.
    """
    cells, left_out = sweep_plan.choose_cells(args.libraries, args.operations, args.levels)
    for one in left_out:
        print(f"{one['operation']} is left out: it needs {one['missing']}")
    sample = sweep_plan.sample_rows(read_manifest(args.sweep), args.sample, args.seed)
    predictor = load_ensemble(
        args.experts or (),
        args.released,
        fusion=args.fusion or "probability_mean",
        device=args.device,
        precision=args.precision,
        batch_size=args.batch_size or "auto",
        workers=args.workers,
    )
    out, distort_at = Path(args.out) / "sweep.json", args.distort_at or "native"
    operations: dict[str, list[str]] = {}
    for cell in cells:
        names = operations.setdefault(cell.library, [])
        names += [] if cell.operation in names else [cell.operation]
    settings = {
        "operations": operations,
        "levels": sorted({cell.level for cell in cells}),
        "images": len(sample.rows),
        "distort_at": distort_at,
        "seed": args.seed,
        "draws": args.draws,
    }
    made_by = predictor.sidecar() | {"manifest": manifest_entry(args.sweep, out), "sweep": settings}
    result = _finished(predictor, out, made_by)
    if result is None:
        print(
            f"{len(sample.rows):,} images in {len(cells)} cells on {predictor.device} in "
            f"{predictor.precision}: {', '.join(predictor.sources)}"
        )
        resampling = Resampling(args.draws, args.seed)
        result = sweep(predictor, sample, cells, out, made_by, args.seed, distort_at, resampling, left_out)
    else:
        print(f"{out} is finished; this is what it holds")
    print(sweep_tables.summary(result), end="")
    rows = sweep_tables.csv_rows(result)
    atomic.write_text(out.with_suffix(".csv"), atomic.csv_text(sweep_tables.CSV_HEADER, rows))
    atomic.write_text(out.with_suffix(".md"), sweep_tables.markdown(result))
    return int(bool(result["unreadable"]))


def sweep(
    predictor: Predictor,
    sample: Sample,
    cells: Sequence[Cell],
    out: Path,
    made_by: dict[str, Any],
    seed: int = 0,
    distort_at: str = "native",
    resampling: Resampling = Resampling(),  # noqa: B008 (frozen)
    left_out: Sequence[dict[str, str]] = (),
) -> dict[str, Any]:
    """Score a sample in all cells, going on from the journal beside `out`, and write what was found to `out`.

    Args:
        out: `sweep.json`.
        made_by: what decides the result; the journal of another sweep is not read.
        seed, distort_at: see `SweepDataset`.
        left_out: operations that cannot be applied, for the record.

    Returns:
        What was written: what `measure` returns, and `images`, `real`, `ai`, `unlabelled`, `distorted`
        (counts), `unreadable` (a list of `name` and `reason`), `left_out`, `bootstrap` and `made_by`.

    Raises:
        UserError: no images of both classes could be read, or an expert's scores are no finite numbers.
    """
    with full_memory_is_an_error():
        headers = journal_headers(out).values()
        recorded = next((header for header in headers if predictor.settle(made_by, header) == header), None)
        made_by = recorded or made_by | predictor.decide(sample.rows)
        # In the order in which a journal gives it back, so that a continued sweep is written alike.
        made_by = json.loads(json.dumps(made_by, sort_keys=True))
        keys = [expert.preprocessing.key for expert in predictor.experts.values()]
        dataset = SweepDataset(sample.rows, keys, cells, seed, distort_at)
        partial = PartialScores(out, made_by, len(keys), len(dataset))
        settled = made_by["precision"], made_by["batch_size"]
        models = [] if partial.is_complete else predictor.models(*settled)
        score_resumably(models, dataset, partial, "sweep", **predictor.settings())
    # What is broken in one cell is left out of all: the cells are compared on the same images.
    reasons: dict[int, str] = {}
    for item in sorted(partial.broken):
        reasons.setdefault(item // dataset.width, partial.broken[item])
    names, good = sample.rows["name"].tolist(), np.ones(len(sample.rows), bool)
    good[list(reasons)] = False
    label = sample.rows["label"].to_numpy(dtype=np.int64)[good]
    if len(np.unique(label)) < 2:
        raise UserError(
            f"{len(reasons)} of {len(names)} images could not be read, and the others are of one class; "
            f"the first is {names[next(iter(reasons))]}: {next(iter(reasons.values()))}"
        )
    logits = partial.logits.reshape(len(keys), len(names), dataset.width)[:, good].transpose(0, 2, 1)
    for name, own in zip(predictor.names, logits, strict=True):
        if not np.isfinite(own).all():
            raise UserError(f"expert {name} gives scores that are no finite numbers; look at its weights")
    fused = predictor.fusion.apply(logits.reshape(len(keys), -1), predictor.names)
    single = dict(zip(predictor.names, logits, strict=True))
    result = {
        **measure(label, fused.reshape(logits.shape[1:]), single, cells, resampling),
        "images": len(label),
        "real": int((label == 0).sum()),
        "ai": int((label == 1).sum()),
        "unlabelled": sample.unlabelled,
        "distorted": sample.distorted,
        "unreadable": [{"name": names[row], "reason": reason} for row, reason in reasons.items()],
        "left_out": list(left_out),
        "bootstrap": {"draws": resampling.draws, "seed": resampling.seed, "confidence": CONFIDENCE},
        "made_by": made_by,
    }
    atomic.write_json(out, result)
    partial.remove()
    return result


def measure(
    label: np.ndarray,
    fused: np.ndarray,
    experts: dict[str, np.ndarray],
    cells: Sequence[Cell],
    resampling: Resampling,
) -> dict[str, Any]:
    """Return the AUC of every cell, and their means.

    All cells see the same images, and in each draw of the bootstrap the same ones of them.

    Args:
        label: (N,) 0 or 1, both there.
        fused: (1 + cells, N) scores; the first row is of the images as they are.
        experts: name -> (1 + cells, N) scores.

    Returns:
        `clean_auc`, `mean_robust_auc` (each cell counts the same) and `mean_drop` (the difference), each with
        its 95 % `..._interval`; `libraries`: name -> `mean_robust_auc` and `mean_robust_auc_interval`;
        `cells`: for each `library`, `operation`, `level`, `scale`, `auc`, `low`, `high`, `drop`, `drop_low`,
        `drop_high`, `n`, and `experts` (name -> AUC). Bounds are None without draws.
    """
    auc = np.array([roc_auc(label, row) for row in fused])
    draws = model_draws(label, fused, resampling)
    single = {name: [roc_auc(label, row) for row in rows] for name, rows in experts.items()}
    found = []
    for place, cell in enumerate(cells, start=1):
        (low, high), (drop_low, drop_high) = interval(draws[place]), interval(draws[0] - draws[place])
        found.append(
            {
                "library": cell.library,
                "operation": cell.operation,
                "level": cell.level,
                "scale": cell.scale,
                "auc": float(auc[place]),
                "low": low,
                "high": high,
                "drop": float(auc[0] - auc[place]),
                "drop_low": drop_low,
                "drop_high": drop_high,
                "n": len(label),
                "experts": {name: aucs[place] for name, aucs in single.items()},
            }
        )

    def mean_over(places: list[int]) -> dict[str, Any]:
        bounds = interval(draws[places].mean(axis=0))
        return {"mean_robust_auc": float(auc[places].mean()), "mean_robust_auc_interval": list(bounds)}

    everywhere = list(range(1, len(auc)))
    of_library: dict[str, list[int]] = {}
    for place, cell in enumerate(cells, start=1):
        of_library.setdefault(cell.library, []).append(place)
    drop = draws[0] - draws[everywhere].mean(axis=0)
    return {
        "clean_auc": float(auc[0]),
        "clean_auc_interval": list(interval(draws[0])),
        **mean_over(everywhere),
        "mean_drop": float(auc[0] - auc[everywhere].mean()),
        "mean_drop_interval": list(interval(drop)),
        "libraries": {library: mean_over(places) for library, places in of_library.items()},
        "clean_experts": {name: aucs[0] for name, aucs in single.items()},
        "cells": found,
    }


def _at_input(square: np.ndarray, plan: Plan) -> Tensor:
    distorted = apply_plan(square, plan)
    size = len(square)
    # Where the operation changed the size.
    return to_planes(distorted if distorted.shape == square.shape else fit(distorted, size, "squash"))


def _finished(predictor: Predictor, out: Path, made_by: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a finished sweep found; None where there is none.

    Raises:
        UserError: it is another one.
    """
    if not out.is_file():
        return None
    try:
        result = json.loads(out.read_text(encoding="utf-8"))
        former = result["made_by"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out} is no sweep of this command; give another --out, or remove it") from error
    changed = difference(former, predictor.settle(made_by, former))
    if changed:
        raise UserError(f"{out} was made otherwise: {changed}; give another --out, or remove it")
    return result
