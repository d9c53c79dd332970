"""The check of a submission, whoever made it: as the organisers', and stricter.

Their checker turns down a CSV that cannot be read, a missing column, NaN, a score that is no number and
duplicate names. This one also refuses what may be read in two ways, and sound files that cannot be meant:
other images than the split's, a constant, a file that was cut off. Rows are counted from 1, without the
header.
"""

import hashlib
import io
import re
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from featdistill.command_line import UserError
from featdistill.records.predictions import INDEX_HEADERS, name_list, parse_csv, without_extension
from featdistill.submission.profiles import PROFILES, Profile

# A submission of 10,000 rows measures about half a MiB; a file that claims more than this is not unpacked.
MAX_BYTES = 64 * 2**20
# What readers of CSV files, pandas among them, take for a missing value.
_MISSING_TEXTS = {"", "nan", "na", "n/a", "#n/a", "<na>", "null", "none"}
# What every reader takes for the same number; Python also takes 1_0, inf and the digits of other alphabets.
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# Bits of a member's flags: encrypted, strongly encrypted, encrypted list of members (APPNOTE 4.4.4).
_ENCRYPTED = 0x0001 | 0x0040 | 0x2000


@dataclass(frozen=True)
class CheckedFile:
    """A CSV that passed.

    Attributes:
        file: its name.
        slot: what it holds the scores of; None of a lone CSV whose name is not of the profile.
        names: as written.
        score: (N,) float64 in [0, 1].
        sha256: of its bytes.
    """

    file: str
    slot: str | None
    names: list[str]
    score: np.ndarray
    sha256: str

    @property
    def rows(self) -> int:
        return len(self.names)

    @property
    def mean_score(self) -> float:
        return float(self.score.mean())

    @property
    def share_above_half(self) -> float:
        return float((self.score > 0.5).mean())

    @property
    def tied(self) -> int:
        """How many rows share their score with another: nothing ranks them among each other."""
        _, counts = np.unique(self.score, return_counts=True)
        return int(counts[counts > 1].sum())


def check_submission(
    path: str | Path, profile: Profile, expected: dict[str, list[str]] | None = None, where: str | None = None
) -> list[CheckedFile]:
    """Check a submission zip, or one CSV that is to go into it.

    Args:
        expected: slot -> the names that must be there, with their extension; where a slot is left out, any
            names will do.
        where: what errors call the file; by default its path.

    Raises:
        UserError: the first fault that is found, with up to five of the rows or names it concerns.
    """
    expected, where = expected or {}, where or str(path)
    members = read_members(path, where)
    slots = {name: slot for slot, name in profile.files.items()}
    if None in members:
        slot = slots.get(Path(path).name)
        names = expected.get(slot) or (next(iter(expected.values())) if len(expected) == 1 else None)
        if expected and names is None:
            raise UserError(f"{where}: which of the manifests is meant? give one")
        return [_check_csv(members[None], where, Path(path).name, slot, profile, names)]
    stray = sorted(set(members) - set(slots))
    if stray:
        inside = any("/" in name for name in stray)
        folder = " (files must lie at the root, not in a folder)" if inside else ""
        raise UserError(
            f"{where} holds {name_list(stray)}, which do not belong there{folder}; only "
            f"{', '.join(slots)} may be in it"
        )
    absent = [profile.files[slot] for slot in profile.required if profile.files[slot] not in members]
    if absent:
        raise UserError(
            f"{where} holds no {' and no '.join(absent)}; it holds {', '.join(members) or 'nothing'}"
        )
    return [
        _check_csv(data, f"{where}: {name}", name, slots[name], profile, expected.get(slots[name]))
        for name, data in members.items()
    ]


