"""The official library against the organizers' output and its definitions, and its command line."""

import colorsys
import io
import itertools
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import smooth_picture
from PIL import Image

import distortions_official as face
from featdistill.command_line import UserError
from featdistill.distortions import command as distortion_cli
from featdistill.distortions import official as distortions_official
from featdistill.distortions import official_tables as tables
from featdistill.distortions.command import CELL_PX, draw_sheet, parse_steps
from featdistill.distortions.official import OFFICIAL, shift_green
from featdistill.distortions.operation import LEVELS

ROOT = Path(__file__).resolve().parents[2]
DETERMINISTIC = [name for name, operation in OFFICIAL.items() if not operation.random]
DIRECTIONS = [(1, 0), (0, 1), (0.6, 0.8), (0.7071, 0.7071)]


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(one.astype(int) - other.astype(int))


@cache
def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return {key: arrays[key] for key in arrays.files}


@pytest.fixture
def golden(shared):
    """The organizers' own output by key; see the reference folder."""
    path = shared / "golden" / "official_ops.npz"
    if not path.is_file():
        pytest.skip("the reference output official_ops.npz is not next to the project")
    return arrays_of(path)


@pytest.fixture
def golden_statistics(shared):
    path = shared / "golden" / "official_ops_stats.json"
    if not path.is_file():
        pytest.skip("the reference statistics official_ops_stats.json are not next to the project")
    return json.loads(path.read_text())


# The official library against the organizers' output.


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_deterministic_operation_gives_what_the_organizers_code_gives(golden, name):
    mean, highest = {"jpeg": (0.5, 2), "brighten": (0.1, 3)}.get(name, (0.1, 2))
    for level, picture in itertools.product(LEVELS, ("china", "flower")):
        result = OFFICIAL[name](golden[f"input/{picture}"], level, generator())
        change = difference(result, golden[f"{name}/{level}/{picture}"])
        assert change.mean() <= mean and change.max() <= highest, (level, picture)


@pytest.mark.parametrize("level", LEVELS)
def test_colorshift_in_a_given_direction_gives_what_the_organizers_code_gives(golden, level):
    amount_px = OFFICIAL["colorshift"].scales[level - 1]
    for picture in ("china", "flower"):
        for place, direction in enumerate(DIRECTIONS):
            result = shift_green(golden[f"input/{picture}"], amount_px, np.array(direction))
            change = difference(result, golden[f"colorshift/{level}/{picture}/dir{place}"])
            inner = change[amount_px:-amount_px, amount_px:-amount_px]
            assert inner.mean() <= 0.1 and inner.max() <= 2


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "name,draws,tolerances",
    [
        ("whitenoise", 10, [0.03] * 5),
        ("impulsenoise", 200, [0.03] * 5),
        ("jitter", 10, [0.1, 0.1, 0.25, 0.25, 0.25]),
        ("colorshift", 40, [0.1] * 5),
    ],
)
def test_a_random_operation_changes_as_much_as_the_organizers_code(
    golden, golden_statistics, name, draws, tolerances, level
):
    for picture in ("china", "flower"):
        image, expected = golden[f"input/{picture}"], golden_statistics[picture][f"{name}/{level}"]
        results = np.stack([OFFICIAL[name](image, level, generator(seed)) for seed in range(draws)])
        change = (results.astype(np.float32) - image)[:, 8:-8, 8:-8]
        tolerance = tolerances[level - 1]
        assert np.abs(change).mean() == pytest.approx(expected["mean_abs"], rel=tolerance)
        assert np.sqrt((change**2).mean()) == pytest.approx(expected["rmse"], rel=tolerance)


@pytest.mark.parametrize("level", LEVELS)
def test_curves_and_disk_kernels_are_the_organizers(golden, level):
    place = level - 1
    contrast = tables.contrast_curve(OFFICIAL["lincontrchange"].scales[place])
    brighter = tables.middle_curve(OFFICIAL["brighten"].scales[place])
    darker = tables.middle_curve(-OFFICIAL["darken"].scales[place])
    values = np.arange(256) / 255
    for name, curve in (("lincontrchange", contrast), ("brighten", brighter), ("darken", darker)):
        np.testing.assert_allclose(curve(values), golden[f"curve/{name}/{level}"], atol=1e-6)
    kernel = tables.disk_kernel(OFFICIAL["lensblur"].scales[place])
    np.testing.assert_allclose(kernel, golden[f"kernel/lensblur/{level}"], atol=1e-9)


# The official library against its definitions.


