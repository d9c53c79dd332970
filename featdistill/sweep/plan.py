"""What a robustness sweep does: which operations at which levels, on which images of a manifest."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from featdistill.command_line import UserError, one_of
from featdistill.distortions.libraries import LIBRARIES
from featdistill.distortions.operation import LEVELS
from featdistill.distortions.plan import Step
from featdistill.seeds import evaluation_generator, hash_ranks

_FLAGS = (
    "experts",
    "released",
    "fusion",
    "libraries",
    "operations",
    "levels",
    "sample",
    "distort_at",
    "batch_size",
    "workers",
    "precision",
    "device",
)
_SAMPLE = 500


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
        rows: of the manifest, in its order, all of them labelled.
        unlabelled, distorted: how many of the manifest's rows could not be chosen, and why.
    """

    rows: pd.DataFrame
    unlabelled: int
    distorted: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that go with `--sweep` alone; see `refuse_flags`."""
    group = parser.add_argument_group("with --sweep")
    group.add_argument("--experts", nargs="+", metavar="DIR", help="experts' folders")
    group.add_argument("--released", metavar="DIR", help="folder of the authors' released experts")
    group.add_argument(
        "--fusion", metavar="HOW", help="as for predict.py: probability_mean (default), logit_mean or a file"
    )
    group.add_argument(
        "--libraries",
        nargs="+",
        metavar="NAME",
        help=f"whose operations are applied: {', '.join(LIBRARIES)} (default: official)",
    )
    group.add_argument(
        "--operations", nargs="+", metavar="NAME", help="these operations alone (default: all)"
    )
    group.add_argument(
        "--levels", nargs="+", type=int, choices=LEVELS, metavar="LEVEL", help="1 to 5 (default: all)"
    )
    group.add_argument(
        "--sample",
        type=int,
        metavar="N",
        help=f"images that are distorted, of both classes (default: {_SAMPLE})",
    )
    group.add_argument(
        "--distort-at",
        choices=("native", "input"),
        help="distort images as they are stored (native, the default), or resized to the experts' input",
    )
    group.add_argument("--batch-size", metavar="N", help="as for predict.py (default: auto)")
    group.add_argument("--workers", type=int, help="loader processes (default: 8, or as many as cores)")
    group.add_argument("--precision", metavar="NAME", help="as for predict.py: fp32, bf16, ...")
    group.add_argument("--device", help="cuda, cuda:1, cpu, ... (default: a GPU where there is one)")


def refuse_flags(args: argparse.Namespace) -> None:
    """Refuse flags of the sweep where none is asked for.

    Raises:
        UserError: one is given.
    """
    for flag in _FLAGS:
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag.replace('_', '-')} goes with --sweep")


def choose_cells(
    libraries: Sequence[str] | None = None,
    operations: Sequence[str] | None = None,
    levels: Sequence[int] | None = None,
) -> tuple[list[Cell], list[dict[str, str]]]:
    """Return the cells of a sweep in the libraries' order, level by level.

    Args:
        libraries: names; the official one by default.
        operations: names out of these libraries; all by default.
        levels: 1 to 5; all by default.

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


def sample_rows(frame: pd.DataFrame, count: int | None = None, seed: int = 0) -> Sample:
    """Choose labelled images that are not distorted yet, each class in proportion to its share.

    Of each class those whose hash of (seed, name) is smallest are taken, so that neither the order of the
    rows nor the rows of the other class matter.

    Args:
        frame: of `read_manifest`.
        count: how many are wanted, 500 by default; all where there are not as many.

    Raises:
        UserError: `count` is below 2, or there are no such images of both classes.
    """
    count, where = _SAMPLE if count is None else count, frame.attrs["path"]
    if count < 2:
        raise UserError(f"--sample must be 2 or more, not {count}")
    is_labelled = frame["label"].notna()
    is_distorted = (frame["is_distorted"] == 1).fillna(False).astype(bool)
    rows = frame[is_labelled & ~is_distorted]
    of_class = {label: rows[rows["label"] == label] for label in (0, 1)}
    lacking = [name for label, name in ((0, "real"), (1, "AI-generated")) if of_class[label].empty]
    if lacking:
        raise UserError(
            f"{where} has no labelled, undistorted {' and no '.join(lacking)} image; a sweep takes images of "
            "both classes"
        )
    ai = min(max(round(count * len(of_class[1]) / len(rows)), 1), count - 1)
    kept = []
    for label, wanted in ((0, count - ai), (1, ai)):
        ranks = pd.Series(hash_ranks(of_class[label]["name"], seed), index=of_class[label].index)
        kept += ranks.sort_values().index[:wanted].tolist()
    chosen = rows.loc[sorted(kept)].reset_index(drop=True)
    return Sample(chosen, int((~is_labelled).sum()), int((is_labelled & is_distorted).sum()))
