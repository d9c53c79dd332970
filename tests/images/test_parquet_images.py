"""Rows of parquet files are images, whichever the column, the row groups and the order of reading."""

import os
import sys

import numpy as np
import pytest

from featdistill.images import parquet as parquet_images
from featdistill.images import reading as image_io
from featdistill.images.archives import ArchiveError
from featdistill.images.reading import BrokenImage

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

CELLS = [bytes([row % 256]) * (50 + row * 7) for row in range(60)]


def write(path, table=None, **options):
    if table is None:
        table = pyarrow.table({"caption": [str(row) for row in range(60)], "image": as_structs(CELLS)})
    parquet.write_table(table, path, **options)
    return path


def as_structs(cells):
    return [{"bytes": cell, "path": f"{place}.jpg"} for place, cell in enumerate(cells)]


@pytest.mark.parametrize("rows_a_group", [1, 7, 60])
@pytest.mark.parametrize("window", [1, 600, 1 << 20])
@pytest.mark.parametrize("column", ["image", "image_data"])
def test_every_row_gives_its_bytes_in_any_order(tmp_path, monkeypatch, rows_a_group, window, column):
    monkeypatch.setattr(parquet_images, "WINDOW_BYTES", window)
    table = pyarrow.table({column: CELLS if column == "image_data" else as_structs(CELLS)})
    paths = [
        write(tmp_path / name, table, row_group_size=rows_a_group) for name in ("a.parquet", "b.parquet")
    ]
    order = np.random.default_rng(0).permutation(60)
    for row in [*range(60), *reversed(range(60)), *order]:
        for path in paths[: 1 + row % 2]:
            assert image_io.read_bytes(f"{path}::{row}") == CELLS[row]


def test_a_row_group_that_was_decoded_is_not_decoded_again(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", row_group_size=20)
    decoded, batches = [], parquet_images.ParquetImages.batches

    def note(self, group):
        decoded.append(group)
        return batches(self, group)

    monkeypatch.setattr(parquet_images.ParquetImages, "batches", note)
    for row in (21, 39, 20, 30, 5, 19, 0):
        image_io.read_bytes(f"{path}::{row}")
    assert decoded == [1, 0]
    # One row at a time: reading on in order goes through a row group once.
    monkeypatch.setattr(parquet_images, "WINDOW_BYTES", 1)
    for row in range(40, 60):
        image_io.read_bytes(f"{path}::{row}")
    assert decoded == [1, 0, 2]


def test_rows_that_are_not_there_are_named(tmp_path):
    cells = as_structs(CELLS[:3])
    cells[1]["bytes"] = None
    cells.append(None)
    path = write(tmp_path / "a.parquet", pyarrow.table({"image": cells}))
    assert image_io.read_bytes(f"{path}::2") == CELLS[2]
    for row, message in (
        ("4", "no row 4 in .*a.parquet, which has 4"),
        ("1", "row 1 of .* is empty"),
        ("3", "row 3 of .* is empty"),
        ("-1", "'-1' is not a row number"),
        ("²", "'²' is not a row number"),
        ("", "'' is not a row number"),
    ):
        with pytest.raises(BrokenImage, match=message):
            image_io.read_bytes(f"{path}::{row}")


def test_the_column_is_found_by_the_schema():
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    wide = pyarrow.struct([("path", pyarrow.string()), ("bytes", pyarrow.large_binary())])
    binary, text = pyarrow.binary(), pyarrow.string()

    def found(**columns):
        return parquet_images.image_column(pyarrow.schema(list(columns.items())))

    assert found(Caption=text, Image=struct, Label_A=pyarrow.int64()) == "Image.bytes"
    assert found(photo=wide) == "photo.bytes"
    assert found(image_data=binary, embedding=binary) == "image_data"
    assert found(mask=struct, IMAGE=struct) == "IMAGE.bytes"
    assert found(bytes=binary, image=struct) == "image.bytes"
    with pytest.raises(ArchiveError, match=r"several columns may hold the images \(left, right\)"):
        found(left=struct, right=struct)
    with pytest.raises(ArchiveError, match="no column holds images: of image, embedding, none is"):
        found(image=text, embedding=binary)


def test_damage_and_what_is_no_parquet_file_end_in_one_line(tmp_path):
    path = write(tmp_path / "a.parquet", row_group_size=20, compression="zstd")
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[100:900] = b"\xff" * 800
    (tmp_path / "damaged.parquet").write_bytes(damaged)
    (tmp_path / "cut.parquet").write_bytes(whole[:-40])
    (tmp_path / "page.parquet").write_bytes(b"<html>")
    write(tmp_path / "text.parquet", pyarrow.table({"caption": ["a"]}))
    for name, message in (
        ("damaged", "is damaged around row 0"),
        ("cut", "is not a complete parquet file"),
        ("page", "is not a complete parquet file"),
        ("text", "text.parquet: no column holds images"),
        ("none", "No such file"),
    ):
        with pytest.raises(BrokenImage, match=message) as error:
            image_io.read_bytes(f"{tmp_path}/{name}.parquet::0")
        assert "\n" not in str(error.value)
    assert image_io.read_bytes(f"{tmp_path}/damaged.parquet::59") == CELLS[59]
    assert image_io.read_bytes(f"{path}::0") == CELLS[0]


def test_a_missing_package_is_named_with_what_to_do(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet")
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BrokenImage, match="need the package pyarrow; pip install pyarrow"):
        image_io.read_bytes(f"{path}::0")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_process_reads_on_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_images, "WINDOW_BYTES", 1)
    path = write(tmp_path / "a.parquet", row_group_size=60)
    assert image_io.read_bytes(f"{path}::10") == CELLS[10]
    child = os.fork()
    if child == 0:
        same = all(image_io.read_bytes(f"{path}::{row}") == CELLS[row] for row in (10, 11, 40, 3))
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [image_io.read_bytes(f"{path}::{row}") for row in (11, 12)] == CELLS[11:13]
