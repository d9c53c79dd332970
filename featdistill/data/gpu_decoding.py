"""JPEGs decoded and resized on the GPU, where it scores faster than the loader's workers can decode.

Workers read the bytes and look at the header. Plain JPEGs (`plain_jpeg_header`) go as they are to the main
process, which decodes those of a batch on the GPU (nvJPEG, through torchvision) and resizes them there. The
rest is prepared by the workers as ever: other formats, JPEGs with an orientation, CMYK, very large images and
those that an expert wants reduced to `max_side_px` first. So is, in the main process, what the GPU's decoder
refuses; an image is broken only if it cannot be decoded on the CPU either.

Pixels differ from those of the CPU. As torchvision sets it up, nvJPEG repeats each value of chroma that
covers several pixels, where libjpeg interpolates. Experts that do not resize lost .02 AUC by that, with
libjpeg told to repeat; so we interpolate in its place (`interpolate_chroma`). What remains is rounding, RGB
that was cut off at 0 and 255, and nvJPEG's own inverse transform; resizing adds next to nothing.

Tests run this with torchvision's decoder for the CPU; it has not run on a GPU yet. From 0.29 on, torchvision
recommends torchcodec in place of its decoders, which work as before.
"""

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from featdistill.command_line import UserError
from featdistill.data.loading import Broken, ScoreDataset, collate, to_device
from featdistill.data.preprocessing import InputKey, Preprocessing, fit_stack
from featdistill.data.views import PLAIN, View
from featdistill.images.reading import BrokenImage, JpegHeader, encode_jpeg, plain_jpeg_header

_log = logging.getLogger(__name__)
CPU, GPU = "cpu", "gpu"
_RESIZES = ("shorter", "squash", "crop")
# Rows and columns of pixels that share a value of chroma; what is stored otherwise is rare.
_SHARED = {"Gray": (1, 1), "444": (1, 1), "422": (1, 2), "420": (2, 2)}
# PyTorch's antialiased bicubic kernel for GPUs cannot reduce a side to less than 1/90 in 48 KiB of memory.
_MOST_REDUCED = 32
# Bounds the memory for decoded images: up to about 60 bytes per pixel.
_PIXELS_AT_ONCE = 1 << 25


class Jpeg(NamedTuple):
    """A row whose image is still to be decoded."""

    index: int
    header: JpegHeader
    data: np.ndarray


class Jpegs(NamedTuple):
    """The rows of a batch whose images are still to be decoded.

    Attributes:
        indices, headers: see `Jpeg`.
        lengths: of the files, in bytes.
        data: all files, one after the other, in one tensor: workers share memory by the tensor.
    """

    indices: list[int]
    headers: list[JpegHeader]
    lengths: list[int]
    data: Tensor


