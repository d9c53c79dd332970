"""The same images in one or several banks, with the features of all banks side by side."""

import dataclasses
import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from featdistill.bank.store import Bank
from featdistill.bank.views import CLEAN, CONTROL
from featdistill.command_line import UserError, counted, one_of
from featdistill.models.features import Feature, FisherSums, top_positions
from featdistill.records.predictions import name_list

_log = logging.getLogger(__name__)
_CONTROL_KEY = "control_side_px"
# Separates the features of several banks in one text.
SEPARATOR = "/"
# Atoms are read in parts of about so many bytes.
_BYTES_AT_ONCE = 1 << 26


class Joined:
    """Images that are labeled, and readable in all banks.

    Args:
        banks: of the same images and with the same draws, in any order of rows.
        rows: those of the first bank that count, by default all that are labeled and readable.

    Attributes:
        rows: (N rows) of the first bank's manifest.
        views: the names that all banks have.

    Raises:
        UserError: the banks are of different images, or their views are drawn differently.
    """

    def __init__(self, banks: Sequence[Bank], rows: pd.DataFrame | None = None) -> None:
        self.banks = list(banks)
        self.views = [view for view in banks[0].views if all(view in bank.views for bank in banks)]
        if rows is None:
            _check_alike(banks, self.views)
            good = banks[0].rows["label"].notna()
            for bank in banks:
                broken = bank.rows["name"][bank.rows["broken"]]
                good &= ~banks[0].rows["name"].isin(broken)
                if len(broken):
                    unread = counted(len(broken), "image")
                    _log.warning("%s: without %s that could not be read (errors.csv)", bank.path, unread)
            rows = banks[0].rows[good].drop(columns="broken").reset_index(drop=True)
            rows.attrs = {}
        self.rows = rows

    def select(self, chosen: np.ndarray) -> "Joined":
        """Return the images of a mask (N,) bool."""
        return Joined(self.banks, self.rows[chosen].reset_index(drop=True))

    @property
    def labels(self) -> np.ndarray:
        """(N,) int8, 0 real, 1 AI-generated."""
        return self.rows["label"].to_numpy(np.int8)

    @property
    def groups(self) -> np.ndarray:
        """(N,) int64, the same for images of a group; an image without a group is one of its own."""
        names = self.rows["group"].where(self.rows["group"] != "", "name:" + self.rows["name"])
        return pd.factorize(names)[0]

    @cached_property
    def _places(self) -> list[np.ndarray]:
        """The row of each image in each bank, (N,) int64."""
        names = self.rows["name"]
        return [pd.Index(bank.rows["name"]).get_indexer(names) for bank in self.banks]

    def chains(self, view: str) -> list[list]:
        """Return for each image the [name, scale] pairs of its distortions in a view."""
        bank = self.banks[0]
        if view in (CLEAN, CONTROL):
            return [[] for _ in range(len(self.rows))]
        column = bank.views.index(view)
        drawn = [views[column] for views in bank.drawn()]
        return [drawn[place] for place in self._places[0]]

    def is_distorted(self, views: Sequence[str]) -> np.ndarray:
        """Return for each image and view whether it is clean or distorted.

        Returns:
            (N, V) int8: 1 distorted, also in a clean view if the image itself is; 0 clean; -1 for a view that
            happens to draw no distortion, which is neither.
        """
        already = (self.rows["is_distorted"] == 1).fillna(False).to_numpy(bool)
        columns = []
        for view in views:
            if view in (CLEAN, CONTROL):
                columns.append(already.astype(np.int8))
            else:
                is_drawn = np.array([bool(chain) for chain in self.chains(view)])
                columns.append(np.where(is_drawn, 1, np.where(already, 1, -1)).astype(np.int8))
        return np.stack(columns, axis=1)

    def features(self, text: str) -> list[Feature]:
        """Return the feature of each bank: one text for all, or one for each, joined by `/`.

        Raises:
            UserError: a bank does not hold what a feature is made of, or there is another number of them.
        """
        texts = text.split(SEPARATOR)
        if len(texts) == 1:
            texts = texts * len(self.banks)
        if len(texts) != len(self.banks):
            raise UserError(
                f"feature '{text}' has {len(texts)} parts for {len(self.banks)} banks; write one for all, or "
                f"one for each, joined by {SEPARATOR}"
            )
        return [bank.feature(part) for bank, part in zip(self.banks, texts, strict=True)]

    def values(self, features: Sequence[Feature], views: Sequence[str]) -> np.ndarray:
        """Return the features of all banks side by side, (N, V, D) float32."""
        for view in views:
            one_of("view", view, self.views)
        result = np.empty((len(self.rows), len(views), sum(each.dim for each in features)), np.float32)
        start = 0
        for bank, places, feature in zip(self.banks, self._places, features, strict=True):
            arrays = {atom: bank.array(atom) for atom in feature.atoms}
            for number, view in enumerate(views):
                column = bank.views.index(view)
                for part in _parts(len(places), arrays.values()):
                    atoms = {atom: array[places[part], column] for atom, array in arrays.items()}
                    result[part, number, start : start + feature.dim] = feature.combine(atoms)
            start += feature.dim
        return result

    def token_sums(
        self, features: Sequence[Feature], views: Sequence[str], chosen: np.ndarray
    ) -> list[FisherSums]:
        """Return for each bank how well its patch tokens tell the classes of some images apart.

        Args:
            chosen: (N,) bool, the images that count.

        Returns:
            Sums without any image for features that do not need them.
        """
        labels, result = self.labels[chosen], []
        for bank, places, feature in zip(self.banks, self._places, features, strict=True):
            sums = FisherSums()
            if feature.needs_positions:
                (atom,) = (atom for atom in feature.atoms if atom.kind == "tokens")
                array, places = bank.array(atom), places[chosen]
                for view in views:
                    for part in _parts(len(places), [array]):
                        sums.add(array[places[part], bank.views.index(view)], labels[part])
            result.append(sums)
        return result


