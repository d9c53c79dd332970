"""Metadata never decides whether pixels can be read, and an orientation counts wherever it stands."""

import io
import os
import struct
import sys
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin
from test_image_io import encode, oriented, pixels

from featdistill.images import formats
from featdistill.images.metadata import plain_jpeg, without_metadata
from featdistill.images.reading import BrokenImage, decode

PICTURE = pixels()
PNG = encode(PICTURE, "PNG")
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
WORKFLOW = b'{"node":1}' * 150_000


def chunk(kind: bytes, data: bytes, crc_error: int = 0) -> bytes:
    crc = zlib.crc32(kind + data) ^ crc_error
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def with_chunk(new: bytes, *, after_pixels: bool = False, png: bytes = PNG) -> bytes:
    position = png.index(b"IEND") - 4 if after_pixels else 33
    return png[:position] + new + png[position:]


def raw_profile(exif: bytes) -> bytes:
    """EXIF as ImageMagick stores it in a text chunk."""
    return b"\nexif\n%8d\n%s\n" % (len(exif), exif.hex().encode())


CHUNKS = {
    "zTXt": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(WORKFLOW)),
    "iTXt": chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(WORKFLOW)),
    "tEXt": chunk(b"tEXt", b"prompt\0" + WORKFLOW),
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(WORKFLOW)),
    "iCCP": chunk(b"iCCP", b"icc\0\0" + zlib.compress(os.urandom(1_100_000))),
    "many texts": chunk(b"zTXt", b"part\0\0" + zlib.compress(WORKFLOW[:900_000])) * 80,
    "short pHYs": chunk(b"pHYs", b"\0"),
    "bad zTXt": chunk(b"zTXt", b"workflow\0\0not deflated"),
    "checksum of tEXt": chunk(b"tEXt", b"prompt\0a cat", crc_error=1),
    "checksum of gAMA": chunk(b"gAMA", struct.pack(">I", 45455), crc_error=1),
    "checksum of eXIf": chunk(b"eXIf", oriented(6).tobytes()[6:], crc_error=1),
    "unknown chunk": chunk(b"caBX", os.urandom(100), crc_error=1),
}


@pytest.mark.parametrize("after_pixels", [False, True])
@pytest.mark.parametrize("name", CHUNKS)
def test_a_png_is_read_whatever_its_ancillary_chunks_hold(name, after_pixels):
    data = with_chunk(CHUNKS[name], after_pixels=after_pixels)
    assert np.array_equal(decode(data), PICTURE)


def test_a_png_without_metadata_is_not_copied_and_a_damaged_critical_chunk_is_broken():
    assert without_metadata(PNG)[0] is PNG
    start = PNG.index(b"IDAT")
    damaged = PNG[: start + 20] + bytes([PNG[start + 20] ^ 255]) + PNG[start + 21 :]
    with pytest.raises(BrokenImage):
        decode(damaged)
    for end in (len(PNG) // 2, start + 6, 20):
        with pytest.raises(BrokenImage):
            decode(PNG[:end])


@pytest.mark.parametrize("after_pixels", [False, True])
@pytest.mark.parametrize(
    "new",
    [
        chunk(b"eXIf", oriented(6).tobytes()[6:]),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw_profile(oriented(6).tobytes()))),
        chunk(b"tEXt", b"Raw profile type exif\0" + raw_profile(oriented(6).tobytes())),
    ],
    ids=["eXIf", "XMP", "compressed XMP", "zTXt profile", "tEXt profile"],
)
def test_the_orientation_of_a_png_is_found_before_and_after_its_pixels(new, after_pixels):
    data = with_chunk(CHUNKS["zTXt"] + new, after_pixels=after_pixels)
    assert np.array_equal(decode(data), cv2.rotate(PICTURE, cv2.ROTATE_90_CLOCKWISE))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
def test_the_orientation_in_xmp_is_applied(kind):
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[700] = XMP
    options = {"tiffinfo": info} if kind == "TIFF" else {"xmp": XMP, "quality": 95}
    plain = decode(encode(PICTURE, kind, **({} if kind == "TIFF" else {"quality": 95})))
    assert np.array_equal(
        decode(encode(PICTURE, kind, **options)), cv2.rotate(plain, cv2.ROTATE_90_CLOCKWISE)
    )


