"""Both watermarks: what they promise as operations, how strong they are, that their marks can be found."""

from itertools import pairwise

import cv2
import numpy as np
import pytest
import simplejpeg
from conftest import smooth_picture

from featdistill.distortions.kernels import watermarks
from featdistill.distortions.kernels.watermarks import (
    PAYLOAD_BITS,
    embed_dwt_dct,
    embed_spread_spectrum,
    spread_spectrum_pattern,
    watermark_payload,
)

PSNR_DB = (46, 43, 40, 37, 34)
AMPLITUDES = (1.25, 1.8, 2.5, 3.6, 5.1)
STEPS = (36, 52, 74, 106, 150)
BOTH = pytest.mark.parametrize("embed,scales", [(embed_spread_spectrum, AMPLITUDES), (embed_dwt_dct, STEPS)])
SIZES = [(16, 16), (23, 16), (17, 233), (130, 97)]


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def picture(seed: int = 1, height: int = 256, width: int = 320) -> np.ndarray:
    """A smooth picture whose left half is flat but for faint grain, with some clipped areas."""
    image = smooth_picture(seed, height, width)
    calm = cv2.GaussianBlur(image, (0, 0), 3)
    image[:, : width // 2] = calm[:, : width // 2]
    return image


def luminance(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float64)


def psnr_db(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / ((one.astype(float) - other) ** 2).mean())


def through_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    return simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(image, quality, colorsubsampling="420"))


def correlations(signal: np.ndarray, seeds: range) -> np.ndarray:
    """The normalized correlation of a signal with the pattern of each seed."""
    patterns = [spread_spectrum_pattern(signal.shape, generator(seed)) for seed in seeds]
    return np.array([np.corrcoef(signal.ravel(), pattern.ravel())[0, 1] for pattern in patterns])


# What both promise.


@BOTH
def test_the_result_is_a_new_image_of_the_same_kind_and_the_input_stays(embed, scales):
    for height, width in SIZES:
        image = smooth_picture(2, height, width)
        before = image.copy()
        for scale in (scales[0], scales[-1]):
            marked = embed(image, scale, generator())
            assert marked.shape == image.shape and marked.dtype == np.uint8
            assert not np.shares_memory(marked, image) and not np.array_equal(marked, image)
            np.testing.assert_array_equal(image, before)


@BOTH
def test_the_generator_alone_decides_the_mark(embed, scales):
    image = picture(3)
    marked = embed(image, scales[2], generator(5))
    np.testing.assert_array_equal(embed(image, scales[2], generator(5)), marked)
    assert not np.array_equal(embed(image, scales[2], generator(6)), marked)


@BOTH
def test_threads_and_memory_placement_do_not_matter(embed, scales):
    image = picture(4, 203, 301)
    expected = embed(image, scales[1], generator())
    threads = cv2.getNumThreads()
    try:
        for count in (0, 1, 4):
            cv2.setNumThreads(count)
            for offset in (0, 1, 3, 16, 33):
                memory = np.empty(image.size + offset, np.uint8)
                moved = memory[offset:].reshape(image.shape)
                moved[:] = image
                np.testing.assert_array_equal(embed(moved, scales[1], generator()), expected)
    finally:
        cv2.setNumThreads(threads)


@BOTH
def test_views_give_what_their_copies_give(embed, scales):
    whole = smooth_picture(5, 80, 90)
    views = [whole[::2, ::2], whole[:, ::-1], whole[..., ::-1], whole.transpose(1, 0, 2), whole[5:40, 7:60]]
    for view in views:
        expected = embed(np.ascontiguousarray(view), scales[3], generator())
        np.testing.assert_array_equal(embed(view, scales[3], generator()), expected)


@BOTH
def test_five_strengths_go_from_46_down_to_34_db(embed, scales):
    for seed in range(3):
        image = picture(seed)
        reached = [psnr_db(embed(image, scale, generator(seed)), image) for scale in scales]
        np.testing.assert_allclose(reached, PSNR_DB, atol=1)
        assert all(weaker > stronger for weaker, stronger in pairwise(reached))


