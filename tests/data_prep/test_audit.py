"""The audit finds what a file gives away, twins across parts, and images that a person should look at."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import smooth_picture
from PIL import Image, PngImagePlugin

from data_prep import audit
from data_prep.auditing import features as audit_features
from data_prep.auditing import leaks as audit_leaks
from data_prep.auditing import page as audit_page
from data_prep.auditing import shortcut
from featdistill.command_line import UserError
from featdistill.evaluation.metrics import roc_auc
from featdistill.records.manifest import make_manifest, read_manifest, write_manifest


def save(path: Path, seed: int, width: int = 88, height: int = 72, **options) -> str:
    Image.fromarray(smooth_picture(seed, height, width)).save(path, **options)
    return str(path)


def write_set(path: Path, images: list[str], **columns) -> str:
    rows = {"image": images, "name": [Path(image).name for image in images]}
    write_manifest(make_manifest({**rows, **columns}), path)
    return str(path)


def run(manifests: list[str], out: Path, *flags: str) -> tuple[int, dict]:
    status = audit.main([*manifests, "--out", str(out), "--workers", "1", *flags])
    return status, json.loads((out / "audit.json").read_text())


@pytest.fixture
def few_trees(monkeypatch):
    monkeypatch.setattr(shortcut, "_ROUNDS", 5)
    monkeypatch.setattr(shortcut, "_ROUNDS_ALONE", 3)
    monkeypatch.setattr(shortcut, "RESAMPLINGS", 50)


@pytest.fixture
def quick(few_trees, monkeypatch):
    """Few trees and no plots, where neither is what is tested."""
    monkeypatch.setattr(audit_page, "save_plots", lambda *_: None)


@pytest.fixture
def confounded(tmp_path):
    """AI images are PNGs of one size, real ones JPEGs of many sizes: as in GenImage."""
    images = [save(tmp_path / f"ai{seed}.png", seed, 64, 64) for seed in range(40)]
    rng = np.random.default_rng(0)
    for seed in range(40, 80):
        width, height = (int(side) for side in rng.integers(64, 110, 2))
        images.append(save(tmp_path / f"real{seed}.jpg", seed, width, height, quality=75 + seed % 4))
    return write_set(tmp_path / "set.csv", images, label=[1] * 40 + [0] * 40, source=["s"] * 80)


@pytest.fixture
def clean(tmp_path):
    """Both classes are stored alike, and their pictures are of one kind."""
    images = [save(tmp_path / f"{seed}.jpg", seed, 80, 80, quality=90) for seed in range(120)]
    return write_set(tmp_path / "set.csv", images, label=[0, 1] * 60, source=["s", "s", "t", "t"] * 30)


def test_files_that_tell_the_label_are_found_and_what_tells_it_is_named(
    confounded, tmp_path, few_trees, capsys
):
    status, found = run([confounded], tmp_path / "out")
    baseline = found["baseline"]
    assert status == 0 and baseline["auc"] > 0.95 and baseline["low"] > 0.9
    assert baseline["verdict"] == "shortcut"
    assert {"container", "width", "height"} & set(baseline["telling"])
    alone = {one["feature"]: one["auc_alone"] for one in baseline["features"]}
    assert alone["container"] > 0.95 and alone["chroma"] > 0.95 and "icc" not in alone
    assert capsys.readouterr().out.startswith("WARNING: the files tell real from AI-generated images")
    assert "container (1.00)" in (tmp_path / "out" / "audit.md").read_text()
    with Image.open(tmp_path / "out" / "audit.png") as page:
        assert page.format == "PNG" and min(page.size) > 1000


def test_files_that_are_alike_score_like_chance(clean, tmp_path, capsys):
    status, found = run([clean], tmp_path / "out")
    baseline = found["baseline"]
    assert status == 0 and baseline["low"] < 0.5 < baseline["high"] and baseline["verdict"] != "shortcut"
    assert {one["feature"] for one in baseline["features"]} == {"bytes", "bytes_per_pixel"}
    assert [one["source"] for one in baseline["sources"]] == ["s", "t"]
    assert "WARNING" not in capsys.readouterr().out


def test_one_image_stands_on_one_side_of_the_classifier_with_its_group():
    # The group decides the label, and the size in bytes names the group: telling the label takes having seen
    # the group.
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(60), 5)
    label = rng.permutation(np.arange(60) % 2)[group]
    table = audit_features.feature_table([audit_features.FileFacts(container="JPEG") for _ in group])
    table["bytes"] = 1000.0 * rng.permutation(60)[group] + rng.integers(0, 10, len(group))
    table["label"], table["source"], table["group"] = label, "s", group.astype(str)
    grouped = shortcut.measure_baseline(table)
    table["group"] = np.arange(len(group)).astype(str)
    assert grouped.auc < 0.65 and grouped.groups == 60
    assert shortcut.measure_baseline(table).auc > 0.9


def test_the_interval_holds_the_auc_and_widens_with_larger_groups():
    rng = np.random.default_rng(0)
    label = np.arange(400) % 2
    score = label + rng.normal(0, 2, 400).round(1)
    auc, low, high = shortcut.auc_interval(label, score, np.arange(400), 0)
    assert auc == roc_auc(label, score) and low < auc < high
    # The normal approximation of Hanley and McNeil (1982).
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    error = np.sqrt((auc * (1 - auc) + 199 * (q1 - auc**2) + 199 * (q2 - auc**2)) / 200**2)
    assert np.allclose([low, high], [auc - 1.96 * error, auc + 1.96 * error], atol=0.015)
    four_times = [np.repeat(values, 4) for values in (label, score, np.arange(400))]
    again, low_again, high_again = shortcut.auc_interval(*four_times, 0)
    assert np.allclose([again, low_again, high_again], [auc, low, high])
    assert shortcut.auc_interval(np.ones(3, int), score[:3], np.arange(3), 0) == (None, None, None)


def test_a_source_of_one_label_is_held_against_all_images_of_the_other(confounded, tmp_path, quick):
    rows = pd.read_csv(confounded, dtype=str, keep_default_na=False)
    rows["source"] = ["g1"] * 20 + ["g2"] * 20 + ["camera"] * 40
    rows.to_csv(confounded, index=False)
    sources = run([confounded], tmp_path / "out")[1]["baseline"]["sources"]
    assert [(one["source"], one["against"]) for one in sources] == [
        ("camera", "all AI"),
        ("g1", "all real"),
        ("g2", "all real"),
    ]
    assert all(one["auc"] > 0.95 for one in sources)


def test_images_of_one_label_leave_the_baseline_undefined(clean, tmp_path, quick, capsys):
    rows = pd.read_csv(clean, dtype=str, keep_default_na=False)
    rows["label"] = "1"
    rows.to_csv(clean, index=False)
    status, found = run([clean], tmp_path / "out")
    assert status == 0 and found["baseline"]["auc"] is None
    assert "it needs real and AI-generated images" in capsys.readouterr().out


def test_a_file_tells_its_container_tables_and_blocks(tmp_path):
    picture = Image.fromarray(smooth_picture(1))
    exif = Image.Exif()
    exif[271] = "camera"
    options = {"quality": 83, "subsampling": 1, "progressive": True, "exif": exif, "icc_profile": b"x" * 200}
    picture.save(tmp_path / "a.jpg", **options)
    facts = audit_features.measure(str(tmp_path / "a.jpg"))
    assert (facts.container, facts.width, facts.height, facts.mode) == ("JPEG", 88, 72, "RGB")
    assert (facts.chroma, facts.progressive, facts.exif, facts.icc) == ("4:2:2", "yes", "yes", "yes")
    assert facts.bytes == (tmp_path / "a.jpg").stat().st_size and facts.suspicions == ()
    Image.fromarray(np.arange(72 * 88, dtype=np.uint16).reshape(72, 88) * 9).save(tmp_path / "b.png")
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.write(tmp_path / "b.png", "b.png")
    deep = audit_features.measure(f"{tmp_path}/z.zip::b.png")
    assert (deep.container, deep.bit_depth, deep.chroma, deep.exif) == ("PNG", "16", "", "no")
    assert np.isnan(deep.jpeg_quality) and deep.jpeg_tables == "" and deep.fault == ""
    table = audit_features.feature_table([facts, deep, audit_features.FileFacts(fault="broken")])
    assert set(audit_features.FEATURES) <= set(table)
    assert table["bytes_per_pixel"][0] == facts.bytes / (88 * 72) and np.isnan(table["aspect"][2])


def test_the_estimated_quality_is_that_of_the_encoder(tmp_path):
    tables = set()
    for quality in range(3, 101):
        data = io.BytesIO()
        Image.fromarray(smooth_picture(1, 16, 16)).save(data, "JPEG", quality=quality)
        with Image.open(data) as image:
            assert audit_features.quality_of_tables(image.quantization) == quality
            tables.add(str(image.quantization))
    assert len(tables) == 98


def test_rare_categories_share_a_number():
    column = pd.Series(["b"] * 3 + ["a"] * 3 + ["c"] * 2 + ["d", "e"])
    assert audit_features.codes(column, limit=3).tolist() == [1] * 3 + [0] * 3 + [2] * 2 + [3, 3]


def test_what_a_person_should_look_at_is_listed(tmp_path):
    picture = Image.fromarray(smooth_picture(1))
    picture.save(tmp_path / "a.jpg", "PNG")
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    picture.resize((300, 64)).save(tmp_path / "long.png")
    picture.resize((63, 90)).save(tmp_path / "small.webp")
    Image.new("RGB", (80, 80), "red").save(tmp_path / "flat.png")
    frames = [Image.fromarray(smooth_picture(seed)) for seed in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    picture.save(tmp_path / "good.jpeg")
    found = {path.name: audit_features.measure(str(path)).suspicions for path in sorted(tmp_path.iterdir())}
    assert found == {
        "a.jpg": (".jpg that is PNG",),
        "cmyk.jpg": ("CMYK",),
        "flat.png": ("flat",),
        "good.jpeg": (),
        "long.png": ("longer than 4:1",),
        "moving.gif": ("animated",),
        "small.webp": ("shorter side below 64 px",),
    }


def test_unreadable_images_are_listed_and_the_status_says_so(clean, tmp_path, quick):
    (tmp_path / "0.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[:200])
    (tmp_path / "7.jpg").unlink()
    status, found = run([clean], tmp_path / "out")
    assert status == 1 and [one["name"] for one in found["unreadable"]] == ["0.jpg", "7.jpg"]
    assert found["images"] == {"audited": 120, "unreadable": 2, "rows": 120}
    assert found["baseline"]["images"] == 118


def test_no_readable_image_at_all_still_ends_in_a_report(clean, tmp_path):
    for path in tmp_path.glob("*.jpg"):
        path.unlink()
    status, found = run([clean], tmp_path / "out")
    assert status == 1 and found["baseline"]["auc"] is None and found["images"]["unreadable"] == 120
    assert (tmp_path / "out" / "audit.png").is_file()


def test_twins_across_manifests_and_hold_out_are_found(tmp_path, quick, capsys):
    images = [save(tmp_path / f"{seed}.jpg", seed) for seed in range(6)]
    again = save(tmp_path / "again.png", 2)
    equal = tmp_path / "equal.jpg"
    equal.write_bytes((tmp_path / "4.jpg").read_bytes())
    flat = [tmp_path / "flat1.png", tmp_path / "flat2.png"]
    for path in flat:
        Image.new("RGB", (80, 80), "red").save(path)
    one = write_set(tmp_path / "all.csv", [*images, str(flat[0])], label=[0, 1, 0, 1, 0, 1, 0])
    two = write_set(tmp_path / "all.holdout.csv", [again, str(equal), str(flat[1])], label=[0, 1, 0])
    leaks = run([one, two], tmp_path / "out")[1]["near_duplicates"]
    assert [leaks[key] for key in ("pairs", "across_manifests", "across_holdout")] == [3, 3, 3]
    assert (leaks["two_labels"], leaks["equal_bytes_two_labels"]) == (1, 1)
    listed = [
        (pair["first"], pair["second"], pair["equal_bytes"], pair["two_labels"]) for pair in leaks["listed"]
    ]
    assert listed[0] == ("4.jpg", "equal.jpg", True, True)
    assert set(listed[1:]) == {("2.jpg", "again.png", False, False), ("flat1.png", "flat2.png", True, False)}
    assert (
        "3 pairs look alike: 3 across manifests, 3 across a hold-out, 1 with two labels"
        in capsys.readouterr().out
    )


def test_the_column_split_or_the_manifests_name_tells_what_is_held_out():
    held = ["holdout.csv", "a/all.holdout.csv", "val.csv", "val_hard.csv", "public_test.csv", "held-out.csv"]
    seen = ["train.csv", "evaluation_of_valves.csv", "latest.csv", "contest.csv", "test/train.csv"]
    assert all(audit_leaks.is_held_out(name, "") for name in held)
    assert not any(audit_leaks.is_held_out(name, "") for name in seen)
    assert audit_leaks.is_held_out("train.csv", "val") and not audit_leaks.is_held_out("val.csv", "train")


def test_a_limit_takes_its_share_of_every_source_and_label():
    rows = make_manifest(
        {
            "image": [f"/{place}" for place in range(1000)],
            "name": [str(place) for place in range(1000)],
            "label": [int(place % 10 < 3) for place in range(1000)],
            "source": ["large" if place < 800 else "small" for place in range(1000)],
        }
    ).assign(manifest="m.csv", split="")
    found = audit.sample(rows, 100, 0)
    assert found.groupby(["source", "label"]).size().tolist() == [56, 24, 14, 6]
    shuffled = rows.iloc[::-1].reset_index(drop=True)
    assert set(audit.sample(shuffled, 100, 0)["name"]) == set(found["name"])
    assert set(audit.sample(rows, 100, 1)["name"]) != set(found["name"])
    assert len(audit.sample(rows, 5000, 0)) == 1000


def test_the_same_command_writes_the_same_bytes_with_any_number_of_workers(
    clean, tmp_path, few_trees, monkeypatch
):
    monkeypatch.setattr("data_prep.writing.parallel._ITEMS_PER_TASK", 8)
    for folder, workers in (("a", "1"), ("b", "2")):
        audit.main([clean, "--out", str(tmp_path / folder), "--workers", workers])
    for name in ("audit.json", "audit.md", "audit.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_an_audit_replaces_an_audit_and_nothing_else(clean, tmp_path, quick):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for damage in (lambda: None, lambda: (out / "audit.json").write_text("[]")):
        damage()
        with pytest.raises(UserError, match=r"already exists and was not written|must hold a JSON object"):
            run([clean], out)
    (out / "audit.json").write_text('{"of": "something else"}')
    with pytest.raises(UserError, match="already exists and was not written by this command; choose"):
        run([clean], out)
    with pytest.raises(UserError, match="already exists and was not written by this command"):
        run([clean], out / "thesis.txt")
    assert [path.name for path in out.iterdir()] == ["thesis.txt", "audit.json"]
    first = run([clean], tmp_path / "new")
    assert run([clean], tmp_path / "new") == first and first[0] == 0


def test_a_source_with_dollar_signs_is_drawn_as_it_is(clean, tmp_path, few_trees):
    source = ["$a_$", "$a_$", "b\\$^{", "b\\$^{"] * 30
    write_manifest(read_manifest(clean).assign(source=source), Path(clean))
    status, found = run([clean], tmp_path / "out")
    assert status == 0 and (tmp_path / "out" / "audit.png").stat().st_size > 10_000
    assert [row["source"] for row in found["sources"]] == ["$a_$", "b\\$^{"]


def test_a_name_cannot_break_a_table():
    text = audit_page.table([{"name": "a|b\nc", "flag": True, "auc": 0.5}], ("name", "flag", "auc"))
    assert text.splitlines()[2] == "| a\\|b c |  yes | 0.5000 |" and len(text.splitlines()) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--near-duplicates", "-1"], "argument --near-duplicates: must be from 0 to 10"),
        (["--limit", "0"], "argument --limit: must be 1 or more"),
        (["--seed", "-1"], "argument --seed: must be 0 or more"),
        (["--workers", "0"], "argument --workers: must be from 1 to 256"),
    ],
)
def test_a_flag_that_makes_no_sense_is_an_error(clean, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        audit.main([clean, "--out", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_a_png_with_more_text_than_pillow_accepts_is_measured(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 2_000_000, zip=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png", pnginfo=info)
    facts = audit_features.measure(str(tmp_path / "a.png"))
    assert facts.fault == "" and facts.container == "PNG"
