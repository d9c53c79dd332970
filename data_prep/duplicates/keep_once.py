"""Rows of a manifest without duplicate images, and a record of which row was dropped for which.

The row that stays inherits from the dropped ones: their groups are merged, so that a hold-out cannot separate
related images, and so are the sets in the column `protocol_sets`.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from data_prep.duplicates.near import near_pairs
from featdistill.command_line import UserError

# Between the sets in a cell of `protocol_sets`.
SET_SEPARATOR = ";"
# (name, reason, name of the image that stays) of a dropped row.
Dropped = tuple[str, str, str]


def drop_equal(rows: pd.DataFrame, sets: Iterable[Sequence[int]], dropped: list[Dropped]) -> pd.DataFrame:
    """Keep one row of each set of equal images: the first that has a label, or the first.

    Two labels are a `UserError`. `sets` are labels of the rows' index, which stays; `dropped` is extended.
    """
    label = rows["label"].astype("object").where(rows["label"].notna(), None)
    copies = []
    for same in sets:
        labeled = [row for row in same if label[row] is not None]
        stays = labeled[0] if labeled else same[0]
        for row in labeled:
            if label[row] != label[stays]:
                first, second = rows.loc[[stays, row], "image"]
                raise UserError(
                    f"{first} and {second} have equal bytes, but labels {label[stays]} and {label[row]}; "
                    "remove the wrong one from its manifest"
                )
        copies += [(row, stays) for row in same if row != stays]
    return _drop(rows, copies, "equal bytes", dropped)


def drop_near(rows: pd.DataFrame, pairs: np.ndarray, dropped: list[Dropped]) -> pd.DataFrame:
    """Drop each row that looks like an earlier row that stays and has the same label and generator.

    An original and its edit, or edits of one original by two methods, both stay. `rows` are indexed by
    0..N-1, `pairs` are those of `near_pairs`, and `dropped` is extended.
    """
    kind = rows["label"].astype("string").fillna("") + ":" + rows["generator"]
    kind = kind.to_numpy(dtype=object)
    copy_of: dict[int, int] = {}
    # Ordered by the later row, so that it is known whether the earlier one stays.
    for first, second, _ in pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))].tolist():
        if kind[first] == kind[second] and first not in copy_of:
            copy_of.setdefault(second, first)
    return _drop(rows, sorted(copy_of.items()), "near-duplicate", dropped)


def drop_across(
    training: pd.DataFrame, held: pd.DataFrame, hashes: pd.Series, bits: int, dropped: list[Dropped]
) -> pd.DataFrame:
    """Drop the training rows within `bits` of a held-out one, whatever their labels, and extend `dropped`.

    `hashes` are the perceptual hashes, or None, by image name.
    """
    names = [*training["name"], *held["name"]]
    copy_of: dict[int, int] = {}
    for first, second, _ in near_pairs(hashes.loc[names], bits).tolist():
        if first < len(training) <= second:
            copy_of.setdefault(first, second)
    if len(copy_of) == len(training):
        raise UserError("every training image looks like a held-out one; lower --near-duplicates")
    dropped += [(names[row], "near-duplicate of a held-out image", names[copy_of[row]]) for row in copy_of]
    return training.drop(index=list(copy_of)).reset_index(drop=True)


def drop_broken(rows: pd.DataFrame, broken: dict[int, str], faults: list[tuple[str, str]]) -> pd.DataFrame:
    """Drop the rows in `broken`, reasons by index label, and extend `faults` by their names and reasons."""
    labels = [row for row in sorted(broken) if row in rows.index]
    faults += [(rows.at[row, "name"], broken[row]) for row in labels]
    return rows.drop(index=labels)


def _drop(
    rows: pd.DataFrame, copies: list[tuple[int, int]], reason: str, dropped: list[Dropped]
) -> pd.DataFrame:
    if not copies:
        return rows
    name = rows["name"]
    dropped += [(name[row], reason, name[stays]) for row, stays in copies]
    rows = rows.assign(group=merged_groups(rows["group"], copies))
    if "protocol_sets" in rows:
        sets = rows["protocol_sets"].to_dict()
        for row, stays in copies:
            names = [*sets[stays].split(SET_SEPARATOR), *sets[row].split(SET_SEPARATOR)]
            sets[stays] = SET_SEPARATOR.join(dict.fromkeys(filter(None, names)))
        rows["protocol_sets"] = pd.Series(sets)
    return rows.drop(index=[row for row, _ in copies])


def merged_groups(group: pd.Series, copies: list[tuple[int, int]]) -> pd.Series:
    """Return the groups after merging that of each copy with that of the row that stays for it."""
    group = group.copy()
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while name in parent:
            name = parent[name]
        return name

    for row, stays in copies:
        if group[row] and not group[stays]:
            group[stays] = group[row]
        one, other = root(group[row]), root(group[stays])
        if one and one != other:
            parent[one] = other
    return group.map(root)
