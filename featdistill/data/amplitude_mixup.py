"""Amplitude mix-up: an image takes on some of another image's amplitude spectrum and keeps its own phases.

What an image shows is in the phases; traces of what made it are in the amplitudes. So with the amplitudes of
another image of the same label, what a detector sees of the content is no longer tied to the traces. After
DAT (NeurIPS 2024), without its generator network.
"""

import math

import cv2
import numpy as np
import torch

from featdistill.data.preprocessing import to_planes

# How far the rounding of a float32 transform of unit noise can reach, by the root of the number of pixels.
_ROUNDING = 4 * float(np.finfo(np.float32).eps)


def mix_amplitudes(image: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    """Return clip(Re IFFT2((share * A(other) + (1 - share) * A(image)) * exp(i * phase(image)))).

    A = |FFT2| of each channel. All is in float32, and the result is rounded to uint8. Where the image has no
    amplitude but that of rounding, its phase is 0.

    Args:
        image, other: (H, W, 3) uint8 RGB of the same size.
        share: of the other image's amplitudes, in [0, 1].

    Returns:
        (H, W, 3) uint8, a new array.
    """
    spectrum = _spectrum(image)
    own, lent = np.abs(spectrum), share * np.abs(_spectrum(other))
    # exp(i * phase) is spectrum / own, so the whole is the spectrum times a factor where `own` is not 0.
    has_phase = own > _ROUNDING * 255 * math.sqrt(image.shape[0] * image.shape[1])
    factor = np.divide(lent, own, out=np.zeros_like(own), where=has_phase)
    factor += np.float32(1 - share)
    spectrum *= factor
    np.copyto(spectrum, lent, where=~has_phase)
    planes = torch.fft.irfft2(torch.from_numpy(spectrum), image.shape[:2]).numpy()
    np.rint(planes, out=planes)
    np.clip(planes, 0, 255, out=planes)
    return cv2.merge(list(planes.astype(np.uint8)))


def _spectrum(image: np.ndarray) -> np.ndarray:
    """Return (3, H, W // 2 + 1) complex64; the rest of a real image's spectrum says the same once more."""
    # PyTorch's transform, because it is several times as fast as NumPy's.
    return torch.fft.rfft2(to_planes(image).float()).numpy()
