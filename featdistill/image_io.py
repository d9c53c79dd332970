"""Bytes to pixels: files, members of zip archives read in place, broken images told apart from good ones.

Decoded images are (H, W, 3) uint8 RGB, upright: an EXIF orientation is applied, so that it cannot tell a
camera's picture from a generated one. Alpha is dropped, palettes and grey become RGB, 16-bit grey becomes
8-bit.
"""

import contextlib
import io
import os
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from featdistill.manifest import ARCHIVE_SEPARATOR

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
# Pillow's own limit for a decompression bomb: a quarter of a GiB of RGB samples.
MAX_PIXELS = 89_478_485
# No image of MAX_PIXELS pixels needs more: a member that claims more is a decompression bomb.
MAX_BYTES = 4 * MAX_PIXELS
_EXIF_ORIENTATION = 0x0112
# What turns an image upright, by its EXIF orientation (EXIF 2.32, tag 0x0112); 1 is upright already.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BrokenImage(Exception):
    """The image could not be read; the message says why, in one line."""


def read_bytes(location: str) -> bytes:
    """Return the bytes of a file, or of `archive.zip::member`.

    Raises:
        BrokenImage: the file, archive or member is missing or damaged, or larger than `MAX_BYTES`.
    """
    archive, separator, member = location.partition(ARCHIVE_SEPARATOR)
    try:
        if not separator:
            return Path(location).read_bytes()
        opened = _open_archive(archive, os.getpid())
        size = opened.getinfo(member).file_size
        if size > MAX_BYTES:
            raise BrokenImage(f"{size} bytes are more than the limit of {MAX_BYTES}")
        return opened.read(member)
    except KeyError as error:
        raise BrokenImage(f"no member {member} in {archive}") from error
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BrokenImage(_reason(error)) from error


def decode(data: bytes) -> np.ndarray:
    """Decode an image file's bytes to (H, W, 3) uint8 RGB.

    Baseline colour and grey JPEGs go through simplejpeg (libjpeg-turbo, the same pixels as Pillow's, faster);
    everything else goes through Pillow.

    Raises:
        BrokenImage: the bytes are no image, are truncated, or hold more than `MAX_PIXELS` pixels.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImage(
                    f"{image.width} x {image.height} pixels are more than the limit of {MAX_PIXELS}"
                )
            orientation = _orientation(image)
            if image.format == "JPEG" and image.mode in ("RGB", "L") and orientation not in _UPRIGHT:
                # A warning of the decoder stops simplejpeg; whether the file is broken, Pillow decides below.
                with contextlib.suppress(ValueError):
                    return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
            # Pillow opens a 16-bit grey PNG as "I" or "I;16", depending on its version.
            is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
            image = image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
            if image.mode.startswith("I") or image.mode == "F":
                grey = np.asarray(image, dtype=np.float64)
                grey = grey / 257 if is_16_bit or grey.max(initial=0) > 255 else grey
                return np.repeat(np.clip(np.rint(grey), 0, 255).astype(np.uint8)[..., None], 3, axis=2)
            return np.array(image.convert("RGB"))
    except BrokenImage:
        raise
    except Exception as error:  # damaged bytes make Pillow raise nearly anything (struct.error, TypeError)
        raise BrokenImage(_reason(error)) from error


def read_image(location: str) -> np.ndarray:
    """Read and decode one image: `decode(read_bytes(location))`."""
    return decode(read_bytes(location))


def limit_side(image: np.ndarray, max_side_px: int | None) -> np.ndarray:
    """Reduce an image whose longer side exceeds a limit to that limit, by area averaging.

    Args:
        image: (H, W, 3) uint8.
        max_side_px: the limit, or None for none.

    Returns:
        (h, w, 3) uint8; `image` itself where it is within the limit. A side may stay at up to 16 px to keep
        what is left of a narrow strip.
    """
    height, width = image.shape[:2]
    if max_side_px is None or max(height, width) <= max_side_px:
        return image
    factor = max_side_px / max(height, width)
    size = [max(round(side * factor), min(side, 16)) for side in (width, height)]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def encode_jpeg(image: np.ndarray, quality_0_100: int) -> bytes:
    """Encode (H, W, 3) uint8 RGB as a JPEG with 4:2:0 chroma."""
    settings = [cv2.IMWRITE_JPEG_QUALITY, quality_0_100]
    settings += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
    return cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), settings)[1].tobytes()


def without_extension(name: str) -> str:
    """Return a name without its image extension: `0a1b.jpg` is `0a1b`; `scan.v2` stays as it is."""
    front, extension = os.path.splitext(name)
    return front if extension.lower() in IMAGE_SUFFIXES else name


def list_images(folder: str | Path) -> list[Path]:
    """Return the image files below a folder, sorted by their relative path; hidden files are left out."""
    folder = Path(folder)
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; a damaged EXIF block says nothing of the pixels and counts as upright."""
    if "exif" not in image.info:
        return 1
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:
        return 1


@lru_cache(maxsize=32)
def _open_archive(archive: str, process: int) -> zipfile.ZipFile:
    """Open an archive once a process: handles shared over a fork would move each other's file position."""
    return zipfile.ZipFile(archive)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
