"""What a submission looks like: the known conventions as data, every part of which can be changed."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from featdistill.command_line import UserError, one_of

SLOTS = ("val", "val_hard", "test")
EXTENSIONS = ("keep", "strip")
# Submissions that the challenge accepts per day (its rules on Codabench).
DAILY_LIMIT = 5
# Images of the challenge's splits (its report, arXiv 2604.11487); both test splits have the same size.
OFFICIAL_ROWS = {"val": 10_000, "val_hard": 2_500, "test": 2_500}
PARTS = ("name_column", "score_column", "extension", "index_column")


@dataclass(frozen=True)
class Profile:
    """One convention for the files of the zip.

    Attributes:
        files: slot -> name of its CSV at the root of the zip.
        required: the slots that must be present; the others of `files` are optional.
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
        one_of("--extension", self.extension, EXTENSIONS)
        names = list(self.files.values())
        if len(set(names)) != len(names):
            raise UserError(f"two files of the submission cannot have the same name: {', '.join(names)}")
        for name in names:
            is_plain = name.isprintable() and "/" not in name and "\\" not in name
            if not is_plain or not name.endswith(".csv"):
                raise UserError(f"'{name}' cannot be a file of the submission; use a name such as a.csv")
        if self.name_column == self.score_column:
            raise UserError(f"names and scores cannot both be in the column {self.name_column}")

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


def flag(slot: str) -> str:
    """Return the flag of a slot: `val_hard` -> `--val-hard`."""
    return "--" + slot.replace("_", "-")


def adapted(name: str, file_names: Iterable[str] = (), **parts: Any) -> Profile:
    """Return a named profile with some parts changed.

    Args:
        file_names: each `SLOT=NAME`, as in `test=submission.csv`.
        parts: of `PARTS`; None leaves a part as it is.

    Raises:
        UserError: an unknown profile, slot or extension, or names that cannot be files of one zip.
    """
    profile = PROFILES[one_of("profile", name, PROFILES)]
    files = dict(profile.files)
    for pair in file_names:
        slot, separator, file = pair.partition("=")
        if not separator:
            raise UserError(f"--file-name {pair}: write it as SLOT=NAME, as in test=submission.csv")
        files[one_of("slot", slot, files)] = file
    # An optional file makes room: a test file may take the default name of a validation file.
    required = {files[slot] for slot in profile.required}
    files = {slot: file for slot, file in files.items() if slot in profile.required or file not in required}
    changes = {part: value for part, value in parts.items() if value is not None}
    return dataclasses.replace(profile, files=files, **changes)


def label(name: str, profile: Profile) -> str:
    """Return a profile's name and how it differs from the named one: `test-card extension=keep`."""
    named = PROFILES[name]
    changes = {
        part: getattr(profile, part) for part in PARTS if getattr(profile, part) != getattr(named, part)
    }
    changes |= {slot: file for slot, file in profile.files.items() if named.files.get(slot) != file}
    return " ".join([name, *(f"{part}={value}" for part, value in changes.items())])
