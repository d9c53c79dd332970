import numpy as np
import pytest
from conftest import smooth_picture

from featdistill.data.amplitude_mixup import mix_amplitudes


def by_formula(image: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    """The formula as it stands, in [0, 1] and float64, before rounding."""
    own, lent = (np.fft.fft2(pixels / 255, axes=(0, 1)) for pixels in (image, other))
    amplitude = share * np.abs(lent) + (1 - share) * np.abs(own)
    mixed = np.fft.ifft2(amplitude * np.exp(1j * np.angle(own)), axes=(0, 1)).real
    return 255 * np.clip(mixed, 0, 1)


@pytest.mark.parametrize("sides", [(64, 64), (48, 63), (33, 21)])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_it_is_the_formula(sides, share):
    image, other = smooth_picture(0, *sides), smooth_picture(1, *sides)
    copies = image.copy(), other.copy()
    found = mix_amplitudes(image, other, share)
    assert found.dtype == np.uint8 and found.shape == image.shape and found.flags.c_contiguous
    np.testing.assert_allclose(found, by_formula(image, other, share), rtol=0, atol=0.51)
    np.testing.assert_array_equal(image, copies[0])
    np.testing.assert_array_equal(other, copies[1])


def test_nothing_of_the_other_and_all_of_oneself_give_the_image_back():
    image, other = (np.random.default_rng(seed).integers(0, 256, (57, 57, 3), np.uint8) for seed in (0, 1))
    np.testing.assert_array_equal(mix_amplitudes(image, other, 0.0), image)
    np.testing.assert_array_equal(mix_amplitudes(image, image, 0.7), image)


def test_the_phases_stay_and_the_amplitudes_are_the_mixture():
    # Of little contrast, so that nothing is clipped.
    image, other = (96 + smooth_picture(seed, 64, 64) // 4 for seed in (2, 3))
    own, lent, found = (
        np.fft.fft2(pixels, axes=(0, 1)) for pixels in (image, other, mix_amplitudes(image, other, 0.4))
    )
    strong = np.abs(own) > 300  # rounding adds about 64 * 0.29 to every amplitude
    assert 30 < strong.sum() < own.size / 2
    turned = np.angle(found[strong] / own[strong])
    assert np.abs(turned).max() < 0.35 and np.abs(turned).mean() < 0.06
    expected = 0.4 * np.abs(lent) + 0.6 * np.abs(own)
    np.testing.assert_allclose(np.abs(found)[strong], expected[strong], atol=80)


def test_where_an_image_has_no_amplitude_its_phase_is_0():
    """A flat image has none but in its mean; rounding alone would give it phases by chance."""
    other = smooth_picture(4, 48, 48)
    lent = np.abs(np.fft.fft2(other, axes=(0, 1)))
    for gray in (0, 37, 255):
        flat = np.full((48, 48, 3), gray, np.uint8)
        amplitude = 0.3 * lent
        amplitude[0, 0] += 0.7 * 48 * 48 * gray
        expected = np.clip(np.fft.ifft2(amplitude, axes=(0, 1)).real, 0, 255)
        np.testing.assert_allclose(mix_amplitudes(flat, other, 0.3), expected, rtol=0, atol=0.51)
