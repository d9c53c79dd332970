import dataclasses
import multiprocessing
import os
import pickle
import shutil
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import smooth_picture
from PIL import Image

from featdistill.command_line import UserError
from featdistill.data import image_cache
from featdistill.data.image_cache import build_cache
from featdistill.data.loading import Broken, make_loader
from featdistill.data.preprocessing import Preprocessing
from featdistill.data.sampling import TrainBatches
from featdistill.data.train_dataset import TrainDataset
from featdistill.distortions.presets import PRESETS
from featdistill.images.equalization import Equalization
from featdistill.images.reading import _open_archive
from featdistill.recipe_groups import Augmentation
from featdistill.records.manifest import read_manifest

POLICY = dataclasses.replace(PRESETS["heavy"], distort_at="input")


def preprocessing(resize: str = "shorter", size: int = 48) -> Preprocessing:
    return Preprocessing(size, resize, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def rows(make_set):
    """Ten images of different sizes, one of which is broken, and two of which are strips."""
    rows = read_manifest(make_set("train", 10))
    for row, sides in enumerate([(20, 700), (700, 20), (30, 33), (48, 48), (150, 49)]):
        Image.fromarray(smooth_picture(row, *sides)).save(rows["image"][row], quality=95)
    Path(rows["image"][6]).write_bytes(Path(rows["image"][6]).read_bytes()[:400])
    return rows


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(image_cache, "_ROWS_PER_FILE", 4)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}


@pytest.mark.parametrize("resize", ["shorter", "squash", "crop"])
@pytest.mark.parametrize("before", [{}, {"max_side_px": 60}, {"equalization": Equalization(((40, 56),))}])
def test_an_item_from_the_cache_equals_the_item_without_it(rows, tmp_path, resize, before):
    cache = build_cache(tmp_path / "cache", rows, preprocessing(resize), **before)
    policy = dataclasses.replace(POLICY, max_side_px=before.get("max_side_px"))
    options = {"views": ("clean", "other"), "equalization": before.get("equalization")}
    for crop in ("random", "center"):
        augmentation = Augmentation(crop=crop)
        plain = TrainDataset(rows, preprocessing(resize), policy, 1, augmentation, **options)
        cached = TrainDataset(rows, preprocessing(resize), policy, 1, augmentation, **options, cache=cache)
        for item in np.ndindex(2, 10):
            one, other = plain[item], cached[item]
            if item[1] == 6:
                assert isinstance(one, Broken) and one == other
                continue
            assert one.keys() == other.keys() and one["label"] == other["label"]
            for view in ("images", "images_clean", "images_other"):
                assert torch.equal(one[view], other[view])


def test_a_finished_cache_is_read_and_not_made_again(rows, tmp_path, monkeypatch):
    build_cache(tmp_path, rows.drop(index=6).reset_index(drop=True), preprocessing())
    monkeypatch.setattr(image_cache, "load_image", None)
    cache = build_cache(tmp_path, rows.drop(index=6).reset_index(drop=True), preprocessing())
    image = cache.read(3)
    assert len(cache) == 9 and image.shape == (48, 48, 3) and not image.flags.writeable


def _build_and_die(folder: Path, rows, images: int) -> None:
    """Make a cache in this process and kill it once so many images were loaded."""
    load, left = image_cache.load_image, [images]

    def count(*arguments):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(*arguments)

    image_cache.load_image = count
    build_cache(folder, rows, preprocessing())


