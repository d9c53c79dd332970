"""From a request to predictions files: which manifest goes to which file, and its scores."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from featdistill import command_line
from featdistill.command_line import UserError
from featdistill.images import reading as image_io
from featdistill.inference.compute import full_memory_is_an_error
from featdistill.inference.fusion import probabilities
from featdistill.inference.journal import PartialScores, journal_headers, score_resumably
from featdistill.inference.predictor import Predictor
from featdistill.inference.processes import Processes
from featdistill.models.expert import read_card
from featdistill.records.manifest import make_manifest, read_manifest
from featdistill.records.predictions import (
    errors_path,
    manifest_entry,
    read_errors,
    read_sidecar,
    write_predictions,
)
from featdistill.records.provenance import Claim, claim

_log = logging.getLogger(__name__)
_MAX_SHOWN = 10


@dataclass(frozen=True)
class Job:
    """A manifest to score and the predictions file to write."""

    manifest: Path
    out: Path


def predict(predictor: Predictor, job: Job, processes: Processes) -> int:
    """Score a manifest to a file, together with the other processes, continuing what is there.

    Returns:
        1 if some images could not be read, else 0.

    Raises:
        UserError: the manifest has no rows, or the file was produced with different settings.
    """
    rows = processes.together(lambda: _read_rows(job.manifest))
    state, sidecar = processes.on_main(
        lambda: claim_scores(
            predictor,
            job.out,
            predictor.sidecar() | {"manifest": manifest_entry(job.manifest, job.out)},
            read_sidecar(job.out),
            rows,
        )
    )
    if state is Claim.FINISHED:
        return processes.on_main(lambda: _report(job.out, "finished; nothing to do"))
    partial = processes.together(
        lambda: PartialScores(
            job.out, sidecar, len(predictor.names), len(rows), processes.rank, processes.world
        )
    )
    missing = processes.on_main(partial.missing)
    share = missing[processes.rank :: processes.world]
    processes.together(lambda: _score(predictor, rows, partial, share, job.manifest.stem, processes.is_main))
    return processes.on_main(lambda: _write(predictor, rows, partial))


def _read_rows(manifest: Path) -> pd.DataFrame:
    rows = read_manifest(manifest)
    if rows.empty:
        raise UserError(f"manifest {manifest} has no rows")
    return rows


def claim_scores(
    predictor: Predictor,
    out: Path,
    requested: dict[str, Any],
    recorded: dict[str, Any] | None,
    rows: pd.DataFrame,
    ignore: Sequence[str] = (),
) -> tuple[Claim, dict[str, Any]]:
    """Return what is at an output, and what it is made from, with nothing left open.

    Args:
        requested: what it would be made from now.
        recorded: what it was made from; None where it does not say.
        rows: what will be scored.
        ignore: as in `claim`.
    """
    exists, journals = out.is_file(), journal_headers(out).values()
    finished = recorded is not None and exists
    if recorded is None:
        recorded = next(
            (header for header in journals if predictor.settle(requested, header) == header), None
        )
    settled = predictor.settle(requested, recorded)
    occupied = exists and not journals
    state = claim(out, recorded, settled, finished=finished, occupied=occupied, ignore=ignore)
    if state is Claim.NEW:
        with full_memory_is_an_error():
            settled |= predictor.decide(rows)
    return state, settled


def _score(
    predictor: Predictor, rows: pd.DataFrame, partial: PartialScores, share: list[int], title: str, show: bool
) -> None:
    if not share:
        return
    with full_memory_is_an_error():
        models = predictor.models(partial.sidecar["precision"], partial.batch_size)
        dataset, settings = predictor.dataset(rows), predictor.settings()
        score_resumably(models, dataset, partial, title, batches=share, show=show, **settings)


def _write(predictor: Predictor, rows: pd.DataFrame, partial: PartialScores) -> int:
    """Write the predictions from all journals, and remove the journals."""
    partial.refresh()
    if not partial.is_complete:
        raise UserError(
            f"{len(partial.missing())} batches of {partial.out} are missing; its folder must be the same for "
            "all processes; run the same command again to continue"
        )
    names = rows["name"].to_numpy(dtype=object)
    errors = [(names[row], reason) for row, reason in sorted(partial.broken.items())]
    good = np.delete(np.arange(len(names)), list(partial.broken))
    logits = partial.logits[:, good]
    fused = predictor.fusion.apply(logits, predictor.names)
    single = dict(zip(predictor.names, probabilities(logits), strict=True))
    write_predictions(partial.out, names[good].tolist(), fused, single, partial.sidecar, errors)
    partial.remove()
    mean = f", mean P(AI) {fused.mean():.3f}" if len(fused) else ""
    return _report(partial.out, f"{len(fused)} images scored{mean}")


def _report(out: Path, what: str) -> int:
    """Log what was done and which images could not be read; return the exit status."""
    _log.info("%s: %s", out, what)
    errors = read_errors(out)
    for name, reason in errors[:_MAX_SHOWN]:
        _log.info("could not be read: %s: %s", name, reason)
    if errors:
        _log.info("%d images could not be read; all of them are in %s", len(errors), errors_path(out))
    return 1 if errors else 0


def split_manifests(splits: list[str], data: Path) -> list[Path]:
    """Return the manifests of splits by name.

    Raises:
        UserError: there is none; the nearest name is suggested.
    """
    manifests = [data / f"{split}.csv" for split in splits]
    for manifest in manifests:
        if not manifest.is_file():
            known = sorted(path.stem for path in data.glob("*.csv"))
            nearest = command_line.nearest(manifest.stem, known)
            raise UserError(
                f"there is no manifest {manifest}{nearest}; make it with data_prep, or use --data DIR"
            )
    return manifests


def data_folder(expert: Path) -> Path:
    """Return the folder of the manifest an expert was trained on."""
    trained_on = read_card(expert).get("data", {}).get("train")
    if not trained_on:
        raise UserError(f"{expert} does not record its training manifest; use --data DIR or --manifest FILE")
    return Path(trained_on[0]["path"]).parent


def images_of_folder(folder: Path) -> pd.DataFrame:
    """Return rows for the images of a folder; names are paths relative to it."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    images = image_io.list_images(folder)
    if not images:
        raise UserError(f"{folder} contains no images ({', '.join(image_io.IMAGE_SUFFIXES)})")
    names = [image.relative_to(folder).as_posix() for image in images]
    return make_manifest({"image": [str(image.resolve()) for image in images], "name": names})


def images_by_path(paths: list[str]) -> pd.DataFrame:
    """Return rows for images given one by one; names are the paths as given, each once."""
    paths = list(dict.fromkeys(paths))
    return make_manifest({"image": [str(Path(path).absolute()) for path in paths], "name": paths})
