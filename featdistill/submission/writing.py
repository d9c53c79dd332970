"""From predictions to the zip for Codabench.

A bad upload costs one of five per day, so everything is checked before the zip gets its name: the scores
before they are written, and the written bytes by the function that checks other people's files.
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
        names: in the manifest's order, with their extension if it is known.
        score: (N,) float64 in [0, 1].
        filled: the names without a prediction, whose score is the value of `fill_missing`.
    """

    names: list[str]
    score: np.ndarray
    filled: list[str] = field(default_factory=list)


def expected_names(manifest: str | Path) -> list[str]:
    """Return the names that a submission must contain according to a manifest, with their extension.

    A name without an image extension gets that of its file, so that `keep` means the same for every manifest.
    """
    frame = read_manifest(manifest)
    names = []
    for name, image in zip(frame["name"], frame["image"], strict=True):
        extension = image[len(without_extension(image)) :]
        names.append(name + extension if without_extension(name) == name else name)
    return names


def prepare(
    predictions: str | Path, manifest: str | Path | None = None, fill_missing: float | None = None
) -> Part:
    """Read the predictions of one slot and compare them with the names that the submission must contain.

    Args:
        manifest: the split's manifest; by default the one named in the predictions' sidecar.
        fill_missing: the score in [0, 1] of images without a prediction; None refuses them.

    Raises:
        UserError: no manifest is known; rows are missing, duplicate or unknown; scores are not numbers, out
            of range or constant.
    """
    manifest = manifest or manifest_of(predictions)
    if manifest is None:
        raise UserError(
            f"{predictions} has no sidecar naming a manifest, so the expected names are unknown; "
            "use --val-manifest, --val-hard-manifest or --test-manifest"
        )
    expected, where = expected_names(manifest), str(predictions)
    frame = read_predictions(predictions)
    names, score = frame["name"], frame["score"].to_numpy()
    position = match_names(names.tolist(), expected)
    refuse(where, "unknown names", names[position < 0], f"not in {manifest}")
    refuse(where, "duplicate names", names[pd.Series(position).duplicated()])
    check_scores(where, names.tolist(), score)
    values = np.full(len(expected), np.nan)
    values[position] = score
    is_missing = np.isnan(values)
    missing = np.array(expected, dtype=object)[is_missing].tolist()
    if fill_missing is None:
        unreadable = (match_names([name for name, _ in read_errors(predictions)], missing) >= 0).sum()
        reason = f"{unreadable} of them could not be read, see {errors_path(predictions)}; "
        advice = "predict them or use --fill-missing 0.5"
        refuse(where, "missing rows", missing, reason + advice if unreadable else advice)
    else:
        values[is_missing] = fill_missing
    return Part(expected, values, missing)


@contextmanager
def replace_submission(
    path: str | Path, parts: dict[str, Part], profile: Profile
) -> Iterator[tuple[Path, list[CheckedFile]]]:
    """Write a temporary zip and check it; it replaces `path` when the body ends.

    The CSVs are at its root, uncompressed, with fixed times: the same scores produce the same bytes. The body
    receives the temporary path and the checked files, while the previous zip still exists at `path`.

    Raises:
        UserError: a slot that the profile requires is missing, one that it has no file for is given, two
            slots share images, or the check of the written bytes fails.
    """
    for slot in profile.required:
        if slot not in parts:
            raise UserError(f"{flag(slot)} is missing: the profile requires {profile.files[slot]}")
    for slot in parts:
        if slot not in profile.files:
            accepted = ", ".join(map(flag, profile.files))
            raise UserError(f"this profile has no file for {flag(slot)}; it accepts {accepted}")
    names = pd.Series([name for part in parts.values() for name in part.names], dtype=object)
    refuse(str(path), "images in more than one file", names[names.duplicated()])
    with atomic.replace_file(path) as temporary:
        files = [(name, parts[slot]) for slot, name in profile.files.items() if slot in parts]
        atomic.write_zip(temporary, [(name, _csv_bytes(part, profile)) for name, part in files])
        expected = {slot: part.names for slot, part in parts.items()}
        yield temporary, check_submission(temporary, profile, expected, where=str(path))


def _csv_bytes(part: Part, profile: Profile) -> bytes:
    rows = zip(names_as_written(part.names, profile), part.score.tolist(), strict=True)
    rows = ([number, *row] if profile.index_column else row for number, row in enumerate(rows))
    return atomic.csv_text(profile.header, rows).encode("utf-8")
