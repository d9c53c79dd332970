"""A tree of folders becomes a manifest: labels by exact folder names alone, equal files once."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_trees import picture, write_tree

from data_prep import folders
from data_prep.reading.files import ImageFile
from featdistill.command_line import UserError
from featdistill.images import reading as image_io
from featdistill.records.manifest import read_manifest


def rows_of(root: Path, **options) -> pd.DataFrame:
    """Return the manifest's rows by their path below the root."""
    rows = folders.build_manifest(root, **options)
    return rows.set_index(pd.Index([os.path.relpath(image, root) for image in rows["image"]]))


@pytest.mark.parametrize(
    ("file", "label", "source", "generator"),
    [
        ("real/exif_samples/a.jpg", 0, "exif_samples", ""),
        ("ai/sdxl/a.jpg", 1, "sdxl", "sdxl"),
        ("Real/a.jpg", 0, "root", ""),
        ("FAKE/a.jpg", 1, "root", ""),
        ("train/Fake/a.jpg", 1, "train", ""),
        ("progan/cat/1_fake/a.png", 1, "progan/cat", "progan"),
        ("progan/cat/0_real/a.png", 0, "progan/cat", ""),
        ("deepfake/0_real/a.png", 0, "deepfake", ""),
        ("FLUX.1-schnell/1_fake/a.png", 1, "FLUX.1-schnell", "FLUX.1-schnell"),
        ("test2/PixArt/1_fake/a.png", 1, "test2/PixArt", "PixArt"),
        (
            "Midjourney/imagenet_midjourney/val/ai/a.PNG",
            1,
            "Midjourney/imagenet_midjourney/val",
            "Midjourney",
        ),
        ("Midjourney/imagenet_midjourney/val/nature/a.JPEG", 0, "Midjourney/imagenet_midjourney/val", ""),
        ("Midjourney/1_fake/cat/a.png", 1, "cat", "Midjourney"),
        ("testimony/ai/a.png", 1, "testimony", "testimony"),
        ("ai/generated/sd15/a.png", 1, "sd15", "sd15"),
        ("real/nature/a.png", 0, "root", ""),
        ("ai/real_estate/b/a.png", 1, "real_estate/b", "real_estate"),
    ],
)
def test_label_source_and_generator_follow_the_folders(tmp_path, file, label, source, generator):
    rows = rows_of(write_tree(tmp_path / "root", {file: 0}))
    row = rows.loc[file]
    assert (row["label"], row["source"], row["generator"]) == (label, source, generator)
    assert (row["name"], row["group"]) == (Path(file).name, "a")
    assert pd.isna(row["is_distorted"]) and row["distortions"] == "[]" and row["licence"] == ""


@given(st.sampled_from(sorted(folders.FOLDER_LABELS)), st.text(min_size=1, max_size=3))
def test_only_a_whole_name_in_any_case_is_a_label_folder(name, addition):
    label = folders.FOLDER_LABELS[name]
    assert folders.row(ImageFile("", f"{name.upper()}/a.png"), "")["label"] == label
    longer = name + addition.replace("/", "")
    if longer.casefold() not in folders.FOLDER_LABELS:
        with pytest.raises(UserError, match="no folder on its path"):
            folders.row(ImageFile("", f"{longer}/a.png"), "")


@pytest.mark.parametrize(
    "name", ["0", "1", "deepfake", "real_estate", "not_real", "ai_vs_real", "train", "a"]
)
def test_names_that_do_not_say_one_class_have_no_label(name):
    with pytest.raises(UserError, match="no folder on its path"):
        folders.row(ImageFile("", f"{name}/a.png"), "")


