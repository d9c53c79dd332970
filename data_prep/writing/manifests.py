"""Manifests and the files next to them: the hold-out, and the list of images that could not be read."""

import csv
import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from data_prep.reading.files import FAULT
from data_prep.writing.parallel import map_in_order
from featdistill import atomic
from featdistill.command_line import counted
from featdistill.images.reading import BrokenImage, read_image
from featdistill.records import manifest
from featdistill.records.provenance import claim

LeftOut = Sequence[tuple[str, str]]  # name and reason of images that are not in a manifest
_log = logging.getLogger(__name__)
# A manifest and the files next to it, by their suffix in place of .csv, and columns that each has.
_COLUMNS = {
    ".csv": {"image", "name"},
    ".holdout.csv": {"image", "name"},
    ".dropped.csv": {"name", "reason", "kept"},
    ".errors.csv": {"name", "reason"},
}


def check_out(out: Path) -> None:
    """Refuse to replace files that are not a manifest or one of the lists next to it, before any work.

    Raises:
        UserError: there is such a file.
    """
    for suffix, columns in _COLUMNS.items():
        path = out.with_suffix(suffix)
        claim(path, None, {}, occupied=path.exists() and not columns <= _header(path))


def take_left_out(frame: pd.DataFrame) -> tuple[pd.DataFrame, LeftOut]:
    """Divide rows into those that can be used, and the names and faults of the others; see `read_rows`."""
    if FAULT not in frame:
        return frame, ()
    is_good = frame[FAULT] == ""
    left_out = frame.loc[~is_good, ["name", FAULT]].itertuples(index=False, name=None)
    return frame[is_good].drop(columns=FAULT).reset_index(drop=True), list(left_out)


def write_manifests(frame: pd.DataFrame, args: Namespace, left_out: LeftOut = ()) -> int:
    """Write a manifest to `args.out`, and with `args.holdout` the hold-out to a file next to it.

    With `args.verify`, images that cannot be read are left out of both; those in `left_out` are listed with
    the first. Returns the exit status.
    """
    held_path = args.out.with_suffix(".holdout.csv")
    frames = {args.out: frame}
    if args.holdout is not None:
        training, held = manifest.split_holdout(frame, args.holdout, args.seed)
        frames = {args.out: training, held_path: held}
    remove_old_holdout(held_path, args.out, is_replaced=args.holdout is not None)
    unreadable = 0
    for path, part in frames.items():
        real, ai = ((part["label"] == label).sum() for label in (0, 1))
        sources = part["source"].nunique()
        _log.info(
            f"{path}: {counted(len(part), 'image')}, {real} real, {ai} AI, from {counted(sources, 'source')}"
        )
        unreadable += write_readable(part, path, args, left_out if path == args.out else ())
    return 1 if unreadable else 0


def write_readable(frame: pd.DataFrame, path: Path, args: Namespace, left_out: LeftOut = ()) -> int:
    """Write a manifest and return the number of images that are left out.

    Those are the ones that are known to be unusable, and with `args.verify` all that cannot be read. They are
    listed in `<manifest>.errors.csv` (columns name, reason).
    """
    faults = unreadable_images(frame["image"].tolist(), args.workers) if args.verify else {}
    broken = frame["image"].isin(list(faults))
    manifest.write_manifest(frame[~broken], path)
    rows = frame.loc[broken, ["name", "image"]].itertuples(index=False)
    errors_path = path.with_suffix(".errors.csv")
    errors = [*left_out, *((name, faults[image]) for name, image in rows)]
    write_or_remove(errors_path, ("name", "reason"), errors)
    if errors:
        _log.info(f"{counted(len(errors), 'unreadable image')} left out of {path}; see {errors_path}")
    return len(errors)


def unreadable_images(locations: list[str], workers: int) -> dict[str, str]:
    """Decode images and return why, by location, for those that cannot be read."""
    reasons = map_in_order(_why_unreadable, locations, workers, "verify")
    return {location: reason for location, reason in zip(locations, reasons, strict=True) if reason}


def remove_old_holdout(path: Path, training: Path, *, is_replaced: bool) -> None:
    """Remove the hold-out of an earlier run: its rows may be training rows now."""
    if path.exists() and not is_replaced:
        _log.info(f"note: {path}, from an earlier run, is removed: its rows may be in {training}")
    path.unlink(missing_ok=True)


def write_or_remove(path: Path, header: Sequence[str], rows: Sequence[Sequence]) -> None:
    """Write a CSV; where there are no rows, remove the one of an earlier run."""
    if rows:
        atomic.write_text(path, atomic.csv_text(header, rows))
    else:
        path.unlink(missing_ok=True)


def _header(path: Path) -> set[str]:
    """Return the cells of a file's first line; those of a folder are none."""
    if not path.is_file():
        return set()
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return set(next(csv.reader([file.readline(1 << 16)]), ()))


def _why_unreadable(location: str) -> str:
    try:
        read_image(location)
    except BrokenImage as error:
        return str(error)
    return ""
