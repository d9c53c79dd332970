"""Manifest rows to uint8 batches: decode once, distort, fit to the input of each backbone, stack.

Pixels stay uint8 until they are on the device. What happens to a training image is a function of (seed,
epoch, index), what happens to a scored image of (seed, name): neither the worker nor the number of processes
matters.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, default_collate

from featdistill.command_line import UserError
from featdistill.distortion_policy import (
    DistortionPolicy,
    apply_plan,
    evaluation_generator,
    training_generator,
)
from featdistill.equalise import Equalisation, equalise
from featdistill.image_io import BrokenImage, limit_side, read_image
from featdistill.working_memory import keep_freed_memory

InputKey = tuple[int, str]


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the square input of a backbone.

    Attributes:
        size: side S of the input in px.
        resize: `shorter` (antialiased bicubic of the shorter side to S, then crop), `squash` (both sides to
            S), or `crop` (no resizing; an image smaller than S is tiled).
        mean, std: normalisation of pixels in [0, 1], done on the device.
    """

    size: int
    resize: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def key(self) -> InputKey:
        """Experts with the same key share one prepared image."""
        return self.size, self.resize


class Place(NamedTuple):
    """Where the crop is taken, as fractions of the room there is, and whether it is mirrored."""

    top: float = 0.5
    left: float = 0.5
    flip: bool = False


CENTRE = Place()
_MOST_ASPECT = 16


class Broken(NamedTuple):
    """A row whose image could not be read."""

    index: int
    reason: str


def prepare(image: np.ndarray, size: int, resize: str, place: Place = CENTRE) -> Tensor:
    """Fit an image to a backbone's input.

    Args:
        image: (H, W, 3) uint8 RGB.
        size: side S of the result in px.
        resize: see `Preprocessing`.

    Returns:
        (3, S, S) uint8.
    """
    return to_planes(fit(image, size, resize, place))


def fit(image: np.ndarray, size: int, resize: str, place: Place = CENTRE) -> np.ndarray:
    """Return the (S, S, 3) uint8 that `prepare` makes planes of; see there."""
    height, width = image.shape[:2]
    if resize == "shorter" and max(height, width) > _MOST_ASPECT * min(height, width):
        # Of a strip only a part is ever seen, and all of it, enlarged, could fill the memory.
        longest = _MOST_ASPECT * min(height, width)
        top, left = int(place.top * max(0, height - longest)), int(place.left * max(0, width - longest))
        image = np.ascontiguousarray(image[top : top + longest, left : left + longest])
        height, width = image.shape[:2]
    if resize == "squash":
        target = (size, size)
    elif resize == "shorter":
        shorter = min(height, width)
        target = (size * height // shorter, size * width // shorter)
    else:
        repeats = -(-size // height), -(-size // width)
        image = np.tile(image, (*repeats, 1)) if max(repeats) > 1 else image
        target = image.shape[:2]
    if target != image.shape[:2]:
        # In this order, PyTorch sees that the channels come last, and resizes them together.
        pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
        pixels = interpolate(pixels, target, mode="bicubic", antialias=True)
        image = pixels[0].permute(1, 2, 0).numpy()
    top = int(place.top * (image.shape[0] - size))
    left = int(place.left * (image.shape[1] - size))
    square = image[top : top + size, left : left + size]
    return cv2.flip(square, 1) if place.flip else np.ascontiguousarray(square)


def to_planes(image: np.ndarray) -> Tensor:
    """Turn (H, W, 3) uint8 into (3, H, W)."""
    planes = np.empty((3, *image.shape[:2]), np.uint8)
    cv2.split(image, list(planes))
    return torch.from_numpy(planes)


class TrainDataset(Dataset):
    """Training rows: a distorted, cropped, perhaps mirrored image, and for stage 2 the teacher's view of it.

    Items are addressed by (epoch, index), so that workers need no state. An item is a dict with `images` (3,
    S, S) uint8, `label` float, `index` int and, with a `teacher_view`, `teacher_images` (3, S, S) uint8,
    cropped and mirrored alike; or `Broken`.

    Args:
        rows: labelled rows of a manifest.
        policy: what distortions are drawn, and whether they come before or after the resizing.
        seed: the run's seed.
        teacher_view: `clean`, `same`, `other` or None (see `DistillRecipe`).
        equalisation: gives every image a size and a JPEG quality that do not depend on its class, first of
            all.
    """

    def __init__(
        self,
        rows: pd.DataFrame,
        preprocessing: Preprocessing,
        policy: DistortionPolicy,
        seed: int,
        *,
        crop: str = "random",
        flip: float = 0.5,
        teacher_view: str | None = None,
        equalisation: Equalisation | None = None,
    ) -> None:
        self.images, self.names = rows["image"].tolist(), rows["name"].tolist()
        self.equalisation = equalisation
        self.labels = rows["label"].astype("float32").tolist()
        self.weights = _weights(rows)
        self.preprocessing, self.policy, self.seed = preprocessing, policy, seed
        self.crop, self.flip, self.teacher_view = crop, flip, teacher_view

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any] | Broken:
        epoch, index = item
        rng = training_generator(self.seed, epoch, index)
        top, left, mirror = rng.random(3)
        top, left = (top, left) if self.crop == "random" else (0.5, 0.5)
        place = Place(top, left, bool(mirror < self.flip))
        plan = self.policy.draw(rng)
        try:
            image = read_image(self.images[index])
            if self.equalisation:
                image = equalise(image, self.names[index], self.equalisation)
            image = limit_side(image, self.policy.max_side_px)
            example = {"images": self._view(image, plan, place), "label": self.labels[index], "index": index}
            if self.teacher_view:
                teacher_plan = self.policy.draw(rng) if self.teacher_view == "other" else plan
                teacher_plan = () if self.teacher_view == "clean" else teacher_plan
                example["teacher_images"] = self._view(image, teacher_plan, place)
        except BrokenImage as error:
            return Broken(index, str(error))
        return example

    def _view(self, image: np.ndarray, plan: tuple, place: Place) -> Tensor:
        size, resize = self.preprocessing.key
        if self.policy.distort_at == "native":
            return prepare(apply_plan(image, plan), size, resize, place)
        square = apply_plan(fit(image, size, resize, place), plan)
        return to_planes(square) if square.shape[:2] == (size, size) else prepare(square, size, "squash")


def _weights(rows: pd.DataFrame) -> np.ndarray | None:
    """Return the column `weight`, where an empty cell counts 1, or None without it."""
    if "weight" not in rows:
        return None
    text = rows["weight"].replace("", "1")
    weights = pd.to_numeric(text, errors="coerce").to_numpy(np.float64)
    wrong = ~(np.isfinite(weights) & (weights > 0))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise UserError(f"the weight of {rows['name'][row]} must be a number above 0, not {text[row]!r}")
    return weights


class ScoreDataset(Dataset):
    """Rows to be scored: each image decoded once and fitted to every input that the experts need.

    An item is a dict with `index` and `images`, a dict from `Preprocessing.key` to (3, S, S) uint8; or
    `Broken`.

    Args:
        keys: the inputs wanted.
        policy: with one given, each image is distorted as (seed, name) says before it is prepared.
        equalisation: as for `TrainDataset`.
    """

    def __init__(
        self,
        rows: pd.DataFrame,
        keys: Sequence[InputKey],
        policy: DistortionPolicy | None = None,
        seed: int = 0,
        equalisation: Equalisation | None = None,
    ) -> None:
        self.images, self.names = rows["image"].tolist(), rows["name"].tolist()
        self.equalisation = equalisation
        self.keys, self.policy, self.seed = list(dict.fromkeys(keys)), policy, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any] | Broken:
        try:
            image = read_image(self.images[index])
            if self.equalisation:
                image = equalise(image, self.names[index], self.equalisation)
            if self.policy:
                rng = evaluation_generator(self.seed, self.names[index])
                image = apply_plan(image, self.policy.draw(rng))
        except BrokenImage as error:
            return Broken(index, str(error))
        return {"index": index, "images": {key: prepare(image, *key) for key in self.keys}}


