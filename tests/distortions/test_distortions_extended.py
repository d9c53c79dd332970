"""The extended library as a whole: the paper's 35 in 8 categories; what each does is tested by category."""

from collections import Counter

from featdistill.distortions.libraries import EXTENDED, EXTRAS
from featdistill.distortions.official import OFFICIAL

# Section 4.2 of the paper: categories and the distortions it names.
CATEGORIES = {
    "blur": 5,
    "noise": 7,
    "compression": 5,
    "color": 4,
    "geometry": 6,
    "environment": 4,
    "sensor": 2,
    "occlusion": 2,
}
NAMED = """motion_blur defocus_blur atmospheric_blur poisson_noise iso_noise jpeg2000 ringing color_cast
perspective_warp fog rain snow blooming random_occlusion"""


def test_there_are_35_operations_in_the_papers_8_categories():
    assert len(EXTENDED) == 35
    assert Counter(operation.category for operation in EXTENDED.values()) == CATEGORIES
    assert set(NAMED.split()) <= set(EXTENDED)


def test_every_operation_says_what_it_is_and_registers_under_its_own_name():
    for library in (EXTENDED, EXTRAS):
        for name, operation in library.items():
            lines = operation.apply.__doc__.strip().splitlines()
            assert operation.name == name and lines[0].endswith("."), name
            # The physical model and its source, beside what a listing prints.
            assert library is EXTRAS or len(lines) > 2, name


def test_geometry_moves_patches_and_color_and_noise_do_not():
    for operation in EXTENDED.values():
        if operation.category == "geometry":
            assert not operation.keeps_layout, operation.name
        if operation.category in ("noise", "color", "compression", "sensor"):
            assert operation.keeps_layout, operation.name


def test_the_second_tier_is_apart_from_the_35():
    assert not set(EXTRAS) & set(EXTENDED) and not set(EXTENDED) & set(OFFICIAL)
    expected = "film_grain color_bleed light_leak digital_glitch ghosting night_vision pixel_shuffle "
    expected += "jpeg_blockiness salt_and_pepper halftone pixelate moire scan_lines screen_capture"
    assert set(EXTRAS) == set(expected.split())
