"""Rows of a manifest to uint8 batches: read each image once, fit it to every input size needed, stack."""

import bisect
import itertools
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from featdistill.command_line import UserError
from featdistill.data.mixed_sizes import stack
from featdistill.data.preprocessing import InputKey
from featdistill.data.reading_ahead import reading_ahead
from featdistill.data.views import PLAIN, View, cut_views
from featdistill.distortions.plan import apply_plan
from featdistill.distortions.policy import DistortionPolicy
from featdistill.images.equalization import Equalization, equalize
from featdistill.images.reading import BrokenImage, decode, limit_side, read_bytes
from featdistill.process_setup import one_thread
from featdistill.seeds import evaluation_generator


class Broken(NamedTuple):
    """A row whose image could not be read."""

    index: int
    reason: str


def load_image(
    location: str,
    name: str,
    equalization: Equalization | None = None,
    max_side_px: int | None = None,
    read: Callable[[str], bytes] = read_bytes,
) -> np.ndarray:
    """Read an image and prepare it for distortion.

    Args:
        location, name: `image` and `name` of its row.
        equalization: assigns a size and a JPEG quality that do not depend on the image's class.
        max_side_px: see `limit_side`.
        read: returns the bytes of a location.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        BrokenImage: it cannot be read.
    """
    image = decode(read(location))
    if equalization:
        image = equalize(image, name, equalization)
    return limit_side(image, max_side_px)


class ScoreDataset(Dataset):
    """Rows to score: each image is decoded once and fitted to every input that the experts need.

    An item is a dict with `index` and `images`, a dict from `View.key` of `Preprocessing.key` to (3, S, S)
    uint8; or `Broken`.

    Args:
        keys: the inputs of the experts.
        policy: distorts each image first, as a function of (seed, name).
        equalization: see `load_image`.
        views: for test-time augmentation.
    """

    def __init__(
        self,
        rows: pd.DataFrame,
        keys: Sequence[InputKey],
        policy: DistortionPolicy | None = None,
        seed: int = 0,
        equalization: Equalization | None = None,
        views: Sequence[View] = PLAIN,
    ) -> None:
        self.images, self.names = rows["image"].tolist(), rows["name"].tolist()
        self.equalization, self.policy, self.seed = equalization, policy, seed
        self.keys, self.views = tuple(keys), tuple(views)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any] | Broken]:
        with reading_ahead([self.images[index] for index in indices]) as read:
            return [self._item(index, read) for index in indices]

    def __getitem__(self, index: int) -> dict[str, Any] | Broken:
        return self._item(index, read_bytes)

    def _item(self, index: int, read: Callable[[str], bytes]) -> dict[str, Any] | Broken:
        try:
            image = load_image(self.images[index], self.names[index], self.equalization, read=read)
            if self.policy:
                rng = evaluation_generator(self.seed, self.names[index])
                image = apply_plan(image, self.policy.draw(rng))
        except BrokenImage as error:
            return Broken(index, str(error))
        return {"index": index, "images": cut_views(image, self.keys, self.views)}


class Joined(Dataset):
    """Data sets to score one after the other, with the same workers; `index` counts through all of them.

    The items of one call of `__getitems__` have to come from the same data set.
    """

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self.datasets = tuple(datasets)
        self.starts = [0, *itertools.accumulate(map(len, datasets))]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any] | Broken]:
        place = bisect.bisect_right(self.starts, indices[0]) - 1
        dataset, start = self.datasets[place], self.starts[place]
        inside = [index - start for index in indices]
        several = getattr(dataset, "__getitems__", None)
        items = several(inside) if several else [dataset[index] for index in inside]
        return [_moved(item, start) for item in items]


def _moved(item: dict[str, Any] | Broken, start: int) -> dict[str, Any] | Broken:
    """Return an item whose index is counted from `start` on."""
    if isinstance(item, Broken):
        return item._replace(index=item.index + start)
    return item | {"index": item["index"] + start}


def collate(items: list[dict[str, Any] | Broken]) -> dict[str, Any]:
    """Stack items into a batch; broken rows are listed under `broken` and are not in the other entries.

    Images that differ in size become `MixedSizes`.
    """
    good = [item for item in items if not isinstance(item, Broken)]
    batch: dict[str, Any] = {"broken": [item for item in items if isinstance(item, Broken)]}
    for key in good[0] if good else ():
        values = [item[key] for item in good]
        # In a worker, PyTorch's collate stacks tensors in memory that the main process shares.
        if isinstance(values[0], dict):
            batch[key] = {name: stack([value[name] for value in values]) for name in values[0]}
        elif isinstance(values[0], str):
            batch[key] = values
        else:
            batch[key] = stack(values) if isinstance(values[0], Tensor) else torch.tensor(values)
    return batch


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch with its images on the device; the copies may still be under way."""
    images = {key: pixels.to(device, non_blocking=True) for key, pixels in batch.get("images", {}).items()}
    return batch | ({"images": images} if images else {})


class Loader(DataLoader):
    """A loader that does not use torch's global random generator, and says what its workers lack.

    Raises:
        UserError: the system denies the workers memory or files.
    """

    def __init__(self, dataset: Dataset, **options: Any) -> None:
        options |= {"worker_init_fn": one_thread, "generator": torch.Generator().manual_seed(0)}
        super().__init__(dataset, **options)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from super().__iter__()
        except (RuntimeError, OSError) as error:
            text = " ".join(str(error).split())
            reasons = [message for pattern, message in _LACKS.items() if re.search(pattern, text)]
            if not (reasons and self.num_workers):
                raise
            for frame, _ in traceback.walk_tb(error.__traceback__):
                # An iterator that could not start its workers fails again, visibly, when it is collected.
                if isinstance(half := frame.f_locals.get("self"), _MultiProcessingDataLoaderIter):
                    half._shutdown = True
            raise UserError(reasons[0]) from error
        except UserError as error:
            # The message of a worker's error is all of its traceback.
            raise UserError(str(error).rstrip().rpartition("UserError: ")[2]) from error


# What is in the messages of PyTorch and the system, and what to do.
_LACKS = {
    r"Too many open files|ancdata": "the loader's workers have too many files open; raise the limit with "
    "ulimit -n 65536, or use fewer --workers",
    r"shared memory|shm|/torch_|Bus error": "the loader's workers need more shared memory than /dev/shm has; "
    "enlarge it (docker run --shm-size=8g), or use --workers 0",
    r"Cannot allocate memory|exited unexpectedly|killed by signal": "a worker of the loader died, perhaps "
    "for lack of memory; use fewer --workers",
}


def make_loader(dataset: Dataset, batches: Any, workers: int) -> Loader:
    """Return a loader over lists of items; a data set may have its own `collate`."""
    return Loader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=getattr(dataset, "collate", collate),
        pin_memory=torch.cuda.is_available(),
    )
