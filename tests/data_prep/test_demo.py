"""The synthetic miniature: official files, the same bytes every time, and only traces tell the classes."""

import ast
import csv
import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data_prep import demo
from data_prep.synthetic import camera as demo_camera
from data_prep.synthetic.generators import GENERATORS, Codebooks
from data_prep.synthetic.scenes import KINDS, draw_scene
from featdistill.command_line import UserError
from featdistill.images.reading import decode

NAME = re.compile(r"[0-9a-f]{20}\.jpg")
HEADER = ["image_name", "label", "distortions", "distortion_scales", "is_distorted"]
LABELED = {
    "val": ("val_images.zip", "val_images", "val_labels.csv"),
    "val_hard": ("val_images_hard.zip", "val_images_hard", "val_hard_labels.csv"),
    "public_test": ("test_images.zip", "test_images", "test_labels.csv"),
    "private_test": ("private_test_images.zip", "private_test", "organisers/private_test_labels.csv"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "tiny"
    assert demo.main(["--out", str(folder), "--size", "tiny", "--workers", "1"]) == 0
    return folder


@pytest.fixture(scope="module")
def codebooks() -> Codebooks:
    return demo._fit_on_scenes(0)


@pytest.fixture(scope="module")
def sample(codebooks) -> list[demo.DemoImage]:
    """120 training images, more than tiny has."""
    return [demo.make_image(index, "train", 0, codebooks) for index in range(120)]


def read_csv(text: str) -> tuple[list[str], list[dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(text))
    return list(reader.fieldnames), list(reader)


def rows_of(path: Path) -> list[dict[str, str]]:
    return read_csv(path.read_text(encoding="utf-8"))[1]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shard(folder: Path, number: int) -> tuple[list[str], list[dict[str, str]], list[str]]:
    with zipfile.ZipFile(folder / f"shard_{number}.zip") as archive:
        header, rows = read_csv(archive.read(f"shard_{number}/labels.csv").decode())
        return header, rows, archive.namelist()


def mosaic_trace(image: np.ndarray) -> float:
    """Log ratio of green's distance from its four neighbors' mean: measured places over interpolated ones.

    0 where both kinds of places are alike; above 0 where an RGGB mosaic was filled in.
    """
    green = image[..., 1].astype(float)
    around = green[:-2, 1:-1] + green[2:, 1:-1] + green[1:-1, :-2] + green[1:-1, 2:]
    distance = np.abs(green[1:-1, 1:-1] - around / 4)
    odd = np.indices(distance.shape).sum(axis=0) % 2 == 1
    return float(np.log(distance[odd].mean() / distance[~odd].mean()))


def test_the_number_of_workers_changes_no_byte(tiny, tmp_path):
    assert demo.main(["--out", str(tmp_path / "two"), "--size", "tiny", "--workers", "2"]) == 0
    assert files_of(tmp_path / "two") == files_of(tiny)


def test_another_seed_gives_other_names_and_other_pictures(sample, codebooks):
    other = demo.make_image(0, "train", 1, codebooks)
    assert other.name != sample[0].name and other.data != sample[0].data


def test_the_folder_holds_the_official_files_and_says_what_else_it_holds(tiny):
    official = {f"shard_{i}.zip" for i in range(6)} | {"toy.zip"}
    official |= {archive for archive, _, _ in LABELED.values()}
    official |= {"val_labels.csv", "val_hard_labels.csv", "test_labels.csv"}
    own = {"README.txt", "demo.json", "generators.csv", "organisers/generators.csv"}
    assert set(files_of(tiny)) == official | own | {"organisers/private_test_labels.csv"}
    readme = (tiny / "README.txt").read_text()
    assert "synthetic" in readme and all(name in readme for name in ("generators.csv", "organisers/"))
    assert json.loads((tiny / "demo.json").read_text())["counts"] == {
        name: split.counts["tiny"] for name, split in demo.SPLITS.items()
    }


def test_shards_hold_images_and_labels_with_an_unnamed_index_first_and_are_balanced(tiny):
    seen = set()
    for number in range(6):
        header, rows, members = shard(tiny, number)
        assert header == ["", "image_name", "label"]
        assert [row[""] for row in rows] == [str(place) for place in range(len(rows))]
        images = {f"shard_{number}/images/{row['image_name']}" for row in rows}
        assert set(members) == images | {f"shard_{number}/labels.csv"}
        assert sum(row["label"] == "1" for row in rows) == len(rows) / 2 == 4
        seen |= {row["image_name"] for row in rows}
    assert len(seen) == 48 and all(NAME.fullmatch(name) for name in seen)


@pytest.mark.parametrize("split", LABELED)
def test_label_files_name_the_images_of_the_archive_and_half_of_each_class_is_distorted(tiny, split):
    archive, folder, labels = LABELED[split]
    header, rows = read_csv((tiny / labels).read_text(encoding="utf-8"))
    assert header == HEADER
    with zipfile.ZipFile(tiny / archive) as opened:
        assert sorted(opened.namelist()) == [f"{folder}/{row['image_name']}" for row in rows]
    assert all(NAME.fullmatch(row["image_name"]) for row in rows)
    for label in "01":
        of_class = [row for row in rows if row["label"] == label]
        assert len(of_class) == len(rows) / 2
        assert sum(row["is_distorted"] == "1" for row in of_class) == len(of_class) / 2
    for row in rows:
        names, scales = (ast.literal_eval(row[column]) for column in HEADER[2:4])
        assert len(names) == len(scales) and bool(names) == (row["is_distorted"] == "1")


def test_archives_are_stored_with_a_fixed_time_and_every_image_opens(tiny):
    for path in tiny.glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                assert info.compress_type == zipfile.ZIP_STORED and info.date_time == (1980, 1, 1, 0, 0, 0)
                if info.filename.endswith(".jpg"):
                    height, width, _ = decode(archive.read(info)).shape
                    assert {height, width} <= set(demo.SIDES_PX)


def test_clean_and_distorted_evaluation_images_end_in_the_same_storage(tiny):
    archive, folder, labels = LABELED["val"]
    tables = {"0": set(), "1": set()}
    with zipfile.ZipFile(tiny / archive) as opened:
        for row in rows_of(tiny / labels):
            with Image.open(io.BytesIO(opened.read(f"{folder}/{row['image_name']}"))) as image:
                tables[row["is_distorted"]].add(str((image.quantization, image.layer)))
    assert tables["0"] == tables["1"] and len(tables["0"]) == 1


def test_generators_held_back_from_training_come_in_and_more_of_them_split_by_split(tiny):
    made_by = {row["image_name"]: row["generator"] for row in rows_of(tiny / "generators.csv")}
    made_by |= {row["image_name"]: row["generator"] for row in rows_of(tiny / "organisers/generators.csv")}
    trained = {made_by[row["image_name"]] for number in range(6) for row in shard(tiny, number)[1]} - {""}
    assert trained == set(demo.SPLITS["train"].generators)
    unseen = {}
    for split, (_, _, labels) in LABELED.items():
        rows = rows_of(tiny / labels)
        assert all((made_by[row["image_name"]] != "") == (row["label"] == "1") for row in rows)
        assert {made_by[row["image_name"]] for row in rows} - trained - {""}
        unseen[split] = set(demo.SPLITS[split].generators) - trained
    counts = [len(unseen[split]) for split in LABELED]
    assert counts == sorted(set(counts))
    assert set.union(trained, *unseen.values()) == set(GENERATORS)


def test_file_size_and_picture_statistics_do_not_tell_the_classes(sample):
    features = []
    for image in sample:
        pixels = decode(image.data)
        features.append((len(image.data), *pixels.shape[:2], pixels.mean(), pixels.std()))
    labels = [image.label for image in sample]
    for column in np.array(features).T:
        assert 0.35 < roc_auc_score(labels, column) < 0.65
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    model = make_pipeline(StandardScaler(), LogisticRegression())
    scores = cross_val_predict(model, features, labels, cv=folds, method="predict_proba")[:, 1]
    assert 0.35 < roc_auc_score(labels, scores) < 0.65


def test_only_camera_pictures_carry_the_trace_of_a_color_mosaic(sample):
    real = [mosaic_trace(decode(image.data)) for image in sample if image.label == 0]
    ai = [mosaic_trace(decode(image.data)) for image in sample if image.label == 1]
    assert min(real) > 0.04 and np.mean(real) > 0.2
    assert max(ai) < 0.04


@pytest.mark.parametrize("edge_aware", [False, True])
def test_demosaicing_a_uniform_surface_gives_its_color_back(edge_aware):
    surface = np.tile(np.float32([0.9, 0.5, 0.1]), (16, 16, 1))
    restored = demo_camera.demosaic(demo_camera.mosaic(surface), edge_aware)
    np.testing.assert_allclose(restored, surface, atol=1e-4)


@pytest.mark.parametrize("generator", GENERATORS)
def test_every_generator_keeps_the_scene_and_changes_its_detail(generator, codebooks):
    rng = np.random.default_rng(4)
    look = demo_camera.draw_look(rng)
    light = demo_camera.expose(draw_scene(rng, "foliage", 112, 128), look)
    render = demo_camera.develop(light, look)
    made = GENERATORS[generator](render, rng, codebooks)
    assert made.shape == render.shape and made.dtype == np.float32
    assert abs(made.mean() - render.mean()) < 0.01
    assert np.corrcoef(made.ravel(), render.ravel())[0, 1] > 0.75
    assert np.abs(made - render).mean() > 0.005


@pytest.mark.parametrize("kind", KINDS)
def test_scenes_are_finite_lit_and_of_the_size_asked_for(kind):
    scene = draw_scene(np.random.default_rng(3), kind, 112, 144)
    assert scene.shape == (112, 144, 3) and scene.dtype == np.float32
    assert np.isfinite(scene).all() and scene.min() >= 0 and scene.std() > 0.05


def test_a_second_run_on_a_finished_folder_says_so_and_leaves_it(tiny, capsys):
    before = {path: path.stat().st_mtime_ns for path in tiny.rglob("*")}
    assert demo.main(["--out", str(tiny), "--size", "tiny"]) == 0
    assert "already holds" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tiny.rglob("*")} == before


@pytest.mark.parametrize("flags", [["--size", "tiny", "--seed", "1"], ["--size", "small"]])
def test_other_settings_on_a_finished_folder_are_an_error_that_names_them(tiny, flags):
    with pytest.raises(UserError, match=flags[-2].strip("-")):
        demo.main(["--out", str(tiny), *flags])


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    (tmp_path / "shard_0.zip").write_bytes(b"precious")
    with pytest.raises(UserError, match="already exists and was not written by this command"):
        demo.main(["--out", str(tmp_path), "--size", "tiny"])
    assert (tmp_path / "shard_0.zip").read_bytes() == b"precious"


def test_an_interrupted_run_leaves_nothing_behind(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_write_split", stop)
    monkeypatch.setattr(
        demo,
        "make_image",
        lambda index, split, seed, codebooks: demo.DemoImage(f"{split}{index}.jpg", 0, "", "", [], 0, b""),
    )
    with pytest.raises(KeyboardInterrupt):
        demo.main(["--out", str(tmp_path / "demo"), "--size", "tiny", "--workers", "1"])
    assert list(tmp_path.iterdir()) == []
