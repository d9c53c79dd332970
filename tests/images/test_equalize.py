import io
import json
import zipfile
from functools import cache

import cv2
import numpy as np
import pytest
from conftest import smooth_picture
from PIL import Image

from data_prep import equalize as command
from data_prep.writing import copies as image_copies
from data_prep.writing import parallel
from featdistill.command_line import UserError
from featdistill.images.equalization import Equalization, common_sizes, cut, equalize, equalized_jpeg
from featdistill.images.reading import decode, encode_jpeg, read_bytes, read_image
from featdistill.records.manifest import make_manifest, read_manifest, write_manifest

NAMES = ("images.zip", "manifest.csv", "equalise.json")


@pytest.fixture
def manifest(tmp_path):
    """A set as benchmarks have them: real images are JPEGs of many sizes, AI ones PNGs of a single one."""
    folder = tmp_path / "set"
    folder.mkdir()
    rows = {"image": [], "name": [], "label": [], "generator": [], "camera": []}
    for place in range(16):
        label = place % 2
        size = (64, 64) if label else (50 + 6 * place, 90 + 2 * place)
        path = folder / f"{place:02d}.{'png' if label else 'jpg'}"
        Image.fromarray(smooth_picture(place, *size)).save(path, **({} if label else {"quality": 98}))
        for column, value in zip(rows, (str(path), path.name, label, "g" * label, f"c{place}"), strict=True):
            rows[column].append(value)
    write_manifest(make_manifest(rows), folder / "manifest.csv")
    return folder / "manifest.csv"


def run(manifest, out, *flags: str) -> int:
    return command.main([str(manifest), "--out", str(out), "--workers", "1", *flags])


def quality_of(data: bytes) -> int:
    """Return the quality whose tables the encoder puts into a file."""
    return _tables().index(_table(data)) + 1


def _table(data: bytes) -> dict:
    with Image.open(io.BytesIO(data)) as image:
        return image.quantization


@cache
def _tables() -> list[dict]:
    blank = np.zeros((16, 16, 3), np.uint8)
    return [_table(encode_jpeg(blank, quality)) for quality in range(1, 101)]


def test_the_common_sizes_fit_into_nearly_all_images_of_every_class():
    rng = np.random.default_rng(0)
    real = rng.integers(300, 4000, (200, 2))
    ai = np.full((50, 2), 512)
    sizes = np.array(common_sizes([real, ai]))
    assert len(sizes) == 400 and np.all(np.diff(sizes[:, 0]) >= 0)
    for own in (real, ai):
        fits = (own[:, None] >= sizes[None]).all(axis=2).mean(axis=0)
        assert fits.min() >= 0.94
    # The AI images give squares, the real ones their own aspect ratios, and both weigh alike.
    square = sizes[:, 0] == sizes[:, 1]
    assert 200 <= square.sum() < 210
    kept = np.sort(real.min(axis=1) / real.max(axis=1))
    found = np.sort(sizes.min(axis=1) / sizes.max(axis=1))
    np.testing.assert_allclose(np.quantile(found, 0.25), np.quantile(kept, 0.5), atol=0.02)


def test_sizes_that_are_all_the_same_lose_the_room_for_a_grid_alone():
    assert set(common_sizes([np.full((7, 2), 256), np.full((3, 2), 256)])) == {(249, 249)}


def test_the_blocks_of_an_earlier_jpeg_lie_anywhere_afterwards():
    """A cut from an image of blocks: where the first edge is found tells the place of the grid."""
    blocks = np.kron(np.indices((32, 32)).sum(0) % 2 * 255, np.ones((8, 8))).astype(np.uint8)
    image = np.repeat(blocks[..., None], 3, axis=2)
    settings = Equalization(common_sizes([np.full((1, 2), 256)]), (100, 100), "crop")
    found = [equalize(image, f"{number}.png", settings) for number in range(100)]
    edges = [np.abs(np.diff(view[:, 0, 0].astype(int)))[:8].argmax() for view in found]
    assert np.bincount(edges, minlength=8).min() >= 4


@pytest.mark.parametrize("fit", ["resize", "crop"])
@pytest.mark.parametrize("size", [(20, 30), (40, 16), (72, 88), (16, 88), (100, 60), (200, 200)])
def test_a_cut_has_the_size_asked_for_wherever_it_is_taken(fit, size):
    for place in (0.0, 0.5, np.nextafter(1, 0)):
        found = cut(smooth_picture(1), size, fit, place, place)
        assert found.shape == (*size, 3) and found.dtype == np.uint8


