"""Lossy codecs as round trips: an image is encoded in memory and decoded again.

Every function takes (H, W, 3) uint8 RGB of at least 16 px a side, views included, leaves it as it is and
returns a new (H, W, 3) uint8 array. The result does not depend on the number of threads.
"""

import io
from functools import cache

import cv2
import numpy as np
import simplejpeg
from PIL import Image, features

from featdistill.command_line import UserError

# Speed of the encoder in Pillow's scale from 0, best, to 10, fastest. libaom makes of 10 what it makes of 9.
_AVIF_SPEED = 9
_SAMPLED_PIXELS = 1 << 14
# An error that is even from one colour to the next has sqrt(12) of its RMS from end to end. A quarter less
# keeps the palette from being spent on the dithering.
_DITHERING = 0.75 * 12**0.5
# How Pillow's `features` calls what it may have been built without.
_FEATURES = {"JPEG2000": "jpg_2000", "WEBP": "webp", "AVIF": "avif"}


def jpeg(image: np.ndarray, quality_0_100: int) -> np.ndarray:
    """JPEG, 4:2:0.

    Args:
        image: (H, W, 3) uint8 RGB.
        quality_0_100: quality of libjpeg.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    # OpenCV writes the same bytes as Pillow; simplejpeg reads the same pixels, faster and as RGB.
    options = [cv2.IMWRITE_JPEG_QUALITY, quality_0_100]
    data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1]
    return simplejpeg.decode_jpeg(data)


def jpeg2000(image: np.ndarray, ratio: float) -> np.ndarray:
    """JPEG 2000 with the irreversible 9-7 wavelet, as a codestream without the JP2 container.

    The headers take about 150 bytes, and OpenJPEG spends at least 30 on the image. So an image of fewer
    than 200 * ratio / 3 pixels is compressed less than asked for, and still keeps next to nothing.

    Args:
        image: (H, W, 3) uint8 RGB.
        ratio: 3 * H * W divided by the bytes of the file, 1 or more.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        UserError: the installed Pillow has no JPEG 2000.
    """
    # Pillow takes fewer resolutions by itself where the image is too small for six.
    options = {"quality_mode": "rates", "quality_layers": [ratio], "irreversible": True, "no_jp2": True}
    return _decode(_encode(image, "JPEG2000", **options))


def webp(image: np.ndarray, quality_0_100: int) -> np.ndarray:
    """WebP, lossy, 4:2:0, libwebp's fastest method.

    Args:
        image: (H, W, 3) uint8 RGB.
        quality_0_100: quality of libwebp.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        UserError: the installed Pillow or OpenCV has no WebP.
    """
    # Method 0 takes a quarter to a half of the time of the default 4, for files 16 to 31 % larger.
    data = _encode(image, "WEBP", quality=quality_0_100, method=0)
    # OpenCV reads the same pixels as Pillow, faster. It does not write: its lowest quality is 1.
    decoded = cv2.imdecode(np.frombuffer(data.getbuffer(), np.uint8), cv2.IMREAD_COLOR)
    if decoded is None:
        raise _missing("WEBP", "OpenCV", "opencv-python-headless")
    return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)


def avif(image: np.ndarray, quality_0_100: int) -> np.ndarray:
    """AVIF, 4:2:0, at the encoder's fastest speed.

    Args:
        image: (H, W, 3) uint8 RGB.
        quality_0_100: quality of libavif.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        UserError: the installed Pillow has no AVIF.
    """
    # Pillow's default is a thread for every core, but images are processed in parallel already.
    options = {"speed": _AVIF_SPEED, "subsampling": "4:2:0", "max_threads": 1}
    return _decode(_encode(image, "AVIF", quality=quality_0_100, **options))


def gif(image: np.ndarray, colours: int) -> np.ndarray:
    """GIF: a palette made for the image, with ordered dithering (8 x 8, Bayer 1973).

    No file is written: what GIF does beyond the palette is lossless. Error diffusion, the other dithering in
    use, would take three times as long.

    Args:
        image: (H, W, 3) uint8 RGB.
        colours: the most that the palette may have, 1 to 256.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    height, width = image.shape[:2]
    # Every few pixels tell how far apart the colours will be, and so how strong the dithering must be.
    step = max(1, round((height * width / _SAMPLED_PIXELS) ** 0.5))
    sample = np.ascontiguousarray(image[::step, ::step])
    error = cv2.subtract(_with_palette(sample, colours), sample, dtype=cv2.CV_16S)
    amplitude = _DITHERING * float(np.sqrt(np.mean(error.astype(np.float32) ** 2)))
    dots = np.rint(amplitude * _bayer_matrix()).astype(np.int16)[..., None].repeat(3, axis=2)
    dots = np.tile(dots, (-(-height // len(dots)), -(-width // len(dots)), 1))[:height, :width]
    return _with_palette(cv2.add(image, dots, dtype=cv2.CV_8U), colours)


def _with_palette(image: np.ndarray, colours: int) -> np.ndarray:
    # The octree takes a tenth of the median cut's time and comes as near to the image.
    return np.array(Image.fromarray(image).quantize(colours, method=Image.Quantize.FASTOCTREE).convert("RGB"))


@cache
def _bayer_matrix() -> np.ndarray:
    """Return (8, 8) float64 thresholds, evenly spread around 0 from -1/2 to 1/2."""
    ranks = np.zeros((1, 1))
    for _ in range(3):
        ranks = np.block([[4 * ranks, 4 * ranks + 2], [4 * ranks + 3, 4 * ranks + 1]])
    return (ranks + 0.5) / ranks.size - 0.5


def _encode(image: np.ndarray, file_format: str, **options) -> io.BytesIO:
    if not features.check(_FEATURES[file_format]):
        raise _missing(file_format, "Pillow", "pillow")
    data = io.BytesIO()
    Image.fromarray(image).save(data, file_format, **options)
    return data


def _decode(data: io.BytesIO) -> np.ndarray:
    return np.array(Image.open(data))


def _missing(codec: str, library: str, package: str) -> UserError:
    return UserError(
        f"the installed {library} was built without {codec}; install one that has it, "
        f"as its wheels do: pip install --upgrade --only-binary :all: {package}"
    )
