"""From the command line of `predict.py` to scores: which manifest goes to which predictions file."""

import json
import logging
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch.utils.data import Dataset

from featdistill import command_line, remote_files
from featdistill.calibration import Calibrator
from featdistill.calibration.stability import (
    NEAR_LOGITS,
    PRESET,
    SEED,
    Request,
    Stability,
    check_request,
    copy_names,
    flip_rates,
    flip_sentence,
    is_near,
    parse_request,
    stability_of,
)
from featdistill.calibration.verdict_files import copies_path, read_copies, refuse_foreign, write_verdicts
from featdistill.command_line import UserError, counted
from featdistill.data.loading import ScoreDataset
from featdistill.distortions.presets import PRESETS
from featdistill.images.archives import ARCHIVE_SUFFIXES, COMPRESSED_TAR_SUFFIXES
from featdistill.images.formats import IMAGE_SUFFIXES
from featdistill.images.listing import absolute, ignored_note, image_files, list_folder, printable
from featdistill.images.reading import PARQUET_SUFFIX, check_access
from featdistill.inference import part_tools, remote_output, single_images
from featdistill.inference.detector import Detector
from featdistill.inference.flags import load_settings
from featdistill.inference.journal import PartialScores, claim_scores, score_resumably
from featdistill.inference.parts import score_parts
from featdistill.inference.predictor import Predictor, load_ensemble
from featdistill.inference.processes import Processes
from featdistill.inference.profile import Profile
from featdistill.inference.references import is_folder
from featdistill.models.expert import latest_experts, read_card
from featdistill.records import predictions
from featdistill.records.logits import logits_of, probabilities
from featdistill.records.manifest import BANK_VIEW, make_manifest, read_manifest, write_manifest
from featdistill.records.parts import has_parts
from featdistill.records.provenance import Claim

_log = logging.getLogger(__name__)
# Names with these are surely meant to be files, and predictions are CSV.
_FILE_SUFFIXES = (".txt", ".tsv", ".json", ".jsonl", ".xls", ".xlsx", ".parquet", ".zip", ".gz")
_MAX_SHOWN = 10
_ARCHIVE_SUFFIXES = (*ARCHIVE_SUFFIXES, *COMPRESSED_TAR_SUFFIXES, PARQUET_SUFFIX)


def run(args: Namespace, processes: Processes) -> int:
    """Do what the command line of `predict.py` requests; return 1 if images could not be read, else 0."""
    if args.image and not args.out:
        return processes.on_main(lambda: _show(args))
    if args.status or args.merge:
        out, target = args.out, args.merge
        print(processes.on_main(lambda: part_tools.merge(out, target) if target else part_tools.status(out)))
        return 0
    predictor, folders = processes.together(lambda: _load(args))
    if processes.is_main:
        several = f", {processes.world} processes" if processes.world > 1 else ""
        where = f"{predictor.device} in {predictor.precision}{several}"
        _log.info("%s on %s: %s", counted(len(predictor.names), "expert"), where, ", ".join(predictor.names))
    calibrator, request = processes.together(lambda: _judge(args, predictor))
    if out := _folder_of_parts(args):
        if request:
            raise UserError("--stability needs predictions in one file; use --out FILE.csv")
        settings = {"calibrator": calibrator, "lease_s": args.lease, "show": processes.is_main}
        status = score_parts(predictor, args.manifest[0], out, **settings)
        if args.profile:
            _log.info("%s", predictor.profile.line())
        return status
    jobs = processes.on_main(lambda: _plan(args, folders))
    statuses = []
    predictor.profile = Profile()
    for manifest, out in jobs:
        there = processes.on_main(lambda out=out: remote_output.fetch(out))
        if calibrator or request:
            processes.on_main(lambda out=out: refuse_foreign(out))
        statuses.append(predict(predictor, manifest, out, processes))
        if calibrator or request:
            judge(predictor, manifest, out, processes, calibrator, request)
        processes.on_main(lambda out=out, there=there: remote_output.publish(out, there))
    if args.profile and processes.is_main:
        _log.info("%s", predictor.profile.line())
    return max(statuses)


