"""Bytes become upright RGB pixels, the same by either decoder, and damage is told from an image."""

import io
import os
import struct
import zipfile
import zlib

import cv2
import numpy as np
import pytest
from conftest import smooth_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from featdistill.images import archives as containers
from featdistill.images import reading as image_io
from featdistill.images.reading import BrokenImage, limit_side

ORIENTATION = 0x0112


def pixels(height: int = 24, width: int = 40, seed: int = 0) -> np.ndarray:
    """A smooth picture, (H, W, 3) uint8, so that a JPEG of it is close to it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def encode(image: np.ndarray | Image.Image, kind: str = "JPEG", **options) -> bytes:
    data = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(data, kind, **options)
    return data.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("quality", [30, 95])
def test_simplejpeg_and_pillow_give_equal_pixels(subsampling, progressive, quality):
    data = encode(pixels(33, 47), subsampling=subsampling, progressive=progressive, quality=quality)
    assert np.array_equal(image_io.decode(data), by_pillow(data))


def test_a_gray_jpeg_and_one_stored_as_rgb_give_pillows_pixels():
    gray = encode(Image.fromarray(pixels()).convert("L"))
    assert np.array_equal(image_io.decode(gray), by_pillow(gray))
    assert (np.ptp(image_io.decode(gray), axis=2) == 0).all()
    stored = encode(pixels(), keep_rgb=True, quality=95)
    assert np.array_equal(image_io.decode(stored), by_pillow(stored))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats_give_the_pixels_that_were_saved(kind, options):
    found = image_io.decode(encode(pixels(), kind, **options))
    assert np.array_equal(found, pixels())
    assert found.dtype == np.uint8 and found.flags.writeable and found.flags.c_contiguous


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", mode) for mode in ("L", "CMYK", "1")]
    + [("PNG", mode) for mode in ("L", "LA", "RGBA", "P", "1")]
    + [("TIFF", mode) for mode in ("L", "LA", "RGBA", "P", "1", "CMYK")],
)
def test_every_mode_becomes_three_channels_as_pillow_converts_it(kind, mode):
    data = encode(Image.fromarray(pixels()).convert(mode), kind)
    found = image_io.decode(data)
    assert found.shape == (24, 40, 3) and found.dtype == np.uint8
    assert np.array_equal(found, by_pillow(data))


def test_alpha_is_dropped_not_blended():
    image = np.dstack([pixels(), np.zeros((24, 40), np.uint8)])
    assert np.array_equal(image_io.decode(encode(image, "PNG")), pixels())


def test_a_palette_gives_its_colors():
    image = Image.fromarray(pixels()).quantize(16)
    assert np.array_equal(image_io.decode(encode(image, "PNG")), np.array(image.convert("RGB")))
    assert len(np.unique(image_io.decode(encode(image, "GIF")).reshape(-1, 3), axis=0)) <= 16


def test_a_cmyk_jpeg_has_the_colors_of_its_rgb_picture():
    data = encode(Image.fromarray(pixels()).convert("CMYK"), quality=95)
    assert np.abs(image_io.decode(data).astype(int) - pixels()).mean() < 4


@pytest.mark.parametrize("top", [65535, 4000, 200])
def test_16_bit_gray_is_scaled_by_its_own_range_whatever_it_holds(top):
    gray = np.linspace(0, top, 24 * 40).reshape(24, 40).astype(np.uint16)
    for data in (encode(gray, "PNG"), encode(gray, "TIFF")):
        found = image_io.decode(data)
        assert np.array_equal(found[..., 0], np.rint(gray / 257).astype(np.uint8))
        assert (np.ptp(found, axis=2) == 0).all()


def test_16_bit_color_is_read_as_8_bit_color():
    color = pixels().astype(np.uint16) * 257
    written, data = cv2.imencode(".png", color[..., ::-1])
    assert written
    assert np.abs(image_io.decode(data.tobytes()).astype(int) - pixels()).max() <= 1


UPRIGHT = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].transpose(1, 0, 2),
    8: lambda image: np.rot90(image),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_an_exif_orientation_is_applied(orientation, kind):
    options = {"PNG": {}, "TIFF": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}}[kind]
    found = image_io.decode(encode(pixels(), kind, exif=oriented(orientation), **options))
    stored = image_io.decode(encode(pixels(), kind, **options))
    assert np.array_equal(found, UPRIGHT[orientation](stored))


@pytest.mark.parametrize("orientation", [0, 9, 60000])
def test_an_orientation_that_does_not_exist_leaves_the_image_as_it_is(orientation):
    data = encode(pixels(), exif=oriented(orientation))
    assert np.array_equal(image_io.decode(data), by_pillow(data))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
@pytest.mark.parametrize("damage", [b"\xff" * 8, b"MM\0\x2a\0\0\0\xff", b"II\x2a\0\xff\xff\xff\x7f"])
def test_damaged_exif_leaves_the_image_readable(kind, damage):
    whole = encode(pixels(), kind, exif=oriented(6))
    place = whole.index(b"MM\0\x2a\0\0\0\x08")
    damaged = whole[:place] + damage + whole[place + 8 :]
    assert np.array_equal(image_io.decode(damaged), image_io.decode(encode(pixels(), kind)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_a_truncated_image_is_broken(kind):
    whole = encode(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8), kind)
    for length in (0, 3, 30, len(whole) // 2, len(whole) * 9 // 10):
        with pytest.raises(BrokenImage) as error:
            image_io.decode(whole[:length])
        assert str(error.value) and "\n" not in str(error.value)


def test_a_jpeg_without_its_last_bytes_is_broken_and_one_with_bytes_after_its_end_is_not():
    whole = encode(pixels())
    with pytest.raises(BrokenImage, match="truncated"):
        image_io.decode(whole[:-2])
    assert np.array_equal(image_io.decode(whole + b"trailing"), image_io.decode(whole))


@pytest.mark.parametrize(
    "data", [b"", b"<html>401 Unauthorized</html>", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\0" * 99]
)
def test_what_is_no_image_is_broken(data):
    with pytest.raises(BrokenImage):
        image_io.decode(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_460, 20_000, 2_000_000_000])
def test_an_image_that_claims_too_many_pixels_is_broken_before_it_is_decoded(side):
    assert side * side > image_io.MAX_PIXELS
    with pytest.raises(BrokenImage, match=r"limit|exceeds"):
        image_io.decode(png_that_claims(side, side))


Image.init()
SEEDS = [
    encode(pixels(), kind, **({"exif": oriented(6)} if kind in ("JPEG", "PNG", "WEBP") else {}))
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF")
    if kind in Image.SAVE  # AVIF came with Pillow 11.3
]


@settings(deadline=None, max_examples=300)
@pytest.mark.filterwarnings("ignore")
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 0.999), st.binary(max_size=4)), max_size=4),
    st.floats(0.5, 1),
)
def test_damaged_bytes_are_an_image_or_broken_and_nothing_else(seed, changes, kept):
    data = bytearray(seed)
    for place, new in changes:
        start = int(place * len(data))
        data[start : start + len(new)] = new
    try:
        image = image_io.decode(bytes(data[: int(kept * len(data))]))
    except BrokenImage:
        return
    assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "a.zip"
    noise = np.random.default_rng(0).integers(0, 40, 5000, dtype=np.uint8).tobytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("images/a.png", encode(pixels(), "PNG"))
        file.writestr("images/b::c.jpg", b"second")
        file.writestr("noise", noise)
    return path


def test_members_of_archives_are_read_like_files(archive, tmp_path):
    (tmp_path / "a.png").write_bytes(encode(pixels(), "PNG"))
    for location in (f"{archive}::images/a.png", str(tmp_path / "a.png")):
        assert np.array_equal(image_io.read_image(location), pixels())
    assert image_io.read_bytes(f"{archive}::images/b::c.jpg") == b"second"


def test_what_cannot_be_read_is_broken_and_named(archive, tmp_path):
    for location, message in (
        (f"{archive}::images/none.png", "no member images/none.png in"),
        (f"{tmp_path}/none.zip::a.png", "none.zip"),
        (f"{tmp_path}/none.png", "none.png"),
        (str(tmp_path), "is a folder"),
        ("a\0b.png", "null byte"),
    ):
        with pytest.raises(BrokenImage, match=message):
            image_io.read_bytes(location)
    (tmp_path / "page.zip").write_bytes(b"<html>")
    with pytest.raises(BrokenImage, match="not a zip file"):
        image_io.read_bytes(f"{tmp_path}/page.zip::a.png")


def test_a_damaged_member_is_broken_and_its_neighbors_are_not(archive):
    data = bytearray(archive.read_bytes())
    start = data.index(b"noise") + 5
    data[start : start + 400] = b"\xff" * 400
    archive.write_bytes(data)
    with pytest.raises(BrokenImage):
        image_io.read_bytes(f"{archive}::noise")
    assert np.array_equal(image_io.read_image(f"{archive}::images/a.png"), pixels())


def test_a_member_larger_than_any_image_is_not_unpacked(archive, monkeypatch):
    monkeypatch.setattr(containers, "MAX_BYTES", 4999)
    with pytest.raises(BrokenImage, match="5000 bytes are more than the limit of 4999"):
        image_io.read_bytes(f"{archive}::noise")
    assert image_io.read_bytes(f"{archive}::images/b::c.jpg") == b"second"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_process_opens_archives_of_its_own(archive):
    location = f"{archive}::images/a.png"
    image_io.read_bytes(location)
    mine = image_io._open_archive(str(archive), os.getpid())
    child = os.fork()
    if child == 0:
        image_io.read_bytes(location)
        theirs = image_io._open_archive(str(archive), os.getpid())
        os._exit(int(theirs is mine or theirs.file.fileno() == mine.file.fileno()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_folder_is_listed_by_path_without_hidden_files(tmp_path):
    names = [
        "b/2.JPG",
        "b/10.png",
        "a.webp",
        "c/d/e.avif",
        "notes.txt",
        ".hidden.jpg",
        ".cache/f.jpg",
        "g.jpg/h.gif",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in image_io.list_images(tmp_path)]
    assert found == ["a.webp", "b/10.png", "b/2.JPG", "c/d/e.avif", "g.jpg/h.gif"]


def test_a_jpeg_written_by_us_is_color_subsampled_and_close_to_the_picture():
    picture = pixels()
    data = image_io.encode_jpeg(picture, 95)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "JPEG" and image.layer[0][1:3] == (2, 2)
    assert np.abs(image_io.decode(data).astype(int) - picture).mean() < 12


def test_the_longer_side_is_limited_and_the_ratio_kept():
    image = smooth_picture(0, 60, 90)
    assert limit_side(image, None) is image and limit_side(image, 90) is image
    assert limit_side(image, 45).shape == (30, 45, 3)
    assert limit_side(image[:, :20], 30).shape == (30, 16, 3)
    assert limit_side(image[:9], 45).shape == (9, 45, 3)
    np.testing.assert_allclose(limit_side(image, 45).mean(), image.mean(), atol=0.5)


def test_a_reason_is_the_same_in_every_run():
    reasons = set()
    for _ in range(2):
        with pytest.raises(BrokenImage) as error:
            image_io.decode(b"no image at all")
        reasons.add(str(error.value))
    assert len(reasons) == 1 and "0x" not in reasons.pop()
