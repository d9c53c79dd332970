"""The challenge's official training distortions: 12 operations in 7 groups, 5 levels each, on uint8 images.

They reproduce the output of the organizers' released functions, quirks included, because the evaluation
images went through that code. Its plain bugs are not reproduced: crashes, writing to the input, and a jitter
that moves the whole image. Between the steps of a chain the image is rounded to 8 bits; theirs keeps floats.
What its JPEG makes of them is imitated (see `plan.apply_chain`).
"""

import math
from functools import cache

import cv2
import numpy as np

from featdistill.distortions.kernels import codecs
from featdistill.distortions.kernels.filters import BoxAndRest
from featdistill.distortions.kernels.noise_tables import (
    add_noise,
    gaussian_table,
    normal_quantiles,
    random_bytes,
)
from featdistill.distortions.kernels.scratch import in_strips, scratch_array
from featdistill.distortions.official_tables import (
    BrightenTable,
    contrast_curve,
    curve_table,
    disk_kernel,
    gaussian_taps,
    middle_curve,
)
from featdistill.distortions.operation import Operation, register

OFFICIAL: dict[str, Operation] = {}

_EDGE = cv2.BORDER_REPLICATE
# Jitter: how much longer the rows of displacements are in each of the passes, steps between two 8-bit values
# (few enough for exact sums in float32, see `_displacements_px`), and pixels of a strip that the cache holds.
_PASSES = 5
_LONGER_BY = 24
_UNITS = 64
_STRIP_PX = 1 << 16