def predict(predictor: Predictor, manifest: str | Path, out: Path, processes: Processes) -> int:
    """Score a manifest to a file, together with the other processes, continuing what is there.

    Returns:
        1 if some images could not be read, else 0.

    Raises:
        UserError: the manifest has no rows, or the file was produced with different settings.
    """
    rows = processes.together(lambda: read_manifest(manifest))
    processes.on_main(lambda: check_access(rows["image"]))
    if rows.empty:
        raise UserError(f"manifest {manifest} has no rows")
    if BANK_VIEW in rows:
        view = rows[BANK_VIEW].iloc[0]
        raise UserError(
            f"{manifest} has the labels of a bank's view {view}, whose distorted pixels are not kept; make "
            "distorted images with python -m data_prep.distort_split, and score those"
        )
    made_from = {"manifest": predictions.manifest_entry(manifest, out)}
    return _score(predictor, rows, predictor.dataset(rows), out, made_from, processes)


def judge(
    predictor: Predictor,
    manifest: str | Path,
    out: Path,
    processes: Processes,
    calibrator: Calibrator | None,
    request: Request | None = None,
) -> None:
    """Write the verdicts of the predictions at `out`, and score copies of the images if requested.

    The scores of the copies stay in a predictions file of their own: for `val.csv`, `val.copies.csv`.

    Raises:
        UserError: one of the files was produced with different settings.
    """
    stability, made_from = None, None
    if request:
        made_from = {"preset": PRESET, "seed": SEED, "copies": request.copies}
        if request.near:
            made_from["near"] = [NEAR_LOGITS, calibrator.real_threshold, calibrator.ai_threshold]
        frame = processes.together(lambda: _to_copy(out, calibrator, request))
        path = copies_path(out)
        stability = {}
        if len(frame):
            rows = processes.together(lambda: _copies(manifest, frame, request.copies))
            keys = [expert.preprocessing.key for expert in predictor.experts.values()]
            dataset = ScoreDataset(rows, keys, PRESETS[PRESET], SEED, views=predictor.views)
            entry = {"manifest": predictions.manifest_entry(manifest, path), "redelivery": made_from}
            _score(predictor, rows, dataset, path, entry, processes)
            copies = processes.on_main(lambda: read_copies(out))
            stability = _stability(frame, copies, calibrator)
    if processes.is_main:
        _log.info("%s: verdicts", write_verdicts(out, calibrator, stability, made_from))
        if calibrator:
            _log.info("%s", calibrator.promise())
        if calibrator and stability:
            scores = frame.set_index("name")["score"][[*copies]].to_numpy()
            rates = flip_rates(scores, [*copies.values()], calibrator)
            _log.info("%s", flip_sentence(rates, request.near))


def _to_copy(out: Path, calibrator: Calibrator | None, request: Request) -> pd.DataFrame:
    """Return the predictions whose stability is requested."""
    frame = predictions.read_predictions(out)
    return frame[is_near(logits_of(frame["score"].to_numpy()), calibrator)] if request.near else frame


def _copies(manifest: str | Path, frame: pd.DataFrame, copies: int) -> pd.DataFrame:
    """Return the rows of a manifest that have predictions, once for each copy, under the copies' names."""
    rows = read_manifest(manifest)
    rows = rows[rows["name"].isin(frame["name"])]
    names = [copy for name in rows["name"] for copy in copy_names(name, copies)]
    return rows.loc[rows.index.repeat(copies)].assign(name=names).reset_index(drop=True)


def _stability(
    frame: pd.DataFrame, copies: dict[str, np.ndarray], calibrator: Calibrator | None
) -> dict[str, Stability]:
    scores = dict(zip(frame["name"], frame["score"], strict=True))
    return {name: stability_of(scores[name], own, calibrator) for name, own in copies.items()}