def test_groups_and_scales_are_the_published_ones():
    assert {name: (operation.category, operation.scales) for name, operation in OFFICIAL.items()} == {
        "gausblur": ("blur", (0.1, 0.5, 1, 2, 5)),
        "lensblur": ("blur", (1, 2, 4, 6, 8)),
        "colorshift": ("color_distortion", (1, 3, 6, 8, 12)),
        "colorsat": ("color_distortion", (0.4, 0.2, 0.1, 0, -0.4)),
        "jpeg": ("jpeg", (43, 36, 24, 7, 4)),
        "whitenoise": ("noise", (0.001, 0.002, 0.003, 0.005, 0.01)),
        "impulsenoise": ("noise", (0.001, 0.005, 0.01, 0.02, 0.03)),
        "brighten": ("brightness_change", (0.1, 0.2, 0.4, 0.7, 1.1)),
        "darken": ("brightness_change", (0.05, 0.1, 0.2, 0.4, 0.8)),
        "jitter": ("spatial_distortion", (0.05, 0.1, 0.2, 0.5, 1)),
        "quantization": ("spatial_distortion", (20, 16, 13, 10, 7)),
        "lincontrchange": ("sharpness_contrast", (0, 0.15, -0.4, 0.3, -0.6)),
    }
    assert [name for name, operation in OFFICIAL.items() if not operation.monotone] == ["lincontrchange"]


def test_gausblur_spreads_a_point_over_two_sigma_and_level_1_is_the_identity():
    image = np.zeros((41, 41, 3), np.uint8)
    image[20, 20] = 255
    result = OFFICIAL["gausblur"](image, 4, generator())
    rows, columns = np.indices((41, 41)) - 20
    weights = np.exp(-(rows**2 + columns**2) / 8) * (np.maximum(abs(rows), abs(columns)) <= 4)
    np.testing.assert_array_equal(result[..., 0], np.rint(255 * weights / weights.sum()))
    picture = smooth_picture(7)
    np.testing.assert_array_equal(OFFICIAL["gausblur"](picture, 1, generator()), picture)


@pytest.mark.parametrize("level,negative", [(1, 0), (2, 8), (3, 8), (4, 16), (5, 16)])
def test_lensblur_in_parts_is_the_filter_with_the_whole_kernel(level, negative):
    kernel = tables.disk_kernel(OFFICIAL["lensblur"].scales[level - 1])
    assert kernel.sum() == pytest.approx(1) and np.count_nonzero(kernel < 0) == negative
    image = generator().integers(0, 256, (250, 1201, 3), dtype=np.uint8)
    whole = cv2.filter2D(image.astype(np.float64), -1, kernel, borderType=cv2.BORDER_REPLICATE)
    change = difference(OFFICIAL["lensblur"](image, level, generator()), np.clip(np.rint(whole), 0, 255))
    assert change.max() <= 1 and change.mean() < 0.001


def test_disk_kernels_are_narrower_than_true_disks():
    for radius_px, rms_px in ((4, 2.43), (6, 3.45), (8, 4.49)):
        kernel = tables.disk_kernel(radius_px)
        offsets = np.arange(-radius_px, radius_px + 1)
        squared = offsets[:, None] ** 2 + offsets**2
        assert np.sqrt((kernel * squared).sum()) == pytest.approx(rms_px, abs=0.006)
        assert kernel.min() > -0.051


def test_colorsat_multiplies_the_saturation_of_hsv():
    colors = generator(8).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for level in (1, 2, 3, 4):
        factor = OFFICIAL["colorsat"].scales[level - 1]
        result = OFFICIAL["colorsat"](colors, level, generator())
        for before, after in zip(colors.reshape(-1, 3) / 255, result.reshape(-1, 3), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*before)
            expected = 255 * np.array(colorsys.hsv_to_rgb(hue, factor * saturation, value))
            np.testing.assert_allclose(after, expected, atol=0.51)
    color = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    assert OFFICIAL["colorsat"](color, 5, generator())[0, 0].tolist() == [200, 240, 255]


def test_jpeg_is_what_pillow_makes_of_the_image():
    image = smooth_picture(9, 101, 130)
    for level, quality in zip(LEVELS, OFFICIAL["jpeg"].scales, strict=True):
        data = io.BytesIO()
        Image.fromarray(image).save(data, "JPEG", quality=quality)
        np.testing.assert_array_equal(
            OFFICIAL["jpeg"](image, level, generator()), np.asarray(Image.open(data))
        )