def test_a_cut_that_needs_no_resizing_is_a_part_of_the_image():
    image = smooth_picture(2)
    for fit, size in (("crop", (40, 50)), ("resize", (72, 50)), ("resize", (72, 88))):
        found = cut(image, size, fit, 0.3, 0.7)
        views = np.lib.stride_tricks.sliding_window_view(image, (*size, 3))[:, :, 0]
        assert (views == found).all(axis=(2, 3, 4)).sum() == 1


def test_reducing_keeps_the_scene_and_all_of_the_shorter_direction():
    ramp = np.repeat(np.linspace(0, 255, 80).astype(np.uint8)[:, None, None], 120, axis=1).repeat(3, axis=2)
    found = cut(ramp, (20, 20), "resize", 0.5, 0.5)
    assert found[0].max() <= 7 and found[-1].min() >= 248


def test_what_is_drawn_is_a_function_of_seed_and_name():
    image, sizes = smooth_picture(3), tuple((side, side + 4) for side in range(20, 60))
    settings = Equalization(sizes, (60, 90))
    names = [f"{number}.png" for number in range(40)]
    found = [equalized_jpeg(image, name, settings) for name in names]
    assert found == [equalized_jpeg(image, name, settings) for name in names]
    other = Equalization(sizes, (60, 90), seed=1)
    assert (
        sum(equalized_jpeg(image, name, other) == data for name, data in zip(names, found, strict=True)) < 3
    )
    assert all(decode(data).shape[:2] in sizes for data in found)
    qualities = [quality_of(data) for data in found]
    assert min(qualities) >= 60 and max(qualities) <= 90 and len(set(qualities)) > 12


def test_settings_come_back_from_json():
    settings = Equalization(((20, 30), (20, 30), (40, 40)), (70, 80), "crop", 3)
    assert Equalization.from_json(json.loads(json.dumps(settings.as_json()))) == settings


def test_the_copy_holds_what_is_made_on_the_fly_and_keeps_the_other_columns(manifest, tmp_path):
    out = tmp_path / "copy"
    assert run(manifest, out) == 0
    source, found = read_manifest(manifest), read_manifest(out / "manifest.csv")
    assert found["name"].tolist() == [f"{place:02d}.jpg" for place in range(16)]
    for column in ("label", "generator", "camera"):
        assert found[column].tolist() == source[column].tolist()
    settings = Equalization.from_json(json.loads((out / "equalise.json").read_text())["settings"])
    for row in range(len(found)):
        expected = equalize(read_image(source["image"][row]), source["name"][row], settings)
        np.testing.assert_array_equal(read_image(found["image"][row]), expected)


def test_every_file_is_of_one_kind(manifest, tmp_path):
    folder = manifest.parent
    exif = Image.Exif()
    exif[0x010F] = "Camera"
    Image.open(folder / "00.jpg").save(folder / "00.jpg", quality=90, exif=exif)
    out = tmp_path / "copy"
    run(manifest, out, "--quality-range", "70", "80")
    archive = zipfile.ZipFile(out / "images.zip")
    assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    for member in archive.namelist():
        data = archive.read(member)
        assert data[:2] == b"\xff\xd8" and b"Exif" not in data and 70 <= quality_of(data) <= 80
        # Markers before the scan: only those of a plain JFIF file with 4:2:0 chroma.
        with Image.open(archive.open(member)) as image:
            assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
            assert [layer[1:3] for layer in image.layer] == [(2, 2), (1, 1), (1, 1)]


def test_sizes_of_both_classes_come_from_one_distribution(tmp_path):
    rows = {"image": [], "name": [], "label": []}
    for place in range(240):
        label = place % 2
        height, width = (40, 40) if label else (40 + place % 60, 50 + place % 70)
        path = tmp_path / f"{place}.png"
        cv2.imwrite(str(path), np.zeros((height, width, 3), np.uint8))
        for column, value in zip(rows, (str(path), path.name, label), strict=True):
            rows[column].append(value)
    write_manifest(make_manifest(rows), tmp_path / "manifest.csv")
    run(tmp_path / "manifest.csv", tmp_path / "copy")
    found = read_manifest(tmp_path / "copy" / "manifest.csv")
    sizes = np.array([read_image(image).shape[:2] for image in found["image"]])
    ai = found["label"].to_numpy() == 1
    # Before, the size alone told nearly all of them apart; now the two samples differ as chance has it.
    for measure in (sizes.min(axis=1), sizes[:, 1] / sizes[:, 0]):
        levels = np.unique(measure)
        gap = [abs((measure[ai] <= level).mean() - (measure[~ai] <= level).mean()) for level in levels]
        assert max(gap) < 1.63 * (2 / 120) ** 0.5  # Kolmogorov-Smirnov, 1 %
    assert len(np.unique(sizes, axis=0)) > 10


