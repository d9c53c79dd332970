"""Bytes to pixels: files, members of archives and rows of parquet files, read in place and checked.

| location | read from |
|---|---|
| `folder/name.jpg` | a file |
| `archive.zip::member`, `archive.tar::member` | a member, by `featdistill.images.archives` |
| `part.parquet::17` | the image of row 17, by `featdistill.images.parquet` |
| any of these at an address such as `s3://bucket/name.jpg` | `featdistill.remote_files` |

Decoded images are (H, W, 3) uint8 RGB. The format is recognized by the bytes, not by the file's name:

| image | becomes |
|---|---|
| orientation by EXIF or XMP | applied, so that it cannot tell a camera's picture from a generated one |
| gray, palette, black and white | RGB |
| alpha, or a transparent color | dropped, not blended: the colors below it count |
| CMYK | RGB without a color profile; a CMYK or YCCK JPEG is assumed to be inverted, as Adobe writes it |
| 16-bit gray | divided by 257, whatever range it uses; 16-bit color: the upper 8 bits |
| 12-bit gray | scaled by its own range |
| gray whose zero is white | inverted |
| 32-bit gray | like 8-bit up to 255, else like 16-bit; floats up to 1 as shares of white |
| several frames or pages | the first; of an animated PNG, the fallback picture |
| a color profile, text, other metadata | ignored, even if damaged |

HEIC images need the optional package pillow-heif. An image of more than `MAX_PIXELS` pixels, a file or member
of more than `MAX_BYTES`, a truncated image, and a format that is not supported raise `BrokenImage`. Decoding
needs up to about 12 bytes per pixel.
"""

import contextlib
import io
import os
import re
import stat
import threading
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image, TiffImagePlugin

from featdistill import remote_files
from featdistill.images.archives import MAX_BYTES, Archive, ArchiveError, check_size
from featdistill.images.formats import (
    FORMATS,
    HEAD_BYTES,
    HEIF,
    RAW_SUFFIXES,
    format_of,
    refusal,
)
from featdistill.images.listing import ARCHIVE_SEPARATOR, file_path, image_files, list_folder, split_location
from featdistill.images.metadata import orientation, plain_jpeg, png_orientation, without_metadata
from featdistill.images.parquet import ParquetImages

PARQUET_SUFFIX = ".parquet"
# Pillow's own limit for a decompression bomb: a quarter of a GiB of RGB samples.
MAX_PIXELS = 89_478_485
_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_WHITE_IS_ZERO = 0  # a TIFF's PhotometricInterpretation
_PHOTOMETRIC, _BITS_PER_SAMPLE = 0x0106, 0x0102
# Operations that turn an image upright, by EXIF orientation (EXIF 2.32, tag 0x0112); 1 is upright already.
_UPRIGHT = {
    2: lambda image: cv2.flip(image, 1),
    3: lambda image: cv2.rotate(image, cv2.ROTATE_180),
    4: lambda image: cv2.flip(image, 0),
    5: cv2.transpose,
    6: lambda image: cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE),
    7: lambda image: cv2.transpose(cv2.rotate(image, cv2.ROTATE_180)),
    8: lambda image: cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE),
}
# Two threads must not read the pixels of one Pillow image at once.
_READING = threading.Lock()
# Pillow reads 16-bit gray whose zero is white with the small end first only, and misses that it is inverted.
TiffImagePlugin.OPEN_INFO.setdefault(
    (TiffImagePlugin.MM, _WHITE_IS_ZERO, (1,), 1, (16,), ()), ("I;16B", "I;16B")
)


class BrokenImage(Exception):
    """The image could not be read; the message says why in one line."""


class TooManyPixels(BrokenImage):
    """The image is larger than allowed; its pixels were not decoded."""


class JpegHeader(NamedTuple):
    """Size in px, and how chroma is stored: `444`, `422`, `420`, ..., or `Gray` without any."""

    height: int
    width: int
    subsampling: str


