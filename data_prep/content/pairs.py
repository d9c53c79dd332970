"""Rows of a manifest in pairs of both classes that show the same; see `matching`."""

import logging
from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import pandas as pd

from data_prep.content import banks
from data_prep.content.matching import nearest_pairs
from data_prep.duplicates.keep_once import Dropped, merged_groups
from featdistill.command_line import Parser, UserError, nearest, within

_log = logging.getLogger(__name__)
COLUMN = "pair"
_MATCH, _OWN_BANK = "--match content", "--match content without --bank"


def add_flags(parser: Parser) -> None:
    """Add `--match` and the flags that belong to it."""
    parser.add_argument(
        "--match", choices=("content",), help="keep pairs of an AI and a real image that show nearly the same"
    )
    group = banks.add_flags(parser, _MATCH)
    group.add_argument(
        "--match-share",
        type=within(0, 1, float),
        metavar="SHARE",
        help="keep only this share of the pairs, the nearest ones (default: 1)",
    )
    group.add_argument(
        "--match-within", metavar="COLUMN", help="pair images with the same value, such as fold or split"
    )
    group.add_argument(
        "--bank",
        metavar="BANK",
        help="match by the features of this bank, of its view control if it has one (default: make a bank in "
        "FILE.content)",
    )


def check(arguments: Namespace) -> None:
    """Refuse flags that have no effect or exclude each other."""
    if not arguments.match:
        for flag in ("bank", "match_share", "match_within"):
            if getattr(arguments, flag) is not None:
                raise UserError(f"--{flag.replace('_', '-')} has an effect with {_MATCH} only")
        banks.check(arguments, _MATCH, used=())
        return
    if arguments.balance != "none":
        raise UserError(
            f"--balance {arguments.balance} would tear the pairs of --match apart; omit one of them"
        )
    banks.check(arguments, _OWN_BANK, used=("feature",) if arguments.bank else banks.FLAGS)


class Content:
    """The features by which images are matched.

    Args:
        rows: all rows that will be matched, labeled.
        arguments: with the flags of `add_flags`, `manifests`, `out` and `workers`.

    Raises:
        UserError: the rows cannot be matched, or the bank does not hold them.
    """

    def __init__(self, rows: pd.DataFrame, arguments: Namespace) -> None:
        _check_rows(rows, arguments.match_within)
        if arguments.bank:
            # Imported late: PyTorch takes seconds to import.
            from featdistill.bank.store import open_bank

            bank = open_bank(arguments.bank)
        else:
            sources = {", ".join(arguments.manifests): rows}
            bank = banks.make_bank(rows, sources, arguments.out.with_suffix(".content"), arguments)
        view = "control" if "control" in bank.views else "clean"
        if view == "clean":
            _log.warning(
                "%s has no view control: images are matched by traces of generators as well; embed with "
                "--control-side 28",
                bank.path,
            )
        text = arguments.feature or bank.record["features"][0]
        self.values = bank.values(bank.feature(text), view)
        self.description = f"{text} of view {view} of {bank.path}"
        self._by_image = {image: position for position, image in enumerate(bank.rows["image"])}
        self._by_name = {name: position for position, name in enumerate(bank.rows["name"])}
        missing = rows["name"][self._positions(rows) < 0]
        if len(missing):
            raise UserError(
                f"{len(missing)} images are not in the bank {bank.path}, {missing.iloc[0]} among them; embed "
                "them, or omit --bank"
            )

    def of(self, rows: pd.DataFrame) -> np.ndarray:
        """Return the features of rows, (N, D) float32; NaN where an image could not be read."""
        return self.values[self._positions(rows)]

    def _positions(self, rows: pd.DataFrame) -> np.ndarray:
        # Combined manifests may have other names than the bank's, and files may have moved.
        return np.array(
            [
                self._by_image.get(image, self._by_name.get(name, -1))
                for image, name in zip(rows["image"], rows["name"], strict=True)
            ],
            dtype=np.int64,
        )


def matched(
    rows: pd.DataFrame,
    content: Content,
    arguments: Namespace,
    dropped: list[Dropped],
    faults: list[tuple[str, str]],
) -> pd.DataFrame:
    """Return the rows in pairs, numbered from 1 in the column `pair`; the groups of a pair are merged.

    Args:
        dropped, faults: extended by the rows that are left out.

    Raises:
        UserError: no pair is left.
    """
    values = content.of(rows)
    usable = np.isfinite(values).all(axis=1)
    faults += [(name, "could not be read when it was embedded") for name in rows["name"][~usable]]
    rows, values = rows[usable].reset_index(drop=True), values[usable]
    pairs, distance = _pairs(rows, values, arguments.match_within)
    share = 1.0 if arguments.match_share is None else arguments.match_share
    kept = np.sort(np.argsort(distance, kind="stable")[: round(share * len(pairs))])
    if not len(kept):
        raise UserError(
            "--match content leaves no pair; use a larger --match-share, or another --match-within"
        )
    pairs, label = pairs[kept], rows["label"]
    _log.info(
        f"{len(pairs)} pairs of {(label == 1).sum()} AI and {(label == 0).sum()} real images by "
        f"{content.description}; mean distance {distance[kept].mean():.3f}"
    )
    number = pd.Series("", index=rows.index)
    for position, pair in enumerate(pairs.tolist(), start=1):
        number[pair] = str(position)
    is_alone = (rows["group"] == "") & (number != "")
    group = rows["group"].where(~is_alone, "name:" + rows["name"])
    rows = rows.assign(**{COLUMN: number}, group=merged_groups(group, list(map(tuple, pairs.tolist()))))
    dropped += [(name, "no match", "") for name in rows["name"][number == ""]]
    return rows[number != ""].reset_index(drop=True)


def _check_rows(rows: pd.DataFrame, column: str | None) -> None:
    if COLUMN in rows and (rows[COLUMN] != "").any():
        raise UserError(f"the manifests have a column {COLUMN} already; rename it before matching")
    unlabeled = rows["name"][rows["label"].isna()]
    if len(unlabeled):
        raise UserError(
            f"{_MATCH} needs labels: {len(unlabeled)} rows have none, {unlabeled.iloc[0]} among them"
        )
    if rows["label"].nunique() < 2:
        raise UserError(f"{_MATCH} needs real and AI-generated images; all rows have the same label")
    if column and column not in rows:
        raise UserError(f"--match-within: there is no column {column}{nearest(column, rows.columns)}")


def _pairs(rows: pd.DataFrame, values: np.ndarray, column: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Return positions (K, 2) of AI and real images, and their distances, within each value of a column."""
    label = rows["label"].to_numpy(dtype=np.int64)
    parts: Sequence[np.ndarray] = [np.arange(len(rows))]
    if column:
        parts = [positions for _, positions in sorted(rows.groupby(column).indices.items())]
    found = [(np.empty((0, 2), np.int64), np.empty(0))]
    for part in parts:
        ai, real = part[label[part] == 1], part[label[part] == 0]
        if len(ai) and len(real):
            pairs, distance = nearest_pairs(values[ai], values[real])
            found.append((np.stack([ai[pairs[:, 0]], real[pairs[:, 1]]], axis=1), distance))
    pairs, distance = map(np.concatenate, zip(*found, strict=True))
    order = np.argsort(pairs[:, 0])
    return pairs[order], distance[order]
