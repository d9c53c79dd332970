"""A simulated camera for the demo data: optics, Bayer mosaic, noise, demosaicing, development.

It leaves the trace of a real sensor, which a generator does not: two of three color samples of every pixel
are interpolated from a mosaic of period 2, after the noise has been added, so that neighboring pixels and
their noise are correlated with that period.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from featdistill.images import reading as image_io

_SENSOR_WHITE = 65535


@dataclass(frozen=True)
class Look:
    """How a scene is rendered into a picture; drawn alike for both classes."""

    focus_sigma_px: float  # blur of the optics
    exposure: float  # factor on the radiance; 1 puts the 99th percentile at white
    tint: tuple[float, float, float]  # factors on R, G and B that remain after white balance
    gamma: float  # exponent of the display curve (1 / 2.2 is sRGB's)
    contrast: float  # strength of the S-curve, 0 for none
    vignette: float  # loss of light in the corners
    quality_0_100: int  # of the first JPEG


def draw_look(rng: np.random.Generator) -> Look:
    """Draw a look."""
    return Look(
        focus_sigma_px=rng.uniform(0.25, 0.6),
        exposure=rng.uniform(0.55, 1.1),
        tint=tuple(np.exp(rng.normal(0, 0.05, 3))),
        gamma=rng.uniform(1 / 2.4, 1 / 1.9),
        contrast=rng.uniform(0, 0.5),
        vignette=rng.uniform(0, 0.35),
        quality_0_100=int(rng.integers(85, 96)),
    )


def expose(radiance: np.ndarray, look: Look) -> np.ndarray:
    """Return the light on the image plane, (H, W, 3) float32; 1.0 is white, values are not clipped."""
    height, width = radiance.shape[:2]
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None, :]
    falloff = (1 - look.vignette * (x**2 + y**2) / 2).astype(np.float32)
    light = cv2.GaussianBlur(radiance, (0, 0), look.focus_sigma_px) * look.exposure
    return light * falloff[..., None]


def develop(light: np.ndarray, look: Look) -> np.ndarray:
    """Turn linear light into a picture, (H, W, 3) float32 in [0, 1]: tint, display curve, S-curve."""
    display = np.clip(light * np.float32(look.tint), 0, 1) ** np.float32(look.gamma)
    s_curve = display * display * (3 - 2 * display)
    return display + np.float32(look.contrast) * (s_curve - display)


def photograph(light: np.ndarray, look: Look, rng: np.random.Generator) -> np.ndarray:
    """Take a picture of the light from `expose` with a random camera.

    Returns:
        (H, W, 3) float32 in [0, 1], the developed picture before it is saved.
    """
    # Sensitivities that white balance compensates: sensors record red and blue weaker than green.
    gains = np.float32([rng.uniform(1.5, 2.2), 1.0, rng.uniform(1.4, 2.0)])
    electrons_at_white = np.exp(rng.uniform(np.log(3000), np.log(20000)))
    read_noise_electrons = rng.uniform(2, 6)
    raw = add_sensor_noise(mosaic(light / gains), electrons_at_white, read_noise_electrons, rng)
    balanced = demosaic(raw, edge_aware=bool(rng.random() < 0.4)) * gains
    picture = develop(balanced, look)
    return sharpen(picture, sigma_px=rng.uniform(0.7, 1.1), amount=rng.uniform(0.2, 0.7))


def mosaic(light: np.ndarray) -> np.ndarray:
    """Keep one color per pixel, RGGB from the upper left corner; (H, W, 3) in, (H, W) out."""
    raw = light[..., 1].copy()
    raw[0::2, 0::2] = light[0::2, 0::2, 0]
    raw[1::2, 1::2] = light[1::2, 1::2, 2]
    return raw


def add_sensor_noise(
    raw: np.ndarray, electrons_at_white: float, read_noise_electrons: float, rng: np.random.Generator
) -> np.ndarray:
    """Add shot noise (variance = signal, in electrons) and read noise, then clip to [0, 1]."""
    electrons = np.clip(raw, 0, 1) * electrons_at_white
    deviation = np.sqrt(electrons + read_noise_electrons**2)
    noise = rng.standard_normal(raw.shape, dtype=np.float32)
    return np.clip((electrons + noise * deviation) / electrons_at_white, 0, 1).astype(np.float32)


def demosaic(raw: np.ndarray, edge_aware: bool) -> np.ndarray:
    """Fill in the missing colors, bilinearly or along edges; (H, W) in [0, 1] in, (H, W, 3) out."""
    # OpenCV names a pattern by the second row's second and third pixel: BG is RGGB.
    code = cv2.COLOR_BayerBG2BGR_EA if edge_aware else cv2.COLOR_BayerBG2BGR
    samples = np.rint(raw * _SENSOR_WHITE).astype(np.uint16)
    return cv2.cvtColor(samples, code)[..., ::-1].astype(np.float32) / _SENSOR_WHITE


def sharpen(picture: np.ndarray, sigma_px: float, amount: float) -> np.ndarray:
    """Unsharp masking, clipped to [0, 1]."""
    return np.clip(picture + amount * (picture - cv2.GaussianBlur(picture, (0, 0), sigma_px)), 0, 1)


def encode_jpeg(picture: np.ndarray, quality_0_100: int) -> bytes:
    """Encode (H, W, 3) RGB, uint8 or float in [0, 1] (clipped, rounded), as a 4:2:0 JPEG."""
    if picture.dtype != np.uint8:
        picture = np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    return image_io.encode_jpeg(picture, quality_0_100)