def read_bytes(location: str) -> bytes:
    """Return the bytes of a file, a member of an archive or a row of a parquet file, by its location.

    Raises:
        BrokenImage: it is missing, refused, damaged, or larger than `MAX_BYTES`.
        UserError: nothing in its storage can be read; see `featdistill.remote_files`.
    """
    if location.lower().endswith(RAW_SUFFIXES):
        raise BrokenImage(refusal(location, b""))
    archive, member = split_location(location)
    try:
        if member is None:
            return _read_file(location)
        return _open_archive(archive, os.getpid()).read(member)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        path = file_path(archive)
        if path != archive:  # its name is escaped
            return read_bytes(path + ("" if member is None else ARCHIVE_SEPARATOR + member))
        # A folder's name may look like that of an archive.
        if member is not None and os.path.isfile(location):
            return _read_file(location)
        raise BrokenImage(_reason(error)) from error
    except ArchiveError as error:
        raise BrokenImage(" ".join(str(error).split())) from error
    except (OSError, ValueError) as error:
        raise BrokenImage(_reason(error)) from error


def check_access(locations: Iterable[str]) -> None:
    """Check that what these locations name in object storage may be read; see `remote_files.check_access`."""
    remote_files.check_access(split_location(each)[0] for each in locations if remote_files.is_remote(each))


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file's bytes to (H, W, 3) uint8 RGB, upright; see the top of this module.

    Color and gray JPEGs go through simplejpeg (the same pixels as Pillow's, faster), the rest through Pillow.

    Raises:
        TooManyPixels: by its header, the image has more than `max_pixels`, or `MAX_PIXELS`.
        BrokenImage: the bytes are not an image, or are truncated.
    """
    is_jpeg = data.startswith(_JPEG_START)
    if not is_jpeg and (reason := refusal("", data[:HEAD_BYTES])):
        raise BrokenImage(reason)
    try:
        return _decode(data, max_pixels)
    except BrokenImage:
        raise
    except Image.DecompressionBombError as error:  # far too many: Pillow refuses to open it
        raise TooManyPixels(_reason(error)) from error
    except Exception as error:  # Pillow raises nearly anything for damaged bytes (struct.error, TypeError)
        if is_jpeg and (plain := plain_jpeg(data)) != data:
            with contextlib.suppress(Exception):
                return _decode(plain, max_pixels)
        raise BrokenImage(_reason(error)) from error


def read_image(location: str) -> np.ndarray:
    """Read and decode one image: `decode(read_bytes(location))`."""
    return decode(read_bytes(location))


def from_pillow(image: Image.Image) -> np.ndarray:
    """Return a Pillow image as `decode` returns the file that it was opened from; it is not changed.

    Raises:
        BrokenImage: its file is truncated or closed, or it has more than `MAX_PIXELS` pixels.
    """
    _check_pixels(image)
    try:
        with _READING:
            image.load()
        return _upright(_pixels(image), orientation(image))
    except Exception as error:  # as above
        raise BrokenImage(_reason(error)) from error


def limit_side(image: np.ndarray, max_side_px: int | None) -> np.ndarray:
    """Reduce (H, W, 3) uint8 whose longer side exceeds a limit to that limit, by area averaging.

    Returns `image` itself if it is within the limit. No side is reduced below 16 px, for narrow strips.
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


def list_images(folder: str | Path) -> list[Path]:
    """Return the files below a folder that could be images, ordered by relative path; see `listing`."""
    return [Path(folder, file) for file in image_files(folder, list_folder(folder).files)]


def upright_size(data: bytes) -> tuple[int, int]:
    """Return (height, width) of the decoded image, from the file's header alone.

    Raises:
        BrokenImage: the header cannot be read.
    """
    try:
        image, turn, _ = _open(data)
        with image:
            return (image.width, image.height) if turn in (5, 6, 7, 8) else (image.height, image.width)
    except Exception as error:  # as above
        raise BrokenImage(_reason(error)) from error


def plain_jpeg_header(data: bytes) -> JpegHeader | None:
    """Return the header of a JPEG of which any decoder makes the same picture; None for all other bytes.

    It is gray or YCbCr, upright, of at most `MAX_PIXELS`, and ends where a JPEG ends.
    """
    if not (data.startswith(_JPEG_START) and data.endswith(_JPEG_END)):
        return None
    with contextlib.suppress(Exception):  # as above
        height, width, colors, subsampling = simplejpeg.decode_jpeg_header(data)
        image, turn, _ = _open(data)
        with image:
            is_plain = image.format == "JPEG" and colors in ("YCbCr", "Gray") and turn not in _UPRIGHT
        if is_plain and height * width <= MAX_PIXELS:
            return JpegHeader(height, width, subsampling)
    return None


def _open(data: bytes) -> tuple[Image.Image, int, bytes]:
    """Return an image whose pixels are not read yet, its orientation, and the bytes it is read from."""
    data, oriented = without_metadata(data)
    is_heif = not data.startswith(_JPEG_START) and format_of(data[:HEAD_BYTES]) == HEIF
    formats = [HEIF] if is_heif else FORMATS
    image = Image.open(io.BytesIO(data), formats=formats)
    return image, orientation(image) if oriented is data else png_orientation(oriented), data


def _decode(data: bytes, max_pixels: int) -> np.ndarray:
    image, turn, data = _open(data)
    with image:
        _check_pixels(image, max_pixels)
        pixels = _jpeg_pixels(data) if image.format == "JPEG" and image.mode in ("RGB", "L") else None
        pixels = _pixels(image) if pixels is None else pixels
    return _upright(pixels, turn)


def _check_pixels(image: Image.Image, max_pixels: int = MAX_PIXELS) -> None:
    limit = min(max_pixels, MAX_PIXELS)
    if image.width * image.height > limit:
        size = f"{image.width} x {image.height} pixels"
        raise TooManyPixels(f"{size} are more than the limit of {limit}")


def _upright(pixels: np.ndarray, turn: int) -> np.ndarray:
    return _UPRIGHT[turn](pixels) if turn in _UPRIGHT else pixels


def _jpeg_pixels(data: bytes) -> np.ndarray | None:
    # simplejpeg stops at any warning of the decoder; Pillow then decides whether the file is broken.
    with contextlib.suppress(ValueError):
        return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    return None


def _pixels(image: Image.Image) -> np.ndarray:
    """Return an image of any mode as (H, W, 3) uint8."""
    if not image.mode.startswith(("I", "F")):
        if "transparency" in image.info:  # Pillow would warn that it is dropped
            image = image.copy()
            del image.info["transparency"]
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    # Pillow opens a 16-bit gray PNG as "I" or "I;16", depending on its version.
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    gray = np.asarray(image)
    if gray.dtype.kind == "f":
        gray = np.nan_to_num(gray)
        if gray.max() <= 1:
            gray = gray * np.float32(255)
        gray = np.rint(gray)
    top = 65535 if is_16_bit or gray.max() > 255 else 255
    tags = getattr(image, "tag_v2", {})
    if is_16_bit and tags.get(_BITS_PER_SAMPLE) == (12,):
        top = 4095
    gray = np.clip(gray, 0, top).astype(np.uint16)
    if top > 255:
        # By a table: dividing all pixels would need eight times the memory.
        step = top / 255
        gray = np.rint(np.arange(top + 1) / step).astype(np.uint8)[gray]
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts 8 bits and fewer
        gray = 255 - gray
    return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=2)


def _read_file(path: str) -> bytes:
    if remote_files.is_remote(path):
        return remote_files.read(path, MAX_BYTES)
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        os.listdir(path)  # a listing includes a folder that cannot be listed: that is the reason
        raise BrokenImage(f"{path} is a folder")
    # Reading a pipe could block forever, and some devices never end.
    if not stat.S_ISREG(status.st_mode):
        raise BrokenImage(f"{path} is a device or a pipe")
    check_size(status.st_size)
    with open(path, "rb") as file:
        return file.read()


@lru_cache(maxsize=32)
def _open_archive(archive: str, process: int) -> Archive | ParquetImages:
    """Open an archive once per process: forks that share a handle would move each other's position."""
    is_parquet = archive.lower().endswith(PARQUET_SUFFIX)
    return ParquetImages(archive) if is_parquet else Archive(archive)


def _reason(error: Exception) -> str:
    # Some errors name the object they read from by its address, which differs from run to run.
    text = re.sub(r" ?<[^<>]* at 0x[0-9a-fA-F]+>", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