def _judge(args: Namespace, predictor: Predictor) -> tuple[Calibrator | None, Request | None]:
    calibrator = Calibrator.load(args.calibrator) if args.calibrator else None
    if calibrator:
        calibrator.check(predictor.sidecar(), "these experts")
    request = parse_request(args.stability) if args.stability else None
    check_request(request, calibrator)
    return calibrator, request


def _score(
    predictor: Predictor,
    rows: pd.DataFrame,
    dataset: Dataset,
    out: Path,
    made_from: dict[str, Any],
    processes: Processes,
) -> int:
    """Score rows to a file, together with the other processes, continuing what is there; see `predict`."""
    requested = predictor.sidecar() | made_from
    state, sidecar = processes.on_main(
        lambda: claim_scores(predictor, out, requested, predictions.read_sidecar(out), rows)
    )
    if state is Claim.FINISHED:
        return processes.on_main(lambda: _report(out, "finished; nothing to do"))
    experts, rank, world = len(predictor.names), processes.rank, processes.world
    partial = processes.together(lambda: PartialScores(out, sidecar, experts, len(rows), rank, world))
    share = processes.on_main(partial.missing)[rank::world]
    processes.together(
        lambda: score_resumably(predictor, dataset, partial, out.stem, share, show=processes.is_main)
    )
    return processes.on_main(lambda: _write(predictor, rows, partial))


def images_by_path(paths: Sequence[str]) -> pd.DataFrame:
    """Return rows for images given one by one; names are the paths as given, each once."""
    paths = list(dict.fromkeys(paths))
    return make_manifest({"image": [absolute(path) for path in paths], "name": paths})


def images_of_folder(folder: str) -> pd.DataFrame:
    """Return rows for the images of a folder, or of one's address; names are paths relative to it."""
    if not (remote_files.is_remote(folder) or os.path.isdir(folder)):
        raise UserError(f"{folder} is not a folder")
    listing = list_folder(folder)
    names = list(image_files(folder, listing.files))
    if listing.ignored:
        _log.info(ignored_note(listing.ignored))
    if archives := [file for file in listing.files if file.lower().endswith(_ARCHIVE_SUFFIXES)]:
        _log.info(
            "note: %d archives are not looked into, such as %s; data_prep makes manifests of their images",
            len(archives),
            printable(archives[0]),
        )
    if not names:
        raise UserError(f"{folder} contains no images ({', '.join(IMAGE_SUFFIXES)})")
    images = [f"{folder.rstrip('/')}/{name}" for name in names]
    if not remote_files.is_remote(folder):
        images = [os.path.realpath(image) for image in images]
    return make_manifest({"image": images, "name": names})


def _load(args: Namespace) -> tuple[Predictor, list[Path]]:
    """Return the ensemble, and the experts whose folders are named."""
    folders = [Path(folder) for folder in args.experts]
    if not folders and not args.released:
        folders = latest_experts()
    ours = [folder for folder in folders if is_folder(folder)]
    return load_ensemble(folders, **load_settings(args)), ours


def _show(args: Namespace) -> int:
    predictor, _ = _load(args)
    detector = Detector(predictor, *_judge(args, predictor), args.credentials)
    rows = detector.rows(list(dict.fromkeys(args.image)))
    if args.json:
        print(json.dumps(single_images.as_json(detector, rows), indent=2))
    else:
        print(single_images.as_table(detector, rows))
    return int(any(row.error for row in rows))


