"""Images of several sizes in one batch, and batches of one size cut out of it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import default_collate


class MixedSizes(NamedTuple):
    """The images of a batch that differ in size.

    Attributes:
        stacks: (n, 3, S, S) of each size, ascending.
        positions: of each stack, where its images are in the batch, ascending.
    """

    stacks: list[Tensor]
    positions: list[list[int]]

    def to(self, *args: Any, **options: Any) -> "MixedSizes":
        """Return the images on another device; the arguments are those of `Tensor.to`."""
        return self._replace(stacks=[stack.to(*args, **options) for stack in self.stacks])

    def flip(self, axis: int) -> "MixedSizes":
        """Return the images flipped."""
        return self._replace(stacks=[stack.flip(axis) for stack in self.stacks])


Images = Tensor | MixedSizes


def stack(images: list[Tensor]) -> Images:
    """Return images (3, S, S) as a batch (B, 3, S, S), or as `MixedSizes` if their sides differ."""
    sides = sorted({image.shape[-1] for image in images})
    if len(sides) == 1:
        return default_collate(images)
    positions = [[at for at, image in enumerate(images) if image.shape[-1] == side] for side in sides]
    return MixedSizes([default_collate([images[at] for at in part]) for part in positions], positions)


def stacks(images: Images) -> list[Tensor]:
    """Return the tensors that hold the images."""
    return images.stacks if isinstance(images, MixedSizes) else [images]


def pieces(images: Images, smallest: int) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield images (n, 3, S, S) of one size, and where they are in the batch.

    A piece has at most as many pixels as the batch would have if all its images had the side `smallest`, but
    at least one image: the memory for a batch does not depend on its images.
    """
    is_mixed = isinstance(images, MixedSizes)
    parts = zip(*images, strict=True) if is_mixed else [(images, list(range(len(images))))]
    count = sum(map(len, stacks(images)))
    for part, positions in parts:
        step = max(1, count * smallest**2 // part.shape[-1] ** 2)
        for first in range(0, len(positions), step):
            yield part[first : first + step], positions[first : first + step]


def batch_pieces(batch: dict[str, Any], smallest: int) -> Iterator[dict[str, Any]]:
    """Yield a training batch in pieces of one size each: the same entries, for a part of the images.

    Args:
        batch: entries `images...`, whose sides agree image by image, and others that are (B, ...) tensors.
    """
    views = [key for key in batch if key.startswith("images")]
    cuts = {view: pieces(batch[view], smallest) for view in views}
    for cut in zip(*cuts.values(), strict=True):
        positions = cut[0][1]
        piece = {view: images for view, (images, _) in zip(views, cut, strict=True)}
        yield piece | {key: values[positions] for key, values in batch.items() if key not in views}