def read_members(path: str | Path, where: str) -> dict[str | None, bytes]:
    """Return the members of a zip by name, folders with a final slash; `{None: bytes}` of any other file.

    Raises:
        UserError: the file is missing, too large, called .zip without being one, a damaged zip, or one that
            is encrypted, holds a file twice or is compressed in an unusual way.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{where} does not exist")
    _check_size(path.stat().st_size, where)
    data = path.read_bytes()
    if not data.startswith(b"PK"):
        if path.suffix.lower() == ".zip":
            raise UserError(f"{where} is called .zip but is none; pack the files again, as a zip")
        return {None: data}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            refuse(where, "files that are there twice", _repeated(names))
            locked = [member.filename for member in members if member.flag_bits & _ENCRYPTED]
            refuse(where, "encrypted files", locked, "pack them again without a password")
            unusual = [member.filename for member in members if member.compress_type not in _METHODS]
            refuse(where, "files compressed other than by deflate", unusual, "pack them as a plain zip")
            _check_size(sum(member.file_size for member in members), where)
            return {member.filename: archive.read(member) for member in members}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise UserError(f"{where} is no readable zip: {error}") from error


def closest_profile(path: str | Path) -> str:
    """Return the name of the profile whose files and columns a submission fits best, the first of equals."""
    members = read_members(path, str(path))
    first_line = next(iter(members.values()), b"").split(b"\n", 1)[0].decode("utf-8", "replace")
    columns = first_line.strip().removeprefix("\ufeff").split(",")

    def fit(name: str) -> int:
        profile = PROFILES[name]
        needed = {profile.files[slot] for slot in profile.required}
        fits_files = 0 if None in members else -len(needed.symmetric_difference(members))
        # A score column settles it, as no two conventions of equal columns differ by more than two files.
        return fits_files + 4 * (profile.score_column in columns)

    return max(PROFILES, key=fit)


def check_scores(where: str, names: Sequence[str], score: np.ndarray) -> None:
    """Refuse scores outside [0, 1], and a constant.

    Args:
        names: what an error calls each of the scores.
        score: (N,) float64, finite.
    """
    outside = np.flatnonzero((score < 0) | (score > 1))
    refuse(where, "scores outside 0..1", [names[row] for row in outside])
    if len(score) > 1 and score.min() == score.max():
        raise UserError(
            f"{where}: every score is {score[0]}, a constant; something went wrong in the prediction"
        )


def refuse(where: str, what: str, names: Iterable[str], advice: str = "") -> None:
    """Raise a `UserError` with the first of `names` and their number, if there are any."""
    names = list(names)
    if names:
        after = f"; {advice}" if advice else ""
        raise UserError(f"{where}: {what} ({len(names)}): {name_list(names)}{after}")


def names_as_written(names: Sequence[str], profile: Profile) -> list[str]:
    """Return names as the profile wants them, with or without their extension."""
    return [without_extension(name) for name in names] if profile.extension == "strip" else list(names)


def _check_csv(
    data: bytes, where: str, file: str, slot: str | None, profile: Profile, expected: list[str] | None
) -> CheckedFile:
    rows = _check_table(data, where, profile)
    names, texts = [row[-2] for row in rows], [row[-1] for row in rows]
    labels = [f"{name} (row {number})" for number, name in enumerate(names, start=1)]
    _check_names(where, names, labels, profile)
    if profile.index_column:
        wrong = [f"{row[0]} (row {at})" for at, row in enumerate(rows, start=1) if row[0] != str(at - 1)]
        refuse(where, "index column is not 0, 1, 2, ..", wrong, "rows were put in another order or appended")
    by_label = dict(zip(labels, texts, strict=True))
    empty = [label for label, text in by_label.items() if text.strip().lower() in _MISSING_TEXTS]
    refuse(where, "scores that are NaN or empty", empty)
    odd = [f"{label}: {text!r}" for label, text in by_label.items() if not _NUMBER.fullmatch(text)]
    refuse(where, "scores that are no number", odd)
    score = np.array([float(text) for text in texts])
    check_scores(where, labels, score)
    if expected is not None:
        known = names_as_written(expected, profile)
        present, wanted = set(names), set(known)
        refuse(where, "missing rows", [name for name in known if name not in present])
        pairs = zip(names, labels, strict=True)
        refuse(where, "unknown names", [label for name, label in pairs if name not in wanted])
    return CheckedFile(file, slot, names, score, hashlib.sha256(data).hexdigest())


def _check_table(data: bytes, where: str, profile: Profile) -> list[list[str]]:
    """Return the rows of a CSV whose bytes, lines and header are as they must be."""
    if data.startswith(b"\xef\xbb\xbf"):
        raise UserError(
            f"{where} starts with a byte order mark, which hides the first column; save as plain UTF-8"
        )
    header, rows = parse_csv(data, where)
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if b"\r" in line:
            raise UserError(f"{where}: line {number} has a carriage return; save with unix line ends")
        if not line.strip() and number < len(lines):
            raise UserError(f"{where}: line {number} is blank; remove it")
    if header != profile.header:
        absent = [column for column in profile.header if column not in header]
        what = f"column {', '.join(absent)} is missing" if absent else "the columns differ"
        if header[0] in INDEX_HEADERS and not profile.index_column:
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
    if lines[-1]:
        raise UserError(f"{where}: row {len(rows)}, the last, has no line end: was the file cut off there?")
    return rows


def _check_names(where: str, names: list[str], labels: list[str], profile: Profile) -> None:
    def named(what: str, is_bad: Iterable[bool], advice: str = "") -> None:
        refuse(where, what, [label for label, bad in zip(labels, is_bad, strict=True) if bad], advice)

    named("names that are empty or read as missing", (name.lower() in _MISSING_TEXTS for name in names))
    pairs = enumerate(names, start=1)
    odd = [f"{name!r} (row {at})" for at, name in pairs if name != name.strip() or not name.isprintable()]
    refuse(where, "names with blanks around them or characters that are not seen", odd)
    named(
        "names with a folder", ("/" in name or "\\" in name for name in names), "only the file's name counts"
    )
    named("duplicate names", pd.Series(names, dtype=object).duplicated())
    if profile.extension == "keep":
        bare = (without_extension(name) == name for name in names)
        named("names without their image extension", bare, "expected as in 0a1b.jpg")
    else:
        named("names with an image extension", (without_extension(name) != name for name in names))


def _check_size(size: int, where: str) -> None:
    if size > MAX_BYTES:
        raise UserError(f"{where} holds more than {MAX_BYTES // 2**20} MiB, which is no submission")


def _repeated(names: list[str]) -> list[str]:
    series = pd.Series(names, dtype=object)
    return series[series.duplicated()].tolist()
