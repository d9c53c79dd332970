"""The challenge's splits become manifests, from archives and folders alike; wrong data end in one line."""

import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from image_trees import cells_of
from PIL import Image

from data_prep import ntire
from data_prep.writing import manifests
from featdistill.command_line import UserError
from featdistill.images import reading as image_io
from featdistill.records.manifest import parse_distortions, read_manifest

PROJECT = Path(__file__).resolve().parents[2]
IMAGES = {"train": 30, "val": 8, "val_hard": 6, "public_test": 4, "private_test": 3, "toy": 5}
FOLDERS = {
    "val": "val_images",
    "val_hard": "val_images_hard",
    "public_test": "test_images",
    "private_test": "private_test_images",
    "toy": "toy",
}
LABEL_FILES = {"val": "val_labels.csv", "val_hard": "val_hard_labels.csv", "public_test": "test_labels.csv"}
SHARDS = 3


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG")
    return data.getvalue()


def stems(split: str) -> list[str]:
    return [hashlib.sha256(f"{split} {i}".encode()).hexdigest()[:20] for i in range(IMAGES[split])]


def label(i: int) -> int:
    return int(i % 3 == 0)


def distortions(i: int) -> list[tuple[str, float]]:
    return [[], [("jpeg", 24)], [("downscale", 0.61), ("isonoise", 2), ("watermark", 1)]][i % 3]


def label_file(split: str) -> str:
    lines = ["image_name,label,distortions,distortion_scales,is_distorted"]
    for i, stem in enumerate(stems(split)):
        names, scales = [name for name, _ in distortions(i)], [scale for _, scale in distortions(i)]
        lines.append(f'{stem}.jpg,{label(i)},"{names}","{scales}",{int(bool(names))}')
    return "\n".join(lines) + "\n"


def official_files() -> dict[str, dict[str, bytes]]:
    """Return the contents of every archive, by its name without `.zip` and the member's path."""
    parts: dict[str, dict[str, bytes]] = {}
    for split, folder in FOLDERS.items():
        inner = "images" if split == "toy" else folder
        parts[folder] = {f"{inner}/{stem}.jpg": jpeg(i) for i, stem in enumerate(stems(split))}
    for shard in range(SHARDS):
        mine = [(i, stem) for i, stem in enumerate(stems("train")) if i % SHARDS == shard]
        extension = "" if shard == 1 else ".jpg"
        rows = [f"{row},{stem}{extension},{label(i)}" for row, (i, stem) in enumerate(mine)]
        members = {f"shard_{shard}/images/{stem}.jpg": jpeg(i) for i, stem in mine}
        members[f"shard_{shard}/labels.csv"] = ("\n".join([",image_name,label", *rows]) + "\n").encode()
        parts[f"shard_{shard}"] = members
    return parts


