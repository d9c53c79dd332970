"""Which images and views a probe trains on, and how the others are held out."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from featdistill.bank.heads import FOLDS, HeadOptions, grouped_folds
from featdistill.bank.joined import Joined
from featdistill.bank.store import Bank, open_bank
from featdistill.bank.views import CONTROL
from featdistill.command_line import UserError, counted, nearest, one_of
from featdistill.records.predictions import name_list
from featdistill.seeds import hash_ranks

_log = logging.getLogger(__name__)
FOLDS_PART, LEAVE_OUT_PART, HOLDOUT_PART = "folds", "leave-out", "holdout"


@dataclass(frozen=True)
class Settings:
    """What to probe; the flags of `python -m featdistill probe`.

    Attributes:
        banks: folders of the banks whose views are trained on; several get one head.
        score: folders of the banks whose views are scored, one for each of `banks`; empty: `banks`.
        features: their texts; empty: those that the banks were made for.
        train: `COLUMN=VALUE` of the images to train on; of one column, any of the values counts. Empty: all.
        views: names of the views to train on; empty: all but the content control.
        folds: a column of the manifest, or a number of folds; None: the column `fold`, or 5.
        leave_out: hold out the values of this column one after the other, instead of folds.
        balance: see `data.sampling.balance_weights`.
        seed: of the folds and of perceptrons.
        control: whether to fit the content control as well, where a scored bank has its view.
        write_experts: whether to save experts.
    """

    banks: Sequence[str]
    score: Sequence[str] = ()
    features: Sequence[str] = ()
    train: Sequence[str] = ()
    views: Sequence[str] = ()
    folds: str | None = None
    leave_out: str | None = None
    balance: str = "none"
    head: HeadOptions = dataclasses.field(default_factory=HeadOptions)
    seed: int = 0
    control: bool = True
    write_experts: bool = True


@dataclass(frozen=True)
class Plan:
    """What is trained on and what is scored.

    Attributes:
        train: T images.
        views: those that are trained on.
        fold: (T,) the number of the part that an image is held out with.
        fold_names: names of the parts.
        scored: S images; those trained on are scored by heads without their part, the others by a head
            trained on all.
        scored_views: those that are scored.
        scored_fold: (S,) -1 for images that are not trained on.
        how: says in words how images are held out.
        column: the column of `leave_out`.
    """

    train: Joined
    views: list[str]
    fold: np.ndarray
    fold_names: list[str]
    scored: Joined
    scored_views: list[str]
    scored_fold: np.ndarray
    how: str
    column: str | None = None

    @property
    def parts(self) -> dict[str, np.ndarray]:
        """The parts that figures are taken over, (S,) bool each."""
        first = LEAVE_OUT_PART if self.column else FOLDS_PART
        parts = {first: self.scored_fold >= 0, HOLDOUT_PART: self.scored_fold < 0}
        return {name: inside for name, inside in parts.items() if inside.any()}

    @property
    def is_shared(self) -> bool:
        """Whether exactly the images and views that are trained on are scored."""
        return (
            self.train.banks == self.scored.banks
            and self.views == self.scored_views
            and self.train.rows["name"].equals(self.scored.rows["name"])
        )

    def groups_of(self, held: np.ndarray) -> np.ndarray:
        """Return which training images are of a group that has images in `held`, (T,) bool."""
        groups = self.train.groups
        return np.isin(groups, groups[held])

    def control(self) -> "Plan | None":
        """Return the plan of the content control on the same images, or None without such a view."""
        if CONTROL not in self.scored.views or self.views == [CONTROL]:
            return None
        train, fold, seen = self.train, self.fold, self.scored_fold >= 0
        if seen.any():
            train, fold = self.scored.select(seen), self.scored_fold[seen]
        if CONTROL not in train.views:
            return None
        views = [CONTROL]
        return Plan(train, views, fold, self.fold_names, self.scored, views, self.scored_fold, self.how)


def make_plan(settings: Settings) -> Plan:
    """Open the banks and decide what is trained on and scored.

    Raises:
        UserError: the banks do not fit together, or a flag names what they do not have.
    """
    banks = [open_bank(path) for path in settings.banks]
    joined = Joined(banks)
    _check_classes(joined, settings.banks[0])
    train = joined.select(_selected(joined.rows, settings.train))
    if settings.train:
        _check_classes(train, f"{settings.banks[0]} that {' and '.join(settings.train)} selects")
    if settings.head.kind != "linear" and len(banks) > 1:
        raise UserError(
            "a joint head over several banks must be linear, so that it can be written as a fusion"
        )
    scored = Joined(_score_banks(banks, settings.score)) if settings.score else joined
    views = _views(joined.views, settings.views)
    scored_views = [CONTROL] if views == [CONTROL] else [view for view in scored.views if view != CONTROL]
    if views == [CONTROL] and CONTROL not in scored.views:
        raise UserError(f"the bank {settings.score[0]} has no view {CONTROL}; embed it with --control-side")
    fold, names, how = _partition(train, settings)
    places = _places(train, scored)
    scored_fold = np.where(places >= 0, fold[places], -1)
    return Plan(train, views, fold, names, scored, scored_views, scored_fold, how, settings.leave_out)


def _selected(rows: pd.DataFrame, conditions: Sequence[str]) -> np.ndarray:
    """Return which rows fulfil the conditions: one of the values of each column."""
    wanted: dict[str, list[str]] = {}
    for condition in conditions:
        column, sign, value = condition.partition("=")
        if not sign:
            raise UserError(f"--train: '{condition}' is not COLUMN=VALUE, as in split=train")
        wanted.setdefault(_column(rows, column, "--train"), []).append(value)
    chosen = np.ones(len(rows), bool)
    for column, values in wanted.items():
        texts = rows[column].astype("object").where(rows[column].notna(), "").astype(str)
        for value in values:
            if not (texts == value).any():
                known = name_list(texts.unique())
                raise UserError(
                    f"--train: no labeled image has {column}={value}{nearest(value, texts.unique())}; the "
                    f"values are {known}"
                )
        chosen &= texts.isin(values).to_numpy()
    return chosen


def _column(rows: pd.DataFrame, column: str, flag: str) -> str:
    if column not in rows:
        raise UserError(
            f"{flag}: the bank's manifest has no column {column}{nearest(column, rows.columns)}; it has "
            f"{', '.join(rows.columns)}"
        )
    return column


def _check_classes(train: Joined, which: str) -> None:
    """Refuse images of one class; say how many have no label, which are not among them."""
    counts, rows = np.bincount(train.labels, minlength=2), train.banks[0].rows
    if counts.all():
        return
    message = (
        f"a probe needs real and AI-generated images to train on; those of {which} are {counts[0]} real and "
        f"{counts[1]} AI-generated"
    )
    if unlabeled := int(rows["label"].isna().sum()):
        message += (
            f", and {unlabeled} of all {len(rows)} have no label in the manifest: add labels, and run the "
            "embed command again"
        )
    raise UserError(message)


def _score_banks(banks: Sequence[Bank], paths: Sequence[str]) -> list[Bank]:
    """Open the banks to score, which must be of the same backbones and preprocessing."""
    if len(paths) != len(banks):
        raise UserError(
            f"--score names {len(paths)} banks for {len(banks)} of --bank; name one for each, in the same "
            "order"
        )
    scored = [open_bank(path) for path in paths]
    for bank, other in zip(banks, scored, strict=True):
        if bank.record["weights"]["sha256"] != other.record["weights"]["sha256"]:
            raise UserError(
                f"the banks {bank.path} and {other.path} are of different backbones or weights; random "
                "weights also differ if only one of them was embedded with the feature projection"
            )
        first, second = (dict(each.preprocessing.describe(), max_side_px=None) for each in (bank, other))
        if first != second:
            raise UserError(
                f"the banks {bank.path} and {other.path} prepare images differently ({first} and {second}); "
                "embed with the same --input-size and --resize"
            )
        if bank.preprocessing.max_side_px != other.preprocessing.max_side_px:
            _log.warning(
                "%s limits the sides of images to %s px, and %s to %s px: scores of larger images will "
                "differ from those of predict.py",
                bank.path,
                bank.preprocessing.max_side_px,
                other.path,
                other.preprocessing.max_side_px,
            )
    return scored


def _views(known: Sequence[str], names: Sequence[str]) -> list[str]:
    if not names or list(names) == ["all"]:
        return [view for view in known if view != CONTROL]
    for name in names:
        one_of("view", name, [*known, "all"])
    if "all" in names:
        raise UserError("--views: all stands alone; name views, or write all")
    if CONTROL in names and len(names) > 1:
        raise UserError(f"--views: {CONTROL} stands alone, because it is scored by itself")
    return list(dict.fromkeys(names))


def _partition(train: Joined, settings: Settings) -> tuple[np.ndarray, list[str], str]:
    """Return the part that each training image is held out with, the names of the parts, and how in words."""
    rows, text = train.rows, settings.folds
    if settings.leave_out:
        values = _texts(rows, _column(rows, settings.leave_out, "--leave-out"))
        named = sorted(set(values) - {""})
        if len(named) < 2:
            raise UserError(
                f"--leave-out {settings.leave_out}: the training images have {len(named)} values of it"
            )
        fold = np.array([named.index(value) if value else -1 for value in values])
        fold[fold < 0] = _spread(train.groups[fold < 0], len(named), settings.seed)
        return fold, named, f"each {settings.leave_out} left out"
    if text is None:
        is_filled = "fold" in rows and (rows["fold"] != "").all() and rows["fold"].nunique() > 1
        text = "fold" if is_filled else str(FOLDS)
    if text.isascii() and text.isdigit():
        if int(text) < 2:
            raise UserError(f"--folds must be at least 2 or a column, not {text}")
        fold = grouped_folds(train.labels, train.groups, int(text), settings.seed)
        names = [str(number) for number in range(fold.max() + 1)]
        if settings.folds and len(names) < int(text):
            raise UserError(
                f"--folds {text}: one of the classes has only {counted(len(names), 'group')} of training "
                f"images, which is the largest number of folds"
            )
        return fold, names, f"{len(names)} folds of whole groups"
    values = _texts(rows, _column(rows, text, "--folds"))
    if empty := int((values == "").sum()):
        raise UserError(f"--folds {text}: {empty} of {len(rows)} training images have no value of it")
    names = sorted(set(values))
    if len(names) < 2:
        raise UserError(f"--folds {text}: all {len(rows)} training images have the same value of it")
    return np.array([names.index(value) for value in values]), names, f"folds of column {text}"


def _texts(rows: pd.DataFrame, column: str) -> np.ndarray:
    return rows[column].astype("object").where(rows[column].notna(), "").astype(str).to_numpy(object)


def _spread(groups: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Deal whole groups to `count` parts, in an order that depends on the seed."""
    names = np.unique(groups)
    order = np.argsort(np.array(hash_ranks(map(str, names), seed)), kind="stable")
    part = np.empty(len(names), np.int64)
    part[order] = np.arange(len(names)) % count
    return part[np.searchsorted(names, groups)]


