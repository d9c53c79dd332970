"""Two invisible watermarks of our own design, such as the makers of a generator or a publisher may embed.

Both change the luminance alone: a pixel's R, G and B get the same whole number of steps of 255, so that the
colour differences stay. They serve as distortions here, not as a means of proof: the pattern and the reader
are public so that a test can show that an image carries the mark.
"""

import cv2
import numpy as np

from featdistill.distortions.kernels.noise_tables import random_bytes

PAYLOAD_BITS = 32
_BLOCK_PX = 8
# Weights of the pixels along either side of a block, up to a factor of 1/8 for both: the cosine of index 2 of
# a DCT over four values is (1, -1, -1, 1) / 2, and each of the four is a Haar average of two pixels.
_SIGNS = np.array([1, 1, -1, -1, -1, -1, 1, 1], np.int16)
_KERNEL = np.outer(_SIGNS, _SIGNS)
_KERNEL_GAIN = 8


def spread_spectrum_pattern(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Draw the pattern that `embed_spread_spectrum` hides.

    It is white noise after a blur with sigma 1 px minus the same noise after one with sigma 2 px. Its power
    is greatest at 0.16 cycles a pixel and above half of that from 0.10 to 0.23: lower frequencies show as
    blotches and drown in the image's own, higher ones do not survive compression. The noise is one uniform
    byte a pixel, which is the cheapest to draw. The blurs sum so many of them that the pattern comes close to
    a normal distribution, which Cox et al. prefer to +-1 because it resists the averaging of marked copies.

    Args:
        shape: height and width of the image.
        rng: its state is the mark's key.

    Returns:
        (H, W) int16 of mean about 0 and RMS about 14.
    """
    noise = random_bytes(rng, shape[0] * shape[1]).reshape(shape)
    fine = cv2.GaussianBlur(noise, (5, 5), 1.0)
    coarse = cv2.GaussianBlur(noise, (9, 9), 2.0)
    return np.subtract(fine, coarse, dtype=np.int16)


def embed_spread_spectrum(image: np.ndarray, amplitude: float, rng: np.random.Generator) -> np.ndarray:
    """Add a pseudo-random pattern to the luminance, stronger where the image is busy.

    The spread spectrum technique is that of Cox, Kilian, Leighton and Shamoon, "Secure Spread Spectrum
    Watermarking for Multimedia" (1997): every part of the image carries a little of the mark, and who knows
    the mark finds it by correlation. They change the largest DCT coefficients of the whole image in
    proportion to their size. This model shapes the mark by a filter and fits it to the image pixel by pixel:

        marked = image + gain (8 + min(activity, 24)) pattern

    Activity is the mean, over 7 x 7 px, of how far the luminance is from its own mean over 7 x 7 px, in steps
    of 255. So busy places hide up to four times as much as flat ones. The gain sets the RMS of the change.

    Args:
        image: (H, W, 3) uint8 RGB of at least 16 px a side; it is not changed.
        amplitude: RMS of the change in steps of 255, before rounding to whole steps and clipping.
        rng: draws the pattern, see `spread_spectrum_pattern`, and nothing else.

    Returns:
        (H, W, 3) uint8, a new array.
    """
    luminance = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    activity = cv2.blur(cv2.absdiff(luminance, cv2.blur(luminance, (7, 7))), (7, 7))
    weight = np.minimum(activity, 24) + np.uint8(8)
    change = spread_spectrum_pattern(luminance.shape, rng) * weight
    rms = cv2.norm(change) / np.sqrt(change.size)
    return _add_to_luminance(image, np.rint(change * np.float32(amplitude / rms)).astype(np.int16))


def watermark_payload(rng: np.random.Generator, bits: int = PAYLOAD_BITS) -> np.ndarray:
    """Draw the payload that `embed_dwt_dct` hides: (bits,) uint8 of 0 and 1."""
    return rng.integers(0, 2, bits, dtype=np.uint8)


def embed_dwt_dct(image: np.ndarray, step: float, rng: np.random.Generator) -> np.ndarray:
    """Hide 32 bits in a wavelet and cosine transform of the luminance by quantisation index modulation.

    The technique is that of Chen and Wornell, "Quantization Index Modulation" (2001): a value is moved to the
    nearest point of one of two lattices, and on which of them it lies is the bit. A reader needs the step,
    but not the original.

    The value is coefficient (2, 2) of the DCT of a 4 x 4 block in the low band of a one-level Haar transform.
    The lattices lie a quarter of a step above (bit 0) and below (bit 1) the multiples of the step. Both
    transforms are linear, so the coefficient is one inner product of 8 x 8 pixels with a kernel of norm 1,
    all of whose entries happen to be +-1/8, and changing it adds a multiple of that kernel: at most step / 16
    a pixel. Just so many of the 64 pixels are rounded up that the coefficient lies on the lattice, to 1/16,
    wherever nothing is clipped. The last rows and columns, where they fill no block, stay as they are.

    Args:
        image: (H, W, 3) uint8 RGB of at least 16 px a side; it is not changed.
        step: distance between neighbouring points of one lattice, in steps of 255 of the orthonormal
            coefficient. The RMS of the change is about step / 28 in pixels, and step / 32 in flat images.
        rng: draws the payload, see `watermark_payload`, and nothing else.

    Returns:
        (H, W, 3) uint8, a new array.
    """
    sums = _coefficient_sums(image)
    bits = watermark_payload(rng)[_bit_of_block(sums.shape, PAYLOAD_BITS)]
    spacing = _KERNEL_GAIN * step
    offset = spacing * (0.25 - 0.5 * bits)
    lattice_point = spacing * np.rint((sums - offset) / spacing) + offset
    total = np.rint(lattice_point - sums).astype(np.int16)
    rows, columns = total.shape
    # 64 pixels share the total; the thresholds round it up in just as many of them as its remainder says.
    change = np.repeat(total, _BLOCK_PX, axis=1)[:, None] * np.tile(_KERNEL, columns)
    change += np.tile(_THRESHOLDS, columns)
    change >>= 6
    change = change.reshape(_BLOCK_PX * rows, _BLOCK_PX * columns)
    height, width = change.shape
    marked = image.copy(order="C")
    marked[:height, :width] = _add_to_luminance(image[:height, :width], change)
    return marked


def read_dwt_dct(image: np.ndarray, step: float, bits: int = PAYLOAD_BITS) -> np.ndarray:
    """Read the payload that `embed_dwt_dct` hid.

    The blocks that carry a bit vote on it, each with a weight from 1 (on a lattice point) down to 0 (halfway
    between the two lattices), so that blocks in doubt count less than in a plain majority.

    Args:
        image: (H, W, 3) uint8 RGB, not moved or scaled since the payload was hidden.
        step: as given to `embed_dwt_dct`.
        bits: length of the payload.

    Returns:
        (bits,) uint8 of 0 and 1; 0 where the image has too few blocks to carry the bit.
    """
    sums = _coefficient_sums(image)
    votes = np.sin(2 * np.pi / (_KERNEL_GAIN * step) * sums)
    places = _bit_of_block(sums.shape, bits)
    return (np.bincount(places.ravel(), votes.ravel(), bits) < 0).astype(np.uint8)


def _coefficient_sums(image: np.ndarray) -> np.ndarray:
    """Return the coefficient of every whole block, times 8: (H // 8, W // 8) int16, exact."""
    rows, columns = image.shape[0] // _BLOCK_PX, image.shape[1] // _BLOCK_PX
    luminance = cv2.cvtColor(image[: _BLOCK_PX * rows, : _BLOCK_PX * columns], cv2.COLOR_RGB2GRAY)
    down = np.einsum("ryw,y->rw", luminance.reshape(rows, _BLOCK_PX, -1), _SIGNS)
    return down.reshape(rows, columns, _BLOCK_PX) @ _SIGNS


def _bit_of_block(shape: tuple[int, int], bits: int) -> np.ndarray:
    """Return which bit each block carries: in turn along a row, and shifted by 13 from row to row.

    So the copies of a bit are neither one below the other nor all in one part of the image.
    """
    rows, columns = np.indices(shape, sparse=True)
    return (13 * rows + columns) % bits


def _add_to_luminance(image: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Add (H, W) int16 to R, G and B alike and clip: the luminance changes by as much."""
    return cv2.merge([cv2.add(channel, change, dtype=cv2.CV_8U) for channel in cv2.split(image)])


def _rounding_thresholds() -> np.ndarray:
    """Return (8, 8) int16 with which `(kernel * total + thresholds) >> 6` gives a block its total exactly.

    They are the numbers 0 to 63 in the order of Bayer's dither (1973), which spreads evenly the pixels that
    are rounded up. Upside down they count back from 63, as they have to where the kernel is negative and
    rounding down is what adds; the kernel is the same upside down, so one table serves both of its signs.
    """
    order = np.zeros((1, 1), np.int16)
    for _ in range(3):
        order = np.block([[4 * order, 4 * order + 2], [4 * order + 3, 4 * order + 1]])
    return order


_THRESHOLDS = _rounding_thresholds()
