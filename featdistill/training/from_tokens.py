"""Training the last layers from tokens that a bank has kept, so that the frozen ones are not computed again.

`python -m featdistill embed --tokens-before-last N` keeps what the last N blocks of a plain transformer
receive. A run may start from it if it trains no more than those blocks, and if the views in the bank are what
it would show: view e + 1 in epoch e. Then it ends with the weights that it would have from images, up to the
rounding of the bank's numbers.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from featdistill.bank.store import Bank, open_bank
from featdistill.bank.views import CLEAN, CONTROL
from featdistill.command_line import UserError
from featdistill.data.loading import Broken
from featdistill.data.preprocessing import InputKey, Preprocessing
from featdistill.distortions.policy import DistortionPolicy
from featdistill.distortions.presets import parse_policy
from featdistill.models.expert import Expert
from featdistill.models.features import Atom, needs
from featdistill.models.frozen import layer_hashes
from featdistill.records.manifest import fingerprint
from featdistill.training.extras import LayerHeads
from featdistill.training.recipe import Recipe

_log = logging.getLogger(__name__)
# Settings of the augmentation that mix images or need all of a group, which a bank's views do not show.
_NOT_IN_A_BANK = ("synchronize_groups", "amplitude_mixup", "augmix", "cutmix")


class KeptTokens:
    """The tokens of rows in a bank.

    Args:
        flag: that named the bank, for the messages.
        rows: of a manifest; the bank must have their names, and images of the same size.

    Attributes:
        atom: `hidden-L`.
        distorted: numbers of the views that are neither clean nor the content control.
    """

    def __init__(self, bank: Bank, flag: str, atom: Atom, rows: pd.DataFrame) -> None:
        self.bank, self.atom, self.flag = bank, atom, flag
        self.images = rows["image"].tolist()
        self.distorted = [number for number, name in enumerate(bank.views) if name not in (CLEAN, CONTROL)]
        place_of = {name: place for place, name in enumerate(bank.rows["name"])}
        missing = [name for name in rows["name"] if name not in place_of]
        if missing:
            raise UserError(
                f"{flag} {bank.path}: {len(missing)} of {len(rows)} rows are not in the bank, {missing[0]} "
                "among them; embed the manifests of this run"
            )
        self.places = [place_of[name] for name in rows["name"]]
        kept = bank.rows.iloc[self.places]
        if not _same_images(rows, kept):
            raise UserError(f"{flag} {bank.path}: its images of the same names have other sizes in bytes")
        self.broken = kept["broken"].tolist()
        # Its hash is compared here, once, and not in every loader process.
        bank.array(atom)
        self._values: np.memmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy in another process opens the file again, and does not get its content.
        return self.__dict__ | {"_values": None}

    def __len__(self) -> int:
        return len(self.places)

    def read(self, index: int, view: int) -> Tensor:
        """Return the tokens (T, C) of a row in a view, in the bank's type."""
        if self._values is None:
            self._values = self.bank.array(self.atom)
        return torch.from_numpy(np.array(self._values[self.places[index], view]))

    def missing(self, index: int) -> Broken:
        """Return what stands for a row whose image could not be read."""
        return Broken(index, f"could not be read when {self.bank.path} was made")


