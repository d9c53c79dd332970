"""Scores of many experts over many images; worker processes decode each image once for all experts.

On a GPU, workers fill page-locked uint8 batches while one batch is copied to the device and another one is
scored. Logits are fetched one batch late, so that the device never waits for them.

Where an expert's inputs differ in size, those of one size are scored together.

The last bits of a score depend on the size of the batch and on the position in it, because matrix products
round differently for other shapes. They do not depend on the other images, not even on whether those can be
read: the position of a broken image is filled with another image of the batch. (Only where inputs differ in
size they depend on how many images of the batch have the same size.)
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from featdistill.data.loading import Broken, ScoreDataset, make_loader, to_device
from featdistill.data.mixed_sizes import Images, MixedSizes, pieces, stacks
from featdistill.data.views import PLAIN, View
from featdistill.distortions.policy import DistortionPolicy
from featdistill.images.equalization import Equalization
from featdistill.inference.compute import attention_kernels, autocast
from featdistill.inference.profile import COMPUTING, DEVICE, Profile
from featdistill.models.expert import Expert


@dataclass(frozen=True)
class ScoredBatch:
    """The logits of one batch.

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
        policy: distorts each image, drawing from (seed, name).
        equalization: see `TrainDataset`.
        settings: see `score_dataset`.
    """
    keys = [expert.preprocessing.key for expert in experts]
    yield from score_dataset(experts, ScoreDataset(rows, keys, policy, seed, equalization), **settings)


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
    lengths: Sequence[int] | None = None,
    profile: Profile | None = None,
) -> Iterator[ScoredBatch]:
    """Score the items of a data set batch by batch.

    Only `batch_size` decides which images share a batch, so that a continued run gets the same numbers.

    Args:
        experts: in evaluation mode, on `device`, perhaps compiled.
        dataset: a `ScoreDataset` with these `views`; it may have its own `collate` and `to_device`.
        precision: of the arithmetic of experts whose weights are float32 (autocast); experts that have been
            cast keep their own.
        views: each expert's logits are averaged over them.
        full_batches: fill up the last batch, so that every forward pass has the same shape.
        batches: numbers of the batches to score; all by default.
        lengths: of the parts of the data set, one after the other: no batch has items of two of them.
        profile: what the time is added to.
    """
    profile = profile or Profile()
    device = torch.device(device)
    divided = batch_rows([len(dataset)] if lengths is None else lengths, batch_size)
    numbers = range(len(divided)) if batches is None else batches
    parts = [divided[number] for number in numbers]
    loader = make_loader(dataset, parts, workers)
    pending: list[Callable[[], ScoredBatch]] = []
    ready = profile.waited(on_device(loader, device, getattr(dataset, "to_device", to_device)))
    for number, part, batch in zip(numbers, parts, ready, strict=True):
        rows = batch["index"].tolist() if "images" in batch else []
        logits = torch.zeros((len(experts), 0))
        slots = [row - part.start for row in rows]
        if rows:
            size = batch_size if full_batches else len(part)
            images = in_slots(batch["images"], slots, size)
            with autocast(device, precision), attention_kernels(device), profile.part(COMPUTING):
                each = [_mean_logits(expert, images, views, size) for expert in experts]
                logits = torch.stack(each).float()
        pending.append(_fetcher(number, rows, slots, logits, batch["broken"]))
        if device.type == "cpu" or len(pending) > 1:
            yield _fetched(pending.pop(0), profile)
    yield from (_fetched(fetch, profile) for fetch in pending)


def batch_rows(lengths: Sequence[int], batch_size: int) -> list[range]:
    """Return the rows of each batch of parts that follow each other; see `score_dataset`."""
    ends = itertools.accumulate(lengths)
    parts = [range(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    return [part[at : at + batch_size] for part in parts for at in range(0, len(part), batch_size)]


def _fetched(fetch: Callable[[], ScoredBatch], profile: Profile) -> ScoredBatch:
    with profile.part(DEVICE):
        return fetch()


def _fetcher(
    number: int, rows: list[int], slots: list[int], logits: Tensor, broken: list[Broken]
) -> Callable[[], ScoredBatch]:
    """Start copying logits from the device, and return a function that waits for them."""
    copy, event = logits.to("cpu", non_blocking=True), None
    if logits.is_cuda:
        # The copy is in page-locked memory, and complete only when the event has happened.
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(logits.device))

    def fetch() -> ScoredBatch:
        if event:
            event.synchronize()
        return ScoredBatch(number, rows, copy.numpy()[:, slots], broken)

    return fetch


def on_device(
    batches: Iterable[dict],
    device: torch.device,
    move: Callable[[dict, torch.device], dict] = to_device,
) -> Iterator[dict]:
    """Move each batch to the device; on a GPU in a stream of its own, while another batch is scored."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in batches:
        # A stream of None has no effect.
        with torch.cuda.stream(stream):
            batch = move(batch, device)
        if stream:
            computing = torch.cuda.current_stream(device)
            computing.wait_stream(stream)
            for pixels in itertools.chain.from_iterable(map(stacks, batch.get("images", {}).values())):
                # Their memory must not be reused before the computation is done with it.
                pixels.record_stream(computing)
        yield batch


def in_slots(images: dict, slots: list[int], size: int) -> dict:
    """Return batches of `size` with each image in its slot, and the first image in the empty ones.

    Where images differ in size, the empty slots stay empty.
    """
    if slots == list(range(size)):
        return images
    order = [0] * size
    for position, slot in enumerate(slots):
        order[slot] = position
    mixed = {key: pixels for key, pixels in images.items() if isinstance(pixels, MixedSizes)}
    for key, pixels in mixed.items():
        positions = [[slots[position] for position in part] for part in pixels.positions]
        mixed[key] = pixels._replace(positions=positions)
    return {key: mixed[key] if key in mixed else pixels[order] for key, pixels in images.items()}


def _mean_logits(expert: Expert, images: dict, views: Sequence[View], size: int) -> Tensor:
    logits = []
    for view in views:
        pixels = images[view.key(expert.preprocessing.key)]
        pixels = pixels.flip(-1) if view.mirrored else pixels
        with torch.inference_mode():
            logits.append(_logits(expert, pixels, size) if expert.preprocessing.sizes else expert(pixels))
    return logits[0] if len(logits) == 1 else torch.stack(logits).mean(0)


def _logits(expert: Expert, images: Images, size: int) -> Tensor:
    """Return logits (size,) of images that may differ in size; 0 in empty slots."""
    logits = torch.zeros(size, device=expert.mean.device)
    for piece, slots in pieces(images, expert.preprocessing.size):
        logits[slots] = expert(piece)
    return logits