@BOTH
def test_red_green_and_blue_change_alike_so_the_luminance_changes_alone(embed, scales):
    image = np.clip(picture(6), 64, 190)
    for scale in scales:
        change = embed(image, scale, generator()).astype(int) - image
        assert change.any()
        np.testing.assert_array_equal(change, change[..., :1].repeat(3, axis=2))


@BOTH
@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_flat_image_is_served(embed, scales, value):
    image = np.full((40, 48, 3), value, np.uint8)
    for scale in scales:
        marked = embed(image, scale, generator())
        change = marked.astype(int) - image
        largest = 5 * scale if embed is embed_spread_spectrum else scale / 16 + 1
        assert marked.dtype == np.uint8 and 0 < np.abs(change).max() <= largest


# Spread spectrum.


def test_the_pattern_is_nearly_normal_and_of_middle_frequencies():
    pattern = spread_spectrum_pattern((512, 384), generator()).astype(float)
    assert abs(pattern.mean()) < 0.05 and pattern.std() == pytest.approx(14.45, rel=0.02)
    assert (pattern**4).mean() / pattern.var() ** 2 == pytest.approx(3, abs=0.3)
    power = np.abs(np.fft.fft2(pattern)) ** 2
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(384), np.fft.fftfreq(512)))

    def density(lowest: float, highest: float) -> float:
        return power[(radius >= lowest) & (radius < highest)].mean()

    peak = density(0.15, 0.17)
    assert density(0.09, 0.11) == pytest.approx(peak / 2, rel=0.15)
    assert density(0.22, 0.24) == pytest.approx(peak / 2, rel=0.15)
    assert density(0, 0.03) < 0.03 * peak and density(0.4, 0.5) < 0.01 * peak


def test_the_amplitude_is_the_rms_of_the_change():
    image = np.clip(picture(7), 64, 190)
    for amplitude in (*AMPLITUDES, 8):
        change = embed_spread_spectrum(image, amplitude, generator()).astype(float) - image
        assert np.sqrt((change**2).mean()) == pytest.approx(np.hypot(amplitude, 12**-0.5), rel=0.02)


def test_busy_places_get_up_to_four_times_as_much_as_flat_ones():
    image = np.full((200, 400, 3), 128, np.uint8)
    checks = np.indices((200, 200)).sum(0) // 4 % 2
    image[:, 200:] = (80 + 96 * checks)[..., None]
    change = embed_spread_spectrum(image, 8, generator()).astype(float) - image
    calm, busy = change[10:-10, 10:190], change[10:-10, 210:-10]
    assert busy.std() / calm.std() == pytest.approx(4, rel=0.03)


@pytest.mark.parametrize("amplitude", AMPLITUDES)
def test_the_right_seed_correlates_far_above_50_wrong_ones(amplitude):
    image = picture(8)
    marked = embed_spread_spectrum(image, amplitude, generator(0))
    right, *wrong = correlations(luminance(marked) - luminance(image), range(51))
    assert right > 0.6 and right > 20 * np.std(wrong) and np.abs(wrong).max() < 0.1


def test_the_mark_is_found_without_the_original_even_after_jpeg():
    image = picture(9)
    for amplitude in AMPLITUDES:
        marked = embed_spread_spectrum(image, amplitude, generator(0))
        for seen in (marked, through_jpeg(marked, 90)):
            right, *wrong = correlations(luminance(seen), range(51))
            assert right > 6 * np.std(wrong) and right > 1.5 * np.abs(wrong).max()
    unmarked, *wrong = correlations(luminance(image), range(51))
    assert abs(unmarked) < 4 * np.std(wrong)


# Quantisation of the transform.