class TokenDataset(Dataset):
    """Training rows as `TrainDataset` has them, with tokens (T, C) in place of images (3, S, S).

    Epoch e shows view e + 1, and goes through the views again where there are not so many. `images_clean` is
    the clean view, `images_other` the view after that of the epoch.

    Args:
        rows: labeled rows of a manifest.
        views: as for `TrainDataset`.
    """

    def __init__(
        self,
        tokens: KeptTokens,
        rows: pd.DataFrame,
        preprocessing: Preprocessing,
        stage: int,
        views: Sequence[str],
    ) -> None:
        self.tokens, self.images = tokens, tokens.images
        self.labels = rows["label"].astype("float32").tolist()
        self.preprocessing, self.stage, self.views = preprocessing, stage, tuple(views)

    def __len__(self) -> int:
        return len(self.tokens)

    def blank(self, count: int) -> dict[str, Tensor]:
        """Return zeros in place of `count` items."""
        names = ["images", *(f"images_{view}" for view in self.views)]
        example = self.tokens.read(0, 0)
        return dict.fromkeys(names, example.new_zeros((count, *example.shape)))

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any] | Broken:
        epoch, index = item
        if self.tokens.broken[index]:
            return self.tokens.missing(index)
        shown = self.tokens.distorted or [0]
        numbers = {"images": shown[epoch % len(shown)], "images_clean": 0}
        numbers["images_other"] = shown[(epoch + 1) % len(shown)]
        names = ["images", *(f"images_{view}" for view in self.views)]
        tokens = {name: self.tokens.read(index, numbers[name]) for name in names}
        return tokens | {"label": self.labels[index], "epoch": epoch, "index": index}


class TokenScores(Dataset):
    """Rows to score as `ScoreDataset` has them, with the tokens (T, C) of one view in place of images."""

    def __init__(self, tokens: KeptTokens, view: int, key: InputKey) -> None:
        self.tokens, self.view, self.key = tokens, view, key

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any] | Broken:
        if self.tokens.broken[index]:
            return self.tokens.missing(index)
        return {"index": index, "images": {self.key: self.tokens.read(index, self.view)}}


def training_set(
    path: str | Path,
    rows: pd.DataFrame,
    task: nn.Module,
    policy: DistortionPolicy,
    recipe: Recipe,
    stage: int,
) -> TokenDataset:
    """Return the training set of a run that starts from a bank, and prepare the task's experts for tokens.

    Raises:
        UserError: bank and run differ, or the run needs pixels.
    """
    flag, bank, expert = "--tokens", open_bank(path), task.expert
    _check_backbone(bank, flag, expert)
    atom = _kept_atom(bank, flag, expert, recipe)
    _check_layers(bank, flag, task, recipe, atom.layer)
    if task.masking and (task.masking.level, task.masking.kind) != ("token", "random"):
        raise _error(
            flag, bank, "masks of pixels and by texture need images; use --mask random --mask-level token"
        )
    tokens = KeptTokens(bank, flag, atom, rows)
    _check_views(tokens, task, policy, recipe, stage)
    # Last, because random weights differ where only the seed does.
    _check_frozen(bank, flag, expert, atom.layer)
    for module in task.modules():
        if isinstance(module, Expert):
            module.tokens_after = atom.layer
    _log.info(
        f"training layers {atom.layer + 1} to {expert.backbone.depth} from the tokens in {bank.path}, "
        f"{len(tokens.distorted)} distorted views"
    )
    if recipe.epochs > len(tokens.distorted) > 0:
        first = len(tokens.distorted) + 1
        _log.info(f"epochs from {first} on show the {len(tokens.distorted)} views again")
    return TokenDataset(tokens, rows, expert.preprocessing, stage, task.views)


class TokenHoldout:
    """A hold-out that is scored from a bank of `--draw evaluation`: see `holdout.ImageHoldout`.

    Args:
        rows: labeled rows.
        expert: one that is trained from tokens, see `training_set`.

    Raises:
        UserError: the bank does not fit the expert or the rows.
    """

    def __init__(self, path: str | Path, rows: pd.DataFrame, expert: Expert) -> None:
        flag, bank = "--val-tokens", open_bank(path)
        _check_backbone(bank, flag, expert)
        atom = Atom("hidden", expert.tokens_after)
        if atom not in bank.atoms:
            raise _error(flag, bank, f"it does not hold {atom.name}, from which the run trains")
        if bank.record["views"].get("draw") != "evaluation":
            raise _error(flag, bank, "its views are not those of scored images; embed with --draw evaluation")
        _check_frozen(bank, flag, expert, atom.layer)
        self.rows, self.tokens, self.key = rows, KeptTokens(bank, flag, atom, rows), expert.preprocessing.key

    def __len__(self) -> int:
        return len(self.rows)

    def parts(self, expert: Expert) -> Iterator[list[tuple[pd.DataFrame, Dataset]]]:
        """Yield what the clean AUC and then what the robust AUC is the mean over: rows, and their tokens."""
        # An expert that was loaded again does not know.
        expert.tokens_after = self.tokens.atom.layer
        is_distorted = (self.rows["is_distorted"] == 1).fillna(False).to_numpy(dtype=bool)
        yield [self._part(np.flatnonzero(~is_distorted), 0)]
        if is_distorted.any():
            yield [self._part(np.flatnonzero(is_distorted), 0)]
        else:
            yield [self._part(np.arange(len(self.rows)), view) for view in self.tokens.distorted]

    def _part(self, chosen: np.ndarray, view: int) -> tuple[pd.DataFrame, Dataset]:
        rows, tokens = self.rows.iloc[chosen], self.tokens
        return rows, TokenScores(KeptTokens(tokens.bank, tokens.flag, tokens.atom, rows), view, self.key)


