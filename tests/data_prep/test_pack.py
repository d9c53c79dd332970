"""A packed copy holds the bytes it was given, in order, the same at every run, and names what it left out."""

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from data_prep import pack
from featdistill.command_line import UserError
from featdistill.images import reading as image_io
from featdistill.records.manifest import make_manifest, read_manifest, write_manifest


def packed(manifest, out, *flags: str) -> int:
    return pack.main([str(manifest), "--out", str(out), *flags])


def encoded(kind: str) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(data, kind)
    return data.getvalue()


@pytest.fixture
def parquet_manifest(tmp_path):
    """A manifest of six rows of a parquet file, in another order than the file's."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    kinds = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]
    cells = [{"bytes": encoded(kind), "path": None} for kind in kinds]
    parquet.write_table(pyarrow.table({"Image": cells}), tmp_path / "part.parquet", row_group_size=2)
    order = [3, 0, 5, 1, 4, 2]
    rows = {
        "image": [str(tmp_path / f"part.parquet::{row}") for row in order],
        "name": [f"part/{row}" for row in order],
        "label": [row % 2 for row in order],
        "caption": [f"Pferd, {row}" for row in order],
    }
    write_manifest(make_manifest(rows), tmp_path / "rows.csv")
    return tmp_path / "rows.csv"


def test_bytes_are_unchanged_and_rows_keep_their_order_and_columns(parquet_manifest, tmp_path):
    assert packed(parquet_manifest, tmp_path / "out") == 0
    source, found = read_manifest(parquet_manifest), read_manifest(tmp_path / "out" / "manifest.csv")
    assert found.drop(columns="image").equals(source.drop(columns="image"))
    for before, after in zip(source["image"], found["image"], strict=True):
        assert image_io.read_bytes(after) == image_io.read_bytes(before)
    with zipfile.ZipFile(tmp_path / "out" / "images.zip") as archive:
        members = archive.infolist()
    suffixes = [".gif", ".jpg", ".tif", ".png", ".bmp", ".webp"]
    expected = [f"images/{name}{suffix}" for name, suffix in zip(source["name"], suffixes, strict=True)]
    assert [member.filename for member in members] == expected
    assert all(member.compress_type == zipfile.ZIP_STORED for member in members)
    assert not (tmp_path / "out" / "errors.csv").exists()


def test_a_moved_folder_can_still_be_read(make_set, tmp_path):
    packed(make_set("set", 2), tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    for location in read_manifest(tmp_path / "moved" / "manifest.csv")["image"]:
        assert image_io.read_image(location).shape == (72, 88, 3)


def test_a_stopped_run_ends_with_the_bytes_of_a_whole_one(parquet_manifest, tmp_path, monkeypatch):
    packed(parquet_manifest, tmp_path / "whole")
    real, calls = image_io.read_bytes, []

    def stop_at_the_fourth(location):
        calls.append(location)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(location)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(image_io, "read_bytes", stop_at_the_fourth)
        packed(parquet_manifest, tmp_path / "stopped")
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == ["pack.json"]
    (tmp_path / "stopped" / ".images.zip.part").write_bytes(b"what kill -9 leaves")
    assert packed(parquet_manifest, tmp_path / "stopped") == 0
    files = sorted(path.name for path in (tmp_path / "stopped").iterdir())
    assert files == ["images.zip", "manifest.csv", "pack.json"]
    for name in files:
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_unreadable_images_are_listed_and_the_others_are_packed(make_set, tmp_path, read_rows, capsys):
    manifest = make_set("set", 5)
    (tmp_path / "set" / "00001.jpg").unlink()
    cut = (tmp_path / "set" / "00003.jpg").read_bytes()[:-50]
    (tmp_path / "set" / "00003.jpg").write_bytes(cut)
    assert packed(manifest, tmp_path / "out") == 1
    errors = read_rows(tmp_path / "out" / "errors.csv")
    assert errors["name"].tolist() == ["00001.jpg"] and "No such file" in errors["reason"][0]
    found = read_manifest(tmp_path / "out" / "manifest.csv")
    assert len(found) == 4 and image_io.read_bytes(found["image"][2]) == cut
    assert "1 could not be read" in capsys.readouterr().out
    assert packed(manifest, tmp_path / "out") == 1 and "nothing to do" in capsys.readouterr().out
    assert packed(manifest, tmp_path / "verified", "--verify") == 1
    assert read_rows(tmp_path / "verified" / "errors.csv")["name"].tolist() == ["00001.jpg", "00003.jpg"]


def test_names_that_no_member_may_have_and_names_that_meet_are_replaced_by_the_row(tmp_path):
    data = encoded("PNG")
    (tmp_path / "a.png").write_bytes(data)
    names = ["../a.png", "/a.png", "a\tb.png", "C:/a.png", ".a.png", "x//a.png", "a\\b.png", "b", "b.png"]
    rows = {"image": [str(tmp_path / "a.png")] * len(names), "name": names}
    write_manifest(make_manifest(rows), tmp_path / "rows.csv")
    assert packed(tmp_path / "rows.csv", tmp_path / "out") == 0
    found = read_manifest(tmp_path / "out" / "manifest.csv")
    assert found["name"].tolist() == names
    members = [location.partition("::")[2] for location in found["image"]]
    assert members == [
        *(f"images/row_{row:09}.png" for row in range(7)),
        "images/b.png",
        "images/row_000000008.png",
    ]
    assert all(image_io.read_bytes(location) == data for location in found["image"])


def test_what_is_of_something_else_is_not_overwritten(make_set, tmp_path):
    manifest = make_set("set", 2)
    with pytest.raises(UserError, match="set already exists and was not written by this command"):
        packed(manifest, tmp_path / "set")
    packed(manifest, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "pack.json").read_text())["finished"] is True
    with pytest.raises(
        UserError, match="out was produced with different settings: verify was false, is true"
    ):
        packed(manifest, tmp_path / "out", "--verify")
    (tmp_path / "set" / "00000.jpg").unlink()
    (tmp_path / "set" / "00001.jpg").unlink()
    with pytest.raises(UserError, match="none of 2 images could be read"):
        packed(manifest, tmp_path / "none")
