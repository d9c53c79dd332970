"""What a robustness sweep does: which operations at which levels, on which images of a manifest."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from featdistill.command_line import UserError, one_of
from featdistill.distortions.libraries import LIBRARIES
from featdistill.distortions.operation import LEVELS
from featdistill.distortions.plan import Step
from featdistill.seeds import evaluation_generator, hash_ranks


@dataclass(frozen=True)
class Cell:
    """One operation at one level."""

    library: str
    operation: str
    level: int

    @property
    def scale(self) -> float:
        """The operation's parameter at the level."""
        return LIBRARIES[self.library][self.operation].scales[self.level - 1]

    def step(self, seed: int, name: str) -> Step:
        """Return what is done to the image of that name: a function of seed, cell and name alone."""
        rng = evaluation_generator(seed, f"{self.library}/{self.operation}/{self.level}/{name}")
        return Step(self.library, self.operation, self.level, int(rng.integers(2**63)))


@dataclass(frozen=True)
class Sample:
    """The images of a sweep.

    Attributes:
        rows: rows of the manifest, in its order, all of them labeled.
        unlabeled, distorted: how many other rows have no label or are already distorted.
    """

    rows: pd.DataFrame
    unlabeled: int
    distorted: int


def choose_cells(
    libraries: Sequence[str] | None = None,
    operations: Sequence[str] | None = None,
    levels: Sequence[int] | None = None,
) -> tuple[list[Cell], list[dict[str, str]]]:
    """Return the cells of a sweep in the libraries' order, level by level.

    Args:
        libraries: names, by default the official one.
        operations: names of operations in these libraries, by default all.
        levels: 1 to 5, by default all.

    Returns:
        The cells, and `library`, `operation` and `missing` (what must be installed) of those left out.

    Raises:
        UserError: a name is unknown, or no cell is left.
    """
    chosen = [
        one_of("distortion library", name, LIBRARIES) for name in dict.fromkeys(libraries or ["official"])
    ]
    known = {name for library in chosen for name in LIBRARIES[library]}
    for name in operations or ():
        one_of(f"operation of {' and '.join(chosen)}", name, sorted(known))
    cells, left_out = [], []
    for library in chosen:
        for name, operation in LIBRARIES[library].items():
            if operations and name not in operations:
                continue
            if missing := operation.missing():
                left_out.append({"library": library, "operation": name, "missing": missing})
                continue
            cells += [Cell(library, name, level) for level in sorted(set(levels or LEVELS))]
    if not cells:
        needed = "; ".join(f"{one['operation']} needs {one['missing']}" for one in left_out)
        raise UserError(f"no operation can be applied: {needed}")
    return cells, left_out


def sample_rows(frame: pd.DataFrame, count: int, seed: int = 0) -> Sample:
    """Choose labeled images that are not distorted yet, each class in proportion to its share.

    Of each class, those with the smallest hash of (seed, name) are taken, so neither the order of the rows
    nor the rows of the other class matter.

    Args:
        frame: of `read_manifest`.
        count: how many, 2 or more; all where there are fewer.

    Raises:
        UserError: there are no such images of both classes.
    """
    is_labeled = frame["label"].notna()
    is_distorted = (frame["is_distorted"] == 1).fillna(False).astype(bool)
    rows = frame[is_labeled & ~is_distorted]
    of_class = {label: rows[rows["label"] == label] for label in (0, 1)}
    lacking = [name for label, name in ((0, "real"), (1, "AI-generated")) if of_class[label].empty]
    if lacking:
        raise UserError(
            f"{frame.attrs['path']} has no labeled, undistorted {' and no '.join(lacking)} image; a sweep "
            "needs images of both classes"
        )
    ai = min(max(round(count * len(of_class[1]) / len(rows)), 1), count - 1)
    chosen = []
    for label, number in ((0, count - ai), (1, ai)):
        ranks = pd.Series(hash_ranks(of_class[label]["name"], seed), index=of_class[label].index)
        chosen += ranks.sort_values().index[:number].tolist()
    sample = rows.loc[sorted(chosen)].reset_index(drop=True)
    return Sample(sample, int((~is_labeled).sum()), int((is_labeled & is_distorted).sum()))
