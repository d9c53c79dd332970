"""Data sets in parquet files: every row has its label, generator and group, and wrong rows are named."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from data_prep import community_forensics, defactify, openfake
from data_prep.reading import parquet as parquet_parts
from featdistill.command_line import UserError
from featdistill.images import reading as image_io
from featdistill.records.manifest import read_manifest

MODULES = {"defactify": defactify, "community_forensics": community_forensics, "openfake": openfake}
# The schemas, as the data sets document them.
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMAS = {
    "defactify": pa.schema(
        [("Caption", pa.string()), ("Image", PICTURE), ("Label_A", pa.int64()), ("Label_B", pa.int64())]
    ),
    "community_forensics": pa.schema(
        [
            ("image_name", pa.string()),
            ("image_data", pa.binary()),
            ("model_name", pa.string()),
            ("label", pa.int64()),
            ("architecture", pa.string()),
        ]
    ),
    "openfake": pa.schema([("image", PICTURE), ("label", pa.string()), ("model", pa.string())]),
}
IMAGE_COLUMN = {"defactify": "Image", "community_forensics": "image_data", "openfake": "image"}
# What an image is, by the order of its number: the label and what made it.
KINDS = {
    "defactify": [(0, "")] + [(1, name) for name in ("sd21", "sdxl", "sd3", "dalle3", "midjourney6")],
    "community_forensics": [(1, "org/model-a"), (1, "org/model-b")],
    "openfake": [(0, ""), (1, "flux.1-dev"), (1, "gpt-image-1")],
}
ROWS = 24


def encoded(number: int) -> bytes:
    """A tiny image of its own content: PNGs and JPEGs in turn."""
    pixels = np.random.default_rng(number).integers(0, 256, (16, 18, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, ("PNG", "JPEG")[number % 2])
    return data.getvalue()


def caption(number: int) -> str:
    return f'A dog, "{number // 6}"\nand a cat'


def row(source: str, number: int) -> dict:
    label, generator = KINDS[source][number % len(KINDS[source])]
    if source == "defactify":
        picture = {"bytes": encoded(number), "path": f"{number}.jpg"}
        return {"Caption": caption(number), "Image": picture, "Label_A": label, "Label_B": number % 6}
    if source == "openfake":
        picture = {"bytes": encoded(number), "path": None}
        text = ("real", "fake")[label]
        return {"image": picture, "label": text, "model": generator if label else "camera"}
    extra = {"image_name": f"{number}.png", "architecture": ("LatDiff", "GAN")[number % 2]}
    return {"image_data": encoded(number), "label": label, "model_name": generator, **extra}


def write_part(path: Path, source: str, rows: list[dict], schema: pa.Schema | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=schema or SCHEMAS[source])
    parquet.write_table(table, path, row_group_size=3)


def write_set(root: Path, source: str, **change) -> Path:
    """Write three parts of eight rows, the last one in a folder of its own; `change` is made to row 13."""
    rows = [row(source, number) for number in range(ROWS)]
    rows[13] |= change
    for part in range(3):
        name = f"train-{part:05d}-of-00003.parquet" if part < 2 else "more/train-extra.parquet"
        write_part(root / "data" / name, source, rows[8 * part : 8 * part + 8])
    # What the hub's client leaves beside the data.
    (root / ".cache" / "huggingface").mkdir(parents=True)
    (root / ".cache" / "huggingface" / "train-x.parquet").write_bytes(b"PAR1 cut off")
    return root


def run(source: str, root: Path, out: Path, *flags: str) -> int:
    return MODULES[source].main(["--root", str(root), "--out", str(out), *flags])


def in_order(rows):
    """The rows in the order of their numbers; the part in the folder comes before the others by path."""
    return [rows.iloc[(number + 8) % ROWS] for number in range(ROWS)]


@pytest.mark.parametrize("source", MODULES)
def test_every_row_has_its_image_label_and_generator(source, tmp_path):
    root = write_set(tmp_path / "root", source)
    assert run(source, root, tmp_path / "all.csv") == 0
    rows = read_manifest(tmp_path / "all.csv")
    assert len(rows) == ROWS and rows["name"].is_unique
    for number, found in enumerate(in_order(rows)):
        label, generator = KINDS[source][number % len(KINDS[source])]
        assert (found["label"], found["generator"]) == (label, generator), number
        assert np.array_equal(image_io.read_image(found["image"]), image_io.decode(encoded(number)))
        assert (found["source"], found["distortions"]) == (source, "[]") and found["licence"]
    part = "data/train-00001-of-00003"
    assert in_order(rows)[11]["name"] == f"{part}/3"
    assert in_order(rows)[11]["image"] == f"{root}/{part}.parquet::3"


@pytest.mark.parametrize("source", MODULES)
def test_the_same_command_writes_the_same_bytes(source, tmp_path):
    root = write_set(tmp_path / "root", source)
    for out in ("a.csv", "b.csv"):
        run(source, root, tmp_path / out, "--limit", "10", "--seed", "3")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert len(read_manifest(tmp_path / "a.csv")) == 10


@pytest.mark.parametrize("source", MODULES)
def test_batches_do_not_change_the_rows(source, tmp_path, monkeypatch):
    root = write_set(tmp_path / "root", source)
    run(source, root, tmp_path / "a.csv")
    monkeypatch.setattr(parquet_parts, "_ROWS_PER_BATCH", 5)
    run(source, root, tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


@pytest.mark.parametrize("source", MODULES)
def test_verify_decodes_the_rows_and_leaves_broken_ones_out(source, tmp_path):
    column = IMAGE_COLUMN[source]
    broken = b"no image" if column == "image_data" else {"bytes": b"no image", "path": ""}
    root = write_set(tmp_path / "root", source, **{column: broken})
    assert run(source, root, tmp_path / "all.csv", "--verify", "--workers", "1") == 1
    assert len(read_manifest(tmp_path / "all.csv")) == ROWS - 1
    assert "data/train-00001-of-00003/5," in (tmp_path / "all.errors.csv").read_text()


def test_images_of_one_caption_are_one_group_and_stay_on_one_side(tmp_path, capsys):
    root = write_set(tmp_path / "root", "defactify")
    assert run("defactify", root, tmp_path / "all.csv", "--holdout", "0.25") == 0
    training, held = read_manifest(tmp_path / "all.csv"), read_manifest(tmp_path / "all.holdout.csv")
    assert (len(training), len(held)) == (18, 6)
    groups = {side["group"].nunique() for side in (training, held)}
    assert groups == {3, 1} and not set(training["group"]) & set(held["group"])
    assert "4 captions" in capsys.readouterr().out


def test_a_caption_makes_its_group_whatever_its_part_and_white_space(tmp_path):
    rows = [row("defactify", 0), row("defactify", 1), row("defactify", 2), row("defactify", 3)]
    rows[1]["Caption"] = f"  {caption(0)} ".replace("\n", "  \n")
    rows[2]["Caption"], rows[3]["Caption"] = None, ""
    write_part(tmp_path / "train-a.parquet", "defactify", rows[:1])
    write_part(tmp_path / "train-b.parquet", "defactify", rows[1:])
    run("defactify", tmp_path, tmp_path / "all.csv")
    groups = read_manifest(tmp_path / "all.csv")["group"].tolist()
    assert groups[0] == groups[1] != "" and groups[2:] == ["", ""]


def test_only_the_split_asked_for_is_taken(tmp_path, capsys):
    root = write_set(tmp_path / "root", "defactify")
    write_part(root / "data" / "test-00000-of-00001.parquet", "defactify", [row("defactify", 30)])
    write_part(root / "data" / "training-00000-of-00001.parquet", "defactify", [row("defactify", 31)])
    run("defactify", root, tmp_path / "all.csv")
    assert len(read_manifest(tmp_path / "all.csv")) == ROWS
    assert "42000" in capsys.readouterr().out.replace(",", "")
    assert run("defactify", root, tmp_path / "test.csv", "--split", "test") == 0
    said = capsys.readouterr().out
    assert "16 %" in said and "42" not in said and len(read_manifest(tmp_path / "test.csv")) == 1
    with pytest.raises(UserError, match="no parts of split val, only of test, train, training"):
        run("defactify", root, tmp_path / "val.csv", "--split", "val")


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        ("defactify", {"Label_A": 0}, "Label_A 0 and Label_B 1 disagree"),
        ("defactify", {"Label_B": 0}, "Label_A 1 and Label_B 0 disagree"),
        ("defactify", {"Label_B": 6}, r"Label_B is 6; it must be 0 \(real\) or 1 to 5"),
        ("defactify", {"Label_B": -1}, "Label_B is -1"),
        ("defactify", {"Label_A": 2}, "Label_A is 2"),
        ("defactify", {"Label_A": None}, "Label_A is None"),
        ("community_forensics", {"label": 2}, r"label is 2; it must be 1 \(AI\) or 0 \(real\)"),
        ("community_forensics", {"label": None}, "label is None"),
        ("openfake", {"label": "generated"}, "label is 'generated'; it must be one of real, fake"),
        ("openfake", {"label": ""}, "label is ''"),
        ("openfake", {"label": None}, "label is None"),
    ],
)
def test_a_wrong_label_is_an_error_that_names_file_and_row(source, change, message, tmp_path):
    root = write_set(tmp_path / "root", source, **change)
    with pytest.raises(UserError, match=rf"train-00001-of-00003.parquet, row 5: {message}"):
        run(source, root, tmp_path / "all.csv")
    assert not (tmp_path / "all.csv").exists()


def test_a_folder_tells_the_split_of_parts_that_are_numbers(tmp_path):
    for split, number in (("train", 1), ("test", 2)):
        write_part(tmp_path / "default" / split / "0000.parquet", "defactify", [row("defactify", number)])
    run("defactify", tmp_path, tmp_path / "all.csv")
    assert read_manifest(tmp_path / "all.csv")["generator"].tolist() == ["sd21"]


def test_inverted_labels_of_a_whole_set_are_refused(tmp_path):
    rows = [{**row("defactify", number), "Label_A": int(number % 6 == 0)} for number in range(6)]
    write_part(tmp_path / "train-0.parquet", "defactify", rows)
    with pytest.raises(UserError, match="row 0: Label_A 1 and Label_B 0 disagree"):
        run("defactify", tmp_path, tmp_path / "all.csv")


@pytest.mark.parametrize(
    ("source", "column", "kind", "value"),
    [
        ("openfake", "label", pa.int64(), 1),
        ("openfake", "model", pa.int64(), 1),
        ("community_forensics", "label", pa.string(), "1"),
        ("community_forensics", "label", pa.bool_(), True),
        ("community_forensics", "label", pa.float64(), 1.0),
    ],
)
def test_a_label_of_another_type_is_no_label(source, column, kind, value, tmp_path):
    place = SCHEMAS[source].get_field_index(column)
    schema = SCHEMAS[source].set(place, pa.field(column, kind))
    write_part(tmp_path / "a.parquet", source, [{**row(source, 1), column: value}], schema)
    with pytest.raises(UserError, match=rf"a\.parquet, row 0: {column} is {value!r}"):
        run(source, tmp_path, tmp_path / "all.csv")


def test_real_images_have_no_generator_and_labels_are_read_in_any_case(tmp_path):
    rows = [row("openfake", 0), row("openfake", 1)]
    rows[0]["label"], rows[1]["label"] = "Real", "FAKE"
    write_part(tmp_path / "a.parquet", "openfake", rows)
    run("openfake", tmp_path, tmp_path / "all.csv")
    found = read_manifest(tmp_path / "all.csv")
    assert found["label"].tolist() == [0, 1] and found["generator"].tolist() == ["", "flux.1-dev"]


def test_the_full_community_forensics_is_said_to_have_no_real_images(tmp_path, capsys):
    root = write_set(tmp_path / "root", "community_forensics")
    run("community_forensics", root, tmp_path / "all.csv")
    assert "there are no real images" in capsys.readouterr().out
    rows = read_manifest(tmp_path / "all.csv")
    assert [found["architecture"] for found in in_order(rows)] == ["LatDiff", "GAN"] * 12
    assert set(rows["licence"]) == {"unknown"}


def test_real_images_are_taken_for_a_smaller_set(tmp_path, capsys):
    change = {"label": 0, "model_name": "a camera", "architecture": "none"}
    root = write_set(tmp_path / "root", "community_forensics", **change)
    run("community_forensics", root, tmp_path / "all.csv")
    assert "warning: found 1 real images, and the full set has none" in capsys.readouterr().err
    run("community_forensics", root, tmp_path / "all.csv", "--preset", "community_forensics_small")
    assert "full set has none" not in capsys.readouterr().err
    rows = read_manifest(tmp_path / "all.csv")
    real = in_order(rows)[13]
    assert (real["label"], real["generator"], real["architecture"]) == (0, "", "")
    assert set(rows["licence"]) == {"non-commercial"} and set(rows["label"]) == {0, 1}


def test_one_file_is_a_root_too(tmp_path):
    root = write_set(tmp_path / "root", "openfake")
    assert run("openfake", root / "data" / "train-00000-of-00003.parquet", tmp_path / "all.csv") == 0
    assert read_manifest(tmp_path / "all.csv")["name"].tolist() == [
        f"train-00000-of-00003/{number}" for number in range(8)
    ]


def test_missing_parts_are_told(tmp_path, capsys):
    root = write_set(tmp_path / "root", "openfake")
    run("openfake", root, tmp_path / "all.csv")
    assert "warning: data/train-00002-of-00003 is missing" in capsys.readouterr().err
    write_part(root / "data" / "train-00002-of-00003.parquet", "openfake", [row("openfake", 1)])
    run("openfake", root, tmp_path / "all.csv")
    assert "warning" not in capsys.readouterr().err
    for part in (0, 2):
        (root / "data" / f"train-{part:05d}-of-00003.parquet").unlink()
    run("openfake", root, tmp_path / "all.csv")
    assert "data/train-00000-of-00003 and 1 more are missing" in capsys.readouterr().err


@pytest.mark.parametrize("source", MODULES)
def test_the_image_column_is_never_read(source, tmp_path, monkeypatch):
    asked = []
    real = parquet.ParquetFile.iter_batches

    def noted(self, *args, **settings):
        asked.append(settings["columns"])
        return real(self, *args, **settings)

    root = write_set(tmp_path / "root", source)
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", noted)
    run(source, root, tmp_path / "all.csv")
    assert len(asked) == 3 and all(IMAGE_COLUMN[source] not in columns for columns in asked)


def test_a_set_of_another_source_is_told_by_its_columns(tmp_path):
    root = write_set(tmp_path / "root", "openfake")
    with pytest.raises(
        UserError, match=r"has no column Image.*it has image, label, model: is it this data set"
    ):
        run("defactify", root, tmp_path / "all.csv")
    with pytest.raises(UserError, match="has no column image_data"):
        run("community_forensics", root, tmp_path / "all.csv")


def test_images_that_are_no_bytes_are_refused(tmp_path):
    schema = SCHEMAS["openfake"].set(0, pa.field("image", pa.string()))
    write_part(tmp_path / "a.parquet", "openfake", [{**row("openfake", 1), "image": "x.jpg"}], schema)
    with pytest.raises(UserError, match=r"a\.parquet: no column holds images"):
        run("openfake", tmp_path, tmp_path / "all.csv")


def test_damaged_files_are_one_line(tmp_path):
    root = write_set(tmp_path / "root", "openfake")
    part = root / "data" / "train-00001-of-00003.parquet"
    whole = part.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"PAR1 nothing PAR1"):
        part.write_bytes(data)
        with pytest.raises(
            UserError, match=r"train-00001-of-00003\.parquet is not a complete parquet file"
        ) as caught:
            run("openfake", root, tmp_path / "all.csv")
        assert "\n" not in str(caught.value)
    start = whole.index(b"flux.1-dev")
    part.write_bytes(whole[: start - 40] + b"\xff" * 60 + whole[start + 20 :])
    with pytest.raises(UserError, match=r"train-00001-of-00003\.parquet is damaged"):
        run("openfake", root, tmp_path / "all.csv")


def test_a_root_without_rows_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no parquet files \(.parquet\)"):
        run("openfake", tmp_path / "empty", tmp_path / "all.csv")
    (tmp_path / "text.csv").write_text("a")
    with pytest.raises(UserError, match="no parquet files"):
        run("openfake", tmp_path / "text.csv", tmp_path / "all.csv")
    write_part(tmp_path / "none" / "a.parquet", "openfake", [])
    with pytest.raises(UserError, match="hold no rows"):
        run("openfake", tmp_path / "none", tmp_path / "all.csv")


@pytest.mark.parametrize("source", MODULES)
def test_the_help_says_where_the_data_come_from_and_their_terms(source, capsys):
    with pytest.raises(SystemExit):
        MODULES[source].main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Hugging Face" in said and "terms: " in said
