"""Counterparts of the operations in Albumentations and kornia, timed next to ours; both are optional.

A counterpart is an augmentation of that package, always applied, with parameters that make it as strong as
one level of the operation, as far as they allow. Where the package does not have the same, the nearest of its
kind is used and marked. An operation that is not listed has no counterpart.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

ImageFunction = Callable[[np.ndarray], np.ndarray]
# By the operation's name: a class, and its arguments as a function of an entry of the operation's `scales`.
Counterparts = dict[str, tuple[str, Callable[[float], dict[str, Any]]]]


@dataclass(frozen=True)
class Package:
    """An installed package.

    Attributes:
        nearest: operations whose counterpart does something else of the same kind.
        make: turns class name and arguments into a function from (H, W, 3) uint8 to the same.
    """

    name: str
    version: str
    counterparts: Counterparts
    nearest: set[str]
    make: Callable[[str, dict[str, Any]], ImageFunction]

    def title(self, operation: str) -> str:
        """Return the name of an operation's counterpart, marked where it is only the nearest."""
        return self.counterparts[operation][0] + (" (nearest)" if operation in self.nearest else "")

    def build(self, operation: str, scale: float) -> ImageFunction:
        """Return the counterpart of an operation for one entry of its `scales`.

        Raises:
            AttributeError, TypeError, ValueError: this version of the package does not have it, or differs.
        """
        name, arguments = self.counterparts[operation]
        return self.make(name, arguments(scale))


def importable_packages() -> list[Package]:
    """Import the installed ones of the packages, and limit them to one thread."""
    packages = []
    for load in (_albumentations, _kornia):
        try:
            packages.append(load())
        except ImportError:
            continue
    return packages


def _albumentations() -> Package:
    # Otherwise the import looks for a newer version on the network.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations

    cv2.setNumThreads(0)

    def make(name: str, arguments: dict[str, Any]) -> ImageFunction:
        transform = getattr(albumentations, name)(**arguments, p=1.0)
        return lambda image: transform(image=image)["image"]

    nearest = {"brighten", "jitter"}
    return Package("albumentations", albumentations.__version__, ALBUMENTATIONS, nearest, make)


def _kornia() -> Package:
    import kornia
    import torch

    torch.set_num_threads(1)

    def make(name: str, arguments: dict[str, Any]) -> ImageFunction:
        augmentation = getattr(kornia.augmentation, name)(**arguments, p=1.0)

        @torch.inference_mode()
        def apply(image: np.ndarray) -> np.ndarray:
            batch = torch.from_numpy(image).permute(2, 0, 1)[None].float().div_(255)
            result = augmentation(batch)[0].mul(255).round_().clamp_(0, 255)
            return result.to(torch.uint8).permute(1, 2, 0).contiguous().numpy()

        return apply

    nearest = {"brighten", "jitter", "lincontrchange", "clahe", "perspective"}
    return Package("kornia", kornia.__version__, KORNIA, nearest, make)


def _only(value: float) -> tuple[float, float]:
    """The range that contains one value."""
    return value, value


def _blur_side(sigma_px: float) -> int:
    """The side of `gausblur`'s kernel."""
    return 2 * math.ceil(2 * sigma_px) + 1


def _contrast(amount: float) -> float:
    """How much steeper than the identity the chord of `lincontrchange`'s curve from 0.3 to 0.7 is."""
    return (0.5 + amount / 2) / 0.4 - 1


def _gamma(amount: float) -> float:
    """The exponent of the power curve that lowers 0.5 by amount / 2, as `darken` does."""
    return math.log(0.5 - amount / 2, 0.5)


def _bits(levels: float) -> int:
    return round(math.log2(levels))


def _uniform(variance: float) -> tuple[float, float]:
    """The range of uniform noise about 1 of this variance."""
    return 1 - math.sqrt(3 * variance), 1 + math.sqrt(3 * variance)


def _within_5(quality: float) -> tuple[float, float]:
    return max(1, quality - 5), min(100, quality + 5)


# Five passes of independent displacements of 1 px add up to sqrt(5). A Gaussian of 1 px leaves
# 1 / (2 sqrt(pi)) of the standard deviation of uniform noise in [-1, 1], which is 1 / sqrt(3).
_JITTER = math.sqrt(5) * math.sqrt(3) * 2 * math.sqrt(math.pi)

_REPLICATE = cv2.BORDER_REPLICATE
_NEAREST_PAIR = dict.fromkeys(("downscale", "upscale"), cv2.INTER_NEAREST)
_SHIFTS = ("r_shift_limit", "g_shift_limit", "b_shift_limit")

