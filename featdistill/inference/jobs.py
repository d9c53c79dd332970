"""From what is asked for to predictions files: which manifest goes to which file, and its scores."""

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
from featdistill.inference.journal import PartialScores, journal_headers, journal_path, score_resumably
from featdistill.inference.predictor import Predictor
from featdistill.inference.processes import Process, wait_for
from featdistill.models.expert import read_card
from featdistill.records.manifest import make_manifest, read_manifest, write_manifest
from featdistill.records.predictions import (
    difference,
    errors_path,
    manifest_entry,
    read_errors,
    read_sidecar,
    write_predictions,
)


@dataclass(frozen=True)
class Job:
    """A manifest to score and the predictions file to write."""

    manifest: Path
    out: Path


def predict(predictor: Predictor, job: Job, process: Process) -> int:
    """Score one manifest to one file, together with the other processes, going on from what is there.

    Returns:
        1 where images could not be read, else 0; in processes other than the main one always 0, since a
        launcher takes any other status for a failure and ends all of them.

    Raises:
        UserError: the manifest has no rows, or the file was made otherwise.
    """
    out = job.out
    rows = read_manifest(job.manifest)
    if rows.empty:
        raise UserError(f"manifest {job.manifest} has no rows")
    asked = predictor.sidecar() | {"manifest": manifest_entry(job.manifest, out)}
    if _is_finished(predictor, out, asked):
        return _say_finished(out, process)
    if out.is_file() and read_sidecar(out) is None and not journal_headers(out):
        raise UserError(f"{out} exists and was not made by this command; give another --out, or remove it")
    with full_memory_is_an_error():
        sidecar = _settled(predictor, out, asked, rows, process)
        if sidecar is None:
            return _say_finished(out, process)
        partial = PartialScores(out, sidecar, len(predictor.names), len(rows), process)
        models = predictor.models(sidecar["precision"], sidecar["batch_size"]) if partial.missing() else []
        dataset = predictor.dataset(rows)
        score_resumably(models, dataset, partial, job.manifest.stem, **predictor.settings())
    if not process.is_main:
        if _is_finished(predictor, out, asked):
            # The main process was faster, and did not need what was written here.
            partial.path.unlink(missing_ok=True)
        return 0
    broken = _write(predictor, out, rows["name"].to_numpy(dtype=object), partial, sidecar)
    partial.remove()
    return _report_broken(broken, out)


def _is_finished(predictor: Predictor, out: Path, asked: dict[str, Any]) -> bool:
    former = read_sidecar(out)
    if former is None:
        return False
    changed = difference(former, predictor.settle(asked, former))
    if changed:
        raise UserError(
            f"{out} was made otherwise: {changed}; give another --out, or remove it to predict anew"
        )
    return out.is_file()


def _say_finished(out: Path, process: Process) -> int:
    if not process.is_main:
        return 0
    print(f"{out} is finished; nothing to do")
    return _report_broken(read_errors(out), out)


def _settled(
    predictor: Predictor, out: Path, asked: dict[str, Any], rows: pd.DataFrame, process: Process
) -> dict[str, Any] | None:
    """Return the sidecar with nothing open; None where the predictions were finished in the meantime.

    The main process continues what a journal says, or else decides; the others wait for its journal.
    """

    def recorded(headers: list[dict[str, Any]]) -> dict[str, Any] | None:
        return next((header for header in headers if predictor.settle(asked, header) == header), None)

    mains = journal_path(out, Process(0, process.world))
    if process.is_main:
        headers = journal_headers(out)
        # Its own first: it is the one that the others go by.
        ordered = [headers[path] for path in sorted(headers, key=lambda path: (path != mains, path))]
        return recorded(ordered) or asked | predictor.decide(rows)
    if asked["batch_size"] is not None and asked["precision"] != "fp8":
        return asked

    def poll() -> dict[str, Any] | None:
        if _is_finished(predictor, out, asked):
            return {}
        return recorded([header for path, header in journal_headers(out).items() if path == mains])

    return wait_for(poll, f"what the main process settles for {out}") or None


def _write(
    predictor: Predictor, out: Path, names: np.ndarray, partial: PartialScores, sidecar: dict[str, Any]
) -> list[tuple[str, str]]:
    good = np.ones(len(names), bool)
    good[list(partial.broken)] = False
    broken = [(names[row], partial.broken[row]) for row in sorted(partial.broken)]
    logits = partial.logits[:, good]
    fused = predictor.fusion.apply(logits, predictor.names)
    single = dict(zip(predictor.names, probabilities(logits), strict=True))
    write_predictions(out, names[good].tolist(), fused, single, sidecar, broken)
    shown = f", mean P(AI) {fused.mean():.3f}" if len(fused) else ""
    print(f"{out}: {len(fused)} images scored{shown}")
    return broken


def _report_broken(broken: list[tuple[str, str]], out: Path) -> int:
    for name, reason in broken[:10]:
        print(f"could not be read: {name}: {reason}")
    if broken:
        print(f"{len(broken)} images could not be read; all of them are in {errors_path(out)}")
    return 1 if broken else 0


def split_manifests(splits: list[str], data: Path) -> list[Path]:
    """Return the manifests of splits by name.

    Raises:
        UserError: there is none; the nearest name is given.
    """
    manifests = [data / f"{split}.csv" for split in splits]
    for manifest in manifests:
        if not manifest.is_file():
            known = sorted(path.stem for path in data.glob("*.csv"))
            nearest = command_line.nearest(manifest.stem, known)
            raise UserError(f"no manifest {manifest}{nearest}; make it with data_prep, or give --data DIR")
    return manifests


def data_folder(expert: Path) -> Path:
    """Return the folder of the manifest an expert was trained on."""
    trained_on = read_card(expert).get("data", {}).get("train")
    if not trained_on:
        raise UserError(f"{expert} does not say what it was trained on; give --data DIR or --manifest FILE")
    return Path(trained_on[0]["path"]).parent


def images_of_folder(folder: Path) -> pd.DataFrame:
    """Return rows for the images of a folder; names are paths relative to it."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder")
    images = image_io.list_images(folder)
    if not images:
        raise UserError(f"{folder} holds no images ({', '.join(image_io.IMAGE_SUFFIXES)})")
    names = [image.relative_to(folder).as_posix() for image in images]
    return make_manifest({"image": [str(image.resolve()) for image in images], "name": names})


def images_by_path(paths: list[str]) -> pd.DataFrame:
    """Return rows for images given one by one; names are the paths as given, each once."""
    paths = list(dict.fromkeys(paths))
    return make_manifest({"image": [str(Path(path).absolute()) for path in paths], "name": paths})


def manifest_beside(rows: pd.DataFrame, out: Path, process: Process) -> Path:
    """Write the manifest of rows that have none beside their predictions, once for all processes."""
    path = out.with_suffix(".manifest.csv")
    if process.is_main:
        write_manifest(rows, path)
        return path
    columns = ["image", "name"]

    def is_written() -> bool | None:
        return (path.is_file() and read_manifest(path)[columns].equals(rows[columns])) or None

    wait_for(is_written, f"the manifest {path} of the main process")
    return path