@register(OFFICIAL, "blur", (0.1, 0.5, 1.0, 2.0, 5.0))
def gausblur(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur; scale: sigma in px. The kernel reaches 2 sigma, so level 1 changes nothing."""
    sigma_px = gausblur.scales[level - 1]
    taps = gaussian_taps(sigma_px, math.ceil(2 * sigma_px))
    return cv2.sepFilter2D(image, -1, taps, taps, borderType=_EDGE)


@register(OFFICIAL, "blur", (1, 2, 4, 6, 8))
def lensblur(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Blur with a disk whose rim over- and undershoots like the released kernel's; scale: radius in px."""
    radius_px = lensblur.scales[level - 1]
    if radius_px < 4:
        return cv2.filter2D(image, -1, disk_kernel(radius_px), borderType=_EDGE)
    return in_strips(_large_disk(radius_px), image, radius_px)


@register(OFFICIAL, "color_distortion", (1, 3, 6, 8, 12), random=True, keeps_layout=False)
def colorshift(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Shift of the green channel down and right, blended in along edges; scale: distance in px."""
    direction = rng.random(2)
    return shift_green(image, colorshift.scales[level - 1], direction / np.hypot(*direction))


@register(OFFICIAL, "color_distortion", (0.4, 0.2, 0.1, 0.0, -0.4))
def colorsat(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """HSV saturation times a factor (the scale): c' = V + factor (c - V), where V = max(R, G, B)."""
    factor = colorsat.scales[level - 1]

    def saturate(strip: np.ndarray) -> np.ndarray:
        red, green, blue = cv2.split(strip)
        value = cv2.max(cv2.max(red, green), blue)
        return cv2.addWeighted(strip, factor, cv2.merge([value, value, value]), 1 - factor, 0)

    return in_strips(saturate, image)


@register(OFFICIAL, "jpeg", (43, 36, 24, 7, 4), leaves_fractions=False, truncates=True)
def jpeg(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """JPEG, 4:2:0; scale: quality from 0 to 100. In a chain, fractions are cut off before it."""
    return codecs.jpeg(image, jpeg.scales[level - 1])


@register(OFFICIAL, "noise", (0.001, 0.002, 0.003, 0.005, 0.01), random=True)
def whitenoise(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise added to every sample; scale: variance for values in [0, 1]."""
    return add_noise(image, gaussian_table(255 * whitenoise.scales[level - 1] ** 0.5), rng)


@register(OFFICIAL, "noise", (0.001, 0.005, 0.01, 0.02, 0.03), random=True, leaves_fractions=False)
def impulsenoise(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Impulse noise: samples set to 255 or 0, half each; scale: share of samples, drawn with replacement."""
    noisy = image.copy(order="C")
    samples = noisy.reshape(-1)
    chosen = rng.integers(0, samples.size, int(impulsenoise.scales[level - 1] * samples.size))
    samples[chosen[: len(chosen) // 2]] = 255
    samples[chosen[len(chosen) // 2 :]] = 0
    return noisy


@register(OFFICIAL, "brightness_change", (0.1, 0.2, 0.4, 0.7, 1.1))
def brighten(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Tone curve that raises 0.5 by scale / 2, two thirds on RGB and one third on CIELAB lightness."""
    table = _brightened(brighten.scales[level - 1])

    def look_up(strip: np.ndarray) -> np.ndarray:
        red, green, blue = cv2.split(strip)
        whole = cv2.LUT(red, table.whole[0])
        cv2.add(whole, cv2.LUT(green, table.whole[1]), dst=whole)
        cv2.add(whole, cv2.LUT(blue, table.whole[2]), dst=whole)
        fraction = cv2.add(cv2.LUT(red, table.fraction_red), cv2.LUT(blue, table.fraction_blue))
        position = whole.view(np.int16).reshape(*whole.shape, 2)
        colors = cv2.remap(table.image, position, fraction, cv2.INTER_LINEAR, borderMode=_EDGE)
        return cv2.convertScaleAbs(colors)

    return in_strips(look_up, image)


@register(OFFICIAL, "brightness_change", (0.05, 0.1, 0.2, 0.4, 0.8))
def darken(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Tone curve on RGB that lowers 0.5 by scale / 2."""
    return cv2.LUT(image, curve_table(middle_curve, -darken.scales[level - 1]))


@register(OFFICIAL, "spatial_distortion", (0.05, 0.1, 0.2, 0.5, 1.0), random=True, keeps_layout=False)
def jitter(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Five bilinear warps that move every pixel by N(0, scale^2) px in x and in y; rounded at the end."""
    height, width = image.shape[:2]
    displacements_px = _displacements_px(jitter.scales[level - 1])
    # OpenCV samples four channels faster than three. Moves of more than a pixel are sampled in strips, from
    # copies that the cache holds, with a margin of as many rows.
    reach_px = math.ceil(float(displacements_px.max()))
    margin, rows = (reach_px, max(1, _STRIP_PX // width)) if reach_px > 1 else (0, height)
    # One stream of displacements serves all passes, cut into rows of another length in each: where a value is
    # used again, it is at another distance in every row, so the fields of two passes are not correlated.
    count = (height + 1) * (width + _PASSES * _LONGER_BY)
    draws = random_bytes(rng, 2 * count).reshape(2, count)
    stream = scratch_array("stream", (2, count), np.float32)
    cv2.LUT(draws[:1], displacements_px, dst=stream[:1])
    cv2.LUT(draws[1:], displacements_px + np.float32(margin), dst=stream[1:])
    shape = (height, width, 4)
    warped, other = (scratch_array(name, shape, np.uint16) for name in ("warped", "other"))
    rgba = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA, dst=scratch_array("rgba", shape, np.uint8))
    np.multiply(rgba, np.uint16(_UNITS), out=warped, dtype=np.uint16)
    strip = scratch_array("strip", (rows + 2 * margin, width, 4), np.uint16)
    flags = cv2.INTER_LINEAR | cv2.WARP_RELATIVE_MAP
    for number in range(1, _PASSES + 1):
        length = width + number * _LONGER_BY
        field = stream[:, number * _LONGER_BY :][:, : height * length].reshape(2, height, length)[..., :width]
        for top in range(0, height, rows):
            across, down = field[:, top : top + rows]
            source = warped
            if margin:
                near = np.arange(top - margin, top + len(down) + margin)
                source = np.take(warped, near, axis=0, mode="clip", out=strip[: len(near)])
            cv2.remap(source, across, down, flags, dst=other[top : top + rows], borderMode=_EDGE)
        warped, other = other, warped
    cv2.convertScaleAbs(warped, dst=rgba, alpha=1 / _UNITS)
    return cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB)


@register(OFFICIAL, "spatial_distortion", (20, 16, 13, 10, 7))
def quantization(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Fewer values per channel, stretched to the full range; scale: number of values besides 0."""
    levels = quantization.scales[level - 1]
    thresholds = [0] + [int(255 * i / levels) for i in range(1, levels)]
    classes = np.searchsorted(thresholds, np.arange(256), side="left")
    darkest, brightest, *_ = cv2.minMaxLoc(np.ascontiguousarray(image).reshape(-1))
    darkest, brightest = classes[int(darkest)], classes[int(brightest)]
    if darkest == brightest:  # there is no range to stretch
        return image.copy()
    stretched = 255 * (np.clip(classes, darkest, brightest) - darkest) / (brightest - darkest)
    return cv2.LUT(image, np.rint(stretched).astype(np.uint8))


@register(OFFICIAL, "sharpness_contrast", (0.0, 0.15, -0.4, 0.3, -0.6), monotone=False)
def lincontrchange(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Contrast curve; a scale above -0.2 raises contrast (so level 1 does), one below lowers it."""
    return cv2.LUT(image, curve_table(contrast_curve, lincontrchange.scales[level - 1]))


def shift_green(image: np.ndarray, amount_px: float, direction: np.ndarray) -> np.ndarray:
    """Shift the green channel of (H, W, 3) uint8 and blend it in where the image has edges.

    `direction` is a unit vector with two components >= 0, in the released code's order. As there, as many
    rows and columns as the rounded components differ by wrap around from the opposite edge.
    """
    height, width = image.shape[:2]
    first, second = (int(component) for component in np.rint(amount_px * np.asarray(direction)))
    red, green, blue = cv2.split(image)
    rows = _wrapped(height, second - first, second)
    columns = _wrapped(width, first - second, first)
    mask = _edge_mask(red, green, blue)
    shifted = np.take(green[rows], columns, axis=1)
    change = scratch_array("change", mask.shape, np.float32)
    cv2.subtract(shifted, green, dst=change, dtype=cv2.CV_32F)
    cv2.multiply(change, mask, dst=change)
    return cv2.merge([red, cv2.add(green, change, dtype=cv2.CV_8U), blue])


def _wrapped(length: int, shift: int, margin: int) -> np.ndarray:
    """Return where `length` positions read from, on a circle with an edge-replicated margin on both sides."""
    return np.clip((np.arange(length) + shift) % (length + 2 * margin) - margin, 0, length - 1)


def _edge_mask(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> np.ndarray:
    """Return the weight of the shifted green, the blurred gradient of gray: (H, W) float32 scratch memory."""
    gray, across, down = (scratch_array(name, red.shape, np.float32) for name in ("gray", "across", "down"))
    cv2.addWeighted(red, 0.299, green, 0.587, 0, dst=gray, dtype=cv2.CV_32F)
    cv2.addWeighted(blue, 0.114, gray, 1, 0, dst=gray, dtype=cv2.CV_32F)
    cv2.Sobel(gray, cv2.CV_32F, 1, 0, dst=across, ksize=1, scale=0.5, borderType=_EDGE)
    cv2.Sobel(gray, cv2.CV_32F, 0, 1, dst=down, ksize=1, scale=0.5, borderType=_EDGE)
    taps = gaussian_taps(4.0, 8)
    # In NumPy: the last bit of cv2.magnitude depends on where in memory its result is.
    np.multiply(across, across, out=across)
    np.add(across, np.multiply(down, down, out=down), out=across)
    gradient = np.sqrt(across, out=across)
    mask = cv2.sepFilter2D(gradient, -1, taps, taps, dst=down, borderType=_EDGE)
    cv2.normalize(mask, mask, 0, 1, cv2.NORM_MINMAX)
    # The released clip of the mask at 1 % and 99 % has a bug: it sets one pixel per row to 0 and one to 1.
    column_0 = mask[:, :1].copy()
    every_row = np.arange(len(mask))
    rank, rank_from_top = np.count_nonzero(mask < column_0, axis=1), np.count_nonzero(mask > column_0, axis=1)
    mask[every_row, rank] = 0
    mask[every_row, rank_from_top] = 1
    return mask


_brightened = cache(BrightenTable)


@cache
def _large_disk(radius_px: int) -> BoxAndRest:
    kernel = disk_kernel(radius_px)
    return BoxAndRest(kernel, kernel[radius_px, radius_px], in_quadrants=True)


@cache
def _displacements_px(sigma_px: float) -> np.ndarray:
    """Return the (256,) float32 normal displacements that a random byte stands for.

    They are multiples of 1 / 32 px: their products with 14 bits, and sums of these, are exact in float32.
    """
    return (np.rint(32 * sigma_px * normal_quantiles(256)) / 32).astype(np.float32)
