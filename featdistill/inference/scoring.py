"""Scores of many experts over many images: each image is decoded once, by worker processes, for all experts.

On a GPU three things go on at once: workers fill page-locked uint8 batches, one batch is copied to the
device, and another is scored; what was scored is fetched one batch late, so that the device never waits for
its own results.

What an image scores depends on its place in its batch and on the size of that batch, in the last bits: matrix
products round otherwise for other shapes. It does not depend on its neighbours, not even on whether they can
be read: in the place of a broken image another of the batch is scored once more.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from featdistill.data.loading import Broken, ScoreDataset, make_loader
from featdistill.data.views import PLAIN, View
from featdistill.distortions.policy import DistortionPolicy
from featdistill.images.equalization import Equalization
from featdistill.inference.compute import attention_kernels, autocast
from featdistill.models.expert import Expert


@dataclass(frozen=True)
class ScoredBatch:
    """What the experts say of one batch.

    Attributes:
        number: of the batch in the order of the rows.
        rows: positions of the N scored rows.
        logits: (experts, N) float32.
        broken: the rows of the batch whose images could not be read.
    """

    number: int
    rows: list[int]
    logits: np.ndarray
    broken: list[Broken]


def score(
    experts: Sequence[Expert],
    rows: pd.DataFrame,
    *,
    policy: DistortionPolicy | None = None,
    seed: int = 0,
    equalization: Equalization | None = None,
    **settings: Any,
) -> Iterator[ScoredBatch]:
    """Score rows of a manifest batch by batch.

    Args:
        experts: in evaluation mode, on the device.
        policy: distorts each image as (seed, name) says before it is scored.
        equalization: see `TrainDataset`.
        settings: see `score_dataset`.
    """
    keys = [expert.preprocessing.key for expert in experts]
    yield from score_dataset(experts, ScoreDataset(rows, keys, policy, seed, equalization), **settings)


def score_dataset(
    experts: Sequence[Expert],
    dataset: Dataset,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    workers: int = 0,
    precision: str = "fp32",
    views: Sequence[View] = PLAIN,
    full_batches: bool = False,
    batches: Sequence[int] | None = None,
) -> Iterator[ScoredBatch]:
    """Score the items of a data set batch by batch.

    Which images share a batch depends on `batch_size` alone, so that a continued run gives the same numbers.

    Args:
        experts: in evaluation mode, on `device`, perhaps compiled.
        dataset: a `ScoreDataset` with these `views`.
        precision: of the arithmetic of experts whose weights are float32 (autocast); experts that have been
            cast keep their own.
        views: each expert's logits are averaged over them.
        full_batches: the last batch is filled up, so that every forward pass has the same shape.
        batches: numbers of the batches wanted; all by default.
    """
    device = torch.device(device)
    numbers = range(-(-len(dataset) // batch_size)) if batches is None else batches
    parts = [range(n * batch_size, min(len(dataset), (n + 1) * batch_size)) for n in numbers]
    loader = make_loader(dataset, parts, workers)
    under_way: _UnderWay | None = None
    for number, part, batch in zip(numbers, parts, _on_device(loader, device), strict=True):
        launched = _UnderWay(number, batch["broken"], torch.zeros((len(experts), 0)))
        if "images" in batch:
            launched.rows = batch["index"].tolist()
            slots = [row - part.start for row in launched.rows]
            images = _in_place(batch["images"], slots, batch_size if full_batches else len(part))
            with autocast(device, precision), attention_kernels(device):
                found = [_mean_logits(expert, images, views) for expert in experts]
            launched.send(torch.stack(found).float(), slots)
        if under_way:
            yield under_way.fetch()
        under_way = launched
        if device.type == "cpu":
            yield under_way.fetch()
            under_way = None
    if under_way:
        yield under_way.fetch()


def score_all(
    experts: Sequence[Expert], dataset: Dataset, **settings: Any
) -> tuple[np.ndarray, dict[int, str]]:
    """Score all items of a data set; `settings` are those of `score_dataset`.

    Returns:
        (experts, N) float32 logits, NaN for broken items; and item -> why it is broken.
    """
    logits = np.full((len(experts), len(dataset)), np.nan, np.float32)
    broken: dict[int, str] = {}
    for batch in score_dataset(experts, dataset, **settings):
        logits[:, batch.rows] = batch.logits
        broken |= dict(batch.broken)
    return logits, broken


@dataclass
class _UnderWay:
    """A batch whose logits are still on their way from the device."""

    number: int
    broken: list[Broken]
    logits: Tensor
    rows: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    arrival: Any = None

    def send(self, logits: Tensor, slots: list[int]) -> None:
        self.slots = slots
        # Without blocking, the result is in page-locked memory, and there only when the event has happened.
        self.logits = logits.to("cpu", non_blocking=True)
        if logits.is_cuda:
            self.arrival = torch.cuda.Event()
            self.arrival.record(torch.cuda.current_stream(logits.device))

    def fetch(self) -> ScoredBatch:
        if self.arrival:
            self.arrival.synchronize()
        return ScoredBatch(self.number, self.rows, self.logits.numpy()[:, self.slots], self.broken)


def _on_device(batches: Iterable[dict], device: torch.device) -> Iterator[dict]:
    """Bring each batch to the device; on a GPU in a stream of its own, while another batch is scored."""
    if device.type == "cpu":
        yield from batches
        return
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in batches:
        images = batch.get("images", {})
        # Of no effect where the stream is None.
        with torch.cuda.stream(stream):
            images = {key: pixels.to(device, non_blocking=True) for key, pixels in images.items()}
        if stream:
            computing = torch.cuda.current_stream(device)
            computing.wait_stream(stream)
            for pixels in images.values():
                # Their memory must not be used anew before the computing is done with it.
                pixels.record_stream(computing)
        yield batch | ({"images": images} if images else {})


def _in_place(images: dict, slots: list[int], size: int) -> dict:
    """Return batches of `size` in which each image lies in its slot and the first fills those left empty."""
    if slots == list(range(size)):
        return images
    order = [0] * size
    for position, slot in enumerate(slots):
        order[slot] = position
    return {key: pixels[order] for key, pixels in images.items()}


def _mean_logits(expert: Expert, images: dict, views: Sequence[View]) -> Tensor:
    found = []
    for view in views:
        pixels = images[view.key(expert.preprocessing.key)]
        pixels = pixels.flip(-1) if view.mirrored else pixels
        with torch.inference_mode():
            found.append(expert(pixels))
    return found[0] if len(found) == 1 else torch.stack(found).mean(0)
