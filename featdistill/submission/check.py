"""The check of a submission, whoever made it: what the organizers refuse, and more.

Their checker refuses a CSV that cannot be read, a missing column, NaN, a score that is not a number and
duplicate names. This one also refuses what can be read in two ways, and valid files that cannot be intended:
images of another split, a constant, a file that was cut off. Rows are counted from 1, without the header.
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

# A submission of 10,000 rows has about half a MiB; a file that claims more than this is not unpacked.
MAX_BYTES = 64 * 2**20
# What CSV readers, pandas among them, read as a missing value.
_MISSING_TEXTS = {"", "nan", "na", "n/a", "#n/a", "<na>", "null", "none"}
# What every reader parses as the same number; Python also accepts 1_0, inf and digits of other alphabets.
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# Bits of a member's flags: encrypted, strongly encrypted, encrypted list of members (APPNOTE 4.4.4).
_ENCRYPTED = 0x0001 | 0x0040 | 0x2000


@dataclass(frozen=True)
class CheckedFile:
    """A CSV that passed.

    Attributes:
        file: its name.
        slot: whose scores it holds; None for a single CSV whose name is not in the profile.
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


def check_submission(
    path: str | Path, profile: Profile, expected: dict[str, list[str]] | None = None, where: str | None = None
) -> list[CheckedFile]:
    """Check a submission zip, or a single CSV for it.

    Args:
        expected: slot -> the names that must be present, with extensions; slots without an entry may have any
            names.
        where: what errors call the file; by default its path.

    Raises:
        UserError: the first problem, with up to five of the rows or names concerned.
    """
    expected, where = expected or {}, where or str(path)
    members = read_members(path, where)
    slots = {name: slot for slot, name in profile.files.items()}
    if None in members:
        slot = slots.get(Path(path).name)
        names = expected.get(slot) or (next(iter(expected.values())) if len(expected) == 1 else None)
        if expected and names is None:
            raise UserError(f"{where}: which manifest belongs to this CSV? give only that one")
        return [_check_csv(members[None], where, Path(path).name, slot, profile, names)]
    extra = sorted(set(members) - set(slots))
    if extra:
        folder = " (files must be at the root, not in a folder)" if any("/" in name for name in extra) else ""
        raise UserError(
            f"{where} contains {name_list(extra)}, which the profile does not allow{folder}; "
            f"allowed: {', '.join(slots)}"
        )
    missing = [profile.files[slot] for slot in profile.required if profile.files[slot] not in members]
    if missing:
        raise UserError(
            f"{where} is missing {' and '.join(missing)}; it contains {', '.join(members) or 'nothing'}"
        )
    return [
        _check_csv(data, f"{where}: {name}", name, slots[name], profile, expected.get(slots[name]))
        for name, data in members.items()
    ]


