"""The training set: decode an image once, distort it, and fit it to the input of the backbone.

Pixels stay uint8 until they are on the device. An item is a function of (seed, stage, epoch, index):
neither the worker nor the number of processes matters.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset

from featdistill.command_line import UserError, one_of
from featdistill.data.amplitude_mixup import mix_amplitudes
from featdistill.data.augmix import augmix
from featdistill.data.cutmix import draw_box, paste
from featdistill.data.image_cache import ImageCache
from featdistill.data.loading import Broken, load_image
from featdistill.data.preprocessing import InputKey, Place, Preprocessing, fit, side_of, to_planes
from featdistill.distortions.plan import Plan, apply_plan
from featdistill.distortions.policy import DistortionPolicy
from featdistill.images.equalization import Equalization
from featdistill.images.reading import BrokenImage
from featdistill.recipe_groups import Augmentation
from featdistill.seeds import text_number, training_generator

VIEWS = ("clean", "other")
# Range of width by height of random_resized crops, with a uniform logarithm: torchvision's default.
_ASPECTS = (3 / 4, 4 / 3)
# Separate the random numbers of an item's mix-up, AugMix and CutMix from all its other ones.
_MIXUP_STREAM, _AUGMIX_STREAM, _CUTMIX_STREAM = 1, 2, 3


class TrainDataset(Dataset):
    """Training rows: a distorted, cropped, possibly mirrored image, and further views of it if requested.

    Items are addressed by (epoch, index), so that workers need no state. An item is a dict with `images` (3,
    S, S) uint8, `label` float in [0, 1], `epoch` and `index` int and, for each of `views`, `images_clean` or
    `images_other`, (3, S, S) uint8; or `Broken`. S may differ between items, not between views. All views are
    made from one decoded image. They are cropped and mirrored alike, except `images_other`, which has a crop
    and flip of its own unless the policy or `other_crop` forbids it. A view is distorted once, and then
    fitted to the input of every network that sees it; see `input_name`.

    Args:
        rows: of a manifest; the label of a row without one is NaN.
        policy: the distribution of distortions, and whether they come before or after resizing.
        seed: of the run.
        stage: 1 or 2; stage 2 draws anew.
        augmentation: `random_resized` crops before resizing, and takes the largest part of the drawn shape
            if the drawn area does not fit (torchvision draws again). With `synchronize_groups`, rows of the
            same, non-empty `group` get the same distortions, crop and mirroring in an epoch, and the same
            noise if they have the same size. Amplitude mix-up (see `mix_amplitudes`) is the same in all
            views; the other image is cropped like the view, but not distorted, and ignored if it cannot be
            read. AugMix (see `augmix`) alters distorted views, each in its own way, and leaves pixels in
            their place if the policy's operations do. CutMix (see `cutmix`) pastes the same box into all
            views, from the same views of another row as they are in this epoch, or nothing if that row
            cannot be read; `label` is then the mean of both labels, weighted by area.
        views: `clean` (not distorted) and `other` (distorted by a second draw).
        inputs: inputs of other networks, by the view that they see: `images`, `images_clean`, `images_other`.
        targets: (rows, ...) float32, numbers that belong to the rows: `targets` of an item.
        repeat: number of epochs after which the draws repeat; 0: never.
        equalization: assigns sizes and JPEG qualities that do not depend on the class, before all else.
        cache: the rows' images, already resized, see `check_cache`.
        weights: (rows,) how often each row appears in an epoch, see `sampling.balance_weights`; rows that
            CutMix pastes are drawn accordingly. None: all equally often.

    Raises:
        UserError: settings that exclude each other.
    """

    def __init__(
        self,
        rows: pd.DataFrame,
        preprocessing: Preprocessing,
        policy: DistortionPolicy,
        seed: int,
        augmentation: Augmentation,
        *,
        stage: int = 1,
        views: Sequence[str] = (),
        inputs: Mapping[str, Sequence[InputKey]] | None = None,
        targets: np.ndarray | None = None,
        repeat: int = 0,
        equalization: Equalization | None = None,
        cache: ImageCache | None = None,
        weights: np.ndarray | None = None,
    ) -> None:
        self.images, self.names = rows["image"].tolist(), rows["name"].tolist()
        self.labels = rows["label"].astype("float32").tolist()
        self.preprocessing, self.policy, self.seed, self.stage = preprocessing, policy, seed, stage
        self.augmentation, self.equalization, self.cache = augmentation, equalization, cache
        self.views = tuple(one_of("view", view, VIEWS) for view in views)
        self.targets, self.repeat = targets, repeat
        self.inputs = {name: tuple(keys) for name, keys in (inputs or {}).items() if keys}
        if self.inputs or targets is not None:
            _check_teachers(policy, augmentation, bool(self.inputs))
        self.groups = _group_numbers(rows) if augmentation.synchronize_groups else [None] * len(rows)
        # Rows without a label are a class of their own.
        self.classes = np.nan_to_num(self.labels, nan=-1).tolist()
        is_any = augmentation.amplitude_mixup_with == "any"
        self.mixup_rows = {
            kind: np.flatnonzero((np.asarray(self.classes) == kind) | is_any)
            for kind in sorted(set(self.classes))
        }
        weights = np.ones(len(rows)) if weights is None else weights
        self.row_bounds = np.cumsum(weights) / np.cumsum(weights)[-1]
        if augmentation.crop == "random_resized" and preprocessing.resize == "crop":
            raise UserError(
                "--crop random_resized resizes images, and --resize crop does not; change one of them"
            )
        if cache is not None:
            check_cache(policy, augmentation)
            if len(cache) != len(rows):
                raise ValueError(f"the cache has {len(cache)} images, the manifest {len(rows)}")

    @property
    def sides_px(self) -> dict[str, int]:
        """The name of every image in an item, and its side; the smallest, if it depends on the image."""
        own = ["images", *(f"images_{view}" for view in self.views)]
        others = {input_name(view, key): key[0] for view, keys in self.inputs.items() for key in keys}
        return dict.fromkeys(own, self.preprocessing.size) | others

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any] | Broken:
        epoch, index = item
        drawn = epoch % self.repeat if self.repeat else epoch
        try:
            squares = self._augmented(drawn, index)
        except BrokenImage as error:
            return Broken(index, str(error))
        label = self._cut_mix(squares, drawn, index)
        item = {name: to_planes(square) for name, square in squares.items()}
        if self.targets is not None:
            item["targets"] = self.targets[index].tolist()
        return item | {"label": label, "epoch": epoch, "index": index}

    def blank(self, count: int) -> dict[str, torch.Tensor]:
        """Return black images, and targets if there are any, in place of `count` items."""
        sides = self.sides_px.items()
        blank = {name: torch.zeros(count, 3, side, side, dtype=torch.uint8) for name, side in sides}
        return blank if self.targets is None else blank | {"targets": torch.as_tensor(self.targets[:count])}

    def draw(self, epoch: int, index: int) -> tuple[dict[str, Plan], dict[str, Place]]:
        """Return the distortions and the crop of each view of an item, `images` among them."""
        # Optional augmentations draw last, so that switching them on does not change the other draws.
        rng = training_generator(*self._key(epoch, index))
        place = self._position(rng)
        plans: dict[str, Plan] = {"images": self.policy.draw(rng)}
        for view in sorted(self.views):
            plans[f"images_{view}"] = self.policy.draw(rng) if view == "other" else ()
        places = dict.fromkeys(plans, self._shaped(place, rng))
        shares_crop = self.augmentation.other_crop == "same" or self.policy.keeps_layout_only
        if "images_other" in places and not shares_crop:
            places["images_other"] = self._shaped(self._position(rng), rng)
        return plans, places

    def squares(
        self, image: np.ndarray, plans: dict[str, Plan], places: dict[str, Place], side: int | None = None
    ) -> dict[str, np.ndarray]:
        """Return (S, S, 3) uint8 of every view that was drawn, distorted, cropped and mirrored.

        Args:
            image: (H, W, 3) uint8 RGB, as `load_image` returns it with the policy's `max_side_px`.
            side: S; None for that of the preprocessing. Where it depends on the image, all views get that of
                `images`.

        Views that look alike share an array, which must not be altered.
        """
        if self.policy.distort_at == "native":
            squares, made = {}, {}
            for view, plan in plans.items():
                distorted = apply_plan(image, plan)
                side = side or side_of(distorted, self.preprocessing.sides)
                for name, key in self._cuts(view, side).items():
                    # An image that is not distorted by chance is its clean view.
                    what = (plan, places[view], key)
                    if what not in made:
                        made[what] = fit(distorted, *key, place=places[view])
                    squares[name] = made[what]
            return squares
        side = side or side_of(image, self.preprocessing.sides)
        cropped = {place: self._fit(image, place, side) for place in dict.fromkeys(places.values())}
        squares = {view: apply_plan(cropped[places[view]], plan) for view, plan in plans.items()}
        # Some operations change the size.
        return {
            view: square if square.shape[:2] == (side, side) else fit(square, side, "squash")
            for view, square in squares.items()
        }

    def _augmented(self, epoch: int, index: int, side: int | None = None) -> dict[str, np.ndarray]:
        """Return (S, S, 3) of every view of a row, before CutMix; see `squares`."""
        plans, places = self.draw(epoch, index)
        squares = self.squares(self._load(index), plans, places, side)
        self._augmix(squares, training_generator(*self._key(epoch, index), _AUGMIX_STREAM))
        self._mix(squares, epoch, index, places)
        return squares

    def _key(self, epoch: int, index: int) -> tuple[int, int, int, int]:
        """Return what the random numbers of an item are a function of."""
        group = self.groups[index]
        return self.seed, self.stage, epoch, index if group is None else group

    def _load(self, index: int) -> np.ndarray:
        if self.cache is not None:
            return self.cache.read(index)
        return load_image(self.images[index], self.names[index], self.equalization, self.policy.max_side_px)

    def _position(self, rng: np.random.Generator) -> Place:
        """Draw the position of a crop, and whether it is mirrored."""
        top, left, mirror = rng.random(3)
        if self.augmentation.crop == "center":
            top, left = 0.5, 0.5
        return Place(top, left, bool(mirror < self.augmentation.flip))

    def _shaped(self, place: Place, rng: np.random.Generator) -> Place:
        """Draw area and aspect ratio of the crop, if they are random."""
        if self.augmentation.crop != "random_resized":
            return place
        area = rng.uniform(self.augmentation.crop_min_area, 1)
        aspect = np.exp(rng.uniform(*np.log(_ASPECTS)))
        return place._replace(area=float(area), aspect=float(aspect))

    def _fit(self, image: np.ndarray, place: Place, side: int) -> np.ndarray:
        return fit(image, side, self.preprocessing.resize, place=place)

    def _cuts(self, view: str, side: int) -> dict[str, InputKey]:
        """Return the inputs that a view is fitted to, by their names in an item; our own has this side."""
        own = {view: (side, self.preprocessing.resize)}
        return own | {input_name(view, key): key for key in self.inputs.get(view, ())}

    def _augmix(self, squares: dict[str, np.ndarray], rng: np.random.Generator) -> None:
        """With probability `augmix`, alter the squares of all distorted views, in place."""
        options = self.augmentation
        if not options.augmix or rng.random() >= options.augmix:
            return
        for view in squares:
            if view != "images_clean":
                squares[view] = augmix(
                    squares[view],
                    rng,
                    severity=options.augmix_severity,
                    width=options.augmix_width,
                    depth=options.augmix_depth,
                    keeps_layout_only=self.policy.keeps_layout_only,
                )

    def _cut_mix(self, squares: dict[str, np.ndarray], epoch: int, index: int) -> float:
        """With probability `cutmix`, paste a box of another row into the squares; return the label."""
        own, options = self.labels[index], self.augmentation
        if not options.cutmix:
            return own
        rng = training_generator(self.seed, self.stage, epoch, index, _CUTMIX_STREAM)
        if rng.random() >= options.cutmix:
            return own
        other = int(np.searchsorted(self.row_bounds, rng.random(), side="right"))
        side = len(squares["images"])
        box = draw_box(side, options.cutmix_alpha, rng)
        try:
            pasted = self._augmented(epoch, other, side)
        except BrokenImage:
            return own
        for view, square in squares.items():
            squares[view] = paste(square, pasted[view], box)
        share = box.share(side)
        return (1 - share) * own + share * self.labels[other]

    def _mix(self, squares: dict[str, np.ndarray], epoch: int, index: int, places: dict[str, Place]) -> None:
        """With probability `amplitude_mixup`, mix another row's amplitudes into the squares, in place."""
        if not self.augmentation.amplitude_mixup:
            return
        # Rows of a group share the distortions, not the image that they are mixed with.
        rng = training_generator(self.seed, self.stage, epoch, index, _MIXUP_STREAM)
        if rng.random() >= self.augmentation.amplitude_mixup:
            return
        share = rng.uniform(0, self.augmentation.amplitude_mixup_max)
        rows = self.mixup_rows[self.classes[index]]
        try:
            other = self._load(rows[rng.integers(len(rows))])
        except BrokenImage:
            return
        fitted = {}
        for view, place in places.items():
            for name, key in self._cuts(view, len(squares[view])).items():
                if (place, key) not in fitted:
                    fitted[place, key] = fit(other, *key, place=place)
                squares[name] = mix_amplitudes(squares[name], fitted[place, key], share)


