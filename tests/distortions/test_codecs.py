"""Codecs: what each writes is what its name says, and every one is a pure function of image and setting."""

import io
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import cv2
import numpy as np
import pytest
from conftest import smooth_picture
from PIL import AvifImagePlugin, Image, features

from featdistill.command_line import UserError
from featdistill.distortions.kernels import codecs

# The function and its settings, from hardly any loss to much.
CODECS = {
    "jpeg": (codecs.jpeg, (95, 60, 20, 4)),
    "jpeg2000": (codecs.jpeg2000, (4, 16, 45, 120)),
    "webp": (codecs.webp, (95, 60, 20, 0)),
    "avif": (codecs.avif, (95, 60, 20, 0)),
    "gif": (codecs.gif, (256, 64, 40, 24)),
}
EVERY = [pytest.param(*codec, id=name) for name, codec in CODECS.items()]
SIZES = [(16, 16), (17, 233), (224, 224)]


@pytest.fixture
def files(monkeypatch):
    """The files that Pillow writes for the codecs, as they are written."""
    written, encode = [], codecs._encode

    def spy(*args, **options):
        data = encode(*args, **options)
        written.append(data.getvalue())
        return data

    monkeypatch.setattr(codecs, "_encode", spy)
    return written


def psnr_db(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(1e-3, np.mean((one.astype(float) - other) ** 2)))


def colors_of(image: np.ndarray) -> int:
    return len(np.unique(image.reshape(-1, 3), axis=0))


def through_pillow(image: np.ndarray, file_format: str, **options) -> np.ndarray:
    data = io.BytesIO()
    Image.fromarray(image).save(data, file_format, **options)
    return np.asarray(Image.open(data).convert("RGB"))


@pytest.mark.parametrize("codec,settings", EVERY)
@pytest.mark.parametrize("height,width", SIZES)
def test_the_result_is_a_new_image_of_the_same_size_and_the_input_stays(codec, settings, height, width):
    image = smooth_picture(1, height, width)
    before = image.copy()
    for setting in settings:
        result = codec(image, setting)
        assert result.shape == image.shape and result.dtype == np.uint8 and result.flags.writeable
        assert not np.shares_memory(result, image)
        np.testing.assert_array_equal(image, before)
        np.testing.assert_array_equal(codec(image, setting), result)


@pytest.mark.parametrize("codec,settings", EVERY)
def test_the_image_is_lost_step_by_step_with_the_setting(codec, settings):
    image = smooth_picture(2, 150, 170)
    quality_db = [psnr_db(codec(image, setting), image) for setting in settings]
    assert quality_db[0] > 20 and all(better > worse + 0.5 for better, worse in pairwise(quality_db))


@pytest.mark.parametrize("codec,settings", EVERY)
def test_colors_keep_their_places(codec, settings):
    image = np.zeros((64, 64, 3), np.uint8)
    image[:32, :32, 0], image[:32, 32:, 1], image[32:, :32, 2] = 200, 200, 200
    result = codec(image, settings[0])
    for row, column in ((8, 8), (8, 56), (56, 8), (56, 56)):
        np.testing.assert_allclose(result[row, column].astype(int), image[row, column], atol=12)


@pytest.mark.parametrize("codec,settings", EVERY)
def test_views_give_what_their_copies_give(codec, settings):
    whole = smooth_picture(3, 80, 90)
    for view in (
        whole[::2, ::2],
        whole[::-1],
        whole[:, ::-1],
        whole[..., ::-1],
        whole.transpose(1, 0, 2),
        whole[5:40, 7:60],
        np.broadcast_to(whole[:1], whole.shape),
    ):
        expected = codec(np.ascontiguousarray(view), settings[1])
        np.testing.assert_array_equal(codec(view, settings[1]), expected)


@pytest.mark.parametrize("codec,settings", EVERY)
def test_threads_change_nothing(codec, settings, monkeypatch):
    images = [smooth_picture(seed, 320 + seed, 420) for seed in range(2)]
    threads = cv2.getNumThreads()
    results = []
    try:
        for count in (1, 4):
            cv2.setNumThreads(count)
            monkeypatch.setattr(AvifImagePlugin, "DEFAULT_MAX_THREADS", count)
            results.append([codec(image, settings[2]) for image in images])
    finally:
        cv2.setNumThreads(threads)
    with ThreadPoolExecutor(2) as pool:
        results.append(list(pool.map(lambda image: codec(image, settings[2]), images)))
    for others in results[1:]:
        np.testing.assert_array_equal(np.stack([r[:320] for r in others]), [r[:320] for r in results[0]])