def read_members(path: str | Path, where: str) -> dict[str | None, bytes]:
    """Return the members of a zip by name, folders with a trailing slash; `{None: bytes}` of any other file.

    Raises:
        UserError: the file is missing, too large, named .zip without being one, a damaged zip, or one that is
            encrypted, contains a file twice or is compressed in an unusual way.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{where} does not exist")
    _check_size(path.stat().st_size, where)
    data = path.read_bytes()
    if not data.startswith(b"PK"):
        if path.suffix.lower() == ".zip":
            raise UserError(f"{where} is not a zip, whatever its name says; pack the files again")
        return {None: data}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            names = pd.Series([member.filename for member in members], dtype=object)
            refuse(where, "files that it contains twice", names[names.duplicated()])
            encrypted = [member.filename for member in members if member.flag_bits & _ENCRYPTED]
            refuse(where, "encrypted files", encrypted, "pack them again without a password")
            unusual = [member.filename for member in members if member.compress_type not in _METHODS]
            refuse(where, "files not compressed by deflate", unusual, "pack them as a plain zip")
            _check_size(sum(member.file_size for member in members), where)
            return {member.filename: archive.read(member) for member in members}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise UserError(f"{where} is not a readable zip: {error}") from error


def closest_profile(path: str | Path) -> str:
    """Return the name of the profile that fits the files and columns of a submission best."""
    members = read_members(path, str(path))
    first_line = next(iter(members.values()), b"").split(b"\n", 1)[0].decode("utf-8", "replace")
    columns = first_line.strip().removeprefix("\ufeff").split(",")

    def fit(name: str) -> int:
        profile = PROFILES[name]
        needed = {profile.files[slot] for slot in profile.required}
        fits_files = 0 if None in members else -len(needed.symmetric_difference(members))
        # The score column is decisive: profiles with the same columns differ by at most two files.
        return fits_files + 4 * (profile.score_column in columns)

    return max(PROFILES, key=fit)


def check_scores(where: str, names: Sequence[str], score: np.ndarray) -> None:
    """Refuse scores outside [0, 1], and a constant.

    Args:
        names: what errors call each score.
        score: (N,) float64, finite.
    """
    outside = np.flatnonzero((score < 0) | (score > 1))
    refuse(where, "scores outside 0..1", [names[row] for row in outside])
    if len(score) > 1 and score.min() == score.max():
        raise UserError(f"{where}: every score is {score[0]}, a constant; something went wrong in prediction")


def refuse(where: str, what: str, names: Iterable[str], advice: str = "") -> None:
    """Raise a `UserError` with the first of `names` and how many there are, if there are any."""
    names = list(names)
    if names:
        advice = f"; {advice}" if advice else ""
        raise UserError(f"{where}: {what} ({len(names)}): {name_list(names)}{advice}")


def names_as_written(names: Sequence[str], profile: Profile) -> list[str]:
    """Return names as the profile requires them, with or without extensions."""
    return [without_extension(name) for name in names] if profile.extension == "strip" else list(names)


def _check_csv(
    data: bytes, where: str, file: str, slot: str | None, profile: Profile, expected: list[str] | None
) -> CheckedFile:
    rows = _check_table(data, where, profile)
    names, texts = [row[-2] for row in rows], [row[-1] for row in rows]
    labels = [f"{name} (row {number})" for number, name in enumerate(names, start=1)]
    _check_names(where, names, labels, profile)
    if profile.index_column:
        wrong = [f"{row[0]} (row {at + 1})" for at, row in enumerate(rows) if row[0] != str(at)]
        refuse(where, "index column is not 0, 1, 2, ..", wrong, "rows were reordered or appended")
    by_label = dict(zip(labels, texts, strict=True))
    empty = [label for label, text in by_label.items() if text.strip().lower() in _MISSING_TEXTS]
    refuse(where, "scores that are NaN or empty", empty)
    invalid = [f"{label}: {text!r}" for label, text in by_label.items() if not _NUMBER.fullmatch(text)]
    refuse(where, "scores that are not numbers", invalid)
    score = np.array([float(text) for text in texts])
    check_scores(where, labels, score)
    if expected is not None:
        expected = names_as_written(expected, profile)
        present, known = set(names), set(expected)
        refuse(where, "missing rows", [name for name in expected if name not in present])
        pairs = zip(names, labels, strict=True)
        refuse(where, "unknown names", [label for name, label in pairs if name not in known])
    return CheckedFile(file, slot, names, score, hashlib.sha256(data).hexdigest())


def _check_table(data: bytes, where: str, profile: Profile) -> list[list[str]]:
    """Check the bytes, lines and header of a CSV, and return its rows."""
    if data.startswith(b"\xef\xbb\xbf"):
        raise UserError(
            f"{where} starts with a byte order mark, which hides the first column; save it as plain UTF-8"
        )
    header, rows = parse_csv(data, where)
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if b"\r" in line:
            raise UserError(f"{where}: line {number} contains a carriage return; save it with unix line ends")
        if not line.strip() and number < len(lines):
            raise UserError(f"{where}: line {number} is blank; remove it")
    if header != profile.header:
        missing = [column for column in profile.header if column not in header]
        reason = f"column {', '.join(missing)} is missing" if missing else "the columns differ"
        if header[0] in INDEX_HEADERS and not profile.index_column:
            reason = "there is an index column; write the file with index=False, or use --index-column"
        raise UserError(
            f"{where}: the header must be {','.join(profile.header)}, not {','.join(header)}: {reason}"
        )
    if header in rows:
        raise UserError(
            f"{where}: the header appears again in row {rows.index(header) + 1}: a second run appended its "
            "rows; delete the file and write it again"
        )
    if not rows:
        raise UserError(f"{where} has a header but no rows")
    if lines[-1]:
        raise UserError(f"{where}: row {len(rows)}, the last, has no line end: was the file cut off there?")
    return rows


def _check_names(where: str, names: list[str], labels: list[str], profile: Profile) -> None:
    def refuse_if(is_bad: Iterable[bool], what: str, advice: str = "") -> None:
        refuse(where, what, [label for label, bad in zip(labels, is_bad, strict=True) if bad], advice)

    refuse_if((name.lower() in _MISSING_TEXTS for name in names), "names that are empty or read as missing")
    invisible = [
        f"{name!r} (row {row})"
        for row, name in enumerate(names, start=1)
        if name != name.strip() or not name.isprintable()
    ]
    refuse(where, "names with spaces around them or invisible characters", invisible)
    refuse_if(("/" in name or "\\" in name for name in names), "names with a folder", "use file names only")
    refuse_if(pd.Series(names, dtype=object).duplicated(), "duplicate names")
    bare = [without_extension(name) == name for name in names]
    if profile.extension == "keep":
        refuse_if(bare, "names without their image extension", "expected as in 0a1b.jpg")
    else:
        refuse_if((not is_bare for is_bare in bare), "names with an image extension")


def _check_size(size: int, where: str) -> None:
    if size > MAX_BYTES:
        raise UserError(f"{where} has more than {MAX_BYTES // 2**20} MiB, too much for a submission")