def _places(train: Joined, scored: Joined) -> np.ndarray:
    """Return the training image that each scored image is, by its location, (S,) int64; -1 for the hold-out.

    Raises:
        UserError: different images have the same name, or one image has two labels.
    """
    places = pd.Index(train.rows["image"]).get_indexer(scored.rows["image"])
    is_new = places < 0
    clashes = scored.rows["name"][is_new & scored.rows["name"].isin(train.rows["name"]).to_numpy()]
    if len(clashes):
        raise UserError(
            f"{clashes.iloc[0]} is the name of a training image and of another image to score "
            f"({len(clashes)} such names); if they are different images, give them different names; if they "
            "have moved, embed the same manifest again"
        )
    if (scored.labels[~is_new] != train.labels[places[~is_new]]).any():
        raise UserError("the banks of --bank and --score hold different labels for the same images")
    unseen = len(train.rows) - len(np.unique(places[~is_new]))
    if unseen and not is_new.all():
        _log.info("%d of %d training images are not among those to score", unseen, len(train.rows))
    groups = set(train.rows["group"]) - {""}
    both = scored.rows["group"][is_new].isin(groups)
    if both.any():
        _log.warning(
            "%d of %d hold-out images share a group with training images, %s among them; their scores are "
            "not held out",
            both.sum(),
            is_new.sum(),
            scored.rows["name"][both.idxmax()],
        )
    return places
