"""Properties of an image file that need no pixels: container, size, compression, metadata blocks.

These are the features of the audit's classifier. Except for the number of bytes, which is that of the
compressed picture, they do not depend on its content; how well they tell real from generated images is how
well a detector can score that has learned nothing about either.
"""

import hashlib
import io
import os
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
from PIL import Image, JpegImagePlugin

from data_prep.duplicates.near import is_flat, perceptual_hash, thumbnail
from featdistill.images import reading as image_io
from featdistill.images.formats import IMAGE_SUFFIXES
from featdistill.images.metadata import without_metadata

NUMERIC = ("width", "height", "aspect", "megapixels", "bytes", "bytes_per_pixel", "jpeg_quality")
CATEGORICAL = ("container", "mode", "bit_depth", "chroma", "jpeg_tables", "progressive", "exif", "icc")
FEATURES = NUMERIC + CATEGORICAL

_CHROMA = {0: "4:4:4", 1: "4:2:2", 2: "4:2:0"}
# Suffixes that differ from the name of their container.
_CONTAINERS = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".pjpeg", ".pjp"), "JPEG"),
    **{".tif": "TIFF", ".apng": "PNG", ".dib": "BMP", ".avifs": "AVIF", ".heic": "HEIF", ".hif": "HEIF"},
}
SMALL_PX = 64
EXTREME_ASPECT = 4.0


@dataclass(slots=True)
class FileFacts:
    """Properties of one image file."""

    fault: str = ""  # why there are none
    container: str = ""
    width: int = 0
    height: int = 0
    bytes: int = 0
    mode: str = ""
    bit_depth: str = ""
    chroma: str = ""
    jpeg_tables: str = ""  # short digest of the quantization tables
    jpeg_quality: float = float("nan")  # 1 to 100, where libjpeg's tables have the same sum; NaN for others
    progressive: str = ""
    exif: str = ""
    icc: str = ""
    digest: str = ""  # of the file's bytes
    hash: int | None = None  # perceptual; None if the picture is flat
    suspicions: tuple[str, ...] = ()  # what a person should look at


def measure(location: str) -> FileFacts:
    """Return the properties of an image file; an image that cannot be read has a `fault`."""
    try:
        data = image_io.read_bytes(location)
        # First, since it refuses damaged and oversized images.
        small = thumbnail(image_io.decode(data))
        with _open(data) as image:
            facts = _facts(image, data)
            facts.suspicions = tuple(_suspicions(image, location, small))
    except image_io.BrokenImage as error:
        return FileFacts(fault=str(error))
    except Exception as error:  # Pillow can raise nearly anything for damaged metadata
        return FileFacts(fault=f"metadata: {type(error).__name__}: {' '.join(str(error).split())}")
    facts.hash = perceptual_hash(small)
    return facts


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except Exception:  # its metadata are damaged, or more than Pillow's limits
        return Image.open(io.BytesIO(without_metadata(data)[0]))


def feature_table(facts: list[FileFacts]) -> pd.DataFrame:
    """Return a frame with all of `FEATURES`, one row per image: floats, and text that may be empty."""
    table = pd.DataFrame([{**asdict(one), "suspicions": "; ".join(one.suspicions)} for one in facts])
    pixels = (table["width"] * table["height"]).astype(float).where(table["fault"] == "")
    table["aspect"] = table["width"] / table["height"].where(table["height"] > 0)
    table["megapixels"] = pixels / 1e6
    table["bytes_per_pixel"] = table["bytes"] / pixels
    return table


def codes(column: pd.Series, limit: int = 200) -> np.ndarray:
    """Return categories as numbers, from 0 for the most frequent; all after the first `limit` share one."""
    counts = column.value_counts()
    ranked = sorted(counts.index, key=lambda value: (-counts[value], value))
    code = {value: min(rank, limit) for rank, value in enumerate(ranked)}
    return column.map(code).to_numpy(dtype=np.float64)


def quality_of_tables(tables: dict[int, list[int]]) -> float:
    """Return the libjpeg quality, 1 to 100, whose luminance table has the closest sum."""
    return float(1 + np.abs(_table_sums() - sum(tables[min(tables)])).argmin())


@lru_cache(maxsize=1)
def _table_sums() -> np.ndarray:
    """Return the sums of libjpeg's luminance tables at quality 1 to 100."""
    sums = []
    for quality in range(1, 101):
        data = io.BytesIO()
        Image.new("L", (8, 8)).save(data, "JPEG", quality=quality)
        with Image.open(data) as image:
            sums.append(sum(image.quantization[0]))
    return np.array(sums)


def _facts(image: Image.Image, data: bytes) -> FileFacts:
    facts = FileFacts(
        container=image.format or "",
        width=image.width,
        height=image.height,
        bytes=len(data),
        mode=image.mode,
        bit_depth=_bit_depth(image, data),
        exif="yes" if image.info.get("exif") else "no",
        icc="yes" if image.info.get("icc_profile") else "no",
        digest=hashlib.blake2b(data, digest_size=16).hexdigest(),
    )
    tables = getattr(image, "quantization", None)
    if image.format in ("JPEG", "MPO") and tables:
        text = repr(sorted((number, list(table)) for number, table in tables.items()))
        facts.jpeg_tables = hashlib.sha256(text.encode()).hexdigest()[:8]
        facts.jpeg_quality = quality_of_tables(tables)
        facts.chroma = _CHROMA.get(JpegImagePlugin.get_sampling(image), "other")
        if len(image.getbands()) == 1:
            facts.chroma = "none"
    facts.progressive = "yes" if image.info.get("progressive") or image.info.get("interlace") else "no"
    return facts


def _bit_depth(image: Image.Image, data: bytes) -> str:
    """Return the bits per sample; those of a PNG from byte 24 of its header, since the mode is ambiguous."""
    if image.format == "PNG":
        return str(data[24])
    return {"1": "1", "F": "32", "I": "32"}.get(image.mode, "16" if image.mode.startswith("I;16") else "8")


def _suspicions(image: Image.Image, location: str, small: np.ndarray) -> list[str]:
    found = []
    suffix = os.path.splitext(location)[1].lower()
    claimed = _CONTAINERS.get(suffix, suffix[1:].upper())
    # Pillow calls a JPEG with several pictures MPO.
    actual = "JPEG" if image.format == "MPO" else image.format
    if suffix in IMAGE_SUFFIXES and claimed != actual:
        found.append(f"{suffix} that is {actual}")
    short, long = sorted(image.size)
    if short < SMALL_PX:
        found.append(f"shorter side below {SMALL_PX} px")
    if long > EXTREME_ASPECT * short:
        found.append(f"longer than {EXTREME_ASPECT:g}:1")
    if is_flat(small):
        found.append("flat")
    if image.mode == "CMYK":
        found.append("CMYK")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        found.append("animated")
    return found
