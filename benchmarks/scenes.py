"""The images that are measured on, photographs from a folder or synthetic scenes; and tables of results."""

import functools
import math
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from PIL import Image, ImageOps

from featdistill.command_line import UserError
from featdistill.images.reading import BrokenImage, list_images, read_image


@functools.cache
def synthetic_scene(seed: int) -> np.ndarray:
    """Return a picture with the falling spectrum of a photograph, (768, 1024, 3) uint8."""
    rng = np.random.default_rng(seed)
    scene = np.zeros((768, 1024, 3), np.float32)
    for cell_px in (256, 64, 16, 4, 1):
        coarse = rng.normal(0, cell_px**0.5, (-(-768 // cell_px) + 1, -(-1024 // cell_px) + 1, 3))
        scene += cv2.resize(coarse.astype(np.float32), (1024, 768), interpolation=cv2.INTER_CUBIC)
    return np.clip(128 + 2.5 * scene, 0, 255).astype(np.uint8)


def fitted(scene: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Crop and resize a scene to (width, height)."""
    return np.array(ImageOps.fit(Image.fromarray(scene), size, Image.Resampling.BICUBIC))


def find_images(folder: str, count: int, *, jpegs_only: bool = True) -> list[str]:
    """Return up to `count` images (JPEGs), spread evenly over a folder's sorted list."""
    paths = [str(path) for path in list_images(folder)]
    if jpegs_only:
        paths = [path for path in paths if path.lower().endswith((".jpg", ".jpeg"))]
    if not paths:
        raise UserError(f"--images {folder}: no {'JPEG' if jpegs_only else 'image'} files in it")
    return paths[:: -(-len(paths) // count)]


def scenes(images: str | None, count: int) -> list[np.ndarray]:
    """Return the pictures of `--images`, or synthetic scenes."""
    if images:
        return read_scenes(find_images(images, count, jpegs_only=False))
    return [synthetic_scene(seed) for seed in range(count)]


def jpegs(images: str | None, count: int, folder: str, megapixels: float = 0.66) -> list[str]:
    """Return the JPEGs of `--images`, or write synthetic scenes (4:3, quality 90, 4:2:0) to a folder."""
    if images:
        return find_images(images, count)
    height = round(math.sqrt(megapixels * 1e6 * 3 / 4))
    paths = [str(Path(folder) / f"{seed:04d}.jpg") for seed in range(count)]
    for seed, path in enumerate(paths):
        scene = np.roll(synthetic_scene(seed % 16), seed // 16, axis=1)
        picture = fitted(scene, (round(height * 4 / 3), height))
        Image.fromarray(picture).save(path, quality=90)
    return paths


def read_scenes(paths: list[str]) -> list[np.ndarray]:
    """Read images; raise a `UserError` for one that is broken."""
    try:
        return [read_image(path) for path in paths]
    except BrokenImage as error:
        raise UserError(f"--images: {error}") from error


def print_table(title: str, table: pd.DataFrame) -> None:
    """Print a table under its title."""
    print(f"\n{title}\n{table.round(3).to_string(index=False, na_rep='')}")