def test_folders_above_the_root_never_decide(tmp_path):
    root = write_tree(tmp_path / "fake" / "1_fake", {"real/a.png": 0})
    assert rows_of(root)["label"].tolist() == [0]
    with pytest.raises(
        UserError, match=r"folder 'misc' has images, but no folder on its path, .* is a label: 0_real"
    ):
        folders.build_manifest(write_tree(tmp_path / "ai", {"misc/a.png": 0}))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"real/a.png": 0, "masks/b.png": 1},
            "folder 'masks' has images, but no folder .* is a label: 0_real, real",
        ),
        ({"real/a.png": 0, "b.png": 1}, r"folder '\.' has images"),
        (
            {"a/real/x/fake/b.png": 0},
            "folder 'a/real/x/fake' is below 'real' and 'fake', which disagree",
        ),
        ({"ai/nature/b.png": 0}, "folder 'ai/nature' is below 'ai' and 'nature', which disagree"),
        ({"real/note.txt": b"x", "ai/.hidden.png": 0}, "holds no images"),
    ],
)
def test_a_tree_that_is_not_clear_is_an_error_that_names_the_folder(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        folders.build_manifest(write_tree(tmp_path / "root", files))


def test_names_are_file_names_where_these_are_unique_and_paths_elsewhere(tmp_path):
    root = write_tree(
        tmp_path, {"real/x/1.png": 0, "real/y/1.png": 1, "ai/1.png": 2, "ai/2.png": 3, "ai/1.jpg": 4}
    )
    rows = rows_of(root)
    assert rows["name"].to_dict() == {
        "real/x/1.png": "real/x/1.png",
        "real/y/1.png": "real/y/1.png",
        "ai/1.png": "ai/1.png",
        "ai/2.png": "2.png",
        "ai/1.jpg": "1.jpg",
    }
    assert rows["name"].is_unique
    assert rows.loc["real/x/1.png", "group"] == rows.loc["ai/1.jpg", "group"] == "1"


def test_source_may_be_given_for_all(tmp_path):
    root = write_tree(tmp_path, {"real/x/1.png": 0, "sdxl/ai/2.png": 1})
    rows = rows_of(root, source="mine")
    assert rows["source"].tolist() == ["mine", "mine"]
    assert rows["generator"].to_dict() == {"real/x/1.png": "", "sdxl/ai/2.png": "sdxl"}


def test_equal_files_are_kept_once_the_first_by_path(tmp_path, capsys):
    root = write_tree(
        tmp_path,
        {
            "a/0_real/1.png": 0,
            "b/0_real/1.png": 0,
            "b/0_real/2.png": 0,
            "b/0_real/3.png": 1,
            "b/1_fake/1.png": 2,
        },
    )
    assert rows_of(root).index.tolist() == ["a/0_real/1.png", "b/0_real/3.png", "b/1_fake/1.png"]
    assert "note: 2 byte-for-byte copies of other images" in capsys.readouterr().out


def test_equal_files_with_two_labels_are_an_error_that_names_both(tmp_path):
    root = write_tree(tmp_path, {"real/1.png": 0, "ai/2.png": 0})
    with pytest.raises(UserError, match=r"ai/2\.png and .*real/1\.png have equal bytes, but labels 1 and 0"):
        folders.build_manifest(root)


def test_linked_folders_are_followed_once(tmp_path):
    write_tree(tmp_path / "elsewhere", {"1.png": 0})
    root = write_tree(tmp_path / "root", {"ai/2.png": 1})
    (root / "real").symlink_to(tmp_path / "elsewhere")
    (root / "ai" / "again").symlink_to(root)
    assert rows_of(root)["label"].to_dict() == {"ai/2.png": 1, "real/1.png": 0}


def test_a_link_to_nothing_is_left_out_and_listed(tmp_path):
    root = write_tree(tmp_path, {"ai/2.png": 1})
    (root / "ai" / "3.png").symlink_to(root / "gone.png")
    assert run(root, tmp_path / "out" / "m.csv") == 1
    assert read_manifest(tmp_path / "out" / "m.csv")["name"].tolist() == ["2.png"]
    assert (tmp_path / "out" / "m.errors.csv").read_text() == "name,reason\n3.png,No such file or directory\n"


def run(root: Path, out: Path, *flags: str) -> int:
    return folders.main(["--root", str(root), "--out", str(out), *flags])


def test_the_manifest_is_written_with_images_that_can_be_read(tmp_path):
    root = write_tree(tmp_path / "data", {"real/1.png": 0, "ai/sd/2.png": 1})
    assert run(root, tmp_path / "data" / "m.csv") == 0
    text = (tmp_path / "data" / "m.csv").read_text()
    assert text.splitlines()[1].startswith("ai/sd/2.png,2.png,1,sd,sd,2,")
    rows = read_manifest(tmp_path / "data" / "m.csv")
    for row, seed in zip(rows.itertuples(), (1, 0), strict=True):
        assert np.array_equal(image_io.read_image(row.image), image_io.decode(picture(seed)))


def test_a_holdout_keeps_images_of_one_name_together_and_goes_when_it_is_not_asked_for(tmp_path, capsys):
    files = {f"{folder}/{i}.png": 2 * i + k for k, folder in enumerate(("real", "ai")) for i in range(20)}
    root, out = write_tree(tmp_path / "data", files), tmp_path / "m.csv"
    assert run(root, out, "--holdout", "0.2") == 0
    train, held = read_manifest(out), read_manifest(tmp_path / "m.holdout.csv")
    assert len(held) == 8 and len(train) == 32
    assert not set(train["group"]) & set(held["group"])
    first = (tmp_path / "m.holdout.csv").read_bytes()
    run(root, out, "--holdout", "0.2")
    assert (tmp_path / "m.holdout.csv").read_bytes() == first
    assert run(root, out) == 0
    assert len(read_manifest(out)) == 40 and not (tmp_path / "m.holdout.csv").exists()
    assert "m.holdout.csv, from an earlier run, is removed" in capsys.readouterr().out


def test_verify_leaves_unreadable_images_out_and_lists_them(tmp_path):
    whole = picture(7, "JPEG")
    root = write_tree(
        tmp_path / "data", {"real/1.png": 0, "ai/2.jpg": whole[:-40], "ai/3.png": b"", "ai/4.png": 3}
    )
    assert run(root, tmp_path / "m.csv") == 0
    assert len(read_manifest(tmp_path / "m.csv")) == 4
    assert run(root, tmp_path / "m.csv", "--verify", "--workers", "1") == 1
    assert read_manifest(tmp_path / "m.csv")["name"].tolist() == ["4.png", "1.png"]
    assert pd.read_csv(tmp_path / "m.errors.csv")["name"].tolist() == ["2.jpg", "3.png"]


@pytest.mark.parametrize(
    ("root", "out", "message"),
    [
        ("nowhere", "m.csv", "argument --root: .*nowhere is not a folder"),
        ("data", "m.txt", "m.txt must be the name of a .csv file"),
        ("empty", "m.csv", "empty holds no images"),
    ],
)
def test_a_wrong_command_line_ends_in_an_error_that_names_it(tmp_path, root, out, message):
    write_tree(tmp_path / "data", {"real/1.png": 0})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        run(tmp_path / root, tmp_path / out)


def test_the_shared_pool_gets_the_labels_and_sources_of_its_own_manifest(shared):
    found = folders.build_manifest(shared / "pool").set_index("name")
    own = pd.read_csv(shared / "pool" / "manifest.csv", dtype=str, keep_default_na=False).set_index("name")
    own = own.loc[found.index]
    assert len(found) > 1000
    assert found["label"].astype(str).tolist() == own["label"].tolist()
    assert found["source"].tolist() == own["source"].tolist()
