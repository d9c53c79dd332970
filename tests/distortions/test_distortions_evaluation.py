"""The evaluation bank: every operation does what its name says."""

import io
from itertools import pairwise

import cv2
import numpy as np
import pytest
from conftest import smooth_picture
from PIL import Image
from test_watermarks import read_payload

import distortions_evaluation as face
from featdistill.command_line import UserError
from featdistill.distortions.evaluation import EVALUATION
from featdistill.distortions.kernels import codecs, warps, watermarks
from featdistill.distortions.kernels.filters import filter_sparse, line_kernel
from featdistill.distortions.kernels.noise_tables import poisson_quantiles
from featdistill.distortions.operation import LEVELS


def apply(name: str, image: np.ndarray, level: int, seed: int = 0) -> np.ndarray:
    return EVALUATION[name](image, level, np.random.default_rng(seed))


def flat(value: int, side: int = 256) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2))


def test_the_bank_holds_the_transformations_of_the_splits():
    published = "motionblur multnoise pixelate rgbshift randomcrop randomaspectcrop downscale jpeg_ai "
    published += (
        "adv_embed_resnet adv_embed_clip randomtonecurve jpeg_recompression_1 jpeg_recompression_2 clahe "
    )
    published += (
        "perspective isonoise jpeg2000 wmforger cheng2020 shotnoise jpeg_jpeg2000 glassblur webp avif"
    )
    assert set(published.split()) <= set(EVALUATION)


# Blur


@pytest.mark.parametrize("angle", [0.0, 0.4, 1.3, 2.5])
@pytest.mark.parametrize("length_px", [2, 5, 20])
def test_a_line_kernel_has_its_length_and_its_energy_along_its_angle(length_px, angle):
    kernel = line_kernel(length_px, angle)
    y, x = np.indices(kernel.shape) - len(kernel) // 2
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    assert kernel.sum() == pytest.approx(1) and kernel.min() >= 0
    # A uniform stroke has the variance length^2 / 12; splitting points among pixels adds at most 1/4.
    assert (kernel * along**2).sum() == pytest.approx(length_px**2 / 12, abs=0.3)
    assert (kernel * across**2).sum() < 0.3
    np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-9)


def test_filtering_by_quadrants_is_the_filter_with_the_whole_kernel():
    image = smooth_picture(0, 60, 90)
    for length_px, angle in ((2, 0.3), (9, 1.0), (20, 2.2)):
        kernel = line_kernel(length_px, angle)
        expected = cv2.filter2D(image.astype(np.float64), -1, kernel, borderType=cv2.BORDER_REPLICATE)
        assert np.abs(filter_sparse(image, kernel) - expected).max() <= 1
    with pytest.raises(ValueError, match="10 px"):
        filter_sparse(image, np.ones((23, 23)) / 529)


def test_motionblur_smears_a_point_along_one_line_through_it():
    image = flat(0, 65)
    image[32, 32] = 255
    for seed in range(6):
        blurred = apply("motionblur", image, 5, seed)[..., 0].astype(float)
        y, x = np.nonzero(blurred)
        spread = np.linalg.eigvalsh(np.cov(np.stack([x, y]), aweights=blurred[y, x]))
        assert spread[1] == pytest.approx(20**2 / 12, rel=0.15) and spread[0] < 0.4


def test_exchanged_pixels_are_all_still_there_and_not_far_away():
    height, width, reach = 70, 50, 5
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0], image[..., 1] = np.indices((height, width))
    for passes in (1, 3):
        moved = warps.exchange_pixels(image, reach, passes, np.random.default_rng(passes))
        places = moved[..., 0].astype(int) * width + moved[..., 1]
        assert np.array_equal(np.sort(places.ravel()), np.arange(height * width))
        distance = np.abs(moved.astype(int) - image)[..., :2]
        assert 0 < distance.max() <= passes * reach
        assert 0.25 < (distance.max(axis=2) > 0).mean() < 0.95


# Noise


@pytest.mark.parametrize("level", LEVELS)
def test_multnoise_has_a_deviation_in_proportion_to_the_value(level):
    variance = EVALUATION["multnoise"].scales[level - 1]
    for value in (40, 90):
        noise = apply("multnoise", flat(value), level).astype(float) - value
        assert noise.std() == pytest.approx(value * variance**0.5, rel=0.03)
        assert abs(noise.mean()) < 0.1
    assert not apply("multnoise", flat(0), level).any()


@pytest.mark.parametrize("level", LEVELS)
def test_shotnoise_counts_photons_in_linear_light(level):
    photons = EVALUATION["shotnoise"].scales[level - 1]
    value = 150
    linear = (apply("shotnoise", flat(value), level) / 255.0) ** 2.2
    mean = (value / 255) ** 2.2
    assert linear.mean() == pytest.approx(mean, rel=0.03)
    assert linear.var() == pytest.approx(mean / photons, rel=0.06)


def test_poisson_quantiles_have_mean_and_variance_equal():
    for mean in (0.0, 0.3, 4.0, 190.0):
        quantiles = poisson_quantiles(np.array([[mean]]), 1 << 14)[0]
        assert quantiles.mean() == pytest.approx(mean, abs=0.01)
        assert quantiles.var() == pytest.approx(mean, rel=0.01, abs=1e-9)


