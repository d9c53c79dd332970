"""Odd and hostile images become pixels as `image_io` says, or are broken; no run with others is stopped."""

import io
import os
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from test_image_io import UPRIGHT, encode, oriented, pixels, png_that_claims

from data_prep import folders, pack
from featdistill.images import archives as containers
from featdistill.images.reading import BrokenImage, decode, read_image
from featdistill.records.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[2]
FIRST, SECOND = pixels(seed=1), pixels(seed=2)


@pytest.mark.parametrize(("kind", "name"), [("PNG", "a.jpg"), ("JPEG", "a.png"), ("WEBP", "a.bmp")])
def test_what_the_bytes_are_counts_and_not_the_name(tmp_path, kind, name):
    (tmp_path / name).write_bytes(encode(FIRST, kind))
    assert np.array_equal(read_image(str(tmp_path / name)), decode(encode(FIRST, kind)))


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_of_several_frames_the_first_counts(kind, options):
    more = [Image.fromarray(SECOND), Image.fromarray(FIRST[::-1].copy())]
    data = encode(FIRST, kind, save_all=True, append_images=more, **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    assert np.array_equal(decode(data), FIRST)


def test_of_an_animated_gif_the_first_frame_counts():
    frames = [Image.fromarray(picture).quantize(32) for picture in (FIRST, SECOND)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 2
    assert np.array_equal(decode(data), np.array(frames[0].convert("RGB")))


@pytest.mark.filterwarnings("error")
def test_alpha_in_a_palette_and_beside_gray_is_dropped():
    palette = Image.fromarray(FIRST).quantize(8)
    data = encode(palette, "PNG", transparency=bytes([0, 128, 255, 0]))
    assert Image.open(io.BytesIO(data)).info["transparency"]
    assert np.array_equal(decode(data), np.array(palette.convert("RGB")))
    gray = cv2.cvtColor(FIRST, cv2.COLOR_RGB2GRAY)
    data = encode(Image.merge("LA", [Image.fromarray(gray), Image.new("L", (40, 24), 0)]), "PNG")
    assert np.array_equal(decode(data), np.repeat(gray[..., None], 3, axis=2))
    data = encode(FIRST, "PNG", transparency=tuple(int(sample) for sample in FIRST[0, 0]))
    assert np.array_equal(decode(data), FIRST)


def cmyk_jpeg(ink: tuple[int, int, int, int], *, transform: int | None = 0) -> bytes:
    """A flat CMYK JPEG of inks 0 to 255 as Adobe writes it: inverted, with its marker, or without it."""
    data = encode(Image.new("CMYK", (16, 16), ink), quality=100, subsampling=0)
    place = data.index(b"\xff\xee")
    length = struct.unpack(">H", data[place + 2 : place + 4])[0]
    assert data[place + 4 : place + 9] == b"Adobe" and data[place + 1 + length] == 0
    if transform is None:
        return data[:place] + data[place + 2 + length :]
    return data[: place + 1 + length] + bytes([transform]) + data[place + 2 + length :]


@pytest.mark.parametrize("transform", [0, None])
def test_a_cmyk_jpeg_is_taken_as_inverted_whether_or_not_it_has_adobes_marker(transform):
    for ink, rgb in (
        ((0, 0, 0, 0), (255, 255, 255)),
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 255, 255, 0), (255, 0, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
    ):
        found = decode(cmyk_jpeg(ink, transform=transform))
        assert np.abs(found.astype(int) - rgb).max() <= 2


def test_the_inks_of_a_ycck_jpeg_are_turned_back():
    # What was stored for a CMYK JPEG, 255 - ink, is read as (Y, Cb, Cr, K). That stands for inverted inks
    # CMY = 255 - RGB(Y, Cb, Cr), which are the light that three of the inks leave; K leaves the rest.
    ink = (100, 90, 160, 30)
    stored = np.array([[[255 - ink[0], 255 - ink[2], 255 - ink[1]]]], np.uint8)
    light = 255 - cv2.cvtColor(stored, cv2.COLOR_YCrCb2RGB)[0, 0].astype(int)
    expected = light * (255 - ink[3]) / 255
    found = decode(cmyk_jpeg(ink, transform=2))[8, 8]
    assert np.abs(found - expected).max() <= 3


def test_a_cmyk_tiff_is_not_inverted():
    data = encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF")
    assert (decode(data) == (0, 255, 255)).all()


def test_16_bit_color_is_cut_to_its_upper_8_bits():
    samples = np.random.default_rng(0).integers(0, 65536, (24, 40, 3)).astype(np.uint16)
    written, data = cv2.imencode(".png", samples[..., ::-1])
    assert written
    assert np.array_equal(decode(data.tobytes()), (samples >> 8).astype(np.uint8))


def test_32_bit_gray_is_scaled_by_what_it_holds():
    ramp = np.linspace(0, 1, 24 * 40).reshape(24, 40)
    for samples, expected in (
        (ramp.astype(np.float32), np.rint(ramp * 255)),
        ((ramp * 255).astype(np.float32), np.rint(ramp * 255)),
        ((ramp * 255).astype(np.int32), np.floor(ramp * 255)),
        ((ramp * 65535).astype(np.int32), np.rint(np.floor(ramp * 65535) / 257)),
    ):
        found = decode(encode(Image.fromarray(samples), "TIFF"))
        assert np.abs(found[..., 1] - expected).max() <= 1 and (np.ptp(found, axis=2) == 0).all()
    odd = np.array([[np.nan, np.inf, -np.inf, 3.0]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(encode(Image.fromarray(odd), "TIFF"))[0, :, 0].tolist() == [0, 255, 0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_one_pixel_is_an_image(kind):
    found = decode(encode(Image.new("RGB", (1, 1), (200, 200, 200)), kind))
    assert found.shape == (1, 1, 3) and (np.abs(found.astype(int) - 200) <= 1).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_an_image_30000_px_wide_is_read_and_turned(kind, orientation):
    picture = cv2.resize(FIRST, (30_000, 20))
    data = encode(picture, kind, exif=oriented(orientation))
    stored = decode(encode(picture, kind))
    assert np.array_equal(decode(data), UPRIGHT[orientation](stored))


def test_a_turned_image_is_in_order_in_memory_and_can_be_written_to():
    for orientation in UPRIGHT:
        found = decode(encode(FIRST, exif=oriented(orientation)))
        assert found.flags.c_contiguous and found.flags.writeable and found.base is None


def test_bytes_that_pillow_would_give_to_another_program_are_broken():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    for data in (eps, encode(FIRST, "PPM"), encode(FIRST, "ICO"), b"#define a_width 8\n#define a_height 8\n"):
        with pytest.raises(BrokenImage, match="cannot identify image file"):
            decode(data)


def zip_bomb(path, size: int) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.bmp", b"\0" * size)
        archive.writestr("good.png", encode(FIRST, "PNG"))
    return path


def test_a_member_that_unpacks_to_much_more_than_it_is_is_refused(tmp_path):
    path = zip_bomb(tmp_path / "a.zip", containers.MAX_FREE_BYTES + 1)
    with pytest.raises(BrokenImage, match=r"16777217 bytes out of \d+ are a decompression bomb"):
        read_image(f"{path}::bomb.bmp")
    assert np.array_equal(read_image(f"{path}::good.png"), FIRST)


def test_a_small_flat_image_is_no_bomb_however_well_it_is_compressed(tmp_path):
    flat = encode(Image.new("RGB", (1000, 1000)), "BMP")
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("flat.bmp", flat)
    assert archive.getinfo("flat.bmp").compress_size * containers.MAX_RATIO < len(flat)
    assert not read_image(f"{tmp_path}/a.zip::flat.bmp").any()


def test_a_member_that_claims_less_than_it_unpacks_to_is_cut_off_and_broken(tmp_path):
    path = zip_bomb(tmp_path / "a.zip", 50_000_000)
    data = bytearray(path.read_bytes())
    for start in (b"PK\x01\x02", b"PK\x03\x04"):
        place = data.index(start) + (24 if start[2] == 1 else 22)
        data[place : place + 4] = struct.pack("<I", 999)
    path.write_bytes(data)
    unpacked = []
    real = zlib.decompressobj

    class Watched:
        def __init__(self, *arguments):
            self.inner = real(*arguments)

        def decompress(self, *arguments):
            unpacked.append(self.inner.decompress(*arguments))
            return unpacked[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(containers.zlib, "decompressobj", Watched)
        with pytest.raises(BrokenImage, match="checksum does not match"):
            read_image(f"{path}::bomb.bmp")
    assert [len(data) for data in unpacked] == [1000]


def test_files_that_are_too_large_or_no_files_are_not_opened(tmp_path, monkeypatch):
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(containers.MAX_BYTES + 1)
    with pytest.raises(BrokenImage, match="357913941 bytes are more than the limit"):
        read_image(str(tmp_path / "huge.jpg"))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.jpg")
        with pytest.raises(BrokenImage, match="is a device or a pipe"):
            read_image(str(tmp_path / "pipe.jpg"))
        with pytest.raises(BrokenImage, match="is a device or a pipe"):
            read_image("/dev/zero")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_memory_is_bounded_while_a_large_image_is_decoded(kind):
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not tell how much memory a process had")
    program = f"""if True:
        import io, sys
        import numpy as np
        from PIL import Image
        from featdistill.images.reading import decode
        exif = Image.Exif()
        exif[0x0112] = 6
        data = io.BytesIO()
        Image.new("RGB", (8000, 3000), (1, 2, 3)).save(data, "{kind}", exif=exif)
        def peak():
            lines = open("/proc/self/status").read().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        open("/proc/self/clear_refs", "w").write("5")
        before = peak()
        assert decode(data.getvalue()).shape == (8000, 3000, 3)
        print((peak() - before) * 1024 / 24_000_000)
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    if "clear_refs" in done.stderr:
        pytest.skip("this system does not let a process begin to count its memory anew")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 13  # bytes a pixel


def odd_files() -> dict[str, bytes]:
    """Good files, and everything of this module that is none."""
    whole = encode(FIRST, "PNG")
    return {
        "good.png": whole,
        "named.jpg": whole,
        "tiny.png": encode(Image.new("RGB", (1, 1)), "PNG"),
        "cut.png": whole[:-40],
        "empty.jpg": b"",
        "page.jpg": b"<html>404</html>",
        "bomb.png": png_that_claims(60_000, 60_000),
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_hostile_images_never_stop_a_run_that_has_others(tmp_path, read_rows):
    folder = tmp_path / "set" / "real"
    folder.mkdir(parents=True)
    for name, data in odd_files().items():
        (folder / name).write_bytes(data)
    (tmp_path / "set" / "ai").mkdir()
    (tmp_path / "set" / "ai" / "other.png").write_bytes(encode(SECOND, "PNG"))
    out = tmp_path / "set.csv"
    flags = ["--root", str(tmp_path / "set"), "--out", str(out), "--workers", "1"]
    assert folders.main([*flags]) == 0
    assert pack.main([str(out), "--out", str(tmp_path / "packed"), "--verify"]) == 1
    assert folders.main([*flags, "--verify"]) == 1
    broken = {"bomb.png", "cut.png", "empty.jpg", "page.jpg"}
    assert set(read_rows(tmp_path / "set.errors.csv")["name"]) == broken
    assert set(read_rows(tmp_path / "packed" / "errors.csv")["name"]) == broken
    for manifest in (out, tmp_path / "packed" / "manifest.csv"):
        rows = read_manifest(manifest)
        # Of good.png and named.jpg, whose bytes are equal, one is kept.
        assert set(rows["name"]) == {"good.png", "tiny.png", "other.png"}
        assert all(read_image(location).ndim == 3 for location in rows["image"])