class JpegDataset(ScoreDataset):
    """Rows to score whose plain JPEGs are decoded by `to_device`, on the device.

    Args:
        keys: the inputs of the experts; see `check_input`.
        views: images as they are, perhaps mirrored.
    """

    def __init__(self, rows: pd.DataFrame, keys: Sequence[InputKey], views: Sequence[View] = PLAIN) -> None:
        super().__init__(rows, keys, views=views)
        limits = [key[2] for key in self.keys if len(key) > 2]
        self.longest_px = min([*limits, *(_MOST_REDUCED * key[0] for key in self.keys)])

    def _item(self, index: int, read: Callable[[str], bytes]) -> dict[str, Any] | Broken | Jpeg:
        try:
            data = read(self.images[index])
        except BrokenImage as error:
            return Broken(index, str(error))
        header = plain_jpeg_header(data)
        if header and header.subsampling in _SHARED and max(header[:2]) <= self.longest_px:
            return Jpeg(index, header, np.frombuffer(data, np.uint8))
        return super()._item(index, lambda _: data)

    def collate(self, items: list[dict[str, Any] | Broken | Jpeg]) -> dict[str, Any]:
        """Stack items into a batch, which has `jpegs` if there are any."""
        jpegs = [item for item in items if isinstance(item, Jpeg)]
        batch = collate([item for item in items if not isinstance(item, Jpeg)])
        if jpegs:
            indices, headers, data = (list(column) for column in zip(*jpegs, strict=True))
            joined = torch.from_numpy(np.concatenate(data))
            batch["jpegs"] = Jpegs(indices, headers, [len(one) for one in data], joined)
        return batch

    def to_device(self, batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """Return the batch that a `ScoreDataset` would have made, with its images on the device."""
        jpegs: Jpegs | None = batch.pop("jpegs", None)
        batch = to_device(batch, device)
        if jpegs is None:
            return batch
        items = [*batch["broken"], *_items(batch["index"].tolist() if "images" in batch else [], batch)]
        for part in _parts(jpegs):
            items += self._decoded(part, device)
        return collate(sorted(items, key=lambda one: one.index if isinstance(one, Broken) else one["index"]))

    def _decoded(
        self, part: list[tuple[int, JpegHeader, Tensor]], device: torch.device
    ) -> Iterator[dict[str, Any] | Broken]:
        """Yield the items of a `ScoreDataset` for some JPEGs, on the device."""
        alike: dict[JpegHeader, dict[int, Tensor]] = {}
        pictures = decode([file for *_, file in part], device)
        for (index, header, file), pixels in zip(part, pictures, strict=True):
            if pixels is not None:
                alike.setdefault(header, {})[index] = pixels
            else:
                item = super()._item(index, lambda _, file=file: file.numpy().tobytes())
                yield item if isinstance(item, Broken) else to_device(item, device)
        for header, images in alike.items():
            stack = torch.stack([*images.values()])
            if max(shared := _SHARED[header.subsampling]) > 1 and repeats_chroma(device):
                stack = interpolate_chroma(stack, *shared)
            yield from _items([*images], {"images": {key: fit_stack(stack, *key[:2]) for key in self.keys}})


def _items(indices: list[int], batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the items of a batch, as they were before `collate`."""
    for position, index in enumerate(indices):
        yield {"index": index, "images": {key: images[position] for key, images in batch["images"].items()}}


def _parts(jpegs: Jpegs) -> Iterator[list[tuple[int, JpegHeader, Tensor]]]:
    """Yield some JPEGs at a time, by `_PIXELS_AT_ONCE`."""
    ends = itertools.accumulate(header.height * header.width for header in jpegs.headers)
    files = jpegs.data.split(jpegs.lengths)
    rows = zip(ends, jpegs.indices, jpegs.headers, files, strict=True)
    for _, part in itertools.groupby(rows, lambda row: row[0] // _PIXELS_AT_ONCE):
        yield [row[1:] for row in part]


def decode(files: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """Decode JPEGs, (n,) uint8 on the CPU each, to (3, H, W) uint8 on the device; None where that fails."""
    try:
        return _decode(files, device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if device.type == "cuda":
            # The decoder may still write to memory that is free from here on.
            torch.cuda.synchronize(device)
        if len(files) > 1:
            return [decode([file], device)[0] for file in files]
        _log.debug("decoding on the CPU what the GPU refuses: %s", error)
        return [None]


def _decode(files: list[Tensor], device: torch.device) -> list[Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg

    if device.type == "cuda":
        # nvJPEG does not wait for kernels of ours that still read the memory it writes to (pull requests
        # 9606 of torchvision, 1634 of torchcodec).
        torch.cuda.current_stream(device).synchronize()
    return decode_jpeg(files, ImageReadMode.RGB, device)


@functools.cache
def repeats_chroma(device: torch.device) -> bool:
    """Return whether the device's decoder repeats values of chroma; else it interpolates them."""
    colors = np.array([[200, 60, 60], [60, 60, 200]], np.uint8)
    stripes = np.tile(np.repeat(colors, 4, axis=0), (128, 16, 1))
    [pixels] = _decode([torch.frombuffer(bytearray(encode_jpeg(stripes, 100)), dtype=torch.uint8)], device)
    # At an edge, interpolation makes pixels that share a value differ by a quarter of the edge.
    return bool((pixels[..., ::2].int() - pixels[..., 1::2].int()).abs().max() < 8)


def interpolate_chroma(images: Tensor, rows: int, columns: int) -> Tensor:
    """Interpolate chroma as libjpeg does, in images (N, 3, H, W) uint8 whose decoder has repeated it.

    The triangle filter of libjpeg is bilinear interpolation, for 2 rows or columns.

    Args:
        rows, columns: number of those that share a value.
    """
    red, green, blue = images.float().unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = torch.stack([(blue - luma) / 1.772, (red - luma) / 1.402], 1)
    chroma = avg_pool2d(chroma, (rows, columns), ceil_mode=True)
    chroma = interpolate(chroma, scale_factor=(rows, columns), mode="bilinear")
    blue, red = chroma[..., : images.shape[2], : images.shape[3]].unbind(1)
    # JFIF 1.02, section 3.
    colors = [luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue]
    return torch.stack(colors, 1).round_().clamp_(0, 255).byte()


def require_decoder(device: torch.device) -> None:
    """Raise a `UserError` unless JPEGs can be decoded on the device, a GPU."""
    if device.type != "cuda":
        raise UserError(f"--decode gpu needs a GPU, not {device}; leave it out")
    try:
        repeats_chroma(device)
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--decode gpu needs a torchvision with nvJPEG ({reason}); leave it out") from error


def check_input(expert: str, preprocessing: Preprocessing, views: Sequence[View]) -> None:
    """Raise a `UserError` if the images of an expert have to be prepared on the CPU."""
    preprocessing.require_one_size("--decode gpu")
    if preprocessing.resize not in _RESIZES:
        raise UserError(
            f"--decode gpu resizes by {', '.join(_RESIZES)}, and expert {expert} needs "
            f"{preprocessing.resize}; leave it out"
        )
    if not all(view.is_plain for view in views):
        raise UserError("--decode gpu cuts no test-time views but hflip; leave it out, or --tta")
