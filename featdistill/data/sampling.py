"""How often each training row appears in an epoch, and the order of all batches."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from featdistill.command_line import UserError, counted, one_of
from featdistill.records.strata import column_strata
from featdistill.seeds import hash_ranks, order_generator

# The columns whose values appear equally often, for each value of the recipe key `balance`.
BALANCES = {"none": (), "class": ("label",), "source": ("source",), "class_source": ("label", "source")}
BALANCES |= {"class_scale": ("label",)}


def balance_weights(rows: pd.DataFrame, balance: str = "none") -> np.ndarray | None:
    """Return how often each row appears in an epoch, on average.

    The manifest's column `weight` (1 if empty or missing) sets the frequency of rows relative to each other
    within their class or source; its sum is the number of images per epoch. `balance` sets the frequency of
    the classes or sources: each weight is multiplied by one factor per class, and the sum stays.

    Args:
        rows: of a manifest.
        balance: `none` (the column as it is); `class` or `source` (each appears equally often);
            `class_source` (the classes appear equally often, and the sources within each class);
            `class_scale` (the classes appear equally often among images of similar `scale`, see
            `records.strata`; how often each scale appears does not change).

    Returns:
        (rows,) float64 above 0, or None if all rows count alike.

    Raises:
        UserError: a weight is not a number above 0, a row without source when sources are balanced, or, with
            `class_scale`, a row without `scale` or one class alone among images of similar scale.
    """
    weights = _manifest_weights(rows)
    columns = BALANCES[one_of("value of balance", balance, BALANCES)]
    if "source" in columns:
        without = rows["source"] == "" if "source" in rows else pd.Series(True, index=rows.index)
        if without.any():
            raise UserError(
                f"balance {balance}: {int(without.sum())} of {len(rows)} training rows have no source, "
                f"{rows['name'][without.idxmax()]} among them; fill in the manifest's column source, or use "
                "--balance class"
            )
    if not columns:
        return weights
    weights = pd.Series(1.0 if weights is None else weights, index=rows.index)
    if balance == "class_scale":
        return _class_scale_weights(rows, weights).to_numpy(np.float64)
    share, parts = 1.0, []
    for column in columns:
        values = rows[column]
        # Within each part so far, every value of the column gets the same share.
        share = share / (values.groupby(parts).transform("nunique") if parts else values.nunique())
        parts.append(values)
    totals = weights.groupby(parts).transform("sum")
    return (weights * share * weights.sum() / totals).to_numpy(np.float64)


def limit_per_class(rows: pd.DataFrame, limit: int | None, seed: int) -> pd.DataFrame:
    """Return at most `limit` rows of each label, in their order, chosen by (seed, name) alone.

    A larger limit adds rows to those of a smaller one.
    """
    if limit is None:
        return rows
    ranks = pd.Series(hash_ranks(rows["name"], seed), index=rows.index)
    positions = ranks.groupby(rows["label"]).rank(method="first")
    return rows[positions <= limit].reset_index(drop=True)


def _class_scale_weights(rows: pd.DataFrame, weights: pd.Series) -> pd.Series:
    """Return the weights at which each class has half the sum of each stratum of `scale`."""
    of = f"the {len(rows)} training rows"
    stratum = column_strata(rows, "scale", of)
    if stratum.isna().any():
        raise UserError(
            f"balance class_scale: {int(stratum.isna().sum())} of {of} have no scale, "
            f"{rows['name'][stratum.isna().idxmax()]} among them; fill in the manifest's column scale"
        )
    classes = rows["label"].groupby(stratum, observed=True).nunique()
    if (classes < 2).any():
        raise UserError(
            f"balance class_scale: all training rows with scale {classes.idxmin()} are of one class; "
            "add images of the other one, or leave these out"
        )
    totals = weights.groupby(stratum, observed=True).transform("sum")
    of_class = weights.groupby([stratum, rows["label"]], observed=True).transform("sum")
    return weights * totals / (2 * of_class)


def _manifest_weights(rows: pd.DataFrame) -> np.ndarray | None:
    """Return the column `weight`, with 1 for empty cells, or None without it."""
    if "weight" not in rows:
        return None
    text = rows["weight"].replace("", "1")
    weights = pd.to_numeric(text, errors="coerce").to_numpy(np.float64)
    is_wrong = ~(np.isfinite(weights) & (weights > 0))
    if is_wrong.any():
        row = int(np.argmax(is_wrong))
        raise UserError(
            f"the weight of {rows['name'].iloc[row]} must be a number above 0, not {text.iloc[row]!r}"
        )
    return weights


class TrainBatches:
    """The batches of all epochs as one stream, starting at any optimizer step, for one of several processes.

    Each epoch is a new permutation, a function of (seed, stage, epoch), without its last, incomplete batch.
    An optimizer step sees the same images whatever the number of processes and accumulation steps; each
    forward pass takes a slice of them. With weights, an epoch has as many images as the weights sum to. A row
    of weight w appears w times, rounded down or up, and so do all rows of the same weight together.

    Args:
        rows: number of training rows.
        batch_size: images per optimizer step, over all processes and accumulation steps.
        stage: 1 or 2, so that stage 2 does not repeat the batches of stage 1.
        start: number of optimizer steps already taken.
        weights: (rows,) float64 above 0, see `balance_weights`, or None if all rows count alike.

    Raises:
        UserError: the batch cannot be divided among the processes, or there are fewer rows than one batch.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        epochs: int,
        seed: int,
        *,
        stage: int = 1,
        accumulation: int = 1,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        weights: np.ndarray | None = None,
    ) -> None:
        if batch_size % (accumulation * world):
            raise UserError(
                f"batch_size {batch_size} is not a multiple of {world} processes x accumulation "
                f"{accumulation}"
            )
        images = rows if weights is None else int(weights.sum() * (1 + 1e-9))
        if images < batch_size:
            raise UserError(
                f"{counted(images, 'training image')}, fewer than a batch of {batch_size}; lower --batch-size"
            )
        self.rows, self.batch_size, self.seed, self.stage = rows, batch_size, seed, stage
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
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = self._order(epoch), epoch
            for part in range(self.accumulation):
                first = position * self.batch_size + (part * self.world + self.rank) * share
                yield [tuple(item) for item in order[first : first + share].tolist()]

    def _order(self, epoch: int) -> np.ndarray:
        """Return the (images, 2) items of an epoch: epoch and index.

        When a row appears again in an epoch, its item has an epoch that is never reached, so that it is not
        distorted the same way.
        """
        rng = order_generator(self.seed, self.stage, epoch)
        order = rng.permutation(self.rows)
        if self.weights is None:
            return np.column_stack([np.full(self.rows, epoch), order])
        # Even steps along the rows, each as long as its weight. Rows of one weight are adjacent, so that
        # together they appear as often as their weights sum to (two balanced classes: half the images each).
        order = order[np.argsort(self.weights[order], kind="stable")]
        ends = np.cumsum(self.weights[order])
        steps = (np.arange(self.images) + rng.random()) * (ends[-1] / self.images)
        positions = np.minimum(np.searchsorted(ends, steps, side="right"), self.rows - 1)
        again = np.arange(self.images) - np.searchsorted(positions, positions, side="left")
        items = np.column_stack([epoch + self.epochs * again, order[positions]])
        return items[rng.permutation(self.images)]
