"""The zip that goes to Codabench, and the check of one made by anyone.

A bad upload costs one of five a day, so everything is checked before the zip gets its name: the scores before
they are written, and the written bytes by the function that checks other people's files.
"""

import hashlib
import io
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from featdistill import atomic
from featdistill.command_line import UserError
from featdistill.manifest import read_manifest
from featdistill.predictions import (
    INDEX_HEADERS,
    errors_path,
    manifest_of,
    match_names,
    name_list,
    parse_csv,
    read_errors,
    read_predictions,
    to_numbers,
    without_extension,
)

SLOTS = ("val", "val_hard", "test")
EXTENSIONS = ("keep", "strip")
# A submission of 10,000 rows measures about half a MiB; a zip that claims more than this is not unpacked.
MAX_BYTES = 64 * 2**20
# What readers of CSV files, pandas among them, take for a missing value.
_MISSING_TEXTS = {"", "nan", "na", "n/a", "#n/a", "<na>", "null", "none"}


@dataclass(frozen=True)
class Profile:
    """One convention for the zip's files.

    Attributes:
        files: slot -> name of its CSV at the zip's root.
        required: the slots that must be there; the others of `files` may be.
        name_column, score_column: the header.
        extension: `keep` writes names with their image extension, `strip` without.
        index_column: an unnamed column 0, 1, 2, ... comes first, as pandas writes it.
    """

    files: dict[str, str]
    required: tuple[str, ...]
    name_column: str = "image_name"
    score_column: str = "score"
    extension: str = "keep"
    index_column: bool = False

    def __post_init__(self) -> None:
        names = list(self.files.values())
        if len(set(names)) != len(names):
            raise UserError(f"two files of the submission cannot have one name: {', '.join(names)}")
        for name in names:
            if "/" in name or "\\" in name or not name.endswith(".csv"):
                raise UserError(
                    f"'{name}' cannot be a file of the submission: it must be a plain name, as in a.csv"
                )

    @property
    def header(self) -> list[str]:
        """The columns of each CSV."""
        return [""] * self.index_column + [self.name_column, self.score_column]


# Sources: a team with leaderboard scores (val); the same with the test file in the hard slot, most likely
# what the only team with a reported test score wrote (test); the snippet of the data set card (test-card).
PROFILES = {
    "val": Profile({"val": "submission.csv", "val_hard": "submission_hard.csv"}, ("val", "val_hard")),
    "test": Profile({"val": "submission.csv", "test": "submission_hard.csv"}, ("test",)),
    "test-card": Profile({"test": "submission.csv"}, ("test",), score_column="pred", extension="strip"),
}


@dataclass(frozen=True)
class FileSummary:
    """What a checked CSV holds: numbers for the person who uploads it."""

    file: str
    rows: int
    mean_score: float
    share_above_half: float
    sha256: str


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
    _refuse(where, "unknown names", unknown, f"not in {manifest}")
    repeated = pd.Series(position).duplicated().to_numpy()
    _refuse(where, "duplicate names", np.array(names, dtype=object)[repeated])
    _check_scores(where, names, score)
    values = np.full(len(expected), np.nan)
    values[position] = score
    missing = [name for name, value in zip(expected, values, strict=True) if np.isnan(value)]
    if missing and fill_missing is None:
        unreadable = match_names([name for name, _ in read_errors(predictions)], missing)
        listed = f"{(unreadable >= 0).sum()} of them could not be read, see {errors_path(predictions)}; "
        advice = (listed if (unreadable >= 0).any() else "") + "predict them or ask for --fill-missing 0.5"
        _refuse(where, "missing rows", missing, advice)
    if missing:
        values[np.isnan(values)] = fill_missing
    return Part(expected, values, missing)


def write_submission(path: str | Path, parts: dict[str, Part], profile: Profile) -> list[FileSummary]:
    """Write the zip: CSVs at its root, uncompressed, with fixed times: the same scores give the same bytes.

    The written bytes are read back and checked before the file gets its name.

    Raises:
        UserError: a slot that the profile needs is missing, one that it has no file for is given, two slots
            share images, or the check of the written bytes fails.
    """
    for slot in profile.required:
        if slot not in parts:
            raise UserError(f"{_flag(slot)} is missing: the profile needs {profile.files[slot]}")
    for slot in parts:
        if slot not in profile.files:
            taken = ", ".join(map(_flag, profile.files))
            raise UserError(f"{_flag(slot)} has no place in this profile, which takes {taken}")
    names = [name for part in parts.values() for name in part.names]
    _refuse(
        str(path), "images in more than one file", pd.Series(names)[pd.Series(names).duplicated()].tolist()
    )
    with atomic.replace_file(path) as beside:
        files = [(name, parts[slot]) for slot, name in profile.files.items() if slot in parts]
        atomic.write_zip(beside, [(name, _csv_bytes(part, profile)) for name, part in files])
        written = {slot: part.names for slot, part in parts.items()}
        return check_submission(beside, profile, written, where=str(path))