@pytest.mark.parametrize("images", [12, 16, 19])
def test_a_killed_build_continues_to_the_same_bytes(rows, tmp_path, monkeypatch, images):
    build_cache(tmp_path / "whole", rows, preprocessing())
    process = multiprocessing.get_context("fork").Process(
        target=_build_and_die, args=(tmp_path / "killed", rows, images)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    there = [path.stat().st_mtime_ns for path in sorted((tmp_path / "killed").rglob("[0-9]*.images"))]
    assert len(there) == (images - 10) // 4  # ten are loaded to see how large they are
    assert any(path.name.endswith(".part") for path in (tmp_path / "killed").rglob(".*"))
    build_cache(tmp_path / "killed", rows, preprocessing())
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    after = [path.stat().st_mtime_ns for path in sorted((tmp_path / "killed").rglob("[0-9]*.images"))]
    assert len(after) == 3 and after[: len(there)] == there


def test_worker_processes_make_the_same_bytes_and_read_what_one_process_reads(rows, tmp_path):
    build_cache(tmp_path / "one", rows, preprocessing())
    state = torch.get_rng_state()
    cache = build_cache(tmp_path / "two", rows, preprocessing(), workers=2)
    assert torch.equal(state, torch.get_rng_state())
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    dataset = TrainDataset(rows, preprocessing(), POLICY, 1, Augmentation(), cache=cache)
    batches = TrainBatches(10, 5, 2, seed=0)
    for one, other in zip(make_loader(dataset, batches, 2), make_loader(dataset, batches, 0), strict=True):
        assert torch.equal(one["images"], other["images"]) and one["broken"] == other["broken"]
    assert len(pickle.dumps(cache)) < 2000


def test_two_runs_may_make_a_cache_at_the_same_time(rows, tmp_path):
    build_cache(tmp_path / "one", rows, preprocessing())
    context, arguments = multiprocessing.get_context("fork"), (tmp_path / "both", rows, preprocessing())
    both = [context.Process(target=build_cache, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert contents(tmp_path / "both") == contents(tmp_path / "one")


def test_another_key_is_another_cache(rows, tmp_path):
    made = [
        build_cache(tmp_path, rows, preprocessing()),
        build_cache(tmp_path, rows, preprocessing(size=32)),
        build_cache(tmp_path, rows, preprocessing("squash")),
        build_cache(tmp_path, rows, preprocessing(), max_side_px=40),
        build_cache(tmp_path, rows, preprocessing(), equalization=Equalization(((40, 56),))),
        build_cache(tmp_path, rows, preprocessing(), key_parts=["sha256 of the manifest"]),
        build_cache(tmp_path, rows.iloc[::-1].reset_index(drop=True), preprocessing()),
    ]
    assert len({cache.folder for cache in made}) == 7
    assert build_cache(tmp_path, rows, preprocessing()).folder == made[0].folder
    assert made[1].read(3).shape == (32, 32, 3)


def test_an_archive_that_was_replaced_is_noticed(rows, tmp_path):
    archive = tmp_path / "a.zip"
    inside = rows.iloc[3:4].reset_index(drop=True).assign(image=f"{archive}::x.png")
    folders = set()
    for shade in (10, 200):
        Image.fromarray(np.full((48, 48, 3), shade, np.uint8)).save(tmp_path / "x.png")
        with zipfile.ZipFile(archive, "w") as file:
            file.write(tmp_path / "x.png", "x.png")
        os.utime(archive, (shade, shade))
        _open_archive.cache_clear()  # as in another run
        cache = build_cache(tmp_path / "cache", inside, preprocessing())
        folders.add(cache.folder)
        assert np.all(cache.read(0) == shade)
    assert len(folders) == 2


def test_an_image_that_can_be_read_again_is_broken_no_more(rows, tmp_path):
    cache = build_cache(tmp_path / "cache", rows, preprocessing())
    assert list(cache.broken) == [6]
    shutil.copy(rows["image"][7], rows["image"][6])
    again = build_cache(tmp_path / "cache", rows, preprocessing())
    assert again.folder == cache.folder and not again.broken
    np.testing.assert_array_equal(again.read(6), cache.read(7))


@pytest.mark.parametrize("kept_bytes", [0, 5, 3000, -1])
def test_a_file_that_is_not_whole_is_made_again(rows, tmp_path, kept_bytes):
    cache = build_cache(tmp_path / "cache", rows, preprocessing())
    path = cache.folder / "000001.images"
    whole = path.read_bytes()
    path.write_bytes(whole[:kept_bytes])
    build_cache(tmp_path / "cache", rows, preprocessing())
    assert path.read_bytes() == whole


def test_what_cannot_be_kept_is_an_error_of_one_line(rows, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the cache"):
        build_cache(tmp_path / "file", rows, preprocessing())
    usage = shutil.disk_usage(tmp_path)._replace(free=50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"10 images .* needs about 0\.0 GB, and 0\.0 GB are free; make room"):
        build_cache(tmp_path / "full", rows, preprocessing())
    assert not list((tmp_path / "full").rglob("*.images"))


def test_distortions_and_crops_before_the_resizing_cannot_be_cached(rows, tmp_path):
    cache = build_cache(tmp_path / "cache", rows, preprocessing())

    def dataset(policy, *, rows=rows, cache=cache, **options):
        return TrainDataset(rows, preprocessing(), policy, 0, Augmentation(**options), cache=cache)

    with pytest.raises(UserError, match=r"--distortions NAME,distort_at=input"):
        dataset(PRESETS["heavy"])
    with pytest.raises(UserError, match="random_resized crops images before they are resized"):
        dataset(POLICY, crop="random_resized")
    cached, plain = dataset(PRESETS["none"])[0, 8], dataset(PRESETS["none"], cache=None)[0, 8]
    assert torch.equal(cached["images"], plain["images"])
    with pytest.raises(ValueError, match="the cache has 10 images, the manifest 4"):
        dataset(POLICY, rows=rows.iloc[:4])