@pytest.mark.parametrize("level", LEVELS)
def test_whitenoise_is_normal_of_the_stated_variance_and_white(level):
    image = np.full((300, 400, 3), 128, np.uint8)
    noise = OFFICIAL["whitenoise"](image, level, generator()).astype(float) - 128
    variance = 255**2 * OFFICIAL["whitenoise"].scales[level - 1]
    assert abs(noise.mean()) < 4 * np.sqrt(variance / noise.size)
    assert noise.var() == pytest.approx(variance + 1 / 12, rel=0.01)
    assert (noise**4).mean() / noise.var() ** 2 == pytest.approx(3, abs=0.05)
    for neighbor in (np.roll(noise, 1, 0), np.roll(noise, 1, 1), np.roll(noise, 1, 2)):
        assert abs((noise * neighbor).mean()) / variance < 0.01


@pytest.mark.parametrize("level", LEVELS)
def test_impulsenoise_sets_half_of_its_share_to_white_and_half_to_black(level):
    image = np.full((200, 300, 3), 128, np.uint8)
    result = OFFICIAL["impulsenoise"](image, level, generator())
    share = OFFICIAL["impulsenoise"].scales[level - 1]
    # Places drawn twice make the changed share 1 - exp(-share).
    for value in (0, 255):
        assert np.mean(result == value) == pytest.approx(share / 2, rel=0.06)
    assert set(np.unique(result)) == {0, 128, 255}


@pytest.mark.parametrize("level", LEVELS)
def test_brighten_interpolates_its_colors_closely(level):
    image = smooth_picture(10, 128, 128)
    amount = OFFICIAL["brighten"].scales[level - 1]
    expected = np.rint(255 * tables.brighten_colors(amount, image / 255))
    change = difference(OFFICIAL["brighten"](image, level, generator()), expected)
    assert change.mean() < 0.1 and change.max() <= 3


def test_brighten_exchanges_red_and_blue_in_its_lightness():
    # Values of this code while it agreed with the organizers' output; without the exchange others come out.
    colors = np.array([[200, 60, 20], [20, 60, 200], [90, 160, 120]]) / 255
    expected = [[240.08, 98.44, 55.66], [46.26, 102.81, 241.34], [137.18, 209.10, 170.80]]
    np.testing.assert_allclose(255 * tables.brighten_colors(0.4, colors), expected, atol=0.01)


def test_lightness_through_a_curve_agrees_with_opencv():
    rgb = generator(11).random((64, 64, 3))
    curve = tables.middle_curve(0.4)
    lab = cv2.cvtColor(rgb.astype(np.float32), cv2.COLOR_RGB2LAB)
    lab[..., 0] = 100 * curve(lab[..., 0] / 100)
    expected = np.clip(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB), 0, 1)
    np.testing.assert_allclose(tables.lightness_through(curve, rgb), expected, atol=0.01)


def test_curves_run_through_their_points():
    assert tables.middle_curve(0.2)(np.array([0, 0.5, 1])) == pytest.approx([0, 0.6, 1])
    assert tables.middle_curve(-0.2)(np.array([0, 0.5, 1])) == pytest.approx([0, 0.4, 1])
    knots = np.array([0, 0.3, 0.5, 0.7, 1])
    assert tables.contrast_curve(0.3)(knots) == pytest.approx([0, 0.175, 0.5, 0.825, 1])
    values = np.linspace(0, 1, 33)
    assert tables.contrast_curve(-0.2)(values) == pytest.approx(values)
    for name, amount in (("darken", -0.4), ("lincontrchange", None)):
        image = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
        result = OFFICIAL[name](image, 4, generator())[..., 1].ravel()
        curve = tables.contrast_curve(0.3) if amount is None else tables.middle_curve(amount)
        np.testing.assert_array_equal(result, np.rint(255 * curve(np.arange(256) / 255)))


@pytest.mark.parametrize("level", LEVELS)
def test_quantization_makes_so_many_levels_and_black(level):
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    result = OFFICIAL["quantization"](ramp, level, generator())
    steps = np.unique(result)
    assert len(steps) == OFFICIAL["quantization"].scales[level - 1] + 1
    assert steps[0] == 0 and steps[-1] == 255 and np.ptp(np.diff(steps.astype(int))) <= 1
    assert np.count_nonzero(result == 0) == 3 and np.all(np.diff(result[..., 0].ravel().astype(int)) >= 0)
    flat = np.full((16, 16, 3), 99, np.uint8)
    np.testing.assert_array_equal(OFFICIAL["quantization"](flat, level, generator()), flat)