def check_submission(
    path: str | Path, profile: Profile, expected: dict[str, list[str]] | None = None, where: str | None = None
) -> list[FileSummary]:
    """Check a submission zip, or one CSV that is to go into it, whoever made it.

    Args:
        expected: slot -> the names that must be there, with their extension; where a slot is left out, any
            names will do.
        where: what errors call the file; by default its path.

    Raises:
        UserError: the first fault that is found, with up to five of the names it concerns.
    """
    expected, where = expected or {}, where or str(path)
    members = read_members(path, where)
    if None in members:
        slot = next((slot for slot, name in profile.files.items() if name == Path(path).name), None)
        names = expected.get(slot) or (next(iter(expected.values())) if len(expected) == 1 else None)
        if expected and names is None:
            raise UserError(f"{where}: which of the manifests is meant? give one")
        return [_check_csv(members[None], where, Path(path).name, profile, names)]
    stray = sorted(set(members) - set(profile.files.values()))
    if stray:
        wanted = ", ".join(profile.files.values())
        folder = (
            " (files must lie at the root, not in a folder)" if any("/" in name for name in stray) else ""
        )
        raise UserError(
            f"{where} holds {name_list(stray)}, which do not belong there{folder}; only {wanted} may be in it"
        )
    absent = [profile.files[slot] for slot in profile.required if profile.files[slot] not in members]
    if absent:
        raise UserError(
            f"{where} holds no {' and no '.join(absent)}; it holds {', '.join(members) or 'nothing'}"
        )
    slots = {name: slot for slot, name in profile.files.items()}
    return [
        _check_csv(data, f"{where}: {name}", name, profile, expected.get(slots[name]))
        for name, data in members.items()
    ]


def read_members(path: str | Path, where: str) -> dict[str | None, bytes]:
    """Return the members of a zip by name, folders with a final slash; `{None: bytes}` of any other file.

    Raises:
        UserError: the file is missing, a damaged or encrypted zip, holds a file twice or is too large.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{where} does not exist")
    data = path.read_bytes()
    if not data.startswith(b"PK"):
        return {None: data}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            names = pd.Series([member.filename for member in members], dtype=object)
            _refuse(where, "files that are there twice", names[names.duplicated()].tolist())
            if sum(member.file_size for member in members) > MAX_BYTES:
                raise UserError(
                    f"{where} unpacks to more than {MAX_BYTES // 2**20} MiB, which is no submission"
                )
            return {member.filename: archive.read(member) for member in members}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise UserError(f"{where} is no readable zip: {error}") from error


def _check_csv(
    data: bytes, where: str, file: str, profile: Profile, expected: list[str] | None
) -> FileSummary:
    if data.startswith(b"\xef\xbb\xbf"):
        raise UserError(
            f"{where} starts with a byte order mark, which hides the first column; save as plain UTF-8"
        )
    header, rows = parse_csv(data, where)
    if header != profile.header:
        absent = [column for column in profile.header if column not in header]
        what = f"column {', '.join(absent)} is missing" if absent else "the columns differ"
        if header and header[0] in INDEX_HEADERS and not profile.index_column:
            what = "there is an index column; write the file with index=False, or ask for --index-column"
        raise UserError(
            f"{where}: the header must be {','.join(profile.header)}, not {','.join(header)}: {what}"
        )
    if header in rows:
        raise UserError(
            f"{where}: the header appears again in row {rows.index(header) + 1}: a second run appended "
            "its rows to those of the first; delete the file and write it again"
        )
    if not rows:
        raise UserError(f"{where} holds a header and no rows")
    names, texts = [row[-2] for row in rows], [row[-1] for row in rows]
    _refuse(where, "duplicate names", pd.Series(names)[pd.Series(names).duplicated()].unique())
    if profile.extension == "keep":
        bare = [name for name in names if without_extension(name) == name]
        _refuse(where, "names without their image extension", bare, "expected as in 0a1b.jpg")
    else:
        _refuse(
            where,
            "names with an image extension",
            [name for name in names if without_extension(name) != name],
        )
    empty = [name for name, text in zip(names, texts, strict=True) if text.strip().lower() in _MISSING_TEXTS]
    _refuse(where, "scores that are NaN or empty", empty)
    score = to_numbers(texts)
    _refuse(where, "scores that are no number", np.array(names, dtype=object)[np.isnan(score)])
    _check_scores(where, names, score)
    if expected is not None:
        known, present = _as_written(expected, profile), set(names)
        _refuse(where, "missing rows", [name for name in known if name not in present])
        _refuse(where, "unknown names", sorted(present - set(known)))
    digest = hashlib.sha256(data).hexdigest()
    return FileSummary(file, len(rows), float(score.mean()), float((score > 0.5).mean()), digest)


def _check_scores(where: str, names: list[str], score: np.ndarray) -> None:
    outside = (score < 0) | (score > 1)
    _refuse(where, "scores outside 0..1", np.array(names, dtype=object)[outside])
    if len(score) > 1 and score.min() == score.max():
        raise UserError(
            f"{where}: every score is {score[0]}, a constant; something went wrong in the prediction"
        )


def _refuse(where: str, what: str, names: Sequence[str], advice: str = "") -> None:
    if len(names):
        raise UserError(
            f"{where}: {what} ({len(names)}): {name_list(names)}" + (f"; {advice}" if advice else "")
        )


def _as_written(names: list[str], profile: Profile) -> list[str]:
    return [without_extension(name) for name in names] if profile.extension == "strip" else names


def _csv_bytes(part: Part, profile: Profile) -> bytes:
    rows = zip(_as_written(part.names, profile), part.score.tolist(), strict=True)
    rows = ([number, *row] if profile.index_column else row for number, row in enumerate(rows))
    return atomic.csv_text(profile.header, rows).encode("utf-8")


def _flag(slot: str) -> str:
    return "--" + slot.replace("_", "-")
