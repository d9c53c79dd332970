"""What `make_submission.py` does: make a submission or check one, report on it, and list it."""

import argparse
import logging
import os
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from featdistill.atomic import sha256_of
from featdistill.command_line import UserError
from featdistill.submission import ledger, profiles
from featdistill.submission.check import CheckedFile, check_submission, closest_profile
from featdistill.submission.difference import differences
from featdistill.submission.profiles import PROFILES, SLOTS, Profile
from featdistill.submission.writing import expected_names, prepare, replace_submission

_log = logging.getLogger(__name__)


def make(args: argparse.Namespace) -> None:
    """Write a zip, compare it with the previous submission and list it.

    Raises:
        UserError: something is wrong with the flags, the predictions or the ledger; the message says so if
            the zip is written nevertheless.
    """
    if not args.profile:
        raise UserError(f"--profile is missing; known: {', '.join(PROFILES)}")
    profile = _profile(args, args.profile)
    if not args.out or not args.out.endswith(".zip"):
        raise UserError(f"--out must be the name of a .zip file{f', not {args.out}' if args.out else ''}")
    ledger_path = None if args.no_ledger else Path(args.ledger or Path(args.out).with_name("submissions.csv"))
    if ledger_path and ledger_path.resolve() == Path(args.out).resolve():
        raise UserError(f"--ledger {ledger_path} and --out are the same file")
    when = ledger.parse_date(args.date) if args.date else datetime.now(UTC)
    local_aucs = ledger.read_aucs(args.scores) if args.scores else ""
    slots = [slot for slot in SLOTS if getattr(args, slot)]
    parts = {}
    for slot in slots:
        parts[slot] = prepare(getattr(args, slot), getattr(args, f"{slot}_manifest"), args.fill_missing)
        if parts[slot].filled:
            _log.info("%s: %d missing rows filled with %s", slot, len(parts[slot].filled), args.fill_missing)
    with replace_submission(args.out, parts, profile) as (archive, files):
        # Compared before the previous zip of this name, probably the last submission, is replaced.
        comparison = _compare(ledger_path, files, sha256_of(archive)) if ledger_path else None
    _show_files(args.out, files, f"written and checked, profile {args.profile}")
    _show_comparison(comparison)
    if not ledger_path:
        return
    try:
        entry = {
            "date": when.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "file": _path_in_ledger(args.out, ledger_path),
            "sha256": sha256_of(args.out),
            "profile": profiles.label(args.profile, profile),
            "slots": "; ".join(f"{file.slot}={file.file}:{file.rows}" for file in files),
            "experts": ledger.experts_of(getattr(args, slot) for slot in slots),
            "local_aucs": local_aucs,
            "note": args.note or "",
        }
        count = ledger.add(ledger_path, entry)
    except (UserError, OSError) as error:
        # The zip is what matters: it is kept, and the same command lists it once the ledger is fixed.
        raise UserError(f"{args.out} is written and valid, but not listed: {error}") from error
    text = "\n%s: %d listed for %s (UTC); the challenge accepts %d per day"
    _log.info(text, ledger_path, count, entry["date"][:10], profiles.DAILY_LIMIT)
    if count > profiles.DAILY_LIMIT:
        _log.warning("more submissions are listed for that day than the challenge accepts")


def check(args: argparse.Namespace) -> None:
    """Check a zip or a CSV, and compare it with the previous submission.

    Raises:
        UserError: the file is not a valid submission, or something is wrong with the flags.
    """
    name = args.profile or closest_profile(args.check)
    profile = _profile(args, name)
    manifests = {slot: getattr(args, f"{slot}_manifest") for slot in SLOTS}
    expected = {slot: expected_names(manifest) for slot, manifest in manifests.items() if manifest}
    for slot in expected:
        if slot not in profile.files:
            raise UserError(f"profile {name} has no file for {slot}; it has {', '.join(profile.files)}")
    try:
        files = check_submission(args.check, profile, expected)
    except UserError as error:
        guess = "" if args.profile else f" (checked as profile {name}, the closest one; --profile changes it)"
        raise UserError(f"{error}{guess}") from error
    _show_files(args.check, files, f"checked, profile {name}")
    for file in files:
        official = profiles.OFFICIAL_ROWS.get(file.slot)
        if official and not expected and file.rows != official:
            counts = file.file, f"{file.rows:,}", file.slot, f"{official:,}"
            _log.warning("%s has %s rows; the challenge's %s has %s", *counts)
    if not expected:
        _log.info("\nThe names were not compared; use --val-manifest and the like to find missing images.")
    path = Path(args.ledger or Path(args.check).with_name("submissions.csv"))
    if args.ledger and not path.is_file():
        raise UserError(f"--ledger {path} does not exist")
    if not args.no_ledger and path.is_file():
        _show_comparison(_compare(path, files, sha256_of(args.check)))


def _profile(args: argparse.Namespace, name: str) -> Profile:
    return profiles.adapted(name, args.file_name, **{part: getattr(args, part) for part in profiles.PARTS})


def _path_in_ledger(archive: str, ledger_path: Path) -> str:
    """Return the path of a zip, relative if it is in the ledger's folder or below."""
    folder, path = Path(os.path.realpath(ledger_path)).parent, Path(os.path.realpath(archive))
    return (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()


def _compare(ledger_path: Path, files: list[CheckedFile], sha256: str) -> pd.DataFrame | None:
    try:
        return differences(ledger_path, files, sha256)
    except (UserError, OSError) as error:
        _log.warning("not compared with the previous submission: %s", error)
        return None


def _show_files(path: str, files: list[CheckedFile], status: str) -> None:
    table = pd.DataFrame(
        {
            "file": [file.file for file in files],
            "rows": [f"{file.rows:,}" for file in files],
            "mean score": [f"{file.score.mean():.4f}" for file in files],
            "above 0.5": [f"{100 * (file.score > 0.5).mean():.1f} %" for file in files],
            "SHA-256": [file.sha256 for file in files],
        }
    )
    _log.info("%s: %s\nSHA-256 %s\n\n%s", path, status, sha256_of(path), table.to_string(index=False))
    for file in files:
        tied = pd.Series(file.score).duplicated(keep=False).sum()
        if tied:
            text = "%s: %s of %s rows share their score with another row; ties are not ranked"
            _log.warning(text, file.file, f"{tied:,}", f"{file.rows:,}")
    rows = {file.file: file.rows for file in files}
    if rows.get("submission_hard.csv", 0) > rows.get("submission.csv", float("inf")):
        _log.warning("submission_hard.csv has more rows than submission.csv: are the two swapped?")


def _show_comparison(comparison: pd.DataFrame | None) -> None:
    if comparison is None:
        return
    if comparison.empty:
        _log.info("\nNo other submission of these images is listed, so there is nothing to compare with.")
        return
    formats = {
        "images": "{:,}".format,
        "rank_correlation": "{:.4f}".format,
        "mean_absolute": "{:.4f}".format,
        "changed_sides": lambda share: f"{100 * share:.1f} %",
    }
    header = ["slot", "images", "rank correlation", "mean |difference|"]
    header += ["changed sides of 0.5", "date", "file"]
    table = comparison.to_string(index=False, formatters=formats, header=header, na_rep="n/a")
    _log.info("\nCompared with the previous submission:\n%s", table)
