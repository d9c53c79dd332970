"""Simulated image generators for the demo data.

Each gets the ideal picture of a scene (without noise or camera) and rebuilds it from reduced information, by
an operation that real generators contain. None of them models a real generator; their traces are of the same
kinds (up-sampling lattices, checkerboards, lost and invented detail).
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from data_prep.synthetic.camera import Look, develop, encode_jpeg

# Share of the coarser detail band that a decoder recovers; the rest is lost.
_BAND_GAIN = 0.7
# Unequal overlap of a stride-2 kernel of 3 taps: excess of its center tap.
_CHECKERBOARD = 0.05
# Standard deviation of a sub-pixel filter's taps around those of exact interpolation.
_SUB_PIXEL_ERROR = 0.018
_PATCH_PX = 8
_PATCH_COMPONENTS = 15
_CODE_PX = 4
_CODES = 160


@dataclass(frozen=True)
class Codebooks:
    """Parameters of the two learned generators, all float32."""

    patch_mean: np.ndarray  # (192,), mean of the flattened 8 x 8 x 3 patches
    patch_basis: np.ndarray  # (components, 192), orthonormal rows
    codes: np.ndarray  # (codes, 48), 4 x 4 x 3 patches of detail


Generator = Callable[[np.ndarray, np.random.Generator, Codebooks], np.ndarray]
Doubling = Callable[[np.ndarray], np.ndarray]


def fit_codebooks(pictures: list[np.ndarray], rng: np.random.Generator) -> Codebooks:
    """Fit the patch basis (principal components) and draw the detail codes from (H, W, 3) pictures."""
    patches = np.concatenate([_to_patches(_crop_to(picture, _PATCH_PX), _PATCH_PX) for picture in pictures])
    mean = patches.mean(axis=0)
    covariance = np.cov(patches.astype(np.float64), rowvar=False)
    basis = np.linalg.eigh(covariance)[1][:, ::-1][:, :_PATCH_COMPONENTS].T
    cropped = [_crop_to(picture, 4) for picture in pictures]
    detail = [picture - _up_linear(_up_linear(_halve(_halve(picture)))) for picture in cropped]
    samples = np.concatenate([_to_patches(_crop_to(band, _CODE_PX), _CODE_PX) for band in detail])
    codes = samples[rng.permutation(len(samples))[: _CODES * 16]]
    codes = codes[np.argsort(-np.square(codes).sum(axis=1), kind="stable")][::16]
    return Codebooks(mean, basis.astype(np.float32), codes)


def patch_autoencoder(picture: np.ndarray, rng: np.random.Generator, codebooks: Codebooks) -> np.ndarray:
    """Rebuild overlapping 8 x 8 patches from a few principal components and average the overlaps."""
    half = _PATCH_PX // 2
    padded = np.pad(picture, ((half, half), (half, half), (0, 0)), mode="reflect")
    total = np.zeros_like(padded)
    weight = np.zeros((*padded.shape[:2], 1), np.float32)
    for top in (0, half):
        for left in (0, half):
            bottom = top + (padded.shape[0] - top) // _PATCH_PX * _PATCH_PX
            right = left + (padded.shape[1] - left) // _PATCH_PX * _PATCH_PX
            patches = _to_patches(padded[top:bottom, left:right], _PATCH_PX) - codebooks.patch_mean
            rebuilt = patches @ codebooks.patch_basis.T @ codebooks.patch_basis + codebooks.patch_mean
            total[top:bottom, left:right] += _from_patches(rebuilt, bottom - top, right - left, _PATCH_PX)
            weight[top:bottom, left:right] += 1
    return (total / weight)[half:-half, half:-half]


def vector_quantised(picture: np.ndarray, rng: np.random.Generator, codebooks: Codebooks) -> np.ndarray:
    """Replace the detail of each 4 x 4 patch by the nearest of a few codes."""
    base = _up_linear(_up_linear(_halve(_halve(picture))))
    patches = _to_patches(picture - base, _CODE_PX)
    codes = codebooks.codes
    distance = np.square(codes).sum(axis=1) - 2 * patches @ codes.T
    return base + _from_patches(codes[distance.argmin(axis=1)], *picture.shape[:2], _CODE_PX)


def denoiser(picture: np.ndarray, rng: np.random.Generator, codebooks: Codebooks) -> np.ndarray:
    """Remove the texture and keep the edges, like the last step of a diffusion sampler."""
    smooth = cv2.bilateralFilter(picture, 7, rng.uniform(0.12, 0.2), 2.0)
    return cv2.bilateralFilter(smooth, 5, 0.08, 1.5)


def bicubic_sharpen(picture: np.ndarray, rng: np.random.Generator, codebooks: Codebooks) -> np.ndarray:
    """Up-sample bicubically by 3 and sharpen: a super-resolution stage."""
    height, width = picture.shape[:2]
    small = cv2.resize(picture, (round(width / 3), round(height / 3)), interpolation=cv2.INTER_AREA)
    large = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    return large + rng.uniform(0.8, 1.3) * (large - cv2.GaussianBlur(large, (0, 0), 1.5))


def spectral_peaks(picture: np.ndarray, rng: np.random.Generator, codebooks: Codebooks) -> np.ndarray:
    """Decode bilinearly and leave a faint lattice: peaks of the spectrum at periods 4 and 8."""
    height, width = picture.shape[:2]
    y, x = np.arange(height)[:, None], np.arange(width)[None, :]
    lattice = np.cos(np.pi / 2 * x) + np.cos(np.pi / 2 * y) + np.cos(np.pi / 4 * x) * np.cos(np.pi / 4 * y)
    return _decode(picture, _up_linear, _up_linear) + (rng.uniform(0.008, 0.014) * lattice[..., None]).astype(
        np.float32
    )


def renoised(picture: np.ndarray, rng: np.random.Generator, codebooks: Codebooks) -> np.ndarray:
    """Add noise and remove it again, with less noise each time, like the loop of a diffusion sampler."""
    for deviation in (0.08, 0.06, 0.04, 0.02):
        noisy = picture + deviation * rng.standard_normal(picture.shape, dtype=np.float32)
        picture = cv2.bilateralFilter(noisy, 7, 4 * deviation, 1.5)
    return picture


def token_blocks(picture: np.ndarray, rng: np.random.Generator, codebooks: Codebooks) -> np.ndarray:
    """Keep the low frequencies of each 16 x 16 token and shift its mean slightly: faint seams."""
    side, frequencies = 16, 7
    order = np.arange(side)
    cosines = np.cos(np.pi * (order[None, :] + 0.5) * order[:, None] / side) * np.sqrt(2 / side)
    cosines[0] /= np.sqrt(2)
    project = (cosines[:frequencies].T @ cosines[:frequencies]).astype(np.float32)
    rows, columns = picture.shape[0] // side, picture.shape[1] // side
    tokens = picture.reshape(rows, side, columns, side, 3)
    rebuilt = np.einsum("yi,risjc,jx->rysxc", project, tokens, project, optimize=True)
    shift = rng.normal(0, 0.012, (rows, 1, columns, 1, 1)).astype(np.float32)
    return (rebuilt + shift).reshape(picture.shape)


def wavelet_shrunk(picture: np.ndarray, rng: np.random.Generator, codebooks: Codebooks) -> np.ndarray:
    """Shrink the two finest Haar bands towards 0: small detail vanishes, in blocks of 2 and 4."""
    half, quarter = _halve(picture), _halve(_halve(picture))
    coarse = quarter.repeat(2, axis=0).repeat(2, axis=1)
    half = coarse + _shrink(half - coarse, 0.015)
    fine = half.repeat(2, axis=0).repeat(2, axis=1)
    return fine + _shrink(picture - _halve(picture).repeat(2, axis=0).repeat(2, axis=1), 0.06)


def generate(
    name: str,
    light: np.ndarray,
    look: Look,
    photo: np.ndarray,
    rng: np.random.Generator,
    codebooks: Codebooks,
) -> np.ndarray:
    """Let a generator rebuild a scene, with invented texture so that its file is as large as the photo's.

    Mean and contrast also match, so that neither they nor the file size tell the classes apart.

    Args:
        name: a key of `GENERATORS`.
        light: (H, W, 3) float32, the scene from `camera.expose`; H and W are multiples of 16.
        photo: (H, W, 3) float32 in [0, 1], the camera's picture of the same scene.

    Returns:
        (H, W, 3) float32, to be clipped to [0, 1].
    """
    render = develop(light, look)
    picture = GENERATORS[name](render, rng, codebooks)
    texture = _invent_texture(render, rng)
    target_bytes = len(encode_jpeg(photo, look.quality_0_100))
    # Bisection to 0.2 % of the full range; 0.16 is more than any camera here needs.
    lowest, highest = 0.0, 0.16
    for _ in range(6):
        amount = (lowest + highest) / 2
        candidate = _match_contrast(picture + amount * texture, photo)
        if len(encode_jpeg(candidate, look.quality_0_100)) < target_bytes:
            lowest = amount
        else:
            highest = amount
    return candidate


def _match_contrast(picture: np.ndarray, model: np.ndarray) -> np.ndarray:
    """Return a picture with the mean and the standard deviation of another one."""
    return (picture - picture.mean()) * (model.std() / max(float(picture.std()), 1e-6)) + model.mean()


def _invent_texture(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return noise, (H, W, 3) float32 of deviation about 1, that is stronger where the picture has detail.

    Generators do not omit fine texture; they invent it.
    """
    height, width = picture.shape[:2]
    gray = picture.mean(axis=2)
    detail = np.abs(gray - cv2.GaussianBlur(gray, (0, 0), 1.0))
    strength = cv2.GaussianBlur(detail, (0, 0), 2.0)
    strength = 0.5 + 0.5 * strength / max(float(strength.mean()), 1e-4)
    noise = 0.7 * _noise(rng, height, width) + 0.8 * _up_linear(_noise(rng, height // 2, width // 2))
    return noise * strength[..., None]


def _noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """White noise, (height, width, 3) float32, mostly the same in the three channels."""
    common = rng.standard_normal((height, width, 1), dtype=np.float32)
    return 0.85 * common + 0.5 * rng.standard_normal((height, width, 3), dtype=np.float32)


def _decode(picture: np.ndarray, first_up: Doubling, second_up: Doubling) -> np.ndarray:
    """Rebuild a picture from a quarter of its size and one band of detail, by two doublings."""
    half = _halve(picture)
    quarter = _halve(half)
    band = half - _up_linear(quarter)
    return second_up(first_up(quarter) + _BAND_GAIN * band)


def _halve(picture: np.ndarray) -> np.ndarray:
    return cv2.resize(picture, (picture.shape[1] // 2, picture.shape[0] // 2), interpolation=cv2.INTER_AREA)


def _up_linear(small: np.ndarray) -> np.ndarray:
    return cv2.resize(small, (small.shape[1] * 2, small.shape[0] * 2), interpolation=cv2.INTER_LINEAR)


def _up_nearest(small: np.ndarray) -> np.ndarray:
    kernel = np.float32([0.18, 0.64, 0.18])
    return cv2.sepFilter2D(small.repeat(2, axis=0).repeat(2, axis=1), -1, kernel, kernel)


def _up_transposed(small: np.ndarray) -> np.ndarray:
    """Transposed convolution of stride 2 with 3 taps per side: even positions see one tap, odd ones two."""
    # Divided by its mean gain, so that the mean of the picture stays the same.
    kernel = np.float32([0.5, 1 + _CHECKERBOARD, 0.5]) / (1 + _CHECKERBOARD / 2)
    spread = np.zeros((small.shape[0] * 2, small.shape[1] * 2, 3), np.float32)
    spread[::2, ::2] = small
    return cv2.sepFilter2D(spread, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)


def _up_sub_pixel(small: np.ndarray) -> np.ndarray:
    """Sub-pixel convolution: each of the four pixels of a cell has its own filter, and so its own gain."""
    fixed = np.random.default_rng(11)
    ideal = np.float32([[0.25, 0.75, 0.0], [0.0, 0.75, 0.25]])
    kernels = [
        [np.outer(ideal[i], ideal[j]) + fixed.normal(0, _SUB_PIXEL_ERROR, (3, 3)) for j in (0, 1)]
        for i in (0, 1)
    ]
    mean_gain = np.sum(kernels) / 4
    large = np.empty((small.shape[0] * 2, small.shape[1] * 2, 3), np.float32)
    for i in (0, 1):
        for j in (0, 1):
            large[i::2, j::2] = cv2.filter2D(small, -1, (kernels[i][j] / mean_gain).astype(np.float32))
    return large


def _shrink(band: np.ndarray, threshold: float) -> np.ndarray:
    return np.sign(band) * np.maximum(np.abs(band) - threshold, 0)


def _crop_to(picture: np.ndarray, multiple: int) -> np.ndarray:
    return picture[: picture.shape[0] // multiple * multiple, : picture.shape[1] // multiple * multiple]


def _to_patches(picture: np.ndarray, side: int) -> np.ndarray:
    """Cut (H, W, 3) into (patches, side * side * 3), without overlap."""
    rows, columns = picture.shape[0] // side, picture.shape[1] // side
    tiles = picture.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles).reshape(rows * columns, side * side * 3)


def _from_patches(patches: np.ndarray, height: int, width: int, side: int) -> np.ndarray:
    """Put the patches of `_to_patches` back together."""
    tiles = patches.reshape(height // side, width // side, side, side, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles).reshape(height, width, 3)


def _decoder(first_up: Doubling, second_up: Doubling) -> Generator:
    return lambda picture, rng, codebooks: _decode(picture, first_up, second_up)


_OPERATIONS = (patch_autoencoder, vector_quantised, denoiser, bicubic_sharpen)
_OPERATIONS += (spectral_peaks, renoised, token_blocks, wavelet_shrunk)
GENERATORS: dict[str, Generator] = {operation.__name__: operation for operation in _OPERATIONS} | {
    "nearest": _decoder(_up_nearest, _up_nearest),
    "bilinear": _decoder(_up_linear, _up_linear),
    # Unequal overlap: a checkerboard of periods 2 and 4.
    "transposed_conv": _decoder(_up_transposed, _up_transposed),
    "pixel_shuffle": _decoder(_up_sub_pixel, _up_sub_pixel),
    # A generator and its up-scaler.
    "cascade": _decoder(_up_transposed, _up_sub_pixel),
}