def identity(path: str | Path) -> dict[str, str]:
    """Return the path of a bank and a hash of its arrays, for `run.json`."""
    files = open_bank(path).record["files"]
    arrays = sorted((name, sha256) for name, sha256 in files.items() if name.endswith(".npy"))
    return {"path": str(path), "sha256": hashlib.sha256(json.dumps(arrays).encode()).hexdigest()}


def _error(flag: str, bank: Bank, reason: str) -> UserError:
    return UserError(f"{flag} {bank.path}: {reason}")


def _same_images(rows: pd.DataFrame, kept: pd.DataFrame) -> bool:
    """Return whether images have the same sizes; also if one side's are no longer there."""
    if rows["image"].tolist() == kept["image"].tolist():
        return True
    if not all(Path(str(part["image"].iloc[0]).split("::")[0]).is_file() for part in (rows, kept)):
        return True
    return fingerprint(rows, ["name"]) == fingerprint(kept, ["name"])


def _differences(made: dict[str, Any], own: dict[str, Any]) -> str:
    """Return which settings of a bank and of a run differ, and how; empty if none does."""
    return "; ".join(
        f"{name} is {made.get(name)} in the bank and {value} in the run"
        for name, value in own.items()
        if made.get(name) != value
    )


def _check_backbone(bank: Bank, flag: str, expert: Expert) -> None:
    names = ("library", "name", "options", "input_size")
    made, own = ({name: getattr(spec, name) for name in names} for spec in (bank.spec, expert.spec))
    pixels = (dataclasses.asdict(of.preprocessing) for of in (bank, expert))
    changes = _differences(made, own) or _differences(*pixels)
    if changes:
        raise _error(flag, bank, f"it is of another expert: {changes}")
    if not expert.backbone.is_plain:
        reason = f"{expert.spec.name} is not a transformer whose blocks all have the same tokens"
        raise _error(flag, bank, reason)


def _trained_layers(recipe: Recipe) -> int | None:
    """Return how many of the last layers are trained; None: not only last ones."""
    last = {"frozen": 0, "last_n": recipe.last_n, "lora": recipe.lora_last_n or None}
    return last.get(recipe.finetune)


def _kept_atom(bank: Bank, flag: str, expert: Expert, recipe: Recipe) -> Atom:
    """Return the last tokens in the bank before the layers that are trained."""
    trained, depth = _trained_layers(recipe), expert.backbone.depth
    if trained is None:
        raise _error(flag, bank, f"finetune {recipe.finetune} trains earlier layers; use --finetune last_n")
    kept = [atom for atom in bank.atoms if atom.kind == "hidden"]
    fitting = [atom for atom in kept if atom.layer <= depth - trained]
    if not kept:
        raise _error(flag, bank, f"it has no tokens; embed with --tokens-before-last {max(trained, 1)}")
    if not fitting:
        held = depth - min(kept, key=lambda atom: atom.layer).layer
        raise _error(
            flag,
            bank,
            f"it has what the last {held} blocks receive, and the run trains {trained}; use --last-n {held}, "
            f"or embed with --tokens-before-last {trained}",
        )
    return max(fitting, key=lambda atom: atom.layer)