def test_colorshift_moves_green_alone_and_down_to_the_right():
    image = np.full((80, 80, 3), 30, np.uint8)
    image[30:50, 30:50] = 220
    result = shift_green(image, 8, np.array([0.7071, 0.7071]))
    np.testing.assert_array_equal(result[..., 0], image[..., 0])
    np.testing.assert_array_equal(result[..., 2], image[..., 2])
    rows, columns = np.indices((80, 80))
    added = result[..., 1].astype(int) - image[..., 1]
    assert added[50:, 50:].sum() > 0 > added[:45, :45].sum()
    weight = np.abs(added)
    assert added[52, 40] > 50 and added[40, 52] > 50 and added[27, 40] == 0 and added[40, 27] == 0
    assert weight[(rows < 28) | (columns < 28)].max() == 0


@pytest.mark.parametrize("level", (3, 4, 5))
def test_jitter_moves_pixels_by_its_sigma_and_the_image_not_at_all(level):
    slope = 4
    ramp = np.repeat((slope * np.arange(60) + 8)[None, :, None], 600, 0).astype(np.uint8).repeat(3, 2)
    sigma_px = OFFICIAL["jitter"].scales[level - 1]
    moved_px = (OFFICIAL["jitter"](ramp, level, generator()).astype(float) - ramp)[:, 16:-16] / slope
    assert abs(moved_px.mean()) < 0.1
    # Five independent moves would give sqrt(5) sigma; bilinear samples average the moves made before.
    assert sigma_px < moved_px.std() < np.sqrt(5) * sigma_px


@pytest.mark.parametrize("level", LEVELS)
def test_the_fields_of_jitter_are_independent(level):
    ramp = np.repeat((4 * np.arange(60) + 8)[None, :, None], 600, 0).astype(np.uint8).repeat(3, 2)
    lags = (5, 8, 16, 24, 32, 48, 64)
    found = []
    for seed in range(8):
        moved = (OFFICIAL["jitter"](ramp, level, generator(seed)).astype(float) - ramp)[:, 16:-16, 0]
        found.append([np.corrcoef(moved[:-lag].ravel(), moved[lag:].ravel())[0, 1] for lag in lags])
    # 130,000 pairs, so the deviation of a correlation is about 0.003.
    np.testing.assert_allclose(np.mean(found, axis=0), 0, atol=0.02)


# From level 3 on, theirs may move the whole image.
@pytest.mark.parametrize("level", (1, 2))
def test_jitter_changes_as_many_samples_as_the_organizers_code(golden, golden_statistics, level):
    for picture in ("china", "flower"):
        image = golden[f"input/{picture}"]
        results = np.stack([OFFICIAL["jitter"](image, level, generator(seed)) for seed in range(4)])
        share = np.mean((results != image)[:, 8:-8, 8:-8])
        assert share == pytest.approx(golden_statistics[picture][f"jitter/{level}"]["changed"], abs=0.004)


def test_jitter_adds_up_moves_below_half_a_step():
    ramp = np.arange(32, 192, dtype=np.uint8).repeat(4)[None, :, None].repeat(200, 0).repeat(3, 2)
    ramp = cv2.blur(ramp, (9, 1))  # a quarter of a step per px
    moved = np.mean(OFFICIAL["jitter"](ramp, 5, generator()) != ramp)
    # Each pass moves by about 1 px, which rounding after every pass would lose.
    assert moved > 0.2


def test_jitter_leaves_no_garbage_at_the_border():
    image = np.full((60, 90, 3), 50, np.uint8)
    image[:, 45:] = 200
    for level in LEVELS:
        result = OFFICIAL["jitter"](image, level, generator())
        assert result.min() == 50 and result.max() == 200
        assert np.all(result[:, :30] == 50) and np.all(result[:, 60:] == 200)


# The command line.


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(smooth_picture(12, 70, 90)).save(path)
    return str(path)


def test_the_list_names_every_operation_with_its_scales(capsys):
    assert face.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(OFFICIAL)
    for line, operation in zip(lines[1:], OFFICIAL.values(), strict=True):
        assert line.startswith(f"{operation.name} ") and f" {operation.category} " in line
        assert ", ".join(f"{scale:g}" for scale in operation.scales) in line
        assert ("  random" in line) == operation.random