@pytest.mark.parametrize("quality", [1, 30, 75, 100])
def test_jpeg_is_pillows_of_the_same_quality(quality):
    for height, width in SIZES:
        image = smooth_picture(4, height, width)
        expected = through_pillow(image, "JPEG", quality=quality, subsampling="4:2:0")
        np.testing.assert_array_equal(codecs.jpeg(image, quality), expected)


@pytest.mark.parametrize("ratio", [8, 16, 45, 170])
def test_a_large_jpeg_2000_has_the_ratio_that_was_asked_for(files, ratio):
    image = smooth_picture(5, 600, 800)
    codecs.jpeg2000(image, ratio)
    assert image.size / len(files[0]) == pytest.approx(ratio, rel=0.03)


def test_jpeg_2000_is_a_codestream_with_the_irreversible_wavelet(files):
    codecs.jpeg2000(smooth_picture(5), 16)
    # ISO/IEC 15444-1, annex A: SOC begins a codestream; the wavelet stands 14 bytes after the marker COD, and
    # there 0 means 9-7 irreversible.
    assert files[0].startswith(b"\xff\x4f\xff\x51")
    place = files[0].index(b"\xff\x52")
    assert files[0][place + 13] == 0


@pytest.mark.parametrize("height,width", [(16, 16), (16, 40), (31, 17)])
def test_a_small_jpeg_2000_keeps_the_image_where_the_ratio_leaves_room(height, width):
    image = smooth_picture(6, height, width)
    assert psnr_db(codecs.jpeg2000(image, 1), image) > 35
    assert colors_of(codecs.jpeg2000(image, 1000)) > 1


@pytest.mark.parametrize("quality", [0, 10, 80, 100])
def test_webp_is_pillows_of_the_same_quality(quality):
    for height, width in SIZES:
        image = smooth_picture(7, height, width)
        np.testing.assert_array_equal(
            codecs.webp(image, quality), through_pillow(image, "WEBP", quality=quality, method=0)
        )


@pytest.mark.parametrize("codec", [codecs.jpeg, codecs.webp, codecs.avif])
def test_chroma_has_half_the_resolution_of_luma(codec):
    luma, chroma = np.zeros((2, 64, 64, 3), np.uint8)
    luma[:, ::2] = 255
    chroma[:, ::2], chroma[:, 1::2] = (255, 0, 0), (0, 0, 255)
    assert psnr_db(codec(luma, 100), luma) > 30 and psnr_db(codec(chroma, 100), chroma) < 15


@pytest.mark.parametrize("colors", [2, 5, 16, 256])
def test_gif_has_at_most_the_asked_colors_and_survives_a_real_file(colors):
    for height, width in SIZES:
        image = smooth_picture(8, height, width)
        result = codecs.gif(image, colors)
        assert 1 < colors_of(result) <= colors
        np.testing.assert_array_equal(through_pillow(result, "GIF"), result)


def test_gif_dithers_so_that_an_area_keeps_its_mean():
    ramp = np.repeat(np.linspace(0, 255, 256).astype(np.uint8)[None, :, None], 64, axis=0).repeat(3, axis=2)
    result = codecs.gif(ramp, 64)
    inner = slice(64, 192)
    means = result[:, inner, 0].astype(float).reshape(64, -1, 16).mean((0, 2))
    np.testing.assert_allclose(means, ramp[0, inner, 0].reshape(-1, 16).mean(1), atol=8)
    assert np.mean(result.min(0) < result.max(0)) > 0.4


@pytest.mark.parametrize(
    "codec,name", [(codecs.jpeg2000, "JPEG2000"), (codecs.webp, "WEBP"), (codecs.avif, "AVIF")]
)
def test_a_codec_that_pillow_lacks_is_an_error_that_names_both(codec, name, monkeypatch):
    lacking = codecs._FEATURES[name]
    check = features.check
    monkeypatch.setattr(features, "check", lambda feature: feature != lacking and check(feature))
    with pytest.raises(UserError, match=rf"Pillow was built without {name}\b.*pip install .* pillow"):
        codec(smooth_picture(9), 50)


def test_webp_that_opencv_lacks_is_an_error_that_names_both(monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", lambda data, flags: None)
    with pytest.raises(UserError, match=r"OpenCV was built without WEBP\b.*opencv-python-headless"):
        codecs.webp(smooth_picture(9), 50)