ALBUMENTATIONS: Counterparts = {
    "gausblur": ("GaussianBlur", lambda x: dict(sigma_limit=_only(x), blur_limit=_only(_blur_side(x)))),
    "lensblur": ("Defocus", lambda x: dict(radius=_only(x), alias_blur=_only(0.1))),
    "colorsat": (
        "ColorJitter",
        lambda x: dict(saturation=_only(max(x, 0)), brightness=_only(1), contrast=_only(1), hue=_only(0)),
    ),
    "jpeg": ("ImageCompression", lambda x: dict(quality_range=_only(x))),
    "whitenoise": ("GaussNoise", lambda x: dict(std_range=_only(math.sqrt(x)))),
    "impulsenoise": ("SaltAndPepper", lambda x: dict(amount=_only(x), salt_vs_pepper=_only(0.5))),
    "brighten": (
        "RandomBrightnessContrast",
        lambda x: dict(brightness_limit=_only(x / 2), contrast_limit=_only(0)),
    ),
    "darken": ("RandomGamma", lambda x: dict(gamma_limit=_only(100 * _gamma(x)))),
    "jitter": (
        "ElasticTransform",
        lambda x: dict(alpha=_JITTER * x, sigma=1, noise_distribution="uniform", border_mode=_REPLICATE),
    ),
    "quantization": ("Posterize", lambda x: dict(num_bits=_bits(x))),
    # The package turns the line about black; the brightness moves it back to 0.5.
    "lincontrchange": (
        "RandomBrightnessContrast",
        lambda x: dict(contrast_limit=_only(_contrast(x)), brightness_limit=_only(-_contrast(x) / 2)),
    ),
    "motionblur": ("MotionBlur", lambda x: dict(blur_limit=_only(2 * x + 1), allow_shifted=False)),
    # The blurs before and after have 0.7 to 1.1 px.
    "glassblur": ("GlassBlur", lambda x: dict(max_delta=x, sigma=0.9, iterations=3)),
    "multnoise": (
        "MultiplicativeNoise",
        lambda x: dict(multiplier=_uniform(x), per_channel=True, elementwise=True),
    ),
    "shotnoise": ("ShotNoise", lambda x: dict(scale_range=_only(1 / x))),
    "isonoise": ("ISONoise", lambda x: dict(intensity=_only(x), color_shift=_only(0.1 * x))),
    "rgbshift": ("RGBShift", lambda x: dict.fromkeys(_SHIFTS, (-x, x))),
    "randomtonecurve": ("RandomToneCurve", lambda x: dict(scale=x)),
    "clahe": ("CLAHE", lambda x: dict(clip_limit=_only(x), tile_grid_size=(8, 8))),
    "pixelate": (
        "Downscale",
        lambda x: dict(scale_range=_only(0.95 - x**0.6), interpolation_pair=_NEAREST_PAIR),
    ),
    "downscale": (
        "RandomScale",
        lambda x: dict(scale_limit=(x - 1.05, x - 0.95), interpolation=cv2.INTER_AREA),
    ),
    "perspective": ("Perspective", lambda x: dict(scale=_only(x), border_mode=_REPLICATE)),
    "webp": ("ImageCompression", lambda x: dict(quality_range=_only(x), compression_type="webp")),
    "jpeg_recompression_1": ("ImageCompression", lambda x: dict(quality_range=_within_5(x))),
}

KORNIA: Counterparts = {
    "gausblur": (
        "RandomGaussianBlur",
        lambda x: dict(kernel_size=_only(_blur_side(x)), sigma=_only(x), border_type="replicate"),
    ),
    "colorsat": ("RandomSaturation", lambda x: dict(saturation=_only(max(x, 0)))),
    "jpeg": ("RandomJPEG", lambda x: dict(jpeg_quality=_only(float(x)))),
    "whitenoise": ("RandomGaussianNoise", lambda x: dict(std=math.sqrt(x))),
    "impulsenoise": ("RandomSaltAndPepperNoise", lambda x: dict(amount=_only(x), salt_vs_pepper=_only(0.5))),
    "brighten": ("RandomBrightness", lambda x: dict(brightness=_only(1 + x / 2))),
    "darken": ("RandomGamma", lambda x: dict(gamma=_only(_gamma(x)))),
    # In halves of a side, which is taken to be 512 px.
    "jitter": (
        "RandomElasticTransform",
        lambda x: dict(
            alpha=_only(_JITTER * x / 256), sigma=_only(1.0), kernel_size=_only(9), padding_mode="border"
        ),
    ),
    "quantization": ("RandomPosterize", lambda x: dict(bits=_only(_bits(x)))),
    "lincontrchange": ("RandomContrast", lambda x: dict(contrast=_only(1 + _contrast(x)))),
    "motionblur": (
        "RandomMotionBlur",
        lambda x: dict(kernel_size=2 * x + 1, angle=180.0, direction=0.0, resample="bilinear"),
    ),
    "rgbshift": ("RandomRGBShift", lambda x: dict.fromkeys(_SHIFTS, x / 255)),
    # On R, G and B each.
    "clahe": ("RandomClahe", lambda x: dict(clip_limit=_only(float(x)), grid_size=(8, 8))),
    # Corners move inwards by up to half of this share of the sides; the frame is shrunk, not stretched.
    "perspective": ("RandomPerspective", lambda x: dict(distortion_scale=3.2 * x)),
    "jpeg_recompression_1": ("RandomJPEG", lambda x: dict(jpeg_quality=tuple(map(float, _within_5(x))))),
}
