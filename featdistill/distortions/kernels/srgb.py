"""The transfer curve of sRGB (IEC 61966-2-1)."""

import numpy as np


def to_linear(value: np.ndarray) -> np.ndarray:
    """Return the linear light of sRGB values, both in [0, 1]."""
    return np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)


def from_linear(light: np.ndarray) -> np.ndarray:
    """Return the sRGB values of linear light, clipped to [0, 1]."""
    light = np.clip(light, 0, 1)
    return np.where(light > 0.0031308, 1.055 * light ** (1 / 2.4) - 0.055, 12.92 * light)
