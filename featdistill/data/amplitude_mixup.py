"""Amplitude mix-up: mix another image's amplitude spectrum into an image and keep its phases (section 4.6).

The phases determine what an image shows; the traces of its generator are in the amplitudes. With the
amplitudes of another image of the same label, content and traces are decoupled. After DAT (NeurIPS 2024),
without its generator network.
"""

import math

import cv2
import numpy as np
import torch

from featdistill.data.preprocessing import to_planes

# Bound of the rounding errors in a float32 transform of unit noise, per square root of the number of pixels.
_ROUNDING = 4 * float(np.finfo(np.float32).eps)


def mix_amplitudes(image: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    """Return clip(Re IFFT2((share * A(other) + (1 - share) * A(image)) * exp(i * phase(image)))).

    A = |FFT2| of each channel, in float32; the result is rounded to uint8. Where the image's amplitude is no
    more than rounding error, its phase is 0.

    Args:
        image, other: (H, W, 3) uint8 RGB of the same size.
        share: weight of the other image's amplitudes, in [0, 1].

    Returns:
        (H, W, 3) uint8, a new array.
    """
    spectrum = _spectrum(image)
    amplitude, added = np.abs(spectrum), share * np.abs(_spectrum(other))
    # exp(i * phase) is spectrum / amplitude, so the result is the spectrum times a factor if that is not 0.
    has_phase = amplitude > _ROUNDING * 255 * math.sqrt(image.shape[0] * image.shape[1])
    factor = np.divide(added, amplitude, out=np.zeros_like(amplitude), where=has_phase)
    factor += np.float32(1 - share)
    spectrum *= factor
    np.copyto(spectrum, added, where=~has_phase)
    planes = torch.fft.irfft2(torch.from_numpy(spectrum), image.shape[:2]).numpy()
    np.rint(planes, out=planes)
    np.clip(planes, 0, 255, out=planes)
    return cv2.merge(list(planes.astype(np.uint8)))


def _spectrum(image: np.ndarray) -> np.ndarray:
    """Return (3, H, W // 2 + 1) complex64; the rest of a real image's spectrum is redundant."""
    # PyTorch's transform is several times as fast as NumPy's.
    return torch.fft.rfft2(to_planes(image).float()).numpy()