class ChosenTokens:
    """Features whose tokens are chosen on training images only.

    Args:
        views: those that are trained on.
    """

    def __init__(self, joined: Joined, features: Sequence[Feature], views: Sequence[str]) -> None:
        self.joined, self.features, self.views = joined, list(features), list(views)

    @cached_property
    def _all(self) -> list[FisherSums]:
        everything = np.ones(len(self.joined.rows), bool)
        return self.joined.token_sums(self.features, self.views, everything)

    def of(self, seen: np.ndarray) -> list[Feature]:
        """Return the features with the tokens that are best on the images `seen`, (N,) bool."""
        if not any(feature.needs_positions for feature in self.features):
            return self.features
        # Folds leave little out: the sums of what is left out are subtracted from those of all.
        others = self.joined.token_sums(self.features, self.views, ~seen)
        chosen = []
        for feature, total, other in zip(self.features, self._all, others, strict=True):
            if feature.needs_positions:
                scores = _without(total, other).scores()
                feature = dataclasses.replace(feature, positions=top_positions(scores, feature.top_count))
            chosen.append(feature)
        return chosen


def _parts(rows: int, arrays: Sequence[np.ndarray]) -> list[slice]:
    row_bytes = max(array.dtype.itemsize * int(np.prod(array.shape[2:])) for array in arrays)
    step = max(1, _BYTES_AT_ONCE // row_bytes)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _without(total: FisherSums, part: FisherSums) -> FisherSums:
    """Return the sums of the images that are in `total` and not in `part`."""
    rest = FisherSums()
    rest.counts, rest.sums, rest.squares = total.counts, total.sums, total.squares
    if part.sums is not None:
        rest.counts = total.counts - part.counts
        rest.sums, rest.squares = total.sums - part.sums, total.squares - part.squares
    return rest


def _check_alike(banks: Sequence[Bank], views: Sequence[str]) -> None:
    """Raise a `UserError` unless the banks hold the same images, and shared views are drawn alike."""
    first = banks[0]
    names, draws = set(first.rows["name"]), _draws(first, views)
    for bank in banks[1:]:
        different = names ^ set(bank.rows["name"])
        if different:
            raise UserError(
                f"the banks {first.path} and {bank.path} hold different images: {len(different)} are in one "
                f"of them only, such as {name_list(sorted(different)[:1])}; embed the same manifests"
            )
        if (other := _draws(bank, views)) != draws:
            raise UserError(
                f"the views of {first.path} and {bank.path} are drawn differently ({draws} and {other}); "
                "embed with the same --distortions, --draw and --seed"
            )


def _draws(bank: Bank, views: Sequence[str]) -> dict[str, Any]:
    """Return what decides what the views of a bank show, apart from their size."""
    settings = bank.record["views"]
    is_drawn = set(views) - {CLEAN, CONTROL}
    used = {key: value for key, value in settings.items() if is_drawn and key not in ("names", _CONTROL_KEY)}
    return used | ({_CONTROL_KEY: settings.get(_CONTROL_KEY)} if CONTROL in views else {})