def write_zip(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def write_part(root: Path, part: str, members: dict[str, bytes], layout: str) -> None:
    if layout == "archives":
        write_zip(root / f"{part}.zip", members)
        return
    for name, data in members.items():
        if layout == "flat":
            name = name.split("/", 1)[1].removeprefix("images/")
        elif layout == "folders":
            name = name.split("/", 1)[1] if not name.startswith("images/") else name
        path = root / part / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_official(root: Path, layout: str = "archives") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for part, members in official_files().items():
        write_part(root, part, members, layout)
    for split, name in LABEL_FILES.items():
        (root / name).write_text(label_file(split))
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_official(tmp_path / "root")


def prepare(root: Path, out: Path, *flags: str) -> int:
    return ntire.main(["--root", str(root), "--out", str(out), *flags])


def test_every_split_has_its_rows_labels_and_distortions(root, tmp_path):
    assert prepare(root, tmp_path / "out") == 0
    for split, count in IMAGES.items():
        rows = read_manifest(tmp_path / "out" / f"{split}.csv").set_index("group")
        assert sorted(rows.index) == sorted(stems(split)), split
        for i, stem in enumerate(stems(split)):
            row = rows.loc[stem]
            assert row["name"] == f"{stem}.jpg"
            assert (row["source"], row["generator"], row["licence"]) == ("ntire2026", "", "")
            assert np.array_equal(image_io.read_image(row["image"]), image_io.decode(jpeg(i)))
            wanted = distortions(i) if split in LABEL_FILES else []
            assert parse_distortions(row["distortions"]) == wanted
        labeled = split in ("train", *LABEL_FILES)
        found = rows.loc[stems(split), "label"].tolist()
        assert found == [label(i) for i in range(count)] if labeled else rows["label"].isna().all()


@pytest.mark.parametrize(
    ("split", "wanted"),
    [("train", {0}), ("toy", {0}), ("private_test", set()), ("val", {0, 1}), ("public_test", {0, 1})],
)
def test_is_distorted_is_known_only_where_a_file_or_the_challenge_says_it(root, tmp_path, split, wanted):
    prepare(root, tmp_path / "out")
    rows = read_manifest(tmp_path / "out" / f"{split}.csv")
    assert set(rows["is_distorted"].dropna()) == wanted
    assert rows["is_distorted"].isna().all() == (not wanted)
    if split in LABEL_FILES:
        assert ((rows["distortions"] != "[]") == (rows["is_distorted"] == 1)).all()


@pytest.mark.parametrize("layout", ["folders", "nested", "flat"])
def test_unpacked_folders_give_the_same_rows_as_archives(root, tmp_path, layout):
    prepare(root, tmp_path / "from_archives")
    prepare(write_official(tmp_path / layout, layout), tmp_path / "from_folders")
    for split in IMAGES:
        rows = [read_manifest(tmp_path / kind / f"{split}.csv") for kind in ("from_archives", "from_folders")]
        pd.testing.assert_frame_equal(rows[0].drop(columns="image"), rows[1].drop(columns="image"))
        first = [image_io.read_bytes(frame["image"].iloc[0]) for frame in rows]
        assert first[0] == first[1]


def test_archives_in_subfolders_and_behind_links_are_found(root, tmp_path):
    prepare(root, tmp_path / "plain")
    cache = tmp_path / "cache"
    for number, file in enumerate(sorted(root.iterdir())):
        blob = cache / "blobs" / f"{number:x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blob)
        for revision in ("main", "0a1b"):
            link = cache / f"datasets--{number % 2}" / "snapshots" / revision / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    prepare(cache, tmp_path / "linked")
    for split in IMAGES:
        plain, linked = (read_manifest(tmp_path / run / f"{split}.csv") for run in ("plain", "linked"))
        pd.testing.assert_frame_equal(plain.drop(columns="image"), linked.drop(columns="image"))


def test_an_archive_goes_before_a_folder_of_its_name_and_this_is_said(root, tmp_path, capsys):
    write_part(root, "val_images", {"val_images/other.jpg": jpeg(0)}, "nested")
    assert prepare(root, tmp_path / "out") == 0
    assert "note: val_images is ignored: the archive val_images.zip is used" in capsys.readouterr().out
    assert len(read_manifest(tmp_path / "out" / "val.csv")) == IMAGES["val"]


@pytest.mark.parametrize(
    "part", ["private_test.zip", "private_test_images.zip", "private_test", "toy_images.zip"]
)
def test_the_names_of_unpublished_splits_may_differ(tmp_path, part):
    write_part(tmp_path / "root", part.removesuffix(".zip"), {"images/a.png.jpg": jpeg(0)},
               "archives" if part.endswith(".zip") else "nested")  # fmt: skip
    prepare(tmp_path / "root", tmp_path / "out")
    split = "toy" if part.startswith("toy") else "private_test"
    assert read_manifest(tmp_path / "out" / f"{split}.csv")["name"].tolist() == ["a.png.jpg"]


def test_a_folder_that_only_holds_the_archive_of_its_name_is_nothing_to_speak_of(root, tmp_path, capsys):
    (root / "val_images").mkdir()
    for name in ("val_images.zip", "val_labels.csv"):
        (root / name).rename(root / "val_images" / name)
    assert prepare(root, tmp_path / "out") == 0
    assert "is left out" not in capsys.readouterr().out
    assert len(read_manifest(tmp_path / "out" / "val.csv")) == IMAGES["val"]


def test_what_a_desktop_leaves_in_an_archive_is_no_image(root, tmp_path):
    members = official_files()["val_images"]
    first = next(iter(members))
    litter = {f"__MACOSX/{first}": b"x", f"val_images/._{first[-9:]}": b"x", "val_images/Thumbs.db": b"x"}
    write_zip(root / "val_images.zip", {**members, **litter})
    prepare(root, tmp_path / "out")
    assert len(read_manifest(tmp_path / "out" / "val.csv")) == IMAGES["val"]


def test_a_label_file_is_read_by_column_name_whatever_surrounds_it(root, tmp_path):
    prepare(root, tmp_path / "plain")
    table = pd.read_csv(root / "val_labels.csv", dtype=str)
    table["image_name"] = table["image_name"].str.removesuffix(".jpg")
    table["label"] = " " + table["label"] + ".0 "
    table["is_distorted"] = table["is_distorted"].map({"0": "False", "1": "True"})
    table["distortions"] = table["distortions"].replace("[]", "")
    table["distortion_scales"] = table["distortion_scales"].replace("[]", "")
    table = table[["is_distorted", "distortion_scales", "image_name", "distortions", "label"]].iloc[::-1]
    table.to_csv(root / "val_labels.csv", encoding="utf-8-sig", lineterminator="\r\n")
    prepare(root, tmp_path / "odd")
    assert (tmp_path / "plain" / "val.csv").read_bytes() == (tmp_path / "odd" / "val.csv").read_bytes()


@pytest.mark.parametrize("place", ["inside", "in_the_folder_of_the_archive"])
def test_a_label_file_may_lie_inside_an_archive_or_beside_it_in_a_subfolder(root, tmp_path, place):
    prepare(root, tmp_path / "plain")
    labels = (root / "val_labels.csv").read_bytes()
    (root / "val_labels.csv").unlink()
    (root / "val_images.zip").unlink()
    members = official_files()["val_images"]
    if place == "inside":
        members["val_images/val_labels.csv"] = labels
        write_zip(root / "val_images.zip", members)
    else:
        write_zip(root / "a" / "b" / "val_images.zip", members)
        (root / "a" / "b" / "val_labels.csv").write_bytes(labels)
    prepare(root, tmp_path / "other")
    plain, other = (read_manifest(tmp_path / run / "val.csv") for run in ("plain", "other"))
    pd.testing.assert_frame_equal(plain.drop(columns="image"), other.drop(columns="image"))


def test_a_second_run_writes_equal_bytes_sorted_by_name(root, tmp_path):
    for out in ("one", "two"):
        prepare(root, tmp_path / out, "--holdout", "0.2")
    for split in (*IMAGES, "holdout"):
        first, second = ((tmp_path / out / f"{split}.csv").read_bytes() for out in ("one", "two"))
        assert first == second
        names = read_manifest(tmp_path / "one" / f"{split}.csv")["name"].tolist()
        assert names == sorted(names)


def test_missing_labels_and_splits_are_said_and_give_a_manifest_without_labels(root, tmp_path, capsys):
    (root / "val_labels.csv").unlink()
    (root / "toy.zip").unlink()
    (root / "shard_1.zip").unlink()
    assert prepare(root, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "note: val has no labels: there is no val_labels.csv" in said
    assert "note: toy is missing" in said
    assert "note: train is incomplete: shard_1 missing" in said
    rows = read_manifest(tmp_path / "out" / "val.csv")
    assert rows["label"].isna().all() and rows["is_distorted"].isna().all() and len(rows) == IMAGES["val"]
    assert not (tmp_path / "out" / "toy.csv").exists()


def test_the_table_counts_each_split(root, tmp_path, capsys):
    prepare(root, tmp_path / "out", "--splits", "val", "train", "toy")
    lines = cells_of(capsys.readouterr().out)
    assert lines[0] == ["split", "images", "real", "AI", "unlabeled", "distorted", "from"]
    assert lines[1] == ["val", "8", "5", "3", "0", "5", "val_images.zip"]
    assert lines[2] == ["train", "30", "20", "10", "0", "0", "shard_0.zip .. shard_2.zip (3)"]
    assert lines[3] == ["toy", "5", "0", "0", "5", "0", "toy.zip"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["toy.csv", "train.csv", "val.csv"]


def test_a_holdout_takes_its_share_of_each_class_from_train_alone(root, tmp_path):
    prepare(root, tmp_path / "whole")
    prepare(root, tmp_path / "split", "--holdout", "0.2")
    whole = read_manifest(tmp_path / "whole" / "train.csv")
    train, held = (read_manifest(tmp_path / "split" / f"{name}.csv") for name in ("train", "holdout"))
    assert sorted([*train["name"], *held["name"]]) == sorted(whole["name"])
    assert (held["label"] == 1).sum() == 2 and (held["label"] == 0).sum() == 4
    assert (tmp_path / "whole" / "val.csv").read_bytes() == (tmp_path / "split" / "val.csv").read_bytes()
    prepare(root, tmp_path / "seed", "--holdout", "0.2", "--seed", "1")
    assert set(read_manifest(tmp_path / "seed" / "holdout.csv")["name"]) != set(held["name"])


def test_a_holdout_of_an_earlier_run_does_not_stay_beside_the_whole_training_split(root, tmp_path, capsys):
    prepare(root, tmp_path / "out", "--holdout", "0.2")
    prepare(root, tmp_path / "out", "--splits", "val")
    assert (tmp_path / "out" / "holdout.csv").exists()
    prepare(root, tmp_path / "out")
    assert not (tmp_path / "out" / "holdout.csv").exists()
    assert "holdout.csv, from an earlier run, is removed" in capsys.readouterr().out


def test_extra_columns_are_joined_by_name_and_unknown_names_are_ignored(root, tmp_path, capsys):
    known = stems("train")
    lines = [
        ",image_name,generator,camera",
        f"0,{known[0]}.jpg,sdxl,",
        f"1,{known[1]},,Nikon",
        "2,nobody.jpg,x,y",
    ]
    (tmp_path / "extra.csv").write_text("\n".join(lines) + "\n")
    prepare(root, tmp_path / "out", "--extra", str(tmp_path / "extra.csv"))
    rows = read_manifest(tmp_path / "out" / "train.csv").set_index("group")
    assert rows.loc[known[0], ["generator", "camera"]].tolist() == ["sdxl", ""]
    assert rows.loc[known[1], ["generator", "camera"]].tolist() == ["", "Nikon"]
    assert (rows.loc[known[2:], ["generator", "camera"]] == "").all(axis=None)
    assert rows.loc[known, "label"].tolist() == [label(i) for i in range(len(known))]
    assert "note: 2 of the 3 names in --extra are here" in capsys.readouterr().out


@pytest.mark.parametrize("column", ["label", "image", "name", "is_distorted", "distortions"])
def test_extra_columns_never_overwrite_what_the_challenge_says(root, tmp_path, column):
    (tmp_path / "extra.csv").write_text(f"image_name,{column}\n{stems('train')[0]}.jpg,1\n")
    with pytest.raises(UserError, match=f"must not have a column {column}"):
        prepare(root, tmp_path / "out", "--extra", str(tmp_path / "extra.csv"))


def test_verify_leaves_unreadable_images_out_and_lists_them(root, tmp_path, capsys):
    members = official_files()["val_images"]
    cut, empty = list(members)[2], list(members)[5]
    members[cut] = members[cut][:-60]
    members[empty] = b""
    write_zip(root / "val_images.zip", members)
    flags = ("--splits", "val", "toy", "--verify", "--workers", "1")
    assert prepare(root, tmp_path / "out", *flags) == 1
    errors = pd.read_csv(tmp_path / "out" / "val.errors.csv")
    assert errors.columns.tolist() == ["name", "reason"]
    assert sorted(errors["name"]) == sorted(Path(member).name for member in (cut, empty))
    assert errors["reason"].str.len().gt(5).all()
    names = set(read_manifest(tmp_path / "out" / "val.csv")["name"])
    assert len(names) == IMAGES["val"] - 2 and not names & set(errors["name"])
    assert not (tmp_path / "out" / "toy.errors.csv").exists()
    assert "2 unreadable images left out" in capsys.readouterr().out

    write_zip(root / "val_images.zip", official_files()["val_images"])
    image_io._open_archive.cache_clear()
    assert prepare(root, tmp_path / "out", *flags) == 0
    assert not (tmp_path / "out" / "val.errors.csv").exists()


def test_several_processes_find_the_unreadable_images_that_one_finds(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.writing.parallel._ITEMS_PER_TASK", 4)
    members = {f"{i}.jpg": jpeg(i)[: -60 if i % 5 == 3 else None] for i in range(23)}
    write_zip(tmp_path / "a.zip", members)
    locations = [f"{tmp_path}/a.zip::{name}" for name in members]
    alone = manifests.unreadable_images(locations, workers=1)
    assert list(alone) == [locations[i] for i in (3, 8, 13, 18)]
    assert manifests.unreadable_images(locations, workers=2) == alone


def broken_zip(root: Path) -> None:
    whole = (root / "val_images.zip").read_bytes()
    (root / "val_images.zip").write_bytes(whole[: len(whole) // 2])


def hostile(name: str, mode: int = 0):
    def change(root: Path) -> None:
        with zipfile.ZipFile(root / "val_images.zip", "a") as archive:
            member = zipfile.ZipInfo(name)
            member.external_attr = mode << 16
            archive.writestr(member, b"x")

    return change


def encrypted(root: Path) -> None:
    data = bytearray((root / "val_images.zip").read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (root / "val_images.zip").write_bytes(data)


def relabel(old: str, new: str, file: str = "val_labels.csv"):
    def change(root: Path) -> None:
        text = (root / file).read_text()
        assert text.count(old) >= 1
        (root / file).write_text(text.replace(old, new, 1))

    return change


def without_image(root: Path) -> None:
    members = official_files()["val_images"]
    write_zip(root / "val_images.zip", dict(list(members.items())[1:]))


def without_label(root: Path) -> None:
    lines = (root / "val_labels.csv").read_text().splitlines()
    (root / "val_labels.csv").write_text("\n".join(lines[:-1]) + "\n")


def image_twice(root: Path) -> None:
    members = official_files()["val_images"]
    write_zip(root / "val_images.zip", {**members, f"more/{stems('val')[0]}.png": jpeg(0)})


def label_twice(root: Path) -> None:
    with (root / "val_labels.csv").open("a") as file:
        file.write(f"{stems('val')[0]},1,[],[],0\n")


def image_in_two_shards(root: Path) -> None:
    members = official_files()["shard_2"]
    members[f"shard_2/images/{stems('train')[0]}.jpg"] = jpeg(0)
    write_zip(root / "shard_2.zip", members)


def label_in_two_shards(root: Path) -> None:
    members = official_files()["shard_2"]
    members["shard_2/labels.csv"] += f"99,{stems('train')[0]}.jpg,1\n".encode()
    write_zip(root / "shard_2.zip", members)


def shard_without_labels(root: Path) -> None:
    members = official_files()["shard_2"]
    del members["shard_2/labels.csv"]
    write_zip(root / "shard_2.zip", members)


def archive_twice(root: Path) -> None:
    write_zip(root / "again" / "val_images.zip", official_files()["val_images"])


def labels_twice(root: Path) -> None:
    (root / "again").mkdir()
    (root / "again" / "val_labels.csv").write_text(label_file("val").replace(",1,", ",0,", 1))


def no_images(root: Path) -> None:
    write_zip(root / "val_images.zip", {"val_images/read me.txt": b"x"})


VAL = stems("val")
FAILURES = {
    "a damaged archive": (broken_zip, "val_images.zip is not a complete zip archive"),
    "no images": (no_images, "val_images.zip holds no images"),
    "an image missing": (
        without_image,
        rf"val_labels\.csv names {VAL[0]}\.jpg, which does not exist; 1 image missing",
    ),
    "a label missing": (
        without_label,
        rf"{VAL[-1]}\.jpg has no label in .*val_labels\.csv .*; 1 image without one",
    ),
    "a label of 2": (relabel(f"{VAL[3]}.jpg,1", f"{VAL[3]}.jpg,2"), rf"row 4 \({VAL[3]}.jpg\): label is '2'"),
    "a label left out": (
        relabel(f"{VAL[3]}.jpg,1", f"{VAL[3]}.jpg,"),
        r"row 4 .*: label is ''; it must be 0",
    ),
    "a label in words": (relabel(f"{VAL[3]}.jpg,1", f"{VAL[3]}.jpg,true"), "label is 'true'"),
    "a flag of 7": (relabel('"[24]",1', '"[24]",7'), r"row 2 .*: is_distorted is '7'"),
    "an image named twice": (image_twice, f"val: two images have one name: .*{VAL[0]}.*and.*{VAL[0]}"),
    "a label given twice": (label_twice, f"names image {VAL[0]} more than once"),
    "an image in two shards": (image_in_two_shards, "train: two images have one name: .*shard_0.*shard_2"),
    "a label in two shards": (label_in_two_shards, "shard_2/labels.csv names .*, as another label file does"),
    "a shard without labels": (shard_without_labels, "shard_2.zip has no labels.csv"),
    "an archive twice": (archive_twice, "val_images.zip and .*val_images.zip are the same part"),
    "two label files": (labels_twice, "val_labels.csv and .*val_labels.csv differ"),
    "lists of unequal length": (relabel('"[24]"', '"[24, 3]"'), f"{VAL[1]}.jpg: 1 distortions, but 2 scales"),
    "a list that is code": (relabel('"[24]"', '"[abs(24)]"'), r"'\[abs\(24\)\]' is not a list"),
    "a list that is a word": (relabel("\"['jpeg']\"", "jpeg"), "'jpeg' is not a list"),
    "a name that is a number": (relabel("\"['jpeg']\"", "[7]"), "are not all names"),
    "a scale without end": (relabel('"[24]"', '"[1e999]"'), "cannot be written as JSON"),
    "no column label": (
        relabel("image_name,label", "image_name,class"),
        "has no column label; its columns are",
    ),
    "no column image_name": (relabel("image_name,", "file,"), "has no column image_name"),
    "no column of scales": (relabel("distortion_scales", "scales"), "has no column distortion_scales"),
    "a row without a name": (relabel(f"{VAL[3]}.jpg", ""), r"row 4 \(no name\): image_name is ''"),
    "no CSV": (lambda root: (root / "val_labels.csv").write_bytes(b"\xff\xfe\x00"), "is not a readable CSV"),
    "an empty CSV": (lambda root: (root / "val_labels.csv").write_bytes(b""), "is empty"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_wrong_data_end_in_an_error_that_names_them_and_nothing_is_written(root, tmp_path, case):
    change, message = FAILURES[case]
    change(root)
    with pytest.raises(UserError, match=message):
        prepare(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--splits", "toy"), "toy is missing: no archive .* toy or toy_images"),
        (("--splits", "vall"), r"unknown split 'vall' \(did you mean val\?\)"),
        (("--splits", "val", "--holdout", "0.1"), "--holdout needs the train split"),
        (("--holdout", "1.5"), "argument --holdout: must be between 0 and 1"),
        (("--holdout", "0.0001"), "leaves one side empty"),
        (("--extra", "nowhere.csv"), "cannot read nowhere.csv"),
        (("--verify", "--workers", "0"), "argument --workers: must be from 1 to 256"),
        (("--hold", "0.1"), "unknown argument --hold"),
    ],
)
def test_a_wrong_command_line_ends_in_an_error_that_names_it(root, tmp_path, flags, message):
    (root / "toy.zip").unlink()
    with pytest.raises(UserError, match=message):
        prepare(root, tmp_path / "out", *flags)


def test_a_folder_without_any_split_or_no_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no split of the challenge below"):
        prepare(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="nowhere is not a folder"):
        prepare(tmp_path / "nowhere", tmp_path / "out")


LEFT_OUT = {
    "a member above the archive": (hostile("../evil.jpg"), "leads out of the archive"),
    "a member above it, the Windows way": (hostile("a\\..\\..\\evil.jpg"), "leads out of the archive"),
    "an absolute member": (hostile("/etc/evil.jpg"), "leads out of the archive"),
    "a member on a drive": (hostile("C:/evil.jpg"), "leads out of the archive"),
    "a link": (hostile("val_images/evil.jpg", 0o120777), "is a symbolic link"),
    "a name that is no text": (hostile("val_images/evil\n.jpg"), "has control characters"),
    "an encrypted member": (encrypted, "is encrypted"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_member_that_cannot_be_used_is_listed_and_the_others_are_written(root, tmp_path, case, capsys):
    change, reason = LEFT_OUT[case]
    assert prepare(root, tmp_path / "before", "--splits", "val") == 0
    change(root)
    assert prepare(root, tmp_path / "after", "--splits", "val") == 1
    errors = (tmp_path / "after" / "val.errors.csv").read_text().splitlines()
    assert len(errors) == 2 and reason in errors[1]
    assert "1 unreadable image left out" in capsys.readouterr().out
    before, after = (set(read_manifest(tmp_path / out / "val.csv")["name"]) for out in ("before", "after"))
    assert after == before - {errors[1].split(",")[0]}
    assert len(before - after) == (1 if case == "an encrypted member" else 0)


def test_an_error_is_one_line_and_status_2(root, tmp_path):
    broken_zip(root)
    command = [sys.executable, "-m", "data_prep.ntire", "--root", str(root), "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1 and ended.stderr.startswith("ntire.py: error: ")