def test_the_orientation_of_exif_counts_more_than_that_of_xmp():
    data = encode(PICTURE, "JPEG", xmp=XMP, exif=oriented(3))
    assert np.array_equal(decode(data), cv2.rotate(decode(encode(PICTURE)), cv2.ROTATE_180))


def test_a_jpeg_loses_its_metadata_and_keeps_its_pixels():
    exif = oriented(1)
    data = encode(PICTURE, "JPEG", exif=exif, comment=b"hello", icc_profile=os.urandom(70_000))
    plain = plain_jpeg(data)
    assert len(plain) < len(data) - 70_000
    assert np.array_equal(decode(plain), decode(data))
    cmyk = encode(Image.fromarray(PICTURE).convert("CMYK"), "JPEG", exif=exif)
    assert np.array_equal(decode(plain_jpeg(cmyk)), decode(cmyk))


def gray_tiff(array: np.ndarray, photometric: int, bits: int = 16, big_endian: bool = False) -> bytes:
    """A TIFF of one uncompressed strip of unsigned gray."""
    height, width = array.shape
    order = ">" if big_endian else "<"
    if bits == 12:
        flat = array.astype(np.uint32).reshape(-1, 2)
        packed = (flat[:, 0] << 12) | flat[:, 1]
        strip = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], 1).astype(np.uint8).tobytes()
    else:
        strip = array.astype(f"{order}u2").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: height}
    tags[279] = len(strip)
    start = 8 + 2 + 12 * len(tags) + 4
    tags[273] = start
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = (b"MM\0*" if big_endian else b"II*\0") + struct.pack(f"{order}IH", 8, len(tags))
    return header + entries + b"\0\0\0\0" + strip


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("photometric", [0, 1])
def test_a_16_bit_tiff_is_black_where_its_photometric_interpretation_says(photometric, big_endian):
    values = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
    found = decode(gray_tiff(values, photometric, big_endian=big_endian))
    expected = np.rint(values / 257)
    assert np.array_equal(found[..., 0], 255 - expected if photometric == 0 else expected)


def test_a_12_bit_tiff_uses_the_whole_range():
    values = np.linspace(0, 4095, 24 * 40).reshape(24, 40).astype(np.uint16)
    found = decode(gray_tiff(values, 1, bits=12))
    assert np.array_equal(found[..., 0], np.rint(values / (4095 / 255)))


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate"])
def test_a_compressed_16_bit_tiff_whose_zero_is_white_is_inverted(compression):
    values = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[262] = 0
    data = encode(Image.fromarray(values), "TIFF", compression=compression, tiffinfo=info)
    with Image.open(io.BytesIO(data)) as image:
        stored = image.tag_v2[262]
    expected = np.rint(values / 257)
    assert np.array_equal(decode(data)[..., 0], 255 - expected if stored == 0 else expected)


def test_a_16_bit_png_with_text_keeps_its_pixels():
    values = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", "a cat")
    data = encode(Image.fromarray(values), "PNG", pnginfo=info)
    assert np.array_equal(decode(data)[..., 0], np.rint(values / 257))


def heic(picture: np.ndarray) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    data = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(picture)).save(data, quality=100, chroma=444)
    return data.getvalue()


def test_heic_is_read_with_pillow_heif_and_says_how_to_install_it_without(monkeypatch):
    picture = pixels(64, 96)
    data = heic(picture)
    assert formats.format_of(data[:64]) == "HEIF"
    assert np.abs(decode(data).astype(int) - picture).mean() < 3
    with pytest.raises(BrokenImage, match="Error"):
        decode(data[:200])
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    formats.has_heif.cache_clear()
    with pytest.raises(BrokenImage, match="pip install pillow-heif"):
        decode(data)
    formats.has_heif.cache_clear()


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\xff\x0a\0\0", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"8BPS\0\1", "Photoshop"),
    ],
)
def test_an_unsupported_format_is_named(start, name):
    with pytest.raises(BrokenImage, match=f"{name} is not supported; convert it"):
        decode(start + bytes(100))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"])
def test_formats_are_told_by_their_first_bytes(kind):
    assert formats.format_of(encode(PICTURE, kind)[: formats.HEAD_BYTES]) == kind


@pytest.mark.parametrize(
    "data",
    [b"", b"BM is how this text starts, and it is long enough", b"II", b"\0\0\0\x18ftypisom\0\0\2\0isomiso2"],
)
def test_other_files_are_no_images(data):
    assert formats.format_of(data) == ""
