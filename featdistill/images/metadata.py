"""What an image file holds besides pixels: left out before decoding, except for the orientation.

Metadata must not decide whether pixels can be read: AI images carry whole workflows in text chunks, which
exceed Pillow's limits, and a checksum or an EXIF block may be damaged.
"""

import io
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

_EXIF_ORIENTATION = 0x0112
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# The chunks in which Pillow finds an orientation; of text chunks, those with one of these keywords.
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
_ORIENTED_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
_ORIENTED_INFO = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
# JPEG segments that change the pixels: of APPn, JFIF (0) and Adobe (14) say how colors are stored.
_JPEG_METADATA = {0xFE, *range(0xE1, 0xF0)} - {0xEE}
_JPEG_SCAN = 0xDA


def without_metadata(data: bytes) -> tuple[bytes, bytes]:
    """Split the bytes of an image file into those that decide its pixels and those that tell its orientation.

    Returns:
        Two image files. For most formats both are `data`; for a PNG, the first has no ancillary chunks, and
        the second is one pixel with the chunks that may hold an orientation, or empty without any.
    """
    if not data.startswith(_PNG_SIGNATURE):
        return data, data
    critical, oriented, size = [_PNG_SIGNATURE], [], len(_PNG_SIGNATURE)
    for kind, chunk in _png_chunks(data):
        size += len(chunk)
        if not kind[0] & 0x20:  # an upper-case first letter: pixels depend on it
            critical.append(chunk)
        elif kind == b"eXIf" or (kind in _TEXT_CHUNKS and chunk[8:].startswith(_ORIENTED_TEXTS)):
            oriented.append(chunk)
    if sum(map(len, critical)) < size:
        data = b"".join(critical)
    return data, _one_pixel_png(oriented) if oriented else b""


def orientation(image: Image.Image) -> int:
    """Return the orientation by EXIF or XMP, where Pillow finds one; damaged metadata counts as upright (1).

    So does a TIFF, which Pillow rotates while it reads the pixels.
    """
    if image.format == "TIFF" or _ORIENTED_INFO.isdisjoint(image.info):
        return 1
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # Pillow raises nearly anything for damaged bytes
        return 1


def png_orientation(oriented: bytes) -> int:
    """Return the orientation of a PNG, of the second file that `without_metadata` returns."""
    if not oriented:
        return 1
    try:
        with Image.open(io.BytesIO(oriented), formats=["PNG"]) as image:
            return orientation(image)
    except Exception:  # as above; text may also unpack to more than Pillow's limit
        return 1


def plain_jpeg(data: bytes) -> bytes:
    """Return a JPEG without EXIF, color profile, comments and the like, for a file that Pillow rejects."""
    parts, position = [data[:2]], 2
    while data[position : position + 1] == b"\xff":
        marker = data[position + 1 : position + 4]
        if len(marker) < 3 or marker[0] == _JPEG_SCAN:
            break
        end = position + 2 + int.from_bytes(marker[1:], "big")
        if marker[0] not in _JPEG_METADATA:
            parts.append(data[position:end])
        position = end
    return b"".join([*parts, data[position:]])


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the type and all bytes of each chunk; the last one may be cut short."""
    position = len(_PNG_SIGNATURE)
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        yield kind, data[position : position + 12 + length]
        if kind == b"IEND":
            return
        position += 12 + length


def _one_pixel_png(chunks: list[bytes]) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    pixel = chunk(b"IDAT", zlib.compress(b"\0\0"))
    return b"".join([_PNG_SIGNATURE, header, *chunks, pixel, chunk(b"IEND", b"")])