def test_isonoise_is_noise_of_hue_and_lightness_with_the_level():
    image = smooth_picture(3, 200, 200)
    before = cv2.cvtColor(image, cv2.COLOR_RGB2HLS).astype(float)
    vivid = before[..., 2] > 100
    hues, lights = [], []
    for level in LEVELS:
        after = cv2.cvtColor(apply("isonoise", image, level), cv2.COLOR_RGB2HLS).astype(float)
        turned = (after - before)[..., 0][vivid]
        hues.append(np.std((turned + 90) % 180 - 90))
        lights.append(np.std((after - before)[..., 1]))
    assert all(low < high for low, high in pairwise(hues))
    assert all(low < high for low, high in pairwise(lights))


# Color and contrast


@pytest.mark.parametrize("level", LEVELS)
def test_rgbshift_adds_one_constant_a_channel_within_its_limit(level):
    limit = EVALUATION["rgbshift"].scales[level - 1]
    shifts = []
    for seed in range(40):
        change = apply("rgbshift", flat(128, 16), level, seed).astype(int) - 128
        assert np.ptp(change.reshape(-1, 3), axis=0).max() == 0
        shifts.extend(change[0, 0])
    assert max(map(abs, shifts)) <= limit and np.std(shifts) == pytest.approx(limit / 3**0.5, rel=0.25)


def test_a_tone_curve_is_one_curve_for_all_channels_and_keeps_black_and_white():
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 16, axis=0).repeat(3, axis=2)
    middles = {level: [] for level in LEVELS}
    for seed in range(30):
        for level in LEVELS:
            curve = apply("randomtonecurve", ramp, level, seed)[0].astype(int)
            assert np.ptp(curve, axis=1).max() == 0 and curve[0, 0] == 0 and curve[255, 0] == 255
            middles[level].append(curve[128, 0])
    # At 1/2 the curve is 3/8 (low + high) + 1/8, so it is spread by 3/8 sqrt(2) of the handles' deviation.
    assert np.std(middles[1]) == pytest.approx(255 * 0.375 * 2**0.5 * 0.05, rel=0.35)
    assert np.std(middles[4]) > 2 * np.std(middles[1])


def test_clahe_raises_local_contrast_of_lightness_and_leaves_color_alone():
    image = cv2.GaussianBlur(smooth_picture(5, 160, 160), (0, 0), 2) // 2 + 60
    before = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(float)
    contrasts = [before[..., 0].std()]
    for level in LEVELS:
        after = cv2.cvtColor(apply("clahe", image, level), cv2.COLOR_RGB2LAB).astype(float)
        contrasts.append(after[..., 0].std())
        assert np.abs(after - before)[..., 1:].mean() < 3
    assert all(low < high for low, high in pairwise(contrasts))


# Resolution, crops and geometry


@pytest.mark.parametrize("level", LEVELS)
def test_pixelate_leaves_as_many_different_columns_as_arniqas_formula_says(level):
    image = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    pixelated = apply("pixelate", image, level)
    different = 1 + np.count_nonzero(np.abs(np.diff(pixelated.astype(int), axis=1)).sum((0, 2)))
    amount = EVALUATION["pixelate"].scales[level - 1]
    assert different == round(200 * (0.95 - amount**0.6))


def test_downscale_covers_the_published_range_and_tells_its_factor():
    operation, image, factors = EVALUATION["downscale"], smooth_picture(1, 300, 400), []
    for level in LEVELS:
        for seed in range(30):
            factor = operation.scale(level, np.random.default_rng(seed))
            assert apply("downscale", image, level, seed).shape == (
                round(300 * factor),
                round(400 * factor),
                3,
            )
            factors.append(factor)
    assert 0.3 <= min(factors) < 0.33 and 0.77 < max(factors) <= 0.8
    np.testing.assert_allclose(np.quantile(factors, [0.25, 0.5, 0.75]), [0.425, 0.55, 0.675], atol=0.02)


def test_downscale_averages_areas():
    image = np.indices((160, 160)).sum(0) % 2 * 255
    image = np.repeat(image[..., None].astype(np.uint8), 3, axis=2)
    for level in LEVELS:
        # A checkerboard holds nothing below its own frequency; sampling it would fold that down.
        assert apply("downscale", image, level).mean() == pytest.approx(127.5, abs=2)


@pytest.mark.parametrize("level", LEVELS)
def test_crops_are_parts_of_the_image_of_the_stated_size(level):
    image = np.zeros((240, 200, 3), np.uint8)
    image[..., 0], image[..., 1] = np.indices((240, 200))
    kept, corners, ratios = EVALUATION["randomcrop"].scales[level - 1], set(), []
    for seed in range(12):
        for name in ("randomcrop", "randomaspectcrop"):
            crop = apply(name, image, level, seed)
            height, width = crop.shape[:2]
            top, left = map(int, crop[0, 0, :2])
            np.testing.assert_array_equal(crop, image[top : top + height, left : left + width])
            assert height * width == pytest.approx(kept**2 * 240 * 200, rel=0.03)
            corners.add((top, left))
            if name == "randomcrop":
                assert (height, width) == (round(240 * kept), round(200 * kept))
            else:
                ratios.append(width / height / (200 / 240))
    assert len(corners) > 12
    assert 0.48 <= min(ratios) < 0.95 and 1.05 < max(ratios) <= 2.08


