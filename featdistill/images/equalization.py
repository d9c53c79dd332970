"""Equal sizes, JPEG quality and file format for all images, so that these no longer tell the classes apart.

In many benchmarks real images are JPEGs of all sizes and AI-generated ones PNGs of a few fixed sizes, and a
detector that has learned only this scores well on them. Here every image gets a size and a JPEG quality that
are drawn for its name from a distribution common to all classes.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from featdistill.command_line import UserError
from featdistill.images.reading import decode, encode_jpeg
from featdistill.seeds import evaluation_generator

FITS = ("resize", "crop")
# The smallest side that every distortion accepts.
MIN_SIDE_PX = 16
# Side of a JPEG's blocks.
_GRID_PX = 8


@dataclass(frozen=True)
class Equalization:
    """The distribution of sizes and qualities.

    Attributes:
        sizes: (height, width) in px, in ascending order, all equally likely; a size may be listed several
            times. See `common_sizes`.
        quality_range_0_100: lowest and highest JPEG quality; each integer between them is equally likely. 75
            is the default of many programs, 95 the choice of careful ones.
        fit: `resize` cuts the largest part with the size's aspect ratio and reduces it; `crop` cuts a part of
            exactly that size. Both enlarge an image that is too small.
        seed: random seed of the sizes and qualities.
    """

    sizes: tuple[tuple[int, int], ...]
    quality_range_0_100: tuple[int, int] = (75, 95)
    fit: str = "resize"
    seed: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the settings as JSON values, for `from_json`."""
        # A thousand sizes are often only a few different ones.
        counts = Counter(f"{height}x{width}" for height, width in self.sizes)
        return dataclasses.asdict(self) | {"sizes": dict(counts)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Equalization":
        """Return the settings that `as_json` saved."""
        sizes = []
        for size, count in values["sizes"].items():
            height, _, width = size.partition("x")
            sizes += [(int(height), int(width))] * count
        qualities = tuple(values["quality_range_0_100"])
        return cls(**values | {"sizes": tuple(sizes), "quality_range_0_100": qualities})


def common_sizes(sizes_of_classes: Sequence[np.ndarray], spare: float = 0.05) -> tuple[tuple[int, int], ...]:
    """Return sizes (height, width) from which images of all classes can be drawn alike, in ascending order.

    They are the sizes of all classes, equally many of each. Each is reduced, keeping its aspect ratio, until
    it can be cut without enlargement from all but a share `spare` of the images of every class, with 7 px of
    room to put the blocks of an earlier JPEG anywhere: images compressed twice with the same blocks are easy
    to tell from those compressed for the first time.

    Args:
        sizes_of_classes: (N, 2) heights and widths in px, one array per class.
        spare: share of the images of a class that may have to be enlarged.
    """
    count = max(len(sizes) for sizes in sizes_of_classes)
    balanced = [sizes[np.arange(count) * len(sizes) // count] for sizes in sizes_of_classes]
    result = []
    for height, width in np.concatenate(balanced).tolist():
        # How much each image of a class could be reduced before this size no longer fits into it.
        room = [((sizes - _GRID_PX + 1) / (height, width)).min(axis=1) for sizes in sizes_of_classes]
        factor = min(1.0, *(float(np.quantile(values, spare, method="lower")) for values in room))
        result.append(tuple(max(MIN_SIDE_PX, int(side * factor + 1e-9)) for side in (height, width)))
    return tuple(sorted(result))


def read_settings(path: str | Path) -> Equalization:
    """Read the settings of an equalized copy from the `equalise.json` of `python -m data_prep.equalize`.

    Raises:
        UserError: the file is missing or something else.
    """
    try:
        return Equalization.from_json(json.loads(Path(path).read_text(encoding="utf-8"))["settings"])
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} was not written by python -m data_prep.equalize") from error


def equalize(image: np.ndarray, name: str, settings: Equalization) -> np.ndarray:
    """Return the image as decoded from `equalized_jpeg`: (h, w, 3) uint8 RGB."""
    return decode(equalized_jpeg(image, name, settings))


def equalized_jpeg(image: np.ndarray, name: str, settings: Equalization) -> bytes:
    """Bring (H, W, 3) uint8 RGB to the size and JPEG quality that are drawn for its name.

    The draw depends only on the name and the settings. The JPEG has 4:2:0 chroma and no metadata.
    """
    # The prefix keeps this draw apart from that of the image's distortions, which also depends on its name.
    rng = evaluation_generator(settings.seed, f"equalise:{name}")
    size = settings.sizes[rng.integers(len(settings.sizes))]
    top, left = rng.random(2)
    quality = int(rng.integers(*settings.quality_range_0_100, endpoint=True))
    return encode_jpeg(cut(image, size, settings.fit, top, left), quality)


def cut(image: np.ndarray, size: tuple[int, int], fit: str, top: float, left: float) -> np.ndarray:
    """Cut a part from (H, W, 3) uint8 RGB and bring it to a size (h, w); see `Equalization` for `fit`.

    `top` and `left` are the part's position, as fractions in [0, 1) of the available room.
    """
    sides = image.shape[:2]
    # Pixels of the image per pixel of the result; below 1 the image is enlarged.
    step = min(sides[0] / size[0], sides[1] / size[1])
    step = min(step, 1.0) if fit == "crop" else step
    part = [min(side, max(1, round(target * step))) for side, target in zip(sides, size, strict=True)]
    # A fraction below 1 never reaches the `+ 1`.
    first = [
        int(fraction * (side - length + 1))
        for fraction, side, length in zip((top, left), sides, part, strict=True)
    ]
    image = image[first[0] : first[0] + part[0], first[1] : first[1] + part[1]]
    if image.shape[:2] == tuple(size):
        return np.ascontiguousarray(image)
    # Pillow's filter is as wide as the reduction needs. OpenCV's area averaging blurs more at a factor of 1.1
    # than at 2, which would reveal how much an image was reduced.
    whole = Image.fromarray(np.ascontiguousarray(image))
    return np.array(whole.resize(size[::-1], Image.Resampling.BICUBIC))
