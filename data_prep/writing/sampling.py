"""Which rows are chosen: by a hash of (seed, name), so that the order of the rows does not matter."""

import pandas as pd

from featdistill.seeds import hash_ranks


def hash_positions(names: pd.Series, strata: pd.Series, seed: int) -> pd.Series:
    """Return each name's position, from 0, within its stratum, ordered by a hash of (seed, name)."""
    hashes = pd.Series(hash_ranks(names, seed), index=names.index)
    return hashes.groupby(strata).rank(method="first").astype("int64") - 1


def proportional_subset(frame: pd.DataFrame, limit: int, seed: int) -> pd.DataFrame:
    """Return `limit` rows in their order, with the same proportions of (label, generator).

    Proportions are rounded by the largest remainder. A smaller limit takes a part of what a larger one takes,
    apart from the rounding.
    """
    if limit >= len(frame):
        return frame
    strata = frame["label"].astype("string").fillna("") + "/" + frame["generator"]
    rows = strata.value_counts(sort=False).sort_index()
    shares = {name: divmod(limit * int(count), len(frame)) for name, count in rows.items()}
    take = {name: whole for name, (whole, _) in shares.items()}
    by_remainder = sorted(shares, key=lambda name: (-shares[name][1], name))
    for name in by_remainder[: limit - sum(take.values())]:
        take[name] += 1
    chosen = hash_positions(frame["name"], strata, seed) < strata.map(take).astype("int64")
    return frame[chosen].reset_index(drop=True)