def haar_dct_coefficients(image: np.ndarray) -> np.ndarray:
    """The coefficient (2, 2) of every block, by the two transforms one after the other."""
    height, width = (side // 8 * 8 for side in image.shape[:2])
    pixels = luminance(image)[:height, :width]
    low = (pixels[::2, ::2] + pixels[::2, 1::2] + pixels[1::2, ::2] + pixels[1::2, 1::2]) / 2
    rows, columns = height // 8, width // 8
    blocks = low.reshape(rows, 4, columns, 4).swapaxes(1, 2).reshape(-1, 4, 4)
    return np.array([cv2.dct(block)[2, 2] for block in blocks]).reshape(rows, columns)


def read_payload(image: np.ndarray, step: float) -> np.ndarray:
    """The bits of `embed_dwt_dct`: blocks vote with weights from 1 (on a lattice) to 0 (between both)."""
    coefficients = haar_dct_coefficients(image)
    rows, columns = np.indices(coefficients.shape)
    bits, votes = (13 * rows + columns) % PAYLOAD_BITS, np.sin(2 * np.pi / step * coefficients)
    return (np.bincount(bits.ravel(), votes.ravel(), PAYLOAD_BITS) < 0).astype(np.uint8)


@pytest.mark.parametrize("step", STEPS)
def test_the_coefficients_of_haar_and_dct_lie_on_the_lattice_of_their_bit(step):
    image = np.clip(picture(10, 67, 101), 64, 190)
    before, after = (haar_dct_coefficients(each) for each in (image, embed_dwt_dct(image, step, generator())))
    payload = watermark_payload(generator())
    places = (13 * np.arange(8)[:, None] + np.arange(12)) % PAYLOAD_BITS
    position = after / step - 0.25 * (1 - 2.0 * payload[places])
    assert np.abs(position - np.rint(position)).max() <= 1 / 16 / step + 1e-9
    # The nearest point of the lattice: no coefficient moves by more than half a step.
    assert step / 4 < np.abs(after - before).max() <= step / 2 + 1 / 16


@pytest.mark.parametrize("step", STEPS)
def test_the_payload_is_read_back_and_after_jpeg_too(step):
    for seed in range(4):
        height, width = ((128, 128), (150, 203), (256, 320), (129, 512))[seed]
        marked = embed_dwt_dct(picture(seed, height, width), step, generator(seed))
        payload = watermark_payload(generator(seed))
        np.testing.assert_array_equal(read_payload(marked, step), payload)
        np.testing.assert_array_equal(read_payload(through_jpeg(marked, 90), step), payload)


def test_the_payload_is_read_back_where_the_image_is_clipped():
    for value in (0, 255):
        image = np.full((128, 128, 3), value, np.uint8)
        for step in STEPS:
            marked = embed_dwt_dct(image, step, generator(1))
            np.testing.assert_array_equal(read_payload(marked, step), watermark_payload(generator(1)))


def test_rows_and_columns_that_fill_no_block_stay():
    image = picture(11, 71, 62)
    marked = embed_dwt_dct(image, 150, generator())
    np.testing.assert_array_equal(marked[64:], image[64:])
    np.testing.assert_array_equal(marked[:, 56:], image[:, 56:])
    assert (marked[:64, :56] != image[:64, :56]).mean() > 0.5


def test_payloads_are_fair_and_every_bit_is_carried_about_equally_often(monkeypatch):
    payloads = [watermark_payload(generator(seed)) for seed in range(300)]
    assert np.shape(payloads) == (300, PAYLOAD_BITS)
    assert np.abs(np.mean(payloads, axis=0) - 0.5).max() < 0.15
    gray = np.full((128, 128, 3), 128, np.uint8)
    for bit in range(PAYLOAD_BITS):
        payload = (np.arange(PAYLOAD_BITS) == bit).astype(np.uint8)
        monkeypatch.setattr(watermarks, "watermark_payload", lambda rng, payload=payload: payload)
        marked = embed_dwt_dct(gray, 40, generator())
        assert 6 <= (haar_dct_coefficients(marked) < 0).sum() <= 10
        np.testing.assert_array_equal(read_payload(marked, 40), payload)
