"""Manifest rows to uint8 batches: decode once, distort, fit to the input of each backbone, stack.

Pixels stay uint8 until they are on the device. What happens to a training image is a function of (seed,
epoch, index), what happens to a scored image of (seed, name): neither the worker nor the number of processes
matters.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch.utils.data import Dataset

from featdistill.command_line import UserError, one_of
from featdistill.data.amplitude_mixup import mix_amplitudes
from featdistill.data.image_cache import ImageCache
from featdistill.data.loading import Broken, load_image
from featdistill.data.preprocessing import Place, Preprocessing, fit, to_planes
from featdistill.data.sampling import balance_weights
from featdistill.distortions.plan import Plan, apply_plan
from featdistill.distortions.policy import DistortionPolicy
from featdistill.images.equalization import Equalization
from featdistill.images.reading import BrokenImage
from featdistill.seeds import text_number, training_generator

CROPS = ("random", "center", "random_resized")
VIEWS = ("clean", "other")
# Range of width by height of random_resized crops, whose logarithm is uniform: torchvision's default.
_ASPECTS = (3 / 4, 4 / 3)
# What tells the draws of an item's mix-up from all its other ones.
_MIXUP_STREAM = 1


class TrainDataset(Dataset):
    """Training rows: a distorted, cropped, perhaps mirrored image, and where asked for further views of it.

    Items are addressed by (epoch, index), so that workers need no state. An item is a dict with `images` (3,
    S, S) uint8, `label` float, `epoch` and `index` int and, for each of `views`, `images_clean` or
    `images_other`, (3, S, S) uint8; or `Broken`. All views are of one decoded image, cropped and mirrored
    alike.

    Args:
        rows: labelled rows of a manifest.
        policy: what distortions are drawn, and whether they come before or after the resizing.
        seed: the run's seed.
        crop: `random`, `center`, or `random_resized`: a part of random area and shape, taken before the
            resizing (of the distorted image, where distortions come before the resizing too). Where a part of
            that area and shape does not fit, the largest of that shape is taken; torchvision draws again.
        crop_min_area: the share of the area is uniform between this and 1.
        flip: probability that an item is mirrored.
        views: `clean` (not distorted) and `other` (distorted as drawn a second time).
        equalization: gives every image a size and a JPEG quality that do not depend on its class, first of
            all.
        synchronize_groups: rows of the same, non-empty `group` get the same distortions, crop and mirroring
            in an epoch; where they are distorted at the same size, the same noise, too.
        amplitude_mixup: probability that the squares of an item take on some of another row's amplitudes (see
            `mix_amplitudes`), the same in all views. The other image is not distorted, but cropped alike;
            where it cannot be read, the item stays as it is.
        amplitude_mixup_max: the other's share is uniform between 0 and this.
        amplitude_mixup_with: `same_label` or `any`: the rows that the other is drawn from.
        cache: the rows' images, already resized, see `check_cache`.

    Raises:
        UserError: settings that exclude each other, or a weight that is no number above 0.
    """

    def __init__(
        self,
        rows: pd.DataFrame,
        preprocessing: Preprocessing,
        policy: DistortionPolicy,
        seed: int,
        *,
        crop: str = "random",
        crop_min_area: float = 0.5,
        flip: float = 0.5,
        views: Sequence[str] = (),
        equalization: Equalization | None = None,
        synchronize_groups: bool = False,
        amplitude_mixup: float = 0.0,
        amplitude_mixup_max: float = 0.5,
        amplitude_mixup_with: str = "same_label",
        cache: ImageCache | None = None,
    ) -> None:
        self.images, self.names = rows["image"].tolist(), rows["name"].tolist()
        self.equalization = equalization
        self.labels = rows["label"].astype("float32").tolist()
        self.weights = balance_weights(rows)
        self.preprocessing, self.policy, self.seed = preprocessing, policy, seed
        self.crop, self.crop_min_area = one_of("value of crop", crop, CROPS), crop_min_area
        self.flip, self.views = flip, tuple(one_of("view", view, VIEWS) for view in views)
        self.groups = _group_numbers(rows) if synchronize_groups else None
        self.amplitude_mixup, self.amplitude_mixup_max = amplitude_mixup, amplitude_mixup_max
        one_of("value of amplitude_mixup_with", amplitude_mixup_with, ("same_label", "any"))
        self.any_lends = amplitude_mixup_with == "any"
        self.lenders = {
            label: np.flatnonzero(np.asarray(self.labels) == label) for label in sorted(set(self.labels))
        }
        if crop == "random_resized" and preprocessing.resize == "crop":
            raise UserError(
                "--crop random_resized resizes what --resize crop must not; give another value of one of them"
            )
        if cache is not None:
            check_cache(policy, crop)
            if len(cache) != len(rows):
                raise ValueError(f"the cache has {len(cache)} images, the manifest {len(rows)}")
        self.cache = cache

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any] | Broken:
        epoch, index = item
        # What is switched on draws after what there is without it, which so stays as it is.
        rng = training_generator(self.seed, epoch, self._number(index))
        top, left, mirror = rng.random(3)
        top, left = (0.5, 0.5) if self.crop == "center" else (top, left)
        place = Place(top, left, bool(mirror < self.flip))
        plans: dict[str, Plan] = {"images": self.policy.draw(rng)}
        for view in sorted(self.views):
            plans[f"images_{view}"] = self.policy.draw(rng) if view == "other" else ()
        if self.crop == "random_resized":
            area, aspect = rng.uniform(self.crop_min_area, 1), np.exp(rng.uniform(*np.log(_ASPECTS)))
            place = place._replace(area=float(area), aspect=float(aspect))
        try:
            squares = self._squares(self._load(index), plans, place)
        except BrokenImage as error:
            return Broken(index, str(error))
        self._mix(squares, epoch, index, place)
        planes = {view: to_planes(square) for view, square in squares.items()}
        return planes | {"label": self.labels[index], "epoch": epoch, "index": index}

    def _number(self, index: int) -> int:
        """Return what an item's generator is seeded with: the index, or what its group has in common."""
        return index if self.groups is None or self.groups[index] is None else self.groups[index]

    def _load(self, index: int) -> np.ndarray:
        if self.cache is not None:
            return self.cache.read(index)
        return load_image(self.images[index], self.names[index], self.equalization, self.policy.max_side_px)

    def _squares(self, image: np.ndarray, plans: dict[str, Plan], place: Place) -> dict[str, np.ndarray]:
        """Return (S, S, 3) of every view."""
        size, resize = self.preprocessing.key
        if self.policy.distort_at == "native":
            return {view: fit(apply_plan(image, plan), size, resize, place) for view, plan in plans.items()}
        square = fit(image, size, resize, place)
        squares = {view: apply_plan(square, plan) for view, plan in plans.items()}
        # Where an operation changed the size.
        return {
            view: square if square.shape[:2] == (size, size) else fit(square, size, "squash")
            for view, square in squares.items()
        }

    def _mix(self, squares: dict[str, np.ndarray], epoch: int, index: int, place: Place) -> None:
        """Where it is drawn, replace the squares by their mixtures with another row's amplitudes."""
        if not self.amplitude_mixup:
            return
        # Rows of a group share the distortions, not the image that they are mixed with.
        rng = np.random.default_rng((self.seed, epoch, index, _MIXUP_STREAM))
        if rng.random() >= self.amplitude_mixup:
            return
        share = rng.uniform(0, self.amplitude_mixup_max)
        rows = range(len(self)) if self.any_lends else self.lenders[self.labels[index]]
        try:
            other = self._load(rows[rng.integers(len(rows))])
        except BrokenImage:
            return
        other = fit(other, *self.preprocessing.key, place)
        for view, square in squares.items():
            squares[view] = mix_amplitudes(square, other, share)


def check_cache(policy: DistortionPolicy, crop: str) -> None:
    """Refuse settings under which resized images do not suffice.

    Raises:
        UserError: images are distorted or cut before they are resized.
    """
    if policy.distort_at == "native" and policy.probability > 0:
        raise UserError(
            "--cache keeps resized images, and the policy distorts images before they are resized; give "
            "--distortions NAME,distort_at=input, or leave --cache out"
        )
    if crop == "random_resized":
        raise UserError(
            "--cache keeps resized images, and crop random_resized cuts images before they are resized; give "
            "--crop random, or leave --cache out"
        )


def _group_numbers(rows: pd.DataFrame) -> list[int | None]:
    """Return a 64-bit number for each row's group, the same in every process, and None without a group."""
    groups = rows["group"].tolist() if "group" in rows else [""] * len(rows)
    if not any(groups):
        raise UserError(
            "--synchronize-groups: no training row has a group; fill in the manifest's column group, or "
            "leave the flag out"
        )
    return [text_number(group) if group else None for group in groups]
