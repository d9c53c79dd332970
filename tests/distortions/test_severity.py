"""How strong the levels of the paper's 35 are, and how often a preset draws them (docs/distortions.md)."""

import numpy as np
import pytest
from sklearn.datasets import load_sample_images

from benchmarks.distortion_tables import severity, shares_of_images, structural_similarity
from benchmarks.scenes import fitted
from featdistill.distortions.libraries import EXTENDED
from featdistill.distortions.official import OFFICIAL
from featdistill.distortions.operation import LEVELS
from featdistill.distortions.presets import PRESETS, parse_policy

# Every level of the extended library changes an image visibly, so its mean PSNR is at most this.
MOST_DB = 40
# Level 5 leaves as much of an image as official noise at level 5 does: this PSNR or, where light and color
# change and structure remains, this SSIM. Neither tells anything where patches move.
LEAST_DB, LEAST_SSIM = 20.4, 0.5


@pytest.fixture(scope="module")
def photographs():
    images = [np.asarray(image) for image in load_sample_images().images]
    parts = [image[:, left : left + 427] for image in images for left in (0, 213)]
    return [fitted(part, (256, 256)) for part in parts]


@pytest.mark.parametrize("operation", EXTENDED.values(), ids=EXTENDED)
def test_levels_are_visible_and_leave_as_much_as_official_noise_does(operation, photographs):
    figures = [severity(operation, level, photographs) for level in LEVELS]
    psnrs, ssims = np.transpose(figures)
    assert psnrs.max() < MOST_DB and ssims.max() < 0.9995
    assert (np.diff(psnrs) < 0).all()
    if operation.keeps_layout:
        assert psnrs[4] >= LEAST_DB or ssims[4] >= LEAST_SSIM, figures
        assert psnrs[0] >= 25
    else:
        assert ssims[4] >= 0.25, figures


def test_the_limit_is_official_noise_at_level_5(photographs):
    psnr, ssim = severity(OFFICIAL["whitenoise"], 5, photographs)
    assert psnr == pytest.approx(LEAST_DB, abs=0.5) and ssim == pytest.approx(LEAST_SSIM, abs=0.15)


def test_structural_similarity_is_wangs():
    rng = np.random.default_rng(0)
    image = rng.integers(60, 190, (64, 64, 1), dtype=np.uint8).repeat(3, axis=2)
    assert structural_similarity(image, image) == pytest.approx(1)
    # Of a shift alone, only the term of luminance is left. Independent noise has no common structure.
    flat = np.full((64, 64, 3), 100, np.uint8)
    low = (0.01 * 255) ** 2
    expected = (2 * 100 * 120 + low) / (100**2 + 120**2 + low)
    assert structural_similarity(flat, flat + 20) == pytest.approx(expected, abs=1e-6)
    assert abs(structural_similarity(image, rng.permutation(image))) < 0.1


def test_how_often_a_preset_draws_an_operation_follows_from_the_sizes_of_its_groups():
    shares = shares_of_images(PRESETS["released_featdistill"], 12_000)
    # 0.8 of the images, half of them by the extended library, 2 of 8 groups: of 7 noises, or of 2 occlusions.
    assert shares["extended", "shot_noise"] == pytest.approx(0.4 * 2 / 8 / 7, abs=0.005)
    assert shares["extended", "water_drops"] == pytest.approx(0.4 * 2 / 8 / 2, abs=0.01)
    by_operation = parse_policy("released_featdistill,draw_by=operation,weights=jpeg2000:1")
    shares = shares_of_images(by_operation, 12_000)
    for name in ("shot_noise", "water_drops", "jpeg2000"):
        assert shares["extended", name] == pytest.approx(0.4 * 2 / 35, abs=0.006)
