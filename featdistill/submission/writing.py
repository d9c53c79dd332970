"""Predictions to the zip that goes to Codabench.

A bad upload costs one of five a day, so everything is checked before the zip gets its name: the scores before
they are written, and the written bytes by the function that checks other people's files.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from featdistill import atomic
from featdistill.command_line import UserError
from featdistill.records.manifest import read_manifest
from featdistill.records.predictions import (
    errors_path,
    manifest_of,
    match_names,
    read_errors,
    read_predictions,
    without_extension,
)
from featdistill.submission.check import CheckedFile, check_scores, check_submission, names_as_written, refuse
from featdistill.submission.profiles import Profile, flag


@dataclass(frozen=True)
class Part:
    """The rows of one slot, ready to be written.

    Attributes:
        names: the manifest's names in the manifest's order, with their extension where it is known.
        score: (N,) float64 in [0, 1].
        filled: the names that had no prediction and got the value of `fill_missing`.
    """

    names: list[str]
    score: np.ndarray
    filled: list[str] = field(default_factory=list)


def expected_names(manifest: str | Path) -> list[str]:
    """Return the names that a manifest wants in a submission, with their extension.

    A name without an image extension takes that of its file: `keep` means the same for every manifest.
    """
    frame = read_manifest(manifest)
    names = []
    for name, image in zip(frame["name"], frame["image"], strict=True):
        stem = without_extension(image)
        names.append(name + image[len(stem) :] if without_extension(name) == name else name)
    return names


def prepare(
    predictions: str | Path, manifest: str | Path | None = None, fill_missing: float | None = None
) -> Part:
    """Read the predictions of one slot and hold them against the names that must be in the submission.

    Args:
        manifest: the split's manifest; by default the one that the predictions' sidecar names.
        fill_missing: the score in [0, 1] of images without a prediction; None refuses them.

    Raises:
        UserError: no manifest is known; rows are missing, duplicate or unknown; scores are no numbers, out of
            range or constant.
    """
    if fill_missing is not None and not 0 <= fill_missing <= 1:
        raise UserError(f"--fill-missing must lie between 0 and 1, not {fill_missing}")
    manifest = manifest or manifest_of(predictions)
    if manifest is None:
        raise UserError(
            f"{predictions} has no sidecar that names a manifest, so the names to expect are unknown; "
            "give --val-manifest, --val-hard-manifest or --test-manifest"
        )
    expected = expected_names(manifest)
    frame = read_predictions(predictions)
    names, score = frame["name"].tolist(), frame["score"].to_numpy()
    position = match_names(names, expected)
    where = str(predictions)
    unknown = [name for name, at in zip(names, position, strict=True) if at < 0]
    refuse(where, "unknown names", unknown, f"not in {manifest}")
    repeated = pd.Series(position).duplicated().to_numpy()
    refuse(where, "duplicate names", np.array(names, dtype=object)[repeated])
    check_scores(where, names, score)
    values = np.full(len(expected), np.nan)
    values[position] = score
    missing = [name for name, value in zip(expected, values, strict=True) if np.isnan(value)]
    if missing and fill_missing is None:
        unreadable = match_names([name for name, _ in read_errors(predictions)], missing)
        listed = f"{(unreadable >= 0).sum()} of them could not be read, see {errors_path(predictions)}; "
        advice = (listed if (unreadable >= 0).any() else "") + "predict them or ask for --fill-missing 0.5"
        refuse(where, "missing rows", missing, advice)
    if missing:
        values[np.isnan(values)] = fill_missing
    return Part(expected, values, missing)


@contextmanager
def replace_submission(
    path: str | Path, parts: dict[str, Part], profile: Profile
) -> Iterator[tuple[Path, list[CheckedFile]]]:
    """Write the zip beside `path` and check what was written; it becomes `path` when the body ends.

    CSVs lie at its root, uncompressed, with fixed times: the same scores give the same bytes. The body is
    given the temporary path and the checked files, and still finds the former zip in its place.

    Raises:
        UserError: a slot that the profile needs is missing, one that it has no file for is given, two slots
            share images, or the check of the written bytes fails.
    """
    for slot in profile.required:
        if slot not in parts:
            raise UserError(f"{flag(slot)} is missing: the profile needs {profile.files[slot]}")
    for slot in parts:
        if slot not in profile.files:
            taken = ", ".join(map(flag, profile.files))
            raise UserError(f"{flag(slot)} has no place in this profile, which takes {taken}")
    names = pd.Series([name for part in parts.values() for name in part.names], dtype=object)
    refuse(str(path), "images in more than one file", names[names.duplicated()])
    with atomic.replace_file(path) as beside:
        files = [(name, parts[slot]) for slot, name in profile.files.items() if slot in parts]
        atomic.write_zip(beside, [(name, _csv_bytes(part, profile)) for name, part in files])
        expected = {slot: part.names for slot, part in parts.items()}
        yield beside, check_submission(beside, profile, expected, where=str(path))


def _csv_bytes(part: Part, profile: Profile) -> bytes:
    rows = zip(names_as_written(part.names, profile), part.score.tolist(), strict=True)
    rows = ([number, *row] if profile.index_column else row for number, row in enumerate(rows))
    return atomic.csv_text(profile.header, rows).encode("utf-8")