def test_the_sheet_shows_every_operation_at_every_level(tmp_path, picture):
    target, library = (
        tmp_path / "out" / "sheet.png",
        {name: OFFICIAL[name] for name in ("darken", "whitenoise")},
    )
    written = []
    for _ in range(2):
        assert distortion_cli.main(library, "A library.", ["--sheet", picture, "--out", str(target)]) == 0
        written.append(target.read_bytes())
    assert written[0] == written[1]
    with Image.open(target) as sheet:
        assert sheet.height > 2 * CELL_PX and sheet.width > 6 * CELL_PX
    flat = np.full((300, 300, 3), 100, np.uint8)
    drawn = draw_sheet({"darken": OFFICIAL["darken"]}, flat, 0)
    colors = {tuple(OFFICIAL["darken"](flat, level, generator())[0, 0].tolist()) for level in LEVELS}
    pixels = {tuple(color) for color in drawn[drawn.shape[0] // 2].tolist()}
    assert colors | {(100, 100, 100), (255, 255, 255)} == pixels


def test_the_sheet_of_one_level_shows_every_operation_side_by_side(tmp_path, picture):
    target = tmp_path / "sheet.png"
    arguments = ["--sheet", picture, "--level", "3", "--out", str(target)]
    assert face.main(arguments) == 0
    sheet = np.asarray(Image.open(target)).astype(int)
    # 13 cells of 160 px in three rows of six.
    assert sheet.shape == (6 + 3 * (160 + 28), 6 + 6 * (160 + 6), 3)
    plain = sheet[28:188, 6:166]
    jpeg = list(OFFICIAL).index("jpeg") + 1
    shown = sheet[28 + jpeg // 6 * 188 :, 6 + jpeg % 6 * 166 :][:160, :160]
    expected = OFFICIAL["jpeg"](plain.astype(np.uint8), 3, generator())
    np.testing.assert_array_equal(shown, expected)


def test_apply_gives_what_the_operations_give(tmp_path, picture):
    target = tmp_path / "distorted.png"
    assert face.main(["--apply", "jpeg:3, gausblur:2", picture, str(target)]) == 0
    image = np.asarray(Image.open(picture))
    expected = OFFICIAL["gausblur"](OFFICIAL["jpeg"](image, 3, generator()), 2, generator())
    np.testing.assert_array_equal(np.asarray(Image.open(target)), expected)


def test_apply_is_the_same_for_the_same_seed_and_other_for_another(tmp_path, picture):
    results = []
    for seed in ("1", "1", "2"):
        target = tmp_path / "noisy.png"
        face.main(["--apply", "whitenoise:4,jitter:1", picture, str(target), "--seed", seed])
        results.append(target.read_bytes())
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize(
    "text,message",
    [
        ("jpg:3", "did you mean jpeg"),
        ("jpeg", "is not a step"),
        ("", "is not a step"),
        ("jpeg:3,", "is not a step"),
        ("jpeg:0", "must be 1 to 5"),
        ("jpeg:x", "must be 1 to 5"),
    ],
)
def test_a_wrong_step_is_an_error_that_says_so(text, message):
    with pytest.raises(UserError, match=message):
        parse_steps(text, OFFICIAL)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--sheet", "PICTURE"], "--out"),
        (["--sheet", "missing.png", "--out", "x.png"], "missing.png"),
        (["--apply", "jpeg:1", "TINY", "x.png"], "16 px"),
        (["--apply", "jpeg:1", "PICTURE", "x.gif"], "cannot save"),
        (["--apply", "jpeg:1", "PICTURE", "PICTURE/x.png"], "cannot write"),
        (["--list", "--seed", "-1"], "--seed"),
        ([], "required"),
    ],
)
def test_wrong_arguments_are_errors_that_name_them(tmp_path, monkeypatch, picture, arguments, message):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (15, 40)).save("tiny.png")
    arguments = [part.replace("PICTURE", picture).replace("TINY", "tiny.png") for part in arguments]
    with pytest.raises(UserError, match=message):
        face.main(arguments)
    assert not (tmp_path / "x.png").exists()


def test_the_script_ends_with_status_2_and_one_line():
    command = [sys.executable, str(ROOT / "distortions_official.py"), "--apply", "jpg:3", "a.png", "b.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "did you mean jpeg" in done.stderr


def test_where_arrays_lie_in_memory_does_not_change_a_bit_of_the_edge_mask(monkeypatch):
    channels, masks = cv2.split(smooth_picture(7, 112, 176)), []
    for offset in (0, 4, 16, 32, 48):
        monkeypatch.setattr(
            distortions_official, "scratch_array", lambda _, *kind, at=offset: at_offset(*kind, at)
        )
        masks.append(distortions_official._edge_mask(*channels))
    assert all(np.array_equal(mask, masks[0]) for mask in masks)


def at_offset(shape: tuple[int, ...], dtype: type, offset: int) -> np.ndarray:
    """New memory that begins so many bytes behind a multiple of 64."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + 128, np.uint8)
    first = -memory.ctypes.data % 64 + offset
    return memory[first : first + size].view(dtype).reshape(shape)