class TrainBatches:
    """The batches of all epochs as one stream, from any optimiser step on, for one of several processes.

    Each epoch is a new permutation, a function of (seed, epoch). An optimiser step sees the same images
    whatever the number of processes and accumulation steps; each forward pass takes its own slice of them.
    The last, incomplete batch of an epoch is left out. With weights, an epoch has as many images as the
    weights sum to, and a row of weight w comes up w times on average: as often as that rounded down or up.

    Args:
        rows: number of training rows.
        batch_size: images an optimiser step, over all processes and accumulation steps.
        start: number of optimiser steps that are already done.
        weights: (rows,) float64 above 0, or None where all rows count alike.

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
        images = rows if weights is None else int(weights.sum() + 1e-9)
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
        # Even steps along the rows, each as long as its weight.
        ends = np.cumsum(self.weights[order])
        steps = (np.arange(self.images) + rng.random()) * (ends[-1] / self.images)
        places = np.minimum(np.searchsorted(ends, steps, side="right"), self.rows - 1)
        again = np.arange(self.images) - np.searchsorted(places, places, side="left")
        items = np.column_stack([epoch + self.epochs * again, order[places]])
        return items[rng.permutation(self.images)]


def collate(items: list[dict[str, Any] | Broken]) -> dict[str, Any]:
    """Stack items to a batch; broken rows are listed under `broken` and left out of all else."""
    good = [item for item in items if not isinstance(item, Broken)]
    batch: dict[str, Any] = {"broken": [item for item in items if isinstance(item, Broken)]}
    for key in good[0] if good else ():
        values = [item[key] for item in good]
        # In a worker, PyTorch's collate stacks tensors in memory that the main process shares.
        if isinstance(values[0], dict):
            batch[key] = {name: default_collate([value[name] for value in values]) for name in values[0]}
        else:
            batch[key] = default_collate(values) if isinstance(values[0], Tensor) else torch.tensor(values)
    return batch


def make_loader(dataset: Dataset, batches: Any, workers: int) -> DataLoader:
    """Return a loader over lists of items. Its own generator keeps it from drawing from the global one."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_one_thread,
        generator=torch.Generator().manual_seed(0),
        pin_memory=torch.cuda.is_available(),
    )


def _one_thread(worker: int) -> None:
    """Workers are the parallelism: threads of their own would only get in each other's way."""
    keep_freed_memory()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
