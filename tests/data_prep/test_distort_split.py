import json
import zipfile

import numpy as np
import pytest

from data_prep import distort_split
from data_prep.writing import parallel
from featdistill.command_line import UserError
from featdistill.distortions.libraries import LIBRARIES
from featdistill.distortions.plan import apply_plan, describe
from featdistill.distortions.presets import PRESETS
from featdistill.images.reading import decode, encode_jpeg, read_image
from featdistill.records import label_files
from featdistill.records.manifest import parse_distortions, read_manifest
from featdistill.seeds import evaluation_generator


def copy(manifest, out, *flags: str) -> int:
    return distort_split.main(
        [str(manifest), "--out", str(out), "--preset", "heavy", "--workers", "1", *flags]
    )


def test_half_of_each_class_is_distorted_as_the_policy_says(make_set, tmp_path):
    manifest, out = make_set("holdout", 12), tmp_path / "copy"
    assert copy(manifest, out) == 0
    source, found = read_manifest(manifest), read_manifest(out / "manifest.csv")
    assert found["name"].tolist() == source["name"].tolist()
    assert found["label"].tolist() == source["label"].tolist()
    assert found.groupby("label")["is_distorted"].sum().tolist() == [3, 3]
    for row in range(len(found)):
        image, expected = read_image(found["image"][row]), read_image(source["image"][row])
        chain = []
        if found["is_distorted"][row]:
            plan = PRESETS["heavy"].draw(evaluation_generator(0, found["name"][row]))
            expected, chain = apply_plan(expected, plan), describe(plan)
        assert parse_distortions(found["distortions"][row]) == [tuple(step) for step in chain]
        # Clean images are stored the same way.
        np.testing.assert_array_equal(image, decode(encode_jpeg(expected, 95)))


def test_the_label_file_says_what_the_manifest_says(make_set, tmp_path):
    out = tmp_path / "copy"
    copy(make_set("holdout", 8), out)
    found, labels = read_manifest(out / "manifest.csv"), label_files.read_labels(str(out / "labels.csv"))
    for column, name in (("name", "image_name"), ("label",) * 2, ("is_distorted",) * 2, ("distortions",) * 2):
        assert found[column].tolist() == labels[name].tolist()


def test_a_copy_that_was_stopped_ends_with_the_bytes_of_a_whole_one(make_set, tmp_path, monkeypatch):
    manifest = make_set("holdout", 8)
    monkeypatch.setattr(parallel, "_ITEMS_PER_TASK", 2)
    copy(manifest, tmp_path / "whole", "--workers", "2")

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(distort_split.atomic, "write_zip", stop)
        copy(manifest, tmp_path / "stopped")
    # What a kill in the middle of the work leaves: some images are made, some are not.
    work = next((tmp_path / "stopped").glob(".work-*"))
    made = sorted(work.iterdir())
    assert len(made) == 8
    made[3].unlink()
    copy(manifest, tmp_path / "stopped")
    for name in ("images.zip", "labels.csv", "manifest.csv", "distort_split.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not work.exists()


def test_a_finished_copy_is_left_alone_and_other_settings_are_refused(make_set, tmp_path, capsys):
    manifest, out = make_set("holdout", 4), tmp_path / "copy"
    copy(manifest, out)
    assert copy(manifest, out) == 0 and "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="was produced with different settings: seed was 0, is 5"):
        copy(manifest, out, "--seed", "5")
    with pytest.raises(UserError, match=r"unknown distortion preset 'havy' \(did you mean heavy\?\)"):
        copy(manifest, tmp_path / "other", "--preset", "havy")


def test_an_unreadable_image_is_named_and_left_out(make_set, tmp_path):
    manifest, out = make_set("holdout", 6), tmp_path / "copy"
    (manifest.parent / "00002.jpg").write_bytes(b"no image")
    assert copy(manifest, out) == 1
    assert (out / "errors.csv").read_text().splitlines()[1].startswith("00002.jpg,")
    assert len(read_manifest(out / "manifest.csv")) == 5
    assert len(zipfile.ZipFile(out / "images.zip").namelist()) == 5
    assert copy(manifest, out) == 1


def test_a_preset_with_changes_is_followed_and_the_size_limit_holds_for_clean_images_too(make_set, tmp_path):
    manifest, out = make_set("holdout", 8), tmp_path / "copy"
    assert copy(manifest, out, "--preset", "test_public,max_side_px=50,exclude=randomcrop") == 0
    rows = read_manifest(out / "manifest.csv")
    clean = rows[rows["is_distorted"] == 0]
    assert all(max(read_image(image).shape[:2]) == 50 for image in clean["image"])
    chains = [json.loads(text) for text in rows["distortions"]]
    names = {name for chain in chains for name, _ in chain}
    assert names <= {*LIBRARIES["official"], *LIBRARIES["evaluation"]} - {"randomcrop"} and names
    for chain in chains:
        for name, scale in chain:
            assert name != "downscale" or 0.3 <= scale <= 0.8
    with pytest.raises(UserError, match="distort_at"):
        copy(manifest, tmp_path / "other", "--preset", "official,distort_at=input")


@pytest.mark.parametrize("name", ["manifest.csv", "images.zip"])
def test_files_of_somebody_else_are_not_replaced(make_set, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(UserError, match="already exists and was not written by this command"):
        distort_split.main([str(make_set("val", 4)), "--out", str(out)])
    assert (out / name).read_text() == "mine"
