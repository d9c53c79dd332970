"""Rows of a manifest without those whose images are there already, and which rows were left out for which.

What stays takes over what the others say of it: its group and theirs become one, so that a hold-out does not
come between their relatives, and so do the sets of a column `protocol_sets`.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from data_prep.duplicates.near import near_pairs
from featdistill.command_line import UserError

# Stands between the sets that a cell of `protocol_sets` names.
SET_SEPARATOR = ";"
# (name, reason, name of the image that stays), for each row that is left out.
Dropped = tuple[str, str, str]


def drop_equal(rows: pd.DataFrame, sets: Iterable[Sequence[int]], dropped: list[Dropped]) -> pd.DataFrame:
    """Keep one row of each set: the first that has a label, or the first.

    Args:
        rows: a manifest; its index stays as it is.
        sets: labels of `rows`' index whose images are equal.
        dropped: what is left out is appended.

    Raises:
        UserError: equal images have two labels.
    """
    label = rows["label"].astype("object").where(rows["label"].notna(), None)
    copies = []
    for same in sets:
        known = [row for row in same if label[row] is not None]
        stays = known[0] if known else same[0]
        for row in known:
            if label[row] != label[stays]:
                first, second = rows.loc[[stays, row], "image"]
                raise UserError(
                    f"{first} and {second} have equal bytes, but labels {label[stays]} and {label[row]}; "
                    "take the wrong one out of its manifest"
                )
        copies += [(row, stays) for row in same if row != stays]
    return _drop(rows, copies, "equal bytes", dropped)


def drop_near(rows: pd.DataFrame, pairs: np.ndarray, dropped: list[Dropped]) -> pd.DataFrame:
    """Leave out each row that looks like a row before it that stays, where label and generator are the same.

    An original and its edit, or two edits of one original by two methods, stay.

    Args:
        rows: a manifest, indexed by 0..N-1.
        pairs: (M, 3) as `near_duplicates.near_pairs` returns it.
        dropped: what is left out is appended.
    """
    kind = rows["label"].astype("string").fillna("") + ":" + rows["generator"]
    kind = kind.to_numpy(dtype=object)
    copy_of: dict[int, int] = {}
    # By the later row: whether the earlier one stays is decided by then.
    for first, second, _ in pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))].tolist():
        if kind[first] == kind[second] and first not in copy_of:
            copy_of.setdefault(second, first)
    return _drop(rows, sorted(copy_of.items()), "near-duplicate", dropped)


def drop_across(
    training: pd.DataFrame, held: pd.DataFrame, hashes: pd.Series, bits: int, dropped: list[Dropped]
) -> pd.DataFrame:
    """Leave out the training rows that look like a held-out one, whatever their labels.

    Args:
        hashes: the perceptual hash of each image, or None, by name.
        bits: largest distance of images that look alike.
        dropped: what is left out is appended.

    Raises:
        UserError: no training row stays.
    """
    names = [*training["name"], *held["name"]]
    copy_of: dict[int, int] = {}
    for first, second, _ in near_pairs(hashes.loc[names], bits).tolist():
        if first < len(training) <= second:
            copy_of.setdefault(first, second)
    if len(copy_of) == len(training):
        raise UserError("every training image looks like one that is held out; lower --near-duplicates")
    dropped += [(names[row], "near-duplicate of a held-out image", names[copy_of[row]]) for row in copy_of]
    return training.drop(index=list(copy_of)).reset_index(drop=True)


def drop_broken(rows: pd.DataFrame, broken: dict[int, str], faults: list[tuple[str, str]]) -> pd.DataFrame:
    """Leave out rows that cannot be read.

    Args:
        broken: reasons by label of `rows`' index.
        faults: (name, reason) of each is appended.
    """
    there = [row for row in sorted(broken) if row in rows.index]
    faults += [(rows.at[row, "name"], broken[row]) for row in there]
    return rows.drop(index=there)


def _drop(
    rows: pd.DataFrame, copies: list[tuple[int, int]], reason: str, dropped: list[Dropped]
) -> pd.DataFrame:
    if not copies:
        return rows
    name = rows["name"]
    dropped += [(name[row], reason, name[stays]) for row, stays in copies]
    rows = rows.assign(group=_joined_groups(rows["group"], copies))
    if "protocol_sets" in rows:
        sets = rows["protocol_sets"].to_dict()
        for row, stays in copies:
            names = [*sets[stays].split(SET_SEPARATOR), *sets[row].split(SET_SEPARATOR)]
            sets[stays] = SET_SEPARATOR.join(dict.fromkeys(filter(None, names)))
        rows["protocol_sets"] = pd.Series(sets)
    return rows.drop(index=[row for row, _ in copies])


def _joined_groups(group: pd.Series, copies: list[tuple[int, int]]) -> pd.Series:
    """Return the groups with those of each copy and of what stays for it made one."""
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
