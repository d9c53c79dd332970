"""What all sources share: the walk, the labels, the subset, the copies, the table, the files written."""

import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_trees import KINDS, cells_of, picture, write_tree

from data_prep import aigcdetect, deepfake60k, diffface, ditfake, genimage, universalfakedetect
from data_prep.reading import files as source_files
from data_prep.reading.files import ImageFile, find_images
from data_prep.writing import sampling
from data_prep.writing import source as sources
from featdistill.command_line import UserError
from featdistill.images.reading import decode, read_image
from featdistill.records.manifest import make_manifest, read_manifest

MODULES = (aigcdetect, deepfake60k, diffface, ditfake, genimage, universalfakedetect)


def file_at(path: str) -> ImageFile:
    return ImageFile(f"/data/{path}", path)


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_found_alike_in_folders_and_archives_and_can_be_read_in_place(tmp_path, kind):
    files = {"a/0_real/1.png": 0, "a/1_fake/2.PNG": 1, "a/note.txt": b"x"}
    root = write_tree(tmp_path / "data", files, kind)
    found = find_images(root)
    assert [file.path for file in found] == ["a/0_real/1.png", "a/1_fake/2.PNG"]
    for seed, file in enumerate(found):
        assert np.array_equal(read_image(file.location), decode(picture(seed)))
    assert (found[0].folders, found[0].folder, found[0].stem) == (("a", "0_real"), "a/0_real", "1")


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("inner", ["", "Midjourney/"])
def test_an_archive_below_the_root_counts_as_a_folder_of_its_name_once(tmp_path, kind, inner):
    write_tree(tmp_path / "data" / "x" / "Midjourney", {f"{inner}ai/1.png": 0}, kind)
    assert [file.path for file in find_images(tmp_path / "data")] == ["x/Midjourney/ai/1.png"]


def test_an_archive_goes_before_its_folder_and_the_note_says_so(tmp_path, capsys):
    root = write_tree(tmp_path / "data", {"sd/ai/1.png": 0, "sdxl/ai/1.png": 1})
    write_tree(root / "sd", {"ai/1.png": 0}, "zip")
    assert [file.location for file in find_images(root)] == [
        f"{root}/sd.zip::ai/1.png",
        f"{root}/sdxl/ai/1.png",
    ]
    assert "note: the folder sd/ is ignored: the archive sd.zip is used" in capsys.readouterr().out


def test_the_last_part_of_a_divided_archive_is_an_error_unless_it_was_unpacked(tmp_path, capsys):
    root = write_tree(tmp_path / "data", {"other/ai/1.png": 0, "sd.z01": b"part", "sd.zip": b"part"})
    with pytest.raises(UserError, match=r"sd\.zip is one part of several .*zip -s 0 sd\.zip"):
        find_images(root)
    write_tree(root, {"sd/ai/2.png": 1})
    assert [file.path for file in find_images(root)] == ["other/ai/1.png", "sd/ai/2.png"]
    assert "sd.zip, one part of several, is ignored" in capsys.readouterr().out


