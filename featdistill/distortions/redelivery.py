"""What happens to a picture on its way through the web: saved again, shown small, photographed off a screen.

Thumbnails, messengers and screens change the size, and only a thumbnail is enlarged again to the size it had.
The qualities are ours, in the range of what sites and messengers are known to use.
"""

import cv2
import numpy as np
from PIL import features

from featdistill.distortions.kernels import codecs
from featdistill.distortions.operation import MIN_SIDE_PX, Operation, register
from featdistill.images.reading import limit_side

REDELIVERY: dict[str, Operation] = {}

_CHANGES_SIZE = {"random": True, "keeps_layout": False, "keeps_size": False, "monotone": False}
# Of a messenger's five grades of thrift: the JPEG quality to the longer side in the operation's scale.
_MESSENGER_QUALITIES = (85, 80, 75, 70, 60)
_JITTER = 5


@register(REDELIVERY, "size", (0.8, 0.65, 0.5, 0.35, 0.25))
def thumbnail(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Preview that is enlarged to the size of the image; scale: its share of the sides."""
    height, width = image.shape[:2]
    small = _resized(image, thumbnail.scales[level - 1])
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


@register(REDELIVERY, "size", (0.9, 0.75, 0.6, 1.25, 1.5), spread=0.05, **_CHANGES_SIZE)
def screenshot(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Copy at the size in which a screen shows the image; scale: factor, +-0.05."""
    return _resized(image, screenshot.scale(level, rng))


@register(REDELIVERY, "codec", (95, 85, 70, 50, 30))
def resaved_jpeg(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """JPEG; scale: quality from 0 to 100."""
    return codecs.jpeg(image, resaved_jpeg.scales[level - 1])


@register(REDELIVERY, "codec", (90, 80, 65, 50, 35))
def resaved_webp(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """WebP; scale: quality from 0 to 100."""
    return codecs.webp(image, resaved_webp.scales[level - 1])


def _missing_avif() -> str:
    return "" if features.check("avif") else "a Pillow built with AVIF"


@register(REDELIVERY, "codec", (80, 70, 60, 50, 40), missing=_missing_avif)
def resaved_avif(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """AVIF; scale: quality from 0 to 100."""
    return codecs.avif(image, resaved_avif.scales[level - 1])


@register(REDELIVERY, "messenger", (2048, 1600, 1280, 960, 640), **_CHANGES_SIZE)
def messenger(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Sent by a messenger, and in half of the cases forwarded by another; scale: longer side in px, at most.

    Each reduces the image to its limit and saves it as JPEG, the quality of which is within 5 of 85 to 60.
    """
    hops = [level, *([int(rng.integers(1, level + 1))] if rng.random() < 0.5 else [])]
    for hop in hops:
        image = limit_side(image, messenger.scales[hop - 1])
        quality = _MESSENGER_QUALITIES[hop - 1] + int(rng.integers(-_JITTER, _JITTER + 1))
        image = codecs.jpeg(image, quality)
    return image


def _resized(image: np.ndarray, factor: float) -> np.ndarray:
    """Resize an image by a factor, each side to 16 px or more."""
    size = [max(MIN_SIDE_PX, round(side * factor)) for side in image.shape[1::-1]]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)
