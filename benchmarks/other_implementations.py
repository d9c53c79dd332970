"""Counterparts of the operations in Albumentations and kornia, to be timed beside them; both are optional.

A counterpart is an augmentation of that package, always applied, with the parameters that make it as strong
as one level of the operation as nearly as they allow. Where the package has none that does the same, the
nearest in kind stands in, and says so. An operation that is not listed has nothing like it there.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Counterpart:
    """An augmentation of another package.

    Attributes:
        name: of its class there.
        parameters: from an operation's `scales` entry to the class's arguments.
        nearest: it does something else, of the same kind.
    """

    name: str
    parameters: Callable[[float], dict]
    nearest: bool = False


@dataclass(frozen=True)
class Package:
    """A package that could be imported.

    Attributes:
        name: as it is imported.
        version: what it calls itself.
        counterparts: by the operation's name.
        make: from a class name and arguments to a function of a (H, W, 3) uint8 image that returns another.
    """

    name: str
    version: str
    counterparts: dict[str, Counterpart]
    make: Callable[[str, dict], Callable[[np.ndarray], np.ndarray]]

    def build(self, operation: str, scale: float) -> Callable[[np.ndarray], np.ndarray]:
        """Return the counterpart of an operation, made for one of its `scales`.

        Raises:
            AttributeError, TypeError, ValueError: this version of the package has it not, or not so.
        """
        counterpart = self.counterparts[operation]
        return self.make(counterpart.name, counterpart.parameters(scale))


def importable_packages() -> list[Package]:
    """Import what is there of the packages, and hold them to one thread."""
    packages = []
    for load in (_albumentations, _kornia):
        try:
            packages.append(load())
        except ImportError:
            continue
    return packages


def _albumentations() -> Package:
    # Unless told so, the import asks the network for a newer version.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations

    cv2.setNumThreads(0)

    def make(name: str, parameters: dict) -> Callable[[np.ndarray], np.ndarray]:
        transform = getattr(albumentations, name)(**parameters, p=1.0)
        return lambda image: transform(image=image)["image"]

    return Package("albumentations", albumentations.__version__, ALBUMENTATIONS, make)


def _kornia() -> Package:
    import kornia
    import torch

    torch.set_num_threads(1)

    def make(name: str, parameters: dict) -> Callable[[np.ndarray], np.ndarray]:
        augmentation = getattr(kornia.augmentation, name)(**parameters, p=1.0)

        @torch.inference_mode()
        def apply(image: np.ndarray) -> np.ndarray:
            batch = torch.from_numpy(image).permute(2, 0, 1)[None].float().div_(255)
            result = augmentation(batch)[0].mul(255).round_().clamp_(0, 255)
            return result.to(torch.uint8).permute(1, 2, 0).contiguous().numpy()

        return apply

    return Package("kornia", kornia.__version__, KORNIA, make)


def _both(value: float) -> tuple[float, float]:
    """The range that holds one value."""
    return value, value


def _gaussian_side(sigma_px: float) -> int:
    """The side of the kernel that `gausblur` has."""
    return 2 * math.ceil(2 * sigma_px) + 1


def _contrast(amount: float) -> float:
    """By how much the chord of `lincontrchange`'s curve from 0.3 to 0.7 is steeper than the identity."""
    return (0.5 + amount / 2) / 0.4 - 1


def _gamma(amount: float) -> float:
    """The exponent of the power curve that lowers 0.5 by amount / 2, as `darken` does."""
    return math.log(0.5 - amount / 2, 0.5)


def _bits(levels: float) -> int:
    return round(math.log2(levels))


def _around(value: float) -> tuple[float, float]:
    return -value, value


def _quality_within_5(quality: float) -> tuple[float, float]:
    return max(1, quality - 5), min(100, quality + 5)


# What five passes of independent displacements of 1 px add up to, and what a Gaussian of 1 px leaves of the
# standard deviation of uniform noise in [-1, 1]: 1 / sqrt(3) times 1 / (2 sqrt(pi)).
_FIVE_PASSES = math.sqrt(5)
_SMOOTHED_NOISE = 1 / math.sqrt(3) / (2 * math.sqrt(math.pi))

