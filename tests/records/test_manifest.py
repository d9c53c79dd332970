"""The manifest's contract: what is read is what was written, and a hold-out never divides a group."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featdistill.command_line import UserError
from featdistill.records import manifest


def make(count: int = 6, **columns) -> pd.DataFrame:
    given_columns = {
        "image": [f"/data/{i}.jpg" for i in range(count)],
        "name": [f"{i}.jpg" for i in range(count)],
        "label": [i % 2 for i in range(count)],
    }
    return manifest.make_manifest({**given_columns, **columns})


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_not_given_is_empty_and_columns_stand_in_order():
    frame = make(2, style=["a", None], generator=[None, "sdxl"], label=[None, 1])
    assert frame.columns.tolist() == [*manifest.COLUMNS, "style"]
    assert frame["distortions"].tolist() == ["[]", "[]"]
    assert frame["source"].tolist() == frame["group"].tolist() == frame["licence"].tolist() == ["", ""]
    assert frame["style"].tolist() == ["a", ""] and frame["generator"].tolist() == ["", "sdxl"]
    assert frame["is_distorted"].isna().all()
    assert frame["label"].isna().tolist() == [True, False] and frame["label"].iloc[1] == 1


def test_a_round_trip_keeps_every_cell_and_unknown_columns(tmp_path):
    frame = make(
        4,
        label=[0, 1, None, 1],
        is_distorted=[1, None, 0, 1],
        distortions=[json.dumps([["jpeg", 24], ["downscale", 0.61]]), "[]", "[]", '[["blur", "näher"]]'],
        licence=['a, "b"', "line\nbreak", "0", "NA"],
        style=["007", "null", "1.0", " nan "],
        größe=["", "1", "é", "日本"],
    )
    manifest.write_manifest(frame, tmp_path / "one.csv")
    back = manifest.read_manifest(tmp_path / "one.csv")
    assert back.columns.tolist() == frame.columns.tolist()
    for column in frame:
        assert back[column].astype("object").tolist() == frame[column].astype("object").tolist(), column
    assert str(back["label"].dtype) == str(back["is_distorted"].dtype) == "Int8"
    manifest.write_manifest(back, tmp_path / "two.csv")
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    assert b"\r" not in (tmp_path / "one.csv").read_bytes()


def test_images_below_the_manifest_move_with_it_and_others_stay(tmp_path):
    (tmp_path / "old").mkdir()
    images = [
        f"{tmp_path}/old/a/1.jpg",
        f"{tmp_path}/old/z.zip::m/2.jpg",
        "/else/3.jpg",
        f"{tmp_path}/older/4.jpg",
    ]
    manifest.write_manifest(make(4, image=images), tmp_path / "old" / "m.csv")
    (tmp_path / "old").rename(tmp_path / "new")
    moved = manifest.read_manifest(tmp_path / "new" / "m.csv")["image"].tolist()
    assert moved == [f"{tmp_path}/new/a/1.jpg", f"{tmp_path}/new/z.zip::m/2.jpg", *images[2:]]


def test_image_paths_are_made_absolute_and_members_of_archives_are_left_alone(tmp_path, monkeypatch):
    text = "image,name\n../a.jpg,a\nsub/./z.zip::x/../y.jpg,y\n"
    written(tmp_path / "m.csv", text)
    monkeypatch.chdir(tmp_path)
    frame = manifest.read_manifest("m.csv")
    assert frame["image"].tolist() == [f"{tmp_path.parent}/a.jpg", f"{tmp_path}/sub/z.zip::x/../y.jpg"]
    assert frame.attrs["path"] == "m.csv"


def test_a_manifest_with_the_two_needed_columns_and_a_byte_order_mark_is_read(tmp_path):
    frame = manifest.read_manifest(written(tmp_path / "m.csv", "\ufeffimage,name\na.jpg,a\n"))
    assert frame.columns.tolist() == list(manifest.COLUMNS)
    assert frame["label"].isna().all() and frame["distortions"].tolist() == ["[]"]


@pytest.mark.parametrize("text", ["0", "1", " 1 ", "0.0", "1.0", ""])
def test_labels_are_0_1_or_unknown(tmp_path, text):
    frame = manifest.read_manifest(written(tmp_path / "m.csv", f"image,name,label\na.jpg,a,{text}\n"))
    wanted = int(float(text)) if text.strip() else None
    assert [None if pd.isna(label) else label for label in frame["label"]] == [wanted]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,name,label\na.jpg,a,2\n", "label of a is '2'; it must be 0, 1 or empty"),
        ("image,name,label\na.jpg,a,real\n", "label of a is 'real'"),
        ("image,name,is_distorted\na.jpg,a,-1\n", "is_distorted of a is '-1'"),
        ("image,name\na.jpg,a\nb.jpg,a\n", "name a appears more than once"),
        ("image,label\na.jpg,1\n", "column name is missing"),
        ("file,score\na.jpg,1\n", "column image, name is missing"),
        ("image,name\na.jpg,a,1\n", "more cells than its header"),
        ("image,name\na.jpg,a\nb.jpg,b,1\n", "is not a readable CSV"),
        ("", "is not a readable CSV"),
    ],
)
def test_what_is_no_manifest_is_an_error_that_names_the_file(tmp_path, text, message):
    path = written(tmp_path / "m.csv", text)
    with pytest.raises(UserError, match=message) as error:
        manifest.read_manifest(path)
    assert str(path) in str(error.value)


def test_a_missing_manifest_and_one_that_is_no_text_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"gone\.csv does not exist"):
        manifest.read_manifest(tmp_path / "gone.csv")
    (tmp_path / "m.csv").write_bytes(b"image,name\n\xff\xfe\x80,a\n")
    with pytest.raises(UserError, match="not a readable CSV"):
        manifest.read_manifest(tmp_path / "m.csv")


def test_wrong_rows_are_never_written(tmp_path):
    with pytest.raises(UserError, match=r"name 0\.jpg appears more than once"):
        make(2, name=["0.jpg", "0.jpg"])
    frame = make(2)
    frame["label"] = ["0", "7"]
    with pytest.raises(UserError, match=r"label of 1\.jpg is '7'"):
        manifest.write_manifest(frame, tmp_path / "m.csv")
    assert list(tmp_path.iterdir()) == []


def test_writing_leaves_the_frame_as_it_was(tmp_path):
    frame = make(2, image=[f"{tmp_path}/a.jpg", "/b.jpg"])
    before = frame.copy()
    manifest.write_manifest(frame, tmp_path / "m.csv")
    pd.testing.assert_frame_equal(frame, before)


def test_several_manifests_are_one_set_of_rows_with_all_their_columns(tmp_path):
    manifest.write_manifest(make(2, style=["a", "b"]), tmp_path / "one.csv")
    manifest.write_manifest(make(3, camera=["x", "y", "z"]), tmp_path / "two.csv")
    frame = manifest.read_manifests([tmp_path / "one.csv", tmp_path / "two.csv"])
    assert frame["name"].tolist() == ["0.jpg", "1.jpg", "0.jpg", "1.jpg", "2.jpg"]
    assert frame["style"].tolist() == ["a", "b", "", "", ""]
    assert frame["camera"].tolist() == ["", "", "x", "y", "z"]
    assert frame["label"].tolist() == [0, 1, 0, 1, 0] and frame.index.tolist() == list(range(5))


def test_distortions_are_read_in_order():
    assert manifest.parse_distortions('[["jpeg", 24], ["downscale", 0.61]]') == [
        ("jpeg", 24),
        ("downscale", 0.61),
    ]
    assert manifest.parse_distortions("[]") == manifest.parse_distortions("") == []


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.integers(40, 80), st.sampled_from([0.1, 0.25, 0.5]))
def test_a_holdout_divides_rows_but_no_group_whatever_the_order(seed, groups, share):
    rng = np.random.default_rng(seed)
    count = 4 * groups
    label = [None if value == 2 else value for value in rng.choice(3, count, p=(0.45, 0.45, 0.1)).tolist()]
    frame = make(count, label=label, group=[f"g{group}" for group in rng.integers(0, groups, count)])
    train, held = manifest.split_holdout(frame, share, seed)
    assert sorted([*train["name"], *held["name"]]) == sorted(frame["name"])
    assert not set(train["group"]) & set(held["group"])
    shuffled = frame.iloc[rng.permutation(count)].reset_index(drop=True)
    assert set(manifest.split_holdout(shuffled, share, seed)[1]["name"]) == set(held["name"])
    text = frame["label"].astype("string").fillna("-")
    stratum = text.groupby(frame["group"]).agg(lambda labels: "".join(sorted(set(labels))))
    for name in set(stratum):
        rows = frame["group"].isin(stratum.index[stratum == name])
        largest = frame.loc[rows, "group"].value_counts().max()
        there = held["group"].isin(frame.loc[rows, "group"]).sum()
        assert abs(there - share * rows.sum()) <= largest / 2 + 1e-9


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_a_holdout_has_its_share_of_each_class(share):
    frame = make(1000, label=[int(i < 300) for i in range(1000)])
    train, held = manifest.split_holdout(frame, share)
    assert (held["label"] == 1).sum() == 300 * share and (held["label"] == 0).sum() == 700 * share
    assert len(train) + len(held) == 1000 and train.index.tolist() == list(range(len(train)))


def test_another_seed_holds_out_other_rows_and_the_same_seed_the_same():
    frame = make(200)
    held = [set(manifest.split_holdout(frame, 0.2, seed)[1]["name"]) for seed in (0, 0, 1)]
    assert held[0] == held[1] != held[2]


def test_a_group_larger_than_the_holdout_does_not_keep_others_out_of_it():
    frame = make(200, label=[0] * 200, group=["large"] * 100 + [f"g{i}" for i in range(100)])
    for seed in range(60):
        held = manifest.split_holdout(frame, 0.05, seed)[1]
        assert len(held) == 10 and "large" not in set(held["group"])


def test_rows_without_a_group_are_held_out_one_by_one():
    frame = make(100, label=[0] * 100, group=["pair"] * 2 + [""] * 98)
    train, held = manifest.split_holdout(frame, 0.3)
    assert len(held) in (29, 30, 31) and len(train) == 100 - len(held)
    assert len(set(held.loc[held["group"] == "pair", "name"])) in (0, 2)


@pytest.mark.parametrize(
    ("share", "message"), [(0, "between 0 and 1"), (1, "between 0 and 1"), (0.01, "side empty")]
)
def test_a_holdout_that_leaves_nothing_is_an_error(share, message):
    with pytest.raises(UserError, match=message):
        manifest.split_holdout(make(6), share)


def test_one_group_alone_cannot_be_divided():
    with pytest.raises(UserError, match="leaves one side empty: 6 rows in 1 groups"):
        manifest.split_holdout(make(6, group=["one"] * 6), 0.5)


def test_many_names_are_written_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    names = sorted({rng.bytes(10).hex() + ".jpg" for _ in range(500)})
    frame = make(len(names), name=names, image=[os.path.join(tmp_path, name) for name in names])
    manifest.write_manifest(frame, tmp_path / "m.csv")
    assert manifest.read_manifest(tmp_path / "m.csv")["name"].tolist() == names