def test_what_cannot_be_read_in_place_is_named(tmp_path, capsys):
    root = write_tree(tmp_path / "data", {"ai/1.png": 0, "b.tar.gz": b"x", "c.7z": b"x", "d.zip.001": b"x"})
    write_tree(root / "e", {"2.png": 1, "inner.zip": b"x"}, "zip")
    assert len(find_images(root)) == 2
    notes = capsys.readouterr().out
    for name in ("b.tar.gz", "c.7z", "d.zip.001", "e.zip::inner.zip"):
        assert name in notes


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": b"x"}, "holds no images"),
        ({"a.zip": b"no zip"}, r"a\.zip is not a complete zip archive"),
    ],
)
def test_a_root_without_images_or_with_a_damaged_archive_is_an_error(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        find_images(write_tree(tmp_path / "data", files))


def test_two_archives_of_one_name_are_an_error_that_names_both(tmp_path):
    for kind in ("zip", "tar"):
        write_tree(tmp_path / "data" / "sd", {"ai/1.png": 0}, kind)
    with pytest.raises(UserError, match=r"sd\.\w+::ai/1.png and .*sd\.\w+::ai/1.png are the same"):
        find_images(tmp_path / "data")


def test_a_file_that_is_no_archive_is_an_error(tmp_path):
    root = write_tree(tmp_path / "data", {"a.png": 0})
    with pytest.raises(UserError, match=r"a\.png is neither a folder nor a \.zip or \.tar archive"):
        find_images(root / "a.png")


def test_one_folder_on_the_path_decides_by_its_whole_name_in_any_case():
    known = {"ai": 1, "nature": 0}
    assert source_files.one_on_path(file_at("x/AI/y/1.png"), known, "a label") == (1, 1)
    assert source_files.one_on_path(file_at("Nature/nature/1.png"), known, "a label") == (0, 0)
    with pytest.raises(UserError, match=r"folder 'x/rainy' has images, but no folder .* a label: ai, nature"):
        source_files.one_on_path(file_at("x/rainy/1.png"), known, "a label")
    with pytest.raises(UserError, match="folder 'AI/nature' is below 'AI' and 'nature', which disagree"):
        source_files.one_on_path(file_at("AI/nature/1.png"), known, "a label")


def strata(frame: pd.DataFrame) -> dict:
    return frame.groupby([frame["label"].astype("object").fillna(-1), frame["generator"]]).size().to_dict()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([(0, ""), (1, "a"), (1, "b"), (None, "")]), min_size=1, max_size=60), st.data()
)
def test_a_subset_has_the_size_asked_for_and_each_stratum_its_share(kinds, data):
    frame = make_manifest(
        {
            "image": [f"{i}.png" for i in range(len(kinds))],
            "name": [f"{i}.png" for i in range(len(kinds))],
            "label": [label for label, _ in kinds],
            "generator": [generator for _, generator in kinds],
        }
    )
    limit = data.draw(st.integers(1, len(kinds) + 5))
    taken = sampling.proportional_subset(frame, limit, seed=3)
    assert len(taken) == min(limit, len(frame))
    share = len(taken) / len(frame)
    counts = strata(taken)
    for key, rows in strata(frame).items():
        assert abs(counts.get(key, 0) - share * rows) < 1
    order = data.draw(st.permutations(range(len(frame))))
    shuffled = sampling.proportional_subset(frame.iloc[order].reset_index(drop=True), limit, seed=3)
    assert set(shuffled["name"]) == set(taken["name"])
    assert taken["name"].tolist() == [name for name in frame["name"] if name in set(taken["name"])]


def test_another_seed_takes_another_subset():
    names = [f"{i}.png" for i in range(200)]
    frame = make_manifest({"image": names, "name": names, "label": [0] * 200})
    first, second = (set(sampling.proportional_subset(frame, 50, seed)["name"]) for seed in (0, 1))
    assert first != second and len(first) == len(second) == 50


@pytest.mark.parametrize("kind", KINDS)
def test_equal_images_are_kept_once_and_their_groups_and_sets_are_joined(tmp_path, kind):
    root = write_tree(tmp_path / "data", {"a.png": 0, "b.png": 0, "c.png": 0, "d.png": 1, "e.png": 2}, kind)
    found = find_images(root)
    columns = {
        **source_files.read_rows(found, lambda file: {}),
        "label": [0, 0, 0, 1, 1],
        "group": ["a", "b", "c", "b", "e"],
        "protocol_sets": ["x", "y;x", "z", "y", ""],
    }
    kept = sources.keep_once(make_manifest(columns))
    assert kept["name"].tolist() == ["a.png", "d.png", "e.png"]
    assert kept["protocol_sets"].tolist() == ["x;y;z", "y", ""]
    assert kept["group"][0] == kept["group"][1] != kept["group"][2]


SOURCE = sources.Source(
    "mine", "My set", "nowhere", "none", row=dict, published={("", 0): 2, ("a", 1): 5, ("b", 1): 9}
)


def arguments(out: Path, **changes) -> Namespace:
    settings = {"limit": None, "holdout": None, "seed": 0, "verify": False, "workers": 1}
    return Namespace(out=out, **{**settings, **changes})