ALBUMENTATIONS: dict[str, Counterpart] = {
    "gausblur": Counterpart(
        "GaussianBlur",
        lambda sigma: {"sigma_limit": _both(sigma), "blur_limit": _both(_gaussian_side(sigma))},
    ),
    "lensblur": Counterpart("Defocus", lambda radius: {"radius": _both(radius), "alias_blur": _both(0.1)}),
    "colorsat": Counterpart(
        "ColorJitter",
        lambda factor: {
            "saturation": _both(max(factor, 0)),
            "brightness": _both(1),
            "contrast": _both(1),
            "hue": _both(0),
        },
    ),
    "jpeg": Counterpart("ImageCompression", lambda quality: {"quality_range": _both(quality)}),
    "whitenoise": Counterpart("GaussNoise", lambda variance: {"std_range": _both(math.sqrt(variance))}),
    "impulsenoise": Counterpart(
        "SaltAndPepper", lambda share: {"amount": _both(share), "salt_vs_pepper": _both(0.5)}
    ),
    "brighten": Counterpart(
        "RandomBrightnessContrast",
        lambda amount: {"brightness_limit": _both(amount / 2), "contrast_limit": _both(0)},
        nearest=True,
    ),
    "darken": Counterpart("RandomGamma", lambda amount: {"gamma_limit": _both(100 * _gamma(amount))}),
    "jitter": Counterpart(
        "ElasticTransform",
        lambda sigma: {
            "alpha": _FIVE_PASSES / _SMOOTHED_NOISE * sigma,
            "sigma": 1,
            "noise_distribution": "uniform",
            "border_mode": cv2.BORDER_REPLICATE,
        },
        nearest=True,
    ),
    "quantization": Counterpart("Posterize", lambda levels: {"num_bits": _bits(levels)}),
    "lincontrchange": Counterpart(
        "RandomBrightnessContrast",
        # The package turns the line about black; the brightness moves it back to 0.5.
        lambda amount: {
            "contrast_limit": _both(_contrast(amount)),
            "brightness_limit": _both(-_contrast(amount) / 2),
        },
    ),
    "motionblur": Counterpart(
        "MotionBlur", lambda radius: {"blur_limit": _both(2 * radius + 1), "allow_shifted": False}
    ),
    # The blurs before and after have 0.7 to 1.1 px.
    "glassblur": Counterpart("GlassBlur", lambda reach: {"max_delta": reach, "sigma": 0.9, "iterations": 3}),
    "multnoise": Counterpart(
        "MultiplicativeNoise",
        # Uniform noise of the same variance.
        lambda variance: {
            "multiplier": (1 - math.sqrt(3 * variance), 1 + math.sqrt(3 * variance)),
            "per_channel": True,
            "elementwise": True,
        },
    ),
    "shotnoise": Counterpart("ShotNoise", lambda photons: {"scale_range": _both(1 / photons)}),
    "isonoise": Counterpart(
        "ISONoise", lambda intensity: {"intensity": _both(intensity), "color_shift": _both(0.1 * intensity)}
    ),
    "rgbshift": Counterpart(
        "RGBShift", lambda most: {f"{channel}_shift_limit": _around(most) for channel in "rgb"}
    ),
    "randomtonecurve": Counterpart("RandomToneCurve", lambda scale: {"scale": scale}),
    "clahe": Counterpart("CLAHE", lambda limit: {"clip_limit": _both(limit), "tile_grid_size": (8, 8)}),
    "pixelate": Counterpart(
        "Downscale",
        lambda amount: {
            "scale_range": _both(0.95 - amount**0.6),
            "interpolation_pair": {"downscale": cv2.INTER_NEAREST, "upscale": cv2.INTER_NEAREST},
        },
    ),
    "downscale": Counterpart(
        "RandomScale",
        lambda factor: {"scale_limit": (factor - 1.05, factor - 0.95), "interpolation": cv2.INTER_AREA},
    ),
    "perspective": Counterpart(
        "Perspective", lambda scale: {"scale": _both(scale), "border_mode": cv2.BORDER_REPLICATE}
    ),
    "webp": Counterpart(
        "ImageCompression", lambda quality: {"quality_range": _both(quality), "compression_type": "webp"}
    ),
    "jpeg_recompression_1": Counterpart(
        "ImageCompression", lambda quality: {"quality_range": _quality_within_5(quality)}
    ),
}

KORNIA: dict[str, Counterpart] = {
    "gausblur": Counterpart(
        "RandomGaussianBlur",
        lambda sigma: {
            "kernel_size": _both(_gaussian_side(sigma)),
            "sigma": _both(sigma),
            "border_type": "replicate",
        },
    ),
    "colorsat": Counterpart("RandomSaturation", lambda factor: {"saturation": _both(max(factor, 0))}),
    "jpeg": Counterpart("RandomJPEG", lambda quality: {"jpeg_quality": _both(float(quality))}),
    "whitenoise": Counterpart("RandomGaussianNoise", lambda variance: {"std": math.sqrt(variance)}),
    "impulsenoise": Counterpart(
        "RandomSaltAndPepperNoise", lambda share: {"amount": _both(share), "salt_vs_pepper": _both(0.5)}
    ),
    "brighten": Counterpart(
        "RandomBrightness", lambda amount: {"brightness": _both(1 + amount / 2)}, nearest=True
    ),
    "darken": Counterpart("RandomGamma", lambda amount: {"gamma": _both(_gamma(amount))}),
    "jitter": Counterpart(
        "RandomElasticTransform",
        # In halves of a side, of which 512 px is taken.
        lambda sigma: {
            "alpha": _both(_FIVE_PASSES / _SMOOTHED_NOISE * sigma / 256),
            "sigma": _both(1.0),
            "kernel_size": _both(9),
            "padding_mode": "border",
        },
        nearest=True,
    ),
    "quantization": Counterpart("RandomPosterize", lambda levels: {"bits": _both(_bits(levels))}),
    "lincontrchange": Counterpart(
        "RandomContrast", lambda amount: {"contrast": _both(1 + _contrast(amount))}, nearest=True
    ),
    "motionblur": Counterpart(
        "RandomMotionBlur",
        lambda radius: {
            "kernel_size": 2 * radius + 1,
            "angle": 180.0,
            "direction": 0.0,
            "resample": "bilinear",
        },
    ),
    "rgbshift": Counterpart(
        "RandomRGBShift", lambda most: {f"{channel}_shift_limit": most / 255 for channel in "rgb"}
    ),
    "clahe": Counterpart(
        # On R, G and B each.
        "RandomClahe",
        lambda limit: {"clip_limit": _both(float(limit)), "grid_size": (8, 8)},
        nearest=True,
    ),
    "perspective": Counterpart(
        # Corners move inwards by up to half as much of the sides; the frame is shrunk, not stretched.
        "RandomPerspective",
        lambda scale: {"distortion_scale": 3.2 * scale},
        nearest=True,
    ),
    "jpeg_recompression_1": Counterpart(
        "RandomJPEG", lambda quality: {"jpeg_quality": tuple(map(float, _quality_within_5(quality)))}
    ),
}