def _check_frozen(bank: Bank, flag: str, expert: Expert, layer: int) -> None:
    """Refuse a bank whose layers up to `layer` have other weights than the expert's."""
    recorded = bank.record["weights"].get("layers", [])[: layer + 1]
    if recorded != layer_hashes(expert.backbone)[: layer + 1]:
        is_random = bank.record["weights"]["path"] == "random"
        hint = (
            "; the bank has the random weights of a run with --weights random --seed 0" if is_random else ""
        )
        raise _error(
            flag, bank, f"the weights of the first {layer} layers differ from those of the run{hint}"
        )


def _check_layers(bank: Bank, flag: str, task: nn.Module, recipe: Recipe, layer: int) -> None:
    """Refuse a run that reads layers before the one whose tokens are kept."""
    expert = task.expert
    heads = [module for module in task.modules() if isinstance(module, LayerHeads)]
    read, _ = needs([*expert.feature.atoms, *(atom for head in heads for atom in head.atoms)])
    if read and read[0] < layer:
        what = f"feature {expert.spec.feature}{' or auxiliary_features' if heads else ''}"
        raise _error(flag, bank, f"{what} reads layer {read[0]}, and the tokens are those after {layer}")
    compared = getattr(recipe, "dense_layers", 1) if task.keeps_layout_only else 1
    if expert.backbone.depth - compared + 1 < layer:
        raise _error(
            flag, bank, f"dense_layers {compared} reads layers before {layer}, whose tokens are kept"
        )


def _check_views(
    tokens: KeptTokens, task: nn.Module, policy: DistortionPolicy, recipe: Recipe, stage: int
) -> None:
    """Refuse a bank whose views are not what the run would show."""
    bank, flag, views = tokens.bank, tokens.flag, tokens.bank.record["views"]
    for name in _NOT_IN_A_BANK:
        if getattr(recipe, name):
            raise _error(flag, bank, f"{name} needs images; leave out one of them")
    if recipe.equalize or recipe.cache:
        raise _error(
            flag, bank, f"{'equalize' if recipe.equalize else 'cache'} needs images; leave out one of them"
        )
    is_squashed = task.expert.preprocessing.resize == "squash" and recipe.crop == "random"
    still = recipe.flip == 0 and (recipe.crop == "center" or is_squashed)
    if not tokens.distorted:
        if policy.probability > 0 or not still:
            raise _error(
                flag,
                bank,
                "it has no views but the clean one; embed with --views, or use --distortions none --crop "
                "center --flip 0",
            )
        return
    if views["draw"] != "training":
        raise _error(flag, bank, "its views are those of scored images; embed with --draw training")
    names = ["seed", "crop", "flip", *(["crop_min_area"] if recipe.crop == "random_resized" else [])]
    changes = _differences(views, {name: getattr(recipe, name) for name in names})
    if changes:
        raise _error(flag, bank, f"its views were drawn with other settings: {changes}")
    kept_policy = parse_policy(views["distortions"])
    if kept_policy != policy:
        wanted = recipe.distortions
        if policy == dataclasses.replace(kept_policy, keeps_layout_only=True):
            wanted = f"{views['distortions']},keeps_layout_only=true"
            reason = "its distortions move pixels, and stage 2 compares tokens that must stay in place"
        else:
            reason = f"its distortions are {views['distortions']}, those of the run {recipe.distortions}"
        raise _error(flag, bank, f"{reason}; embed with --distortions {wanted}")
    if task.keeps_layout_only and task.teacher_view != "same" and not still:
        raise _error(
            flag,
            bank,
            "its views are cropped or mirrored, and stage 2 compares their tokens with those of the clean "
            "view; embed with --crop center --flip 0",
        )
    if "other" in task.views and len(tokens.distorted) < 2:
        raise _error(flag, bank, "teacher_view other needs two distorted views; embed with --views 3 or more")
    if views.get("stage", 1) != stage:
        _log.info(f"stage {stage} shows the views of stage {views.get('stage', 1)}")