def test_the_table_holds_what_was_found_against_what_was_promised(tmp_path, capsys):
    names = [f"{i}.png" for i in range(6)]
    columns = {"image": names, "name": names, "label": [0, 0, 1, 1, 1, None]}
    columns["generator"] = ["", "", "a", "a", "c", ""]
    assert sources.finish(columns, SOURCE, arguments(tmp_path / "m.csv", limit=3)) == 0
    shown = capsys.readouterr()
    lines = cells_of(shown.out)
    # One of three goes to each of the larger strata, and of equal remainders the first by name takes one.
    assert shown.out.startswith("My set\n") and lines == [
        ["label", "generator", "published", "found", "taken"],
        ["real", "", "2", "2", "1"],
        ["AI", "a", "5", "2", "1"],
        ["AI", "b", "9", "0", "0"],
        ["AI", "c", "-", "1", "0"],
        ["unlabeled", "", "-", "1", "1"],
        ["all", "", "16", "6", "3"],
    ]
    assert shown.err.splitlines() == [
        "warning: 2 AI images of a found, 5 published",
        "warning: published, but not found: b",
    ]
    rows = read_manifest(tmp_path / "m.csv")
    assert set(rows["source"]) == {"mine"} and set(rows["licence"]) == {"none"}


@pytest.mark.parametrize(("images", "warned"), [(949, True), (950, True), (951, False), (1_049, False)])
def test_counts_published_in_steps_may_differ_by_half_a_step(tmp_path, capsys, images, warned):
    source = sources.Source(
        "mine", "My set", "nowhere", "none", row=dict, published_total=1_000, rounding=100
    )
    names = [f"{i}.png" for i in range(images)]
    columns = {"image": names, "name": names, "label": [0] * images}
    sources.finish(columns, source, arguments(tmp_path / "m.csv"))
    assert (f"warning: {images} images found, 1000 published" in capsys.readouterr().err) is warned


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_help_says_where_the_data_come_from_and_under_what_terms(module, capsys):
    with pytest.raises(SystemExit):
        module.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "from the release of" in text or "Hugging Face hub" in text
    assert "terms: " in text and module.__name__ in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "0"], "argument --limit: must be 1 or more, not 0"),
        (["--holdout", "1"], "argument --holdout: must be between 0 and 1, not 1"),
        (["--workers", "0"], "argument --workers: must be from 1 to 256"),
        (["--out", "m.txt"], "argument --out: m.txt must be the name of a .csv file"),
        (["--root", "nowhere"], "argument --root: nowhere does not exist"),
        (["--limt", "3"], "unknown argument --limt .did you mean --limit"),
    ],
)
def test_a_wrong_flag_is_an_error_before_anything_is_read(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        ditfake.main(["--root", str(tmp_path), "--out", str(tmp_path / "m.csv"), *flags])


DITFAKE = {
    f"test1/{generator}/{label}/{i}.png": i if label == "0_real" else 100 * place + i + 100
    for place, generator in enumerate(ditfake.GENERATORS.values())
    for label in ("0_real", "1_fake")
    for i in range(10)
}


def test_repeating_a_command_gives_the_same_bytes_and_a_holdout_goes_when_it_is_not_asked_for(tmp_path):
    root, out = write_tree(tmp_path / "data", DITFAKE), tmp_path / "m.csv"
    command = ["--root", str(root), "--out", str(out)]
    written = []
    for _ in range(2):
        ditfake.main([*command, "--limit", "20", "--holdout", "0.3"])
        written.append([path.read_bytes() for path in (out, tmp_path / "m.holdout.csv")])
    assert written[0] == written[1]
    train, held = read_manifest(out), read_manifest(tmp_path / "m.holdout.csv")
    assert len(train) + len(held) == 20 and not set(train["group"]) & set(held["group"])
    assert strata(pd.concat([train, held])) == {
        (0, ""): 5,
        **{(1, name): 5 for name in ditfake.GENERATORS.values()},
    }
    ditfake.main(command)
    assert not (tmp_path / "m.holdout.csv").exists() and len(read_manifest(out)) == 40
    assert sorted(os.listdir(tmp_path)) == ["data", "m.csv"]


def test_verify_leaves_unreadable_images_out_and_the_status_says_so(tmp_path):
    root = write_tree(tmp_path / "data", {"Real/1.png": 0, "Fake/2.png": 1, "Fake/3.png": b"broken"})
    out = tmp_path / "m.csv"
    assert deepfake60k.main(["--root", str(root), "--out", str(out), "--verify", "--workers", "1"]) == 1
    assert read_manifest(out)["name"].tolist() == ["2.png", "1.png"]
    assert pd.read_csv(tmp_path / "m.errors.csv")["name"].tolist() == ["3.png"]
