"""The views of an image in a bank: clean, distorted as in training or evaluation, and the content control."""

import json
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pandas as pd
from torch.utils.data import Dataset

from featdistill.data.loading import Broken, load_image
from featdistill.data.preprocessing import Preprocessing, fit, to_planes
from featdistill.data.train_dataset import TrainDataset
from featdistill.distortions.plan import Plan, apply_plan, describe
from featdistill.distortions.presets import parse_policy
from featdistill.images.reading import BrokenImage, limit_side
from featdistill.recipe_groups import Augmentation
from featdistill.seeds import evaluation_generator

CLEAN, CONTROL = "clean", "control"
_UNCHANGED = Augmentation(distortions="none")


@dataclass(frozen=True)
class ViewPlan:
    """Which views of each image a bank holds.

    Attributes:
        distorted: number of distorted views, after the clean one.
        draw: `training`: view v is what `TrainDataset` shows in epoch v - 1; `evaluation`: it is
            what `ScoreDataset` scores with the seed `seed + v - 1`.
        seed: of the distortions, and in training of crops and mirroring.
        augmentation: the policy of the distortions, and in training the crop and the mirroring.
        stage: of training, 1 or 2, which draws anew.
        control_side: side in px of the content control; None: no control.
        clean: whether the clean view is among them; only the audit of content does without.
    """

    distorted: int = 0
    draw: str = "training"
    seed: int = 0
    augmentation: Augmentation = _UNCHANGED
    control_side: int | None = None
    stage: int = 1
    clean: bool = True

    @property
    def names(self) -> list[str]:
        """The names of all views, in their order."""
        numbered = [f"{self.draw}-{number + 1}" for number in range(self.distorted)]
        return [*([CLEAN] if self.clean else []), *numbered, *([CONTROL] if self.control_side else [])]

    def describe(self) -> dict[str, Any]:
        """Return what decides the pixels, as JSON values."""
        drawn: dict[str, Any] = {}
        if self.distorted:
            drawn = {"draw": self.draw, "seed": self.seed, "distortions": self.augmentation.distortions}
            if self.draw == "training":
                drawn |= {
                    name: getattr(self.augmentation, name) for name in ("crop", "flip", "crop_min_area")
                }
                drawn |= {"stage": self.stage} if self.stage != 1 else {}
        control = {"control_side_px": self.control_side} if self.control_side else {}
        return {"names": self.names, **drawn, **control}


CLEAN_ONLY = ViewPlan()


class ViewDataset(Dataset):
    """All views of the images of a manifest; each image is decoded once.

    An item is a dict with `index`, `images` (view's name -> (3, S, S) uint8) and `drawn`, a JSON list with
    the [name, scale] pairs of each view's distortions; or `Broken`, also where only a distorted view cannot
    be made.

    Args:
        rows: of a manifest, labeled or not.
        preprocessing: that of the expert which would see the images.
    """

    def __init__(self, rows: pd.DataFrame, preprocessing: Preprocessing, plan: ViewPlan) -> None:
        self.images, self.names = rows["image"].tolist(), rows["name"].tolist()
        self.preprocessing, self.plan = preprocessing, plan
        self.policy = parse_policy(plan.augmentation.distortions)
        labels = rows.assign(label=rows["label"].astype("float32").fillna(0))
        self.training = TrainDataset(
            labels, preprocessing, self.policy, plan.seed, plan.augmentation, stage=plan.stage
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any] | Broken:
        try:
            image = load_image(self.images[index], self.names[index])
            clean = self._fit(image)
            made: list[tuple[np.ndarray, Plan]] = [(clean, ())] if self.plan.clean else []
            made += [self._distorted(image, index, number) for number in range(self.plan.distorted)]
        except BrokenImage as error:
            return Broken(index, str(error))
        if self.plan.control_side:
            made.append((content_only(clean, self.plan.control_side), ()))
        squares, drawn = zip(*made, strict=True)
        return {
            "index": index,
            "images": dict(zip(self.plan.names, map(to_planes, squares), strict=True)),
            "drawn": json.dumps([describe(plan) for plan in drawn]),
        }

    def _fit(self, image: np.ndarray) -> np.ndarray:
        return fit(image, *self.preprocessing.key)

    def _distorted(self, image: np.ndarray, index: int, number: int) -> tuple[np.ndarray, Plan]:
        if self.plan.draw == "training":
            plans, places = self.training.draw(number, index)
            limited = limit_side(image, self.policy.max_side_px)
            return self.training.squares(limited, plans, places)["images"], plans["images"]
        plan = self.policy.draw(evaluation_generator(self.plan.seed + number, self.names[index]))
        return self._fit(apply_plan(image, plan)), plan


def content_only(square: np.ndarray, side: int) -> np.ndarray:
    """Reduce (S, S, 3) uint8 to `side` px by area and enlarge it again, bicubic.

    What is left tells what a picture shows, not how it was made.
    """
    small = cv2.resize(square, (side, side), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, square.shape[:2], interpolation=cv2.INTER_CUBIC)