def test_perspective_maps_the_drawn_corners_to_the_frame():
    image = np.zeros((120, 160, 3), np.uint8)
    y, x = np.indices((120, 160))
    image[..., 0], image[..., 1] = x, y
    corners = np.array([[12, 8], [150, 20], [140, 110], [5, 100]])
    warped = warps.from_corners(image, corners).astype(int)
    for corner, (row, column) in zip(corners, [(0, 0), (0, 159), (119, 159), (119, 0)], strict=True):
        assert np.abs(warped[row, column, :2] - corner).max() <= 1


def test_perspective_only_ever_looks_inwards():
    image = flat(200, 96)
    image[:2], image[-2:], image[:, :2], image[:, -2:] = 0, 0, 0, 0
    for level in (1, 5):
        for seed in range(5):
            warped = apply("perspective", image, level, seed)
            assert (warped[4:-4, 4:-4] > 0).all() and warped.shape == image.shape


# Compression


def test_single_codecs_are_the_round_trips_at_the_scale():
    image = smooth_picture(2, 100, 120)
    for name, round_trip in (("jpeg2000", codecs.jpeg2000), ("webp", codecs.webp), ("avif", codecs.avif)):
        for level in (1, 5):
            expected = round_trip(image, EVALUATION[name].scales[level - 1])
            np.testing.assert_array_equal(apply(name, image, level), expected)


def test_one_recompression_is_a_jpeg_of_a_quality_near_the_scale():
    image, qualities = smooth_picture(4, 64, 64), set()
    for seed in range(15):
        quality = EVALUATION["jpeg_recompression_1"].scale(3, np.random.default_rng(seed))
        expected = io.BytesIO()
        Image.fromarray(image).save(expected, "JPEG", quality=quality)
        np.testing.assert_array_equal(
            apply("jpeg_recompression_1", image, 3, seed), np.array(Image.open(expected))
        )
        qualities.add(quality)
    assert len(qualities) > 4 and min(qualities) >= 55 and max(qualities) <= 65


def test_chains_apply_their_codecs_one_after_the_other():
    image, second_qualities = smooth_picture(6, 100, 110), set()
    for level, seed in ((level, seed) for level in LEVELS for seed in range(4)):
        for chain, second in (
            ("jpeg_jpeg2000", lambda once, level: codecs.jpeg2000(once, (8, 12, 16, 24, 32)[level - 1])),
            ("jpeg_avif", lambda once, level: codecs.avif(once, EVALUATION["avif"].scales[level - 1])),
        ):
            quality = EVALUATION[chain].scale(level, np.random.default_rng(seed))
            expected = second(codecs.jpeg(image, quality), level)
            np.testing.assert_array_equal(apply(chain, image, level, seed), expected)
        quality = EVALUATION["jpeg_recompression_2"].scale(level, np.random.default_rng(seed))
        twice, once = apply("jpeg_recompression_2", image, level, seed), codecs.jpeg(image, quality)
        second = [q for q in range(quality, 96) if np.array_equal(codecs.jpeg(once, q), twice)]
        assert second
        second_qualities.update(second)
    assert len(second_qualities) > 10


# Watermarks


def test_watermarks_are_invisible_and_carry_what_they_say():
    image = smooth_picture(7, 256, 256)
    for level in LEVELS:
        marked = apply("watermark_spread_spectrum", image, level)
        assert 33 < psnr(marked, image) < 47
        pattern = watermarks.spread_spectrum_pattern(image.shape[:2], np.random.default_rng(0))
        change = (marked.astype(float) - image).mean(axis=2)
        assert np.corrcoef(change.ravel(), pattern.ravel())[0, 1] > 0.5
        step = EVALUATION["watermark_dwt_dct"].scales[level - 1]
        marked = apply("watermark_dwt_dct", image, level)
        assert 33 < psnr(marked, image) < 50
        bits = watermarks.watermark_payload(np.random.default_rng(0))
        np.testing.assert_array_equal(read_payload(marked, step), bits)


# Command line


def test_the_list_says_what_is_missing_and_that_sizes_change(capsys):
    assert face.main(["--list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "changes size" in lines["downscale"] and "0.75" in lines["downscale"]
    assert set(EVALUATION) <= set(lines)
    assert "needs" in lines["wmforger"]


def test_an_operation_that_is_missing_is_one_line_that_says_so(tmp_path):
    path = tmp_path / "in.png"
    Image.fromarray(smooth_picture(0)).save(path)
    with pytest.raises(UserError, match="wmforger"):
        face.main(["--apply", "wmforger:2", str(path), str(tmp_path / "out.png")])
    assert not (tmp_path / "out.png").exists()
