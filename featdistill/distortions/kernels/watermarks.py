"""Two invisible watermarks of our own design, similar to those that generators or publishers embed.

Both change only the luminance: R, G and B of a pixel change by the same whole number of gray levels. They
serve as distortions, not as proof of origin.
"""

import cv2
import numpy as np

from featdistill.distortions.kernels.codecs import bayer_ranks
from featdistill.distortions.kernels.noise_tables import random_bytes

PAYLOAD_BITS = 32
_BLOCK_PX = 8
# Weights of the pixels along either side of a block, up to a factor of 1/8 for both: the cosine of index 2 of
# a DCT over four values is (1, -1, -1, 1) / 2, and each of the four is a Haar average of two pixels.
_SIGNS = np.array([1, 1, -1, -1, -1, -1, 1, 1], np.int16)
_KERNEL = np.outer(_SIGNS, _SIGNS)
_KERNEL_GAIN = 8


def spread_spectrum_pattern(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Draw the pattern that `embed_spread_spectrum` hides: (H, W) int16 with an RMS of about 14.

    White noise blurred with sigma 1 px minus the same noise blurred with sigma 2 px. Its power peaks at 0.16
    cycles per pixel and exceeds half of that from 0.10 to 0.23: lower frequencies show as blotches and drown
    in the image's own, higher ones do not survive compression. It is nearly normal, which Cox et al. prefer
    to +-1 because it resists the averaging of marked copies. The state of `rng` is the mark's key.
    """
    noise = random_bytes(rng, shape[0] * shape[1]).reshape(shape)
    fine = cv2.GaussianBlur(noise, (5, 5), 1.0)
    coarse = cv2.GaussianBlur(noise, (9, 9), 2.0)
    return np.subtract(fine, coarse, dtype=np.int16)


def embed_spread_spectrum(image: np.ndarray, amplitude: float, rng: np.random.Generator) -> np.ndarray:
    """Add a pseudo-random pattern to the luminance, stronger where the image is busy.

    The technique is that of Cox, Kilian, Leighton and Shamoon, "Secure Spread Spectrum Watermarking for
    Multimedia" (1997): every part of the image carries a little of the mark, which is found by correlation.
    They change the largest DCT coefficients in proportion to their size; this model adapts it per pixel:

        marked = image + gain (8 + min(activity, 24)) pattern

    Activity is the mean over 7 x 7 px of the luminance's distance from its own mean over 7 x 7 px, so busy
    areas hide up to four times as much as flat ones. The gain sets the RMS of the change.

    Args:
        image: (H, W, 3) uint8 RGB of at least 16 px per side.
        amplitude: RMS of the change (0-255) before rounding and clipping.
        rng: draws the pattern.
    """
    luminance = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    activity = cv2.blur(cv2.absdiff(luminance, cv2.blur(luminance, (7, 7))), (7, 7))
    weight = np.minimum(activity, 24) + np.uint8(8)
    change = spread_spectrum_pattern(luminance.shape, rng) * weight
    rms = cv2.norm(change) / np.sqrt(change.size)
    return _add_to_luminance(image, np.rint(change * np.float32(amplitude / rms)).astype(np.int16))


def watermark_payload(rng: np.random.Generator) -> np.ndarray:
    """Draw the payload that `embed_dwt_dct` hides: (PAYLOAD_BITS,) uint8 of 0 and 1."""
    return rng.integers(0, 2, PAYLOAD_BITS, dtype=np.uint8)


def embed_dwt_dct(image: np.ndarray, step: float, rng: np.random.Generator) -> np.ndarray:
    """Hide 32 bits in a wavelet and cosine transform of the luminance by quantization index modulation.

    The technique is that of Chen and Wornell, "Quantization Index Modulation" (2001): a value is moved to the
    nearest point of one of two lattices, and which lattice encodes the bit. A reader needs the step only. The
    lattices are a quarter of a step above (bit 0) and below (bit 1) its multiples.

    The value is coefficient (2, 2) of the DCT of a 4 x 4 block in the low band of a one-level Haar transform.
    This is an inner product of 8 x 8 pixels with a kernel whose entries are all +-1/8, so changing it adds a
    multiple of that kernel: at most step / 16 per pixel. As many of the 64 pixels are rounded up as bring the
    coefficient onto the lattice, to 1/16, where nothing is clipped. Rows and columns that do not fill a block
    at the bottom and right are not changed.

    Args:
        image: (H, W, 3) uint8 RGB of at least 16 px per side.
        step: of one lattice, in units of the orthonormal coefficient. The RMS of the change is about step /
            28 per pixel, step / 32 in flat images.
        rng: draws the payload.
    """
    sums = _coefficient_sums(image)
    bits = watermark_payload(rng)[_bit_of_block(sums.shape)]
    spacing = _KERNEL_GAIN * step
    offset = spacing * (0.25 - 0.5 * bits)
    lattice_point = spacing * np.rint((sums - offset) / spacing) + offset
    total = np.rint(lattice_point - sums).astype(np.int16)
    rows, columns = total.shape
    # `(kernel * total + thresholds) >> 6` spreads the total over 64 pixels exactly. Rotated by 180 degrees,
    # the thresholds count back from 63, as they must where the kernel is negative and rounding down adds; the
    # kernel is symmetric under that rotation, so one table serves both signs.
    change = np.repeat(total, _BLOCK_PX, axis=1)[:, None] * np.tile(_KERNEL, columns)
    change += np.tile(bayer_ranks(), columns)
    change >>= 6
    change = change.reshape(_BLOCK_PX * rows, _BLOCK_PX * columns)
    height, width = change.shape
    marked = image.copy(order="C")
    marked[:height, :width] = _add_to_luminance(image[:height, :width], change)
    return marked


def _coefficient_sums(image: np.ndarray) -> np.ndarray:
    """Return the coefficient of every whole block, times 8: (H // 8, W // 8) int16, exact."""
    rows, columns = image.shape[0] // _BLOCK_PX, image.shape[1] // _BLOCK_PX
    luminance = cv2.cvtColor(image[: _BLOCK_PX * rows, : _BLOCK_PX * columns], cv2.COLOR_RGB2GRAY)
    down = np.einsum("ryw,y->rw", luminance.reshape(rows, _BLOCK_PX, -1), _SIGNS)
    return down.reshape(rows, columns, _BLOCK_PX) @ _SIGNS


def _bit_of_block(shape: tuple[int, int]) -> np.ndarray:
    """Return which bit each block carries: in turn along a row, shifted by 13 from row to row.

    The shift spreads the copies of a bit over the whole image.
    """
    rows, columns = np.indices(shape, sparse=True)
    return (13 * rows + columns) % PAYLOAD_BITS


def _add_to_luminance(image: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Add (H, W) int16 to R, G and B alike and clip."""
    return cv2.merge([cv2.add(channel, change, dtype=cv2.CV_8U) for channel in cv2.split(image)])
