"""The challenge's other transformations: what its evaluation images went through besides the official 12.

The challenge names these operations without publishing their code. Where a name suggests an Albumentations
transform (clahe, isonoise, perspective, randomtonecurve, rgbshift), that is implemented here; where it
suggests ARNIQA's set (motionblur, multnoise, pixelate, jpeg2000), its ranges are used. WebP and AVIF stand in
for the neural codecs, two watermarks of our own for its seven. Adapters apply what needs another model.
"""

import math
from functools import partial

import cv2
import numpy as np

from featdistill.distortions import adapters
from featdistill.distortions.kernels import codecs, warps, watermarks
from featdistill.distortions.kernels.filters import filter_sparse, gaussian_blur, line_kernel
from featdistill.distortions.kernels.noise_tables import (
    draw_responses,
    gain_table,
    normal_quantiles,
    photon_table,
    poisson_quantiles,
    random_bytes,
)
from featdistill.distortions.operation import MIN_SIDE_PX, Operation, register

EVALUATION: dict[str, Operation] = {}

_CHANGES_SIZE = {"random": True, "keeps_layout": False, "keeps_size": False}
_CROPPED_SIDE = (0.8, 0.7, 0.6, 0.5, 0.4)
_QUALITIES = (90, 75, 60, 45, 30)
_RECOMPRESSION_RATIOS = (8, 12, 16, 24, 32)


