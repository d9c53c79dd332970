"""A manifest in parts: the same rows as its CSV, written alike each time, and checked."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from data_prep import combine
from featdistill.command_line import UserError
from featdistill.records.labels import read_labels
from featdistill.records.manifest import make_manifest, manifest_chunks, read_manifest, write_manifest
from featdistill.records.parts import Parts, name_hashes, part_name, repeated, table_bytes
from featdistill.storage import Folder


@pytest.fixture
def csv(tmp_path):
    count = 25
    columns = {
        "image": [str(tmp_path / "images" / f"{number}.jpg") for number in range(count)],
        "name": [f"n{number}" for number in range(count)],
        "label": [number % 3 if number % 3 < 2 else None for number in range(count)],
        "source": ["a" if number < 11 else "b" for number in range(count)],
        "group": [f"ü{number}" for number in range(count)],
        "extra": [str(number / 4) for number in range(count)],
    }
    write_manifest(make_manifest(columns), tmp_path / "all.csv")
    return tmp_path / "all.csv"


def parts_of(*manifests, flags=(), rows=10, name="parts"):
    out = manifests[0].parent / name
    flags = ["--no-duplicates-check", "--rows-per-part", str(rows), "--out", str(out), *flags]
    assert combine.main([*map(str, manifests), *flags]) == 0
    return out


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_parts_hold_the_rows_of_the_csv(csv, capsys):
    out = parts_of(csv)
    assert [*content(out)] == ["part-000000.parquet", "part-000001.parquet", "part-000002.parquet"]
    assert [len(chunk) for chunk in manifest_chunks(out)] == [10, 10, 5]
    assert [Parts(out).count(name) for name in Parts(out).names] == [10, 10, 5]
    pd.testing.assert_frame_equal(read_manifest(out), read_manifest(csv))
    pd.testing.assert_frame_equal(read_labels(out, ["extra"]), read_labels(csv, ["extra"]))
    pd.testing.assert_frame_equal(pd.concat(manifest_chunks(csv, 7), ignore_index=True), read_manifest(csv))
    assert parts_of(out, rows=6, name="again") and "25 rows" in capsys.readouterr().out
    pd.testing.assert_frame_equal(read_manifest(csv.parent / "again"), read_manifest(csv))


def test_images_below_the_folder_have_relative_paths(csv):
    out = parts_of(csv, name=".")
    cells, stamp = Parts(out).read("part-000000.parquet")
    assert cells["image"][3] == "images/3.jpg" and stamp.mark == Parts(out).mark("part-000000.parquet")
    assert read_manifest(out)["image"][3] == str(csv.parent / "images" / "3.jpg")


def test_the_same_command_continues_and_another_is_refused(csv):
    out = parts_of(csv)
    before = content(out)
    first = csv.with_name("first.csv")
    write_manifest(read_manifest(csv)[:20], first)
    (out / "part-000001.parquet").unlink()
    assert content(parts_of(csv)) == before
    with pytest.raises(UserError, match=r"part-000000\.parquet with other rows; choose another --out"):
        parts_of(csv, flags=["--where", "source=b"])
    with pytest.raises(UserError, match=r"also has part-000002\.parquet, from before"):
        parts_of(first, rows=10)
    assert content(out) == before


def test_parts_are_appended_unless_a_name_is_there_already(csv):
    out = parts_of(csv, flags=["--where", "source=a"])
    before = content(out)
    other = csv.with_name("other.csv")
    write_manifest(read_manifest(csv)[11:], other)
    parts_of(other, flags=["--append"])
    assert {name: data for name, data in content(out).items() if name in before} == before
    assert read_manifest(out)["name"].tolist() == read_manifest(csv)["name"].tolist()
    with pytest.raises(UserError, match=r"name n11 of .*parts appears more than once"):
        parts_of(other, flags=["--append"])


def test_foreign_files_and_scores_are_not_mixed_with_parts(csv, tmp_path):
    out = tmp_path / "foreign"
    out.mkdir()
    (out / "foo.parquet").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"holds foo\.parquet, which is not a part written here"):
        parts_of(csv, name="foreign")
    (out / "foo.parquet").unlink()
    (out / "predictions.json").write_text("{}")
    for flags in ([], ["--append"]):
        with pytest.raises(UserError, match="holds scores; choose another --out"):
            parts_of(csv, flags=flags, name="foreign")
    assert [*content(out)] == ["predictions.json"]


def test_parts_in_subfolders_are_not_ignored_in_silence(csv, tmp_path):
    parts_of(csv, name="deep/a")
    with pytest.raises(
        UserError, match=r"deep has parts in subfolders, such as .*deep/a/part-00000\d\.parquet"
    ):
        read_manifest(tmp_path / "deep")


def test_names_of_two_manifests_must_differ(csv):
    copy = csv.with_name("copy.csv")
    write_manifest(read_manifest(csv)[20:21], copy)
    with pytest.raises(UserError, match=r"name n20 of .*all\.csv appears more than once"):
        parts_of(csv, copy)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--holdout", "0.5"], "parts take rows as they are"),
        (["--balance", "label"], "parts take rows as they are"),
        (["--where", "source=c"], "no row of .* is left with source=c"),
        (["--where", "sourc=a"], r"no manifest has a column sourc \(did you mean source\?\)"),
    ],
)
def test_flags_that_need_all_rows_are_refused(csv, flags, message):
    with pytest.raises(UserError, match=message):
        parts_of(csv, flags=flags)


def test_cells_of_any_type_are_read_as_those_of_a_csv(tmp_path):
    columns = {
        "image": ["a.jpg", "b.jpg", "c.jpg"],
        "name": [1, 2, 3],
        "label": pa.array([0, None, 1], pa.int64()),
        "is_distorted": pa.array([1.0, 0.0, None], pa.float64()),
        "source": pa.array([None, "x", "y"], pa.string()),
    }
    Folder(tmp_path).write(part_name(0), table_bytes(columns))
    rows = read_manifest(tmp_path)
    assert rows["name"].tolist() == ["1", "2", "3"]
    assert rows["label"].tolist() == [0, pd.NA, 1] and rows["is_distorted"].tolist() == [1, 0, pd.NA]
    assert rows["source"].tolist() == ["", "x", "y"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (None, r"part-000000\.parquet is not a readable parquet file"),
        ({"image": ["a"]}, r"part-000000\.parquet is not a part of a manifest: column name is missing"),
        ({"image": ["a"], "name": ["a"], "label": [7]}, r"label of a is '7'; it must be 0, 1 or empty"),
        ({"image": ["a", "b"], "name": ["a", "a"]}, r"name a appears more than once"),
    ],
)
def test_what_is_not_a_part_is_refused_in_one_line(tmp_path, columns, message):
    Folder(tmp_path).write(part_name(0), table_bytes(columns) if columns else b"PAR1 nothing")
    with pytest.raises(UserError, match=message) as error:
        read_manifest(tmp_path)
    assert "\n" not in str(error.value)


def test_an_empty_folder_and_a_name_in_two_parts_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"is not a manifest in parts: it holds no \.parquet files"):
        read_manifest(tmp_path)
    for number in (0, 1):
        Folder(tmp_path).write(part_name(number), table_bytes({"image": ["a"], "name": ["a"]}))
    with pytest.raises(UserError, match="name a appears in two parts"):
        read_manifest(tmp_path)


def test_repeated_names_are_found_by_their_hashes():
    names = [np.array(["a", "b"], dtype=object), np.array(["c", "a"], dtype=object)]
    assert repeated(names) == set(name_hashes(names[0][:1]).tolist())
    assert repeated([names[0]]) == set() and repeated([]) == set()