@pytest.mark.parametrize(
    ("flags", "shapes"),
    [
        (("--size", "square"), {(height, height) for height in range(40, 58)}),
        (("--size", "square", "32"), {(32, 32)}),
        (("--size", "shorter", "40"), None),
    ],
)
def test_a_size_can_be_square_or_given(manifest, tmp_path, flags, shapes):
    run(manifest, tmp_path / "copy", *flags)
    found = {
        read_image(image).shape[:2] for image in read_manifest(tmp_path / "copy" / "manifest.csv")["image"]
    }
    if shapes:
        assert found <= shapes
    else:
        assert {min(size) for size in found} == {40} and len(found) > 2


def test_an_image_that_lies_on_its_side_counts_as_it_is_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    Image.fromarray(smooth_picture(0, 40, 60)).save(path, exif=exif)
    write_manifest(make_manifest({"image": [str(path)], "name": ["a.jpg"], "label": [0]}), tmp_path / "m.csv")
    sizes = command.sizes_by_class(read_manifest(tmp_path / "m.csv"))
    assert sizes["0"].tolist() == [[60, 40]] == [list(read_image(str(path)).shape[:2])]


def test_a_copy_that_was_stopped_ends_with_the_bytes_of_a_whole_one(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "_ITEMS_PER_TASK", 4)
    run(manifest, tmp_path / "whole", "--workers", "2")

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(image_copies.atomic, "write_zip", stop)
        run(manifest, tmp_path / "stopped")
    work = next((tmp_path / "stopped").glob(".work-*"))
    made = sorted(work.iterdir())
    assert len(made) == 16
    made[3].unlink()
    before = made[4].stat().st_mtime_ns
    made_again = []
    original = command.make_image
    monkeypatch.setattr(
        command, "make_image", lambda name, *a, **k: made_again.append(name) or original(name, *a, **k)
    )
    run(manifest, tmp_path / "stopped")
    assert len(made_again) == 1 and before
    for name in NAMES:
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not work.exists()


def test_a_finished_copy_is_left_alone_and_other_settings_are_refused(manifest, tmp_path, capsys):
    out = tmp_path / "copy"
    run(manifest, out)
    before = (out / "images.zip").stat().st_mtime_ns
    assert run(manifest, out) == 0 and "nothing to do" in capsys.readouterr().out
    assert (out / "images.zip").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="was produced with different settings: seed was 0, is 5"):
        run(manifest, out, "--seed", "5")


def test_an_unreadable_image_is_named_and_left_out(manifest, tmp_path):
    (manifest.parent / "02.jpg").write_bytes(b"no image")
    out = tmp_path / "copy"
    assert run(manifest, out) == 1 and run(manifest, out) == 1
    assert (out / "errors.csv").read_text().splitlines()[1].startswith("02.jpg,")
    assert (
        len(read_manifest(out / "manifest.csv")) == 15 == len(zipfile.ZipFile(out / "images.zip").namelist())
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--size", "squar"), r"unknown --size 'squar' \(did you mean square\?\)"),
        (("--size", "square", "9"), "a side of 16 px or more"),
        (("--size", "square", "64", "64"), "a side of 16 px or more"),
        (("--quality-range", "95", "75"), "--quality-range needs the lower quality first"),
        (("--quality-range", "0", "75"), "argument --quality-range: must be from 1 to 100"),
        (("--workers", "0"), "argument --workers: must be from 1 to 256"),
    ],
)
def test_flags_that_make_no_sense_are_one_clear_error(manifest, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        run(manifest, tmp_path / "copy", *flags)
    assert not (tmp_path / "copy").exists()


def test_a_name_that_cannot_be_used_in_an_archive_is_refused(manifest, tmp_path):
    for name, message in (
        ("../x.png", "cannot be used in an archive"),
        ("00.png", r"both be called 00\.jpg"),
    ):
        frame = read_manifest(manifest)
        frame.loc[1, "name"] = name
        write_manifest(frame, manifest)
        with pytest.raises(UserError, match=message):
            run(manifest, tmp_path / "copy")


def test_a_class_of_which_nothing_can_be_read_is_an_error(manifest, tmp_path):
    for path in manifest.parent.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 8 images with label 1 can be read"):
        run(manifest, tmp_path / "copy")


def test_a_location_is_read_as_any_other(manifest, tmp_path):
    """A copy can be copied again: its images lie in an archive."""
    run(manifest, tmp_path / "copy")
    assert run(tmp_path / "copy" / "manifest.csv", tmp_path / "again") == 0
    location = read_manifest(tmp_path / "again" / "manifest.csv")["image"][0]
    assert "::" in location and read_bytes(location)[:2] == b"\xff\xd8"