@register(EVALUATION, "blur", (1, 2, 4, 6, 10), random=True)
def motionblur(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Straight motion in a random direction; scale: half its length in px (ARNIQA's radii)."""
    length_px = 2 * motionblur.scales[level - 1]
    return filter_sparse(image, line_kernel(length_px, rng.uniform(0, math.pi)))


@register(EVALUATION, "blur", (1, 2, 3, 4, 6), random=True)
def glassblur(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Nearby pixels exchanged between two Gaussian blurs; scale: largest distance in px."""
    reach_px = glassblur.scales[level - 1]
    sigma_px = 0.6 + 0.1 * level
    exchanged = warps.exchange_pixels(gaussian_blur(image, sigma_px), reach_px, 3, rng)
    return gaussian_blur(exchanged, sigma_px)


@register(EVALUATION, "noise", (0.001, 0.005, 0.01, 0.02, 0.05), random=True)
def multnoise(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Every sample times 1 + N(0, scale); scale: variance (ARNIQA's)."""
    return draw_responses(image, gain_table(multnoise.scales[level - 1] ** 0.5), rng)


@register(EVALUATION, "noise", (200, 100, 50, 25, 12), random=True)
def shotnoise(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Photon noise in linear light (gamma 2.2); scale: photons for white."""
    return draw_responses(image, photon_table(shotnoise.scales[level - 1], 2.2), rng)


@register(EVALUATION, "noise", (0.1, 0.2, 0.3, 0.4, 0.5), random=True)
def isonoise(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """High-ISO grain in hue and lightness; scale: intensity (as in Albumentations 1's ISONoise)."""
    intensity = isonoise.scales[level - 1]
    # Its defaults pair intensities of 0.1 to 0.5 with hue shifts of 0.01 to 0.05 of a full turn, times the
    # intensity; the lightness noise has as many steps as the image's contrast times the intensity.
    hue, lightness, saturation = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HLS_FULL).astype(np.float32))
    draws = random_bytes(rng, 4 * hue.size).view(np.uint16).reshape(2, *hue.shape)
    turn = np.float32(256 * 0.1 * intensity**2)
    hue += np.take(turn * normal_quantiles(1 << 16).astype(np.float32), draws[0])
    counts = poisson_quantiles(np.array([[float(lightness.std()) * intensity]]), 1 << 12)[0]
    grain = np.take(counts.astype(np.float32), draws[1] >> 4)
    lightness += grain * (1 - lightness / 255)
    noisy = cv2.merge([np.mod(np.rint(hue), 256), lightness, saturation])
    return cv2.cvtColor(cv2.convertScaleAbs(noisy), cv2.COLOR_HLS2RGB_FULL)


@register(EVALUATION, "color", (10, 20, 30, 45, 60), random=True)
def rgbshift(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """A constant added to each of R, G and B (as Albumentations' RGBShift); scale: its limit (0-255)."""
    limit = rgbshift.scales[level - 1]
    return cv2.add(image, (*rng.uniform(-limit, limit, 3), 0.0))


@register(EVALUATION, "color", (0.05, 0.1, 0.2, 0.3, 0.4), random=True)
def randomtonecurve(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Bezier tone curve whose handles, 1/4 and 3/4, move by N(0, scale^2) (as Albumentations')."""
    handles = np.array([0.25, 0.75]) + rng.normal(0, randomtonecurve.scales[level - 1], 2)
    low, high = np.clip(handles, 0, 1)
    x = np.arange(256) / 255
    curve = 3 * x * (1 - x) * ((1 - x) * low + x * high) + x**3
    return cv2.LUT(image, np.rint(255 * curve).astype(np.uint8))


@register(EVALUATION, "contrast", (1, 2, 3, 4, 6))
def clahe(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Contrast-limited adaptive histogram equalization of CIELAB lightness, 8x8 tiles; scale: clip limit."""
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    # Fewer tiles for a small image: there is nothing to equalize in the histogram of a few hundred pixels.
    tiles = [min(8, max(1, side // 32)) for side in (image.shape[1], image.shape[0])]
    equalizer = cv2.createCLAHE(clipLimit=clahe.scales[level - 1], tileGridSize=tiles)
    cv2.insertChannel(equalizer.apply(cv2.extractChannel(lab, 0)), lab, 0)
    return cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)


@register(EVALUATION, "resolution", (0.01, 0.05, 0.1, 0.2, 0.5))
def pixelate(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Nearest-neighbor reduction to 0.95 - scale^0.6 of the sides, and back (ARNIQA's amounts)."""
    height, width = image.shape[:2]
    share = 0.95 - pixelate.scales[level - 1] ** 0.6
    small = cv2.resize(image, _size(width * share, height * share, 1), interpolation=cv2.INTER_NEAREST)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST)


@register(EVALUATION, "resolution", (0.75, 0.65, 0.55, 0.45, 0.35), spread=0.05, **_CHANGES_SIZE)
def downscale(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Reduction by area averaging; scale: factor, +-0.05 (0.3 to 0.8 as in the challenge)."""
    factor = downscale.scale(level, rng)
    height, width = image.shape[:2]
    return cv2.resize(image, _size(width * factor, height * factor), interpolation=cv2.INTER_AREA)


@register(EVALUATION, "crop", _CROPPED_SIDE, **_CHANGES_SIZE)
def randomcrop(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Random crop; scale: the share of both sides that remains."""
    return _crop(image, randomcrop.scales[level - 1], 1.0, rng)


@register(EVALUATION, "crop", _CROPPED_SIDE, **_CHANGES_SIZE)
def randomaspectcrop(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Random crop with up to twice or half the aspect ratio; scale: square root of the area's share."""
    share = randomaspectcrop.scales[level - 1]
    # Neither side may exceed the image's.
    limit = min(0.5 * math.log(2), -math.log(share))
    return _crop(image, share, math.exp(rng.uniform(-limit, limit)), rng)


@register(EVALUATION, "geometry", (0.02, 0.04, 0.06, 0.08, 0.1), random=True, keeps_layout=False)
def perspective(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Perspective crop with each corner moved inwards by |N(0, scale^2)| of the sides."""
    height, width = image.shape[:2]
    inwards = np.minimum(np.abs(rng.normal(0, perspective.scales[level - 1], (4, 2))), 0.4)
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    corners = np.abs(corners - inwards) * (width - 1, height - 1)
    return warps.from_corners(image, corners)


@register(EVALUATION, "compression", (16, 32, 45, 120, 170))
def jpeg2000(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """JPEG 2000; scale: compression ratio (ARNIQA's)."""
    return codecs.jpeg2000(image, jpeg2000.scales[level - 1])


@register(EVALUATION, "compression", (75, 50, 30, 15, 5))
def webp(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """WebP; scale: quality from 0 to 100."""
    return codecs.webp(image, webp.scales[level - 1])


@register(EVALUATION, "compression", (60, 45, 30, 20, 10))
def avif(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """AVIF, the codec in use that is closest to the challenge's neural ones; scale: quality from 0 to 100."""
    return codecs.avif(image, avif.scales[level - 1])


@register(EVALUATION, "recompression", _QUALITIES, random=True, spread=5)
def jpeg_recompression_1(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """JPEG; scale: quality, +-5."""
    return codecs.jpeg(image, jpeg_recompression_1.scale(level, rng))


@register(EVALUATION, "recompression", _QUALITIES, random=True, spread=5)
def jpeg_recompression_2(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """JPEG twice; scale: first quality, +-5. The second is drawn between that and 95."""
    quality = jpeg_recompression_2.scale(level, rng)
    return codecs.jpeg(codecs.jpeg(image, quality), int(rng.integers(quality, 96)))


@register(EVALUATION, "recompression", _QUALITIES, random=True, spread=5)
def jpeg_jpeg2000(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """JPEG, then JPEG 2000 at a ratio of 8 to 32; scale: JPEG quality, +-5."""
    once = codecs.jpeg(image, jpeg_jpeg2000.scale(level, rng))
    return codecs.jpeg2000(once, _RECOMPRESSION_RATIOS[level - 1])


@register(EVALUATION, "recompression", _QUALITIES, random=True, spread=5)
def jpeg_avif(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """JPEG, then AVIF of the same level, in place of JPEG with JPEG AI; scale: JPEG quality, +-5."""
    once = codecs.jpeg(image, jpeg_avif.scale(level, rng))
    return codecs.avif(once, avif.scales[level - 1])


@register(EVALUATION, "watermark", (1.25, 1.8, 2.5, 3.6, 5.1), random=True)
def watermark_spread_spectrum(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Invisible pseudo-random pattern; scale: its RMS (0-255)."""
    return watermarks.embed_spread_spectrum(image, watermark_spread_spectrum.scales[level - 1], rng)


@register(EVALUATION, "watermark", (36, 52, 74, 106, 150), random=True)
def watermark_dwt_dct(image: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    """Random bits in block DCT coefficients of a Haar band; scale: quantization step."""
    return watermarks.embed_dwt_dct(image, watermark_dwt_dct.scales[level - 1], rng)


_EXTERNAL_TRAITS = {"random": True, "keeps_size": False, "monotone": False}
for _name, _external in adapters.EXTERNAL.items():
    _apply, _missing = (partial(function, _name) for function in (adapters.apply, adapters.missing))
    _apply.__doc__ = f"By an adapter: {_external.description}."
    EVALUATION[_name] = Operation(
        _name, _external.category, _apply, _external.scales, missing=_missing, **_EXTERNAL_TRAITS
    )


def _size(width: float, height: float, minimum: int = MIN_SIDE_PX) -> tuple[int, int]:
    """Round a (width, height), with a lower limit that every operation accepts."""
    return max(minimum, round(width)), max(minimum, round(height))


def _crop(image: np.ndarray, share: float, stretch: float, rng: np.random.Generator) -> np.ndarray:
    width, height = _size(image.shape[1] * share * stretch, image.shape[0] * share / stretch)
    top = int(rng.integers(image.shape[0] - height + 1))
    left = int(rng.integers(image.shape[1] - width + 1))
    return image[top : top + height, left : left + width].copy()
