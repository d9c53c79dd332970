"""Which rows are trained on when: how often each comes up in an epoch, and the order of all batches."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from featdistill.command_line import UserError, one_of
from featdistill.seeds import hash_ranks

# What comes up equally often, by the columns whose values tell it apart.
BALANCES = {"none": (), "class": ("label",), "source": ("source",), "class_source": ("label", "source")}


def balance_weights(rows: pd.DataFrame, balance: str = "none") -> np.ndarray | None:
    """Return how often each row comes up in an epoch, on average.

    The manifest's column `weight` says how often the rows of a class (or source) come up in relation to each
    other, and its sum how many images an epoch has; an empty cell, and every row without the column, counts
    1. `balance` says how often the classes (or sources) come up, whatever the weights of their rows sum to:
    each weight is multiplied by one factor for its class, and the sum stays.

    Args:
        rows: of a manifest.
        balance: `none` (the column as it is); `class` or `source` (each comes up equally often);
            `class_source` (the classes come up equally often, and within each class its sources).

    Returns:
        (rows,) float64 above 0, or None where all rows count alike.

    Raises:
        UserError: a weight is no number above 0, or a row has no source where sources are balanced.
    """
    own = _own_weights(rows)
    columns = BALANCES[one_of("value of balance", balance, BALANCES)]
    if "source" in columns:
        without = rows["source"] == "" if "source" in rows else pd.Series(True, index=rows.index)
        if without.any():
            raise UserError(
                f"balance {balance}: {int(without.sum())} of {len(rows)} training rows have no source, "
                f"{rows['name'][without.idxmax()]} among them; fill in the manifest's column source, or give "
                "--balance class"
            )
    if not columns:
        return own
    own = pd.Series(1.0 if own is None else own, index=rows.index)
    share, parts = 1.0, []
    for column in columns:
        values = rows[column]
        # Within each part so far, every value of the column gets the same share.
        share = share / (values.groupby(parts).transform("nunique") if parts else values.nunique())
        parts.append(values)
    return (own * share * own.sum() / own.groupby(parts).transform("sum")).to_numpy(np.float64)


def limit_per_class(rows: pd.DataFrame, most: int | None, seed: int) -> pd.DataFrame:
    """Return at most `most` rows of each label, a random choice that depends on (seed, name) alone.

    With a larger limit the same rows are chosen, and more. The order of the rows stays.
    """
    if most is None:
        return rows
    ranks = pd.Series(hash_ranks(rows["name"], seed), index=rows.index)
    places = ranks.groupby(rows["label"]).rank(method="first")
    return rows[places <= most].reset_index(drop=True)


def _own_weights(rows: pd.DataFrame) -> np.ndarray | None:
    """Return the column `weight`, where an empty cell counts 1, or None without it."""
    if "weight" not in rows:
        return None
    text = rows["weight"].replace("", "1")
    weights = pd.to_numeric(text, errors="coerce").to_numpy(np.float64)
    wrong = ~(np.isfinite(weights) & (weights > 0))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise UserError(
            f"the weight of {rows['name'].iloc[row]} must be a number above 0, not {text.iloc[row]!r}"
        )
    return weights


class TrainBatches:
    """The batches of all epochs as one stream, from any optimiser step on, for one of several processes.

    Each epoch is a new permutation, a function of (seed, epoch). An optimiser step sees the same images
    whatever the number of processes and accumulation steps; each forward pass takes its own slice of them.
    The last, incomplete batch of an epoch is left out. With weights, an epoch has as many images as the
    weights sum to, and a row of weight w comes up w times on average: as often as that rounded down or up.
    So do all rows of the same weight together.

    Args:
        rows: number of training rows.
        batch_size: images an optimiser step, over all processes and accumulation steps.
        start: number of optimiser steps that are already done.
        weights: (rows,) float64 above 0, see `balance_weights`, or None where all rows count alike.

    Raises:
        UserError: the batch does not divide among the processes, or there are fewer rows than one batch.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        epochs: int,
        seed: int,
        *,
        accumulation: int = 1,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        weights: np.ndarray | None = None,
    ) -> None:
        if batch_size % (accumulation * world):
            raise UserError(
                f"batch_size {batch_size} is no multiple of {world} processes x accumulation {accumulation}"
            )
        images = rows if weights is None else int(weights.sum() * (1 + 1e-9))
        if images < batch_size:
            raise UserError(
                f"{images} training images are fewer than one batch of {batch_size}; lower --batch-size"
            )
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.weights, self.images, self.epochs = weights, images, epochs
        self.accumulation, self.rank, self.world = accumulation, rank, world
        self.steps_per_epoch = images // batch_size
        self.start, self.end = start, self.steps_per_epoch * epochs

    def __len__(self) -> int:
        return (self.end - self.start) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch_size // (self.accumulation * self.world)
        order, order_epoch = None, None
        for step in range(self.start, self.end):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = self._order(epoch), epoch
            for part in range(self.accumulation):
                first = place * self.batch_size + (part * self.world + self.rank) * share
                yield [(time, index) for time, index in order[first : first + share].tolist()]

    def _order(self, epoch: int) -> np.ndarray:
        """Return the (images, 2) items of an epoch: epoch and index.

        A row that comes up again in an epoch does so as of an epoch that there is not, so that it is not
        distorted the same way.
        """
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.rows)
        if self.weights is None:
            return np.column_stack([np.full(self.rows, epoch), order])
        # Even steps along the rows, each as long as its weight; rows of one weight lie together, so that they
        # come up as often as their weights sum to (two balanced classes: half of the images each).
        order = order[np.argsort(self.weights[order], kind="stable")]
        ends = np.cumsum(self.weights[order])
        steps = (np.arange(self.images) + rng.random()) * (ends[-1] / self.images)
        places = np.minimum(np.searchsorted(ends, steps, side="right"), self.rows - 1)
        again = np.arange(self.images) - np.searchsorted(places, places, side="left")
        items = np.column_stack([epoch + self.epochs * again, order[places]])
        return items[rng.permutation(self.images)]