def input_name(view: str, key: InputKey) -> str:
    """Return the name in a batch of a view for another network, such as `384-squash@images_clean`."""
    return f"{'-'.join(map(str, key))}@{view}"


def _check_teachers(policy: DistortionPolicy, augmentation: Augmentation, have_other_inputs: bool) -> None:
    """Refuse settings by which teachers would judge other images than the student sees.

    Raises:
        UserError: images are altered at the size of one input, or mixed after their target was computed.
    """
    if have_other_inputs:
        for name in ("augmix", "cutmix"):
            if getattr(augmentation, name):
                raise UserError(
                    f"{name} alters images at the size of one network's input, and teachers have other "
                    f"inputs; use --{name} 0"
                )
        if policy.distort_at == "input":
            raise UserError(
                "distort_at=input distorts images at the size of one network's input, and teachers have "
                "other inputs; use distort_at=native in --distortions"
            )
    elif augmentation.cutmix:
        raise UserError("stored scores are of whole images; use --cutmix 0, or --teachers")


def check_cache(policy: DistortionPolicy, augmentation: Augmentation) -> None:
    """Refuse settings that need more than resized images.

    Raises:
        UserError: images are distorted or cropped before they are resized.
    """
    if policy.distort_at == "native" and policy.probability > 0:
        raise UserError(
            "--cache holds resized images, and the policy distorts images before they are resized; use "
            "--distortions NAME,distort_at=input, or omit --cache"
        )
    if augmentation.crop == "random_resized":
        raise UserError(
            "--cache holds resized images, and random_resized crops images before they are resized; use "
            "--crop random, or omit --cache"
        )


def _group_numbers(rows: pd.DataFrame) -> list[int | None]:
    """Return a 64-bit number for each row's group, the same in every process, and None without a group."""
    groups = rows["group"].tolist() if "group" in rows else [""] * len(rows)
    if not any(groups):
        raise UserError(
            "--synchronize-groups: no training row has a group; fill in the manifest's column group, or omit "
            "the flag"
        )
    return [text_number(group) if group else None for group in groups]