def _plan(args: Namespace, folders: Sequence[Path]) -> list[tuple[str | Path, Path]]:
    """Return each requested manifest and its output; images without one get it next to their scores."""
    by_hand = args.experts or args.released
    out = remote_output.local_path(
        args.out or ("predictions" if by_hand else folders[0].parents[2] / "predictions")
    )
    is_file = out.suffix.lower() == ".csv"
    if not is_file and out.suffix.lower() in _FILE_SUFFIXES and not out.is_dir():
        raise UserError(f"--out {out} must be a .csv file or a folder")
    if args.images or args.image:
        name = Path(absolute(args.images)).name if args.images else "images"
        out = out if is_file else out / f"{name}.csv"
        manifest = out.with_suffix(".manifest.csv")
        rows = images_of_folder(args.images) if args.images else images_by_path(args.image)
        write_manifest(rows, manifest)
        return [(manifest, out)]
    if args.manifest:
        manifests = [remote_files.located(manifest) for manifest in args.manifest]
    elif args.data and remote_files.is_remote(args.data):
        manifests = [remote_files.join(args.data, f"{split}.csv") for split in args.split]
    elif args.data or folders:
        manifests = _split_manifests(args.split, Path(args.data) if args.data else _data_folder(folders[0]))
    else:
        raise UserError(
            "released, exported, published and downloaded experts do not record where the splits are; use "
            "--data DIR or --manifest"
        )
    if is_file and len(manifests) > 1:
        raise UserError("--out names one file, but several splits are requested; name a folder")
    return [(path, out if is_file else out / f"{Path(path).stem}.csv") for path in manifests]


def _folder_of_parts(args: Namespace) -> str | None:
    """Return the folder for the scores of a manifest in parts, or None if one file of scores is requested."""
    in_parts = [manifest for manifest in args.manifest or () if has_parts(manifest)]
    if not in_parts or (args.out or "").lower().endswith(".csv"):
        return None
    if len(args.manifest) > 1:
        raise UserError(f"{in_parts[0]} is a manifest in parts, which is scored alone; leave the others out")
    if Path(args.out or "").suffix.lower() in _FILE_SUFFIXES:
        raise UserError(f"--out {args.out} must be a folder, or a .csv file")
    return args.out or f"predictions/{Path(in_parts[0]).name}"


def _split_manifests(splits: Sequence[str], data: Path) -> list[Path]:
    manifests = [data / f"{split}.csv" for split in splits]
    for manifest in manifests:
        if not manifest.is_file():
            nearest = command_line.nearest(manifest.stem, sorted(path.stem for path in data.glob("*.csv")))
            raise UserError(f"no manifest {manifest}{nearest}; make it with data_prep, or use --data DIR")
    return manifests


def _data_folder(expert: Path) -> Path:
    """Return the folder of the manifest an expert was trained on."""
    trained_on = read_card(expert).get("data", {}).get("train")
    if not trained_on:
        raise UserError(f"{expert} does not record its training manifest; use --data DIR or --manifest FILE")
    return Path(trained_on[0]["path"]).parent


def _write(predictor: Predictor, rows: pd.DataFrame, partial: PartialScores) -> int:
    """Write the predictions from all journals, and remove the journals."""
    partial.refresh()
    if missing := partial.missing():
        raise UserError(
            f"{len(missing)} batches of {partial.out} are missing; its folder must be the same for "
            "all processes; run the same command again to continue"
        )
    names = rows["name"].to_numpy(dtype=object)
    errors = [(names[row], reason) for row, reason in sorted(partial.broken.items())]
    good = np.delete(np.arange(len(names)), list(partial.broken))
    logits = partial.logits[:, good]
    fused = predictor.fusion.apply(logits, predictor.names)
    single = dict(zip(predictor.names, probabilities(logits), strict=True))
    predictions.write_predictions(partial.out, names[good].tolist(), fused, single, partial.sidecar, errors)
    partial.remove()
    mean = f", mean P(AI) {fused.mean():.3f}" if len(fused) else ""
    return _report(partial.out, f"{counted(len(fused), 'image')} scored{mean}")


def _report(out: Path, what: str) -> int:
    """Log what was done and which images could not be read; return the exit status."""
    _log.info("%s: %s", remote_output.shown(out), what)
    errors = predictions.read_errors(out)
    for name, reason in errors[:_MAX_SHOWN]:
        _log.info("could not be read: %s: %s", name, reason)
    if errors:
        listed = remote_output.shown(predictions.errors_path(out))
        _log.info("%d images could not be read; all of them are in %s", len(errors), listed)
    return 1 if errors else 0
