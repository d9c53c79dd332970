"""Lossy codecs as round trips: an image is encoded in memory and decoded again.

Every function takes (H, W, 3) uint8 RGB of at least 16 px per side, views included, does not change it, and
returns a new (H, W, 3) uint8 array. The result does not depend on the number of threads. A codec that the
installed Pillow or OpenCV lacks is a `UserError`.
"""

import io
from functools import cache

import cv2
import numpy as np
import simplejpeg
from PIL import Image, features

from featdistill.command_line import UserError

# Pillow's scale of encoder speeds runs from 0, best, to 10, fastest; libaom treats 10 as 9.
_AVIF_SPEED = 9
_SAMPLED_PIXELS = 1 << 14
# An error that is uniform between two palette colors spans sqrt(12) times its RMS. A quarter less keeps the
# palette from being spent on the dithering.
_DITHERING = 0.75 * 12**0.5
# Pillow's names for formats it may have been built without.
_FEATURES = {"JPEG2000": "jpg_2000", "WEBP": "webp", "AVIF": "avif"}


def jpeg(image: np.ndarray, quality_0_100: int) -> np.ndarray:
    """Apply JPEG with 4:2:0 chroma."""
    # OpenCV writes the same bytes as Pillow; simplejpeg reads the same pixels, faster and as RGB.
    options = [cv2.IMWRITE_JPEG_QUALITY, quality_0_100]
    data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1]
    return simplejpeg.decode_jpeg(data)


def jpeg2000(image: np.ndarray, ratio: float) -> np.ndarray:
    """Apply JPEG 2000 with the irreversible 9-7 wavelet, as a codestream without the JP2 wrapper.

    The ratio, 1 or more, is 3 * H * W divided by the bytes of the file. With about 150 bytes of headers and
    at least 30 for the image, images of fewer than 200 * ratio / 3 pixels are compressed less than requested.
    """
    # Pillow uses fewer resolutions where the image is too small for six.
    options = {"quality_mode": "rates", "quality_layers": [ratio], "irreversible": True, "no_jp2": True}
    return np.array(Image.open(_encode(image, "JPEG2000", **options)))


def webp(image: np.ndarray, quality_0_100: int) -> np.ndarray:
    """Apply lossy WebP with libwebp's fastest method."""
    # Method 0 needs a quarter to a half of the time of the default 4, for files 16 to 31 % larger.
    data = _encode(image, "WEBP", quality=quality_0_100, method=0)
    # OpenCV reads the same pixels as Pillow, faster. It cannot write them: its lowest quality is 1.
    decoded = cv2.imdecode(np.frombuffer(data.getbuffer(), np.uint8), cv2.IMREAD_COLOR)
    if decoded is None:
        raise _missing("WEBP", "OpenCV", "opencv-python-headless")
    return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)


def avif(image: np.ndarray, quality_0_100: int) -> np.ndarray:
    """Apply AVIF with 4:2:0 chroma at the encoder's fastest speed."""
    # Pillow's default is one thread per core, but images are processed in parallel already.
    options = {"speed": _AVIF_SPEED, "subsampling": "4:2:0", "max_threads": 1}
    return np.array(Image.open(_encode(image, "AVIF", quality=quality_0_100, **options)))


def gif(image: np.ndarray, colors: int) -> np.ndarray:
    """Apply GIF: a palette of at most `colors` (1 to 256) made for the image, with ordered dithering.

    No file is written, because GIF is lossless beyond the palette. Error diffusion, the other common
    dithering, would take three times as long.
    """
    height, width = image.shape[:2]
    # A sample shows how far apart the palette's colors will be, and so how strong the dithering must be.
    step = max(1, round((height * width / _SAMPLED_PIXELS) ** 0.5))
    sample = np.ascontiguousarray(image[::step, ::step])
    error = cv2.subtract(_with_palette(sample, colors), sample, dtype=cv2.CV_16S)
    amplitude = _DITHERING * float(np.sqrt(np.mean(error.astype(np.float32) ** 2)))
    thresholds = (bayer_ranks() + 0.5) / 64 - 0.5
    dots = np.rint(amplitude * thresholds).astype(np.int16)[..., None].repeat(3, axis=2)
    dots = np.tile(dots, (-(-height // len(dots)), -(-width // len(dots)), 1))[:height, :width]
    return _with_palette(cv2.add(image, dots, dtype=cv2.CV_8U), colors)


@cache
def bayer_ranks() -> np.ndarray:
    """Return the numbers 0 to 63 in the order of Bayer's dither (1973), (8, 8) int16."""
    ranks = np.zeros((1, 1), np.int16)
    for _ in range(3):
        ranks = np.block([[4 * ranks, 4 * ranks + 2], [4 * ranks + 3, 4 * ranks + 1]])
    return ranks


def _with_palette(image: np.ndarray, colors: int) -> np.ndarray:
    # The octree needs a tenth of the median cut's time and comes as close to the image.
    return np.array(Image.fromarray(image).quantize(colors, method=Image.Quantize.FASTOCTREE).convert("RGB"))


def _encode(image: np.ndarray, file_format: str, **options) -> io.BytesIO:
    if not features.check(_FEATURES[file_format]):
        raise _missing(file_format, "Pillow", "pillow")
    data = io.BytesIO()
    Image.fromarray(image).save(data, file_format, **options)
    return data


def _missing(codec: str, library: str, package: str) -> UserError:
    return UserError(
        f"the installed {library} was built without {codec}; install a wheel that includes it: "
        f"pip install --upgrade --only-binary :all: {package}"
    )
