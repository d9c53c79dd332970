"""Nothing that could be an image is lost without a word, and one odd file does not stop the others."""

import unicodedata
import zipfile
from pathlib import Path

import pytest
from archive_files import write_tar, write_zip
from image_trees import picture, write_tree

from data_prep import aigcdetect, equalize, folders, ntire
from featdistill.command_line import UserError
from featdistill.records.manifest import read_manifest


def shard(
    path: Path, number: int, member="shard_{n}/images/{i}.jpg", labels="shard_{n}/labels.csv", respell=str
):
    """Write a shard of four labeled images; `respell` changes the names in the label file."""
    names = [f"{number}_{i}" for i in range(4)]
    rows = "".join(f"{respell(i)}.jpg,{label % 2}\n" for label, i in enumerate(names))
    files = {member.format(n=number, i=i): picture(seed, "JPEG") for seed, i in enumerate(names)}
    path.parent.mkdir(exist_ok=True)
    write_zip(path, files | {labels.format(n=number): "image_name,label\n" + rows})


def prepare(root: Path, out: Path) -> list[str]:
    assert ntire.main(["--root", str(root), "--out", str(out), "--splits", "train"]) == 0
    return read_manifest(out / "train.csv")["name"].tolist()


def test_shards_of_every_spelling_are_found(tmp_path, capsys):
    root = tmp_path / "in"
    shard(root / "shard_0.zip", 0)
    shard(root / "shard_1 (1).zip", 1)
    shard(root / "shard_2.ZIP", 2, "shard_{n}\\images\\{i}.jpg", "shard_{n}\\labels.csv")
    shard(root / "shard_3 - Copy.zip", 3, "./shard_{n}/./images//{i}.jpg")
    shard(root / "Shard_4.zip", 4)
    shard(root / "#recycle" / "shard_0.zip", 0)
    write_zip(root / "extra.zip", {"a.jpg": b"x"})
    (root / "shard_5.tar.gz").write_bytes(b"x")
    assert prepare(root, tmp_path / "out") == [f"{n}_{i}.jpg" for n in range(5) for i in range(4)]
    out = capsys.readouterr().out
    assert "note: 2 archives ignored (extra.zip, shard_5.tar.gz)" in out
    assert "note: hidden or system files and folders ignored: 1," in out


@pytest.mark.parametrize("copy", ["shard_0 (1).zip", "shard_0 (12).ZIP", "shard_00.zip", "shard_0 copy.zip"])
def test_one_shard_twice_is_an_error_that_names_both(tmp_path, copy):
    shard(tmp_path / "shard_0.zip", 0)
    shard(tmp_path / copy, 0)
    with pytest.raises(UserError, match=r"shard_0.* are the same part of a split; keep one of them"):
        prepare(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_labels_are_found_in_either_spelling_of_an_accent(tmp_path, form):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    member = "shard_{n}/images/" + unicodedata.normalize(form, "\u00e9") + "{i}.jpg"
    shard(
        tmp_path / "in" / "shard_0.zip",
        0,
        member,
        respell=lambda i: unicodedata.normalize(other, "\u00e9") + i,
    )
    assert len(prepare(tmp_path / "in", tmp_path / "out")) == 4
    assert read_manifest(tmp_path / "out" / "train.csv")["label"].tolist() == [0, 1, 0, 1]


def test_what_a_desktop_left_in_folders_and_archives_is_not_data(tmp_path, capsys):
    files = {"progan/0_real/a": picture(0), "progan/1_fake/b.jfif": picture(1, "JPEG")}
    system = {"progan/0_real/Icon\r": b"", "progan/@eaDir/a.jpg": b"x", "__MACOSX/progan/._Icon\r": b""}
    write_tree(tmp_path / "tree", files | system)
    write_zip(tmp_path / "x.zip", files | system)
    write_tar(tmp_path / "x.tar", files | system)
    for name in ("tree", "x.zip", "x.tar"):
        assert aigcdetect.main(["--root", str(tmp_path / name), "--out", str(tmp_path / "out.csv")]) == 0
        assert read_manifest(tmp_path / "out.csv")["label"].tolist() == [0, 1]
        assert "hidden or system files and folders ignored" in capsys.readouterr().out


def test_images_of_unsupported_kinds_and_with_odd_names_are_listed_or_used(tmp_path):
    files = {
        "real/a.jpg": 0,
        "ai/b::c.png": 1,
        "ai/d\re.png": 2,
        "ai/f": 3,
        "ai/g.jxl": b"\xff\x0a",
        "h.zip": b"",
    }
    root, out = write_tree(tmp_path / "in", files), tmp_path / "m.csv"
    (root / "ai" / "note.bin").write_bytes(b"no image")
    assert folders.main(["--root", str(root), "--out", str(out)]) == 1
    assert set(read_manifest(out)["name"]) == {"a.jpg", "b::c.png", "d\\x0de.png", "f"}
    assert (tmp_path / "m.errors.csv").read_text().startswith('name,reason\ng.jxl,"JPEG XL is not supported')
    assert folders.main(["--root", str(root), "--out", str(out), "--verify", "--workers", "1"]) == 1
    assert len(read_manifest(out)) == 4
    assert equalize.main([str(out), "--out", str(tmp_path / "equal"), "--workers", "1"]) == 0
    with zipfile.ZipFile(tmp_path / "equal" / "images.zip") as archive:
        assert "images/d_x0de.jpg" in archive.namelist()


def test_the_root_may_lead_through_a_linked_folder(tmp_path):
    write_tree(tmp_path / "far", {"real/a.png": 0, "ai/b.png": 1, "deep/note.txt": b""})
    (tmp_path / "link").symlink_to(tmp_path / "far" / "deep")
    assert folders.main(["--root", f"{tmp_path}/link/..", "--out", str(tmp_path / "m.csv")]) == 0
    assert read_manifest(tmp_path / "m.csv")["image"].tolist() == [
        f"{tmp_path}/far/ai/b.png",
        f"{tmp_path}/far/real/a.png",
    ]
