"""`evaluate.py` with strata, breakdowns by any column, and the content control next to every AUC."""

import csv
import json

import numpy as np
import pytest
from audit_folders import write_audit
from report_inputs import make_split, read_page, table_rows
from sklearn.metrics import roc_auc_score

import evaluate
from featdistill.command_line import UserError
from featdistill.evaluation.stratified import auc_row, next_to
from featdistill.records.manifest import read_manifest
from featdistill.records.predictions import read_predictions

ROWS = 160


@pytest.fixture
def split(tmp_path):
    """Predictions of a split with further columns, and the arrays behind it."""
    rng = np.random.default_rng(0)
    columns = {
        "scale": [f"{scale:.4f}" for scale in rng.random(ROWS)],
        "style": rng.choice(["photo", "drawing", ""], ROWS).tolist(),
        "fold": rng.integers(0, 4, ROWS).astype(str).tolist(),
        "few": [""] * (ROWS - 1) + ["x"],
        "odd": ["1.5", "n/a"] + ["2.5"] * (ROWS - 2),
    }
    path = make_split(tmp_path, "val", ROWS, experts=("clip", "dino"), changes=columns)
    manifest, scores = read_manifest(tmp_path / "val_manifest.csv"), read_predictions(path)
    arrays = {name: manifest[name].to_numpy(dtype=int) for name in ("label", "is_distorted")}
    arrays |= {name: scores[name].to_numpy() for name in ("score", "clip", "dino")}
    arrays |= {name: manifest[name].to_numpy(dtype=object) for name in ("name", *columns)}
    return path, arrays


def run(tmp_path, *flags):
    assert evaluate.main(["--out", str(tmp_path / "out"), "--predictions", *map(str, flags)]) == 0
    return json.loads((tmp_path / "out" / "metrics.json").read_text())


def csv_of(tmp_path):
    with (tmp_path / "out" / "metrics.csv").open(newline="") as file:
        return {row["metric"]: row for row in csv.DictReader(file)}


def with_control(tmp_path, arrays, rows=slice(None)):
    control = np.round(np.random.default_rng(1).random(ROWS) + 0.3 * arrays["label"], 6)
    kept = (arrays[name][rows].tolist() for name in ("name", "label"))
    write_audit(tmp_path / "audit", *kept, control[rows].tolist())
    return control


def test_aucs_within_strata_are_next_to_the_plain_ones(tmp_path, split, capsys):
    path, own = split
    found = run(tmp_path, path, "--strata", "scale")["splits"]["val"]["within_strata"]
    assert (found["column"], found["unknown"]) == ("scale", 0)
    stratum = np.searchsorted(np.sort(own["scale"].astype(float))[31:-1:32], own["scale"].astype(float))
    for metric, rows in (
        ("auc", own["label"] >= 0),
        ("robust_auc", own["is_distorted"] == 1),
        ("clean_auc", own["is_distorted"] == 0),
    ):
        expected = auc_row(own["label"][rows], own["score"][rows], stratum[rows])
        assert {key: found[metric][key] for key in expected} == pytest.approx(expected, abs=1e-12)
        expert = auc_row(own["label"][rows], own["dino"][rows], stratum[rows])
        assert found["experts"]["dino"][metric]["auc"] == pytest.approx(expert["auc"], abs=1e-12)
    assert found["auc"]["strata"] == 5 and found["auc"]["images"] == ROWS
    shown = capsys.readouterr().out
    assert "## Within strata of scale" in shown and f"{found['auc']['auc']:.4f} [" in shown
    row = csv_of(tmp_path)["within_strata/scale/experts/clip/auc"]
    assert float(row["value"]) == found["experts"]["clip"]["auc"]["auc"]
    rows = table_rows(read_page(tmp_path / "out" / "report.html"), "All metrics of the split")
    assert rows[2][0] == "Robust AUC within strata"
    assert rows[2][1].startswith(f"{found['robust_auc']['auc']:.4f}") and "alike in scale" in rows[2][3]


def test_images_without_a_value_are_in_no_stratum_and_counted(tmp_path, split, capsys):
    path, own = split
    found = run(tmp_path, path, "--strata", "style")["splits"]["val"]["within_strata"]
    unknown = int((own["style"] == "").sum())
    assert found["unknown"] == unknown and found["auc"]["images"] == ROWS - unknown
    assert f"- val: images without style, in no stratum: {unknown}" in capsys.readouterr().out


def test_a_breakdown_by_any_column_has_a_table_and_a_chart(tmp_path, split, capsys):
    path, own = split
    found = run(tmp_path, path, "--by", "scale", "style", "fold")["splits"]["val"]["by"]
    assert list(found) == ["scale", "style", "fold"] and list(found["fold"]) == ["0", "1", "2", "3"]
    assert set(found["style"]) == {"drawing", "photo"} and len(found["scale"]) == 5
    assert [row["real"] + row["ai"] for row in found["scale"].values()] == [32] * 5
    lowest = [float(name.split(" to ")[0]) for name in found["scale"]]
    assert lowest == sorted(lowest)
    rows = own["fold"] == "2"
    assert found["fold"]["2"]["auc"] == roc_auc_score(own["label"][rows], own["score"][rows])
    shown = capsys.readouterr().out
    assert "## By style" in shown and shown.strip() in (tmp_path / "out" / "metrics.md").read_text()
    assert float(csv_of(tmp_path)["by/fold/2/auc"]["value"]) == found["fold"]["2"]["auc"]
    page = read_page(tmp_path / "out" / "report.html")
    assert [row[0] for row in table_rows(page, "AUC by fold")[1:]] == ["0", "1", "2", "3"]
    assert {"AUC by scale", "AUC by style"} <= {node.text() for node in page.all("title")}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--by", "scales"], r"no column 'scales' in .*val_manifest\.csv \(did you mean scale\?\)"),
        (["--strata", "odd"], r"column odd of .*val_manifest\.csv.*: 'n/a' is not a number"),
        (["--strata", "few"], "--strata few: no stratum of val holds real and AI-generated images"),
        (["--strata", "name"], "--strata name: no stratum of val holds"),
        (["--strata", "licence"], r"column licence of .*: all cells are empty"),
    ],
)
def test_a_column_that_cannot_be_used_is_one_line(tmp_path, split, flags, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, split[0], *flags)
    assert not (tmp_path / "out").exists()


def test_a_column_with_a_value_for_each_image_is_too_long_a_table(tmp_path, monkeypatch, split):
    monkeypatch.setattr("featdistill.evaluation.breakdowns._MAX_STRATA", 100)
    with pytest.raises(UserError, match="--by name: 160 different values are too many for a table"):
        run(tmp_path, split[0], "--by", "name")


def test_the_content_control_is_next_to_every_auc_on_the_same_images(tmp_path, split, capsys):
    path, own = split
    control = with_control(tmp_path, own)
    flags = ["--audit", tmp_path / "audit", "--strata", "scale", "--by", "fold"]
    result = run(tmp_path, path, *flags)
    found = result["splits"]["val"]
    assert result["content"]["side"] == 28
    label, rows = own["label"], own["is_distorted"] == 1
    robust = next_to(label[rows], own["score"][rows], control[rows])
    assert found["content"]["robust_auc"] == pytest.approx(robust, abs=1e-12)
    assert robust["exceeds"] == found["robust_auc"] - roc_auc_score(label[rows], control[rows])
    expert = next_to(label[rows], own["dino"][rows], control[rows])
    assert found["experts"]["experts"]["dino"]["content"]["robust_auc"] == pytest.approx(expert, abs=1e-12)
    made_by = next(iter(found["generators"]))
    names = read_manifest(tmp_path / "val_manifest.csv")["generator"].to_numpy(dtype=object)
    rows = (names == made_by) | (label == 0)
    expected = next_to(label[rows], own["score"][rows], control[rows])
    assert found["generators"][made_by]["content"] == pytest.approx(expected, abs=1e-12)
    tables = (found["distortions"], found["levels"], found["chain_lengths"], found["by"]["fold"])
    assert all("content" in row for table in tables for row in table.values())
    within = found["within_strata"]["auc"]
    assert within["content"]["exceeds"] == pytest.approx(within["auc"] - within["content"]["auc"])
    shown = capsys.readouterr().out
    assert "reduced to 28 px and enlarged again" in shown
    assert f"{robust['auc']:.4f} [{robust['low']:.4f}, {robust['high']:.4f}]" in shown
    assert f"{robust['exceeds']:+.4f} [{robust['exceeds_low']:+.4f}, " in shown
    rows = csv_of(tmp_path)
    assert float(rows["robust_auc/exceeds_content"]["low"]) == found["content"]["robust_auc"]["exceeds_low"]
    for name in (
        f"generators/{made_by}/auc",
        "experts/clip/clean_auc",
        "within_strata/scale/auc",
        "by/fold/0/auc",
    ):
        assert f"{name}/content" in rows and f"{name}/exceeds_content" in rows
    page = read_page(tmp_path / "out" / "report.html")
    row = table_rows(page, "AUCs, content control, and what exceeds it")[1]
    assert row[:2] == ["val", "Robust AUC"] and row[3].startswith(f"{robust['auc']:.4f}")
    assert row[4].startswith(f"{robust['exceeds']:+.4f}")
    assert table_rows(page, "AUC by generator")[0][3:5] == ["content control", "exceeds it by"]
    assert table_rows(page, "AUC by expert")[-1][0] == "content control"
    assert len(page.all("path", class_="control")) == len(found["generators"]) + 4 + len(
        found["chain_lengths"]
    )


def test_an_auc_that_is_not_defined_has_no_control(tmp_path, split):
    own = split[1]
    with_control(tmp_path, own)
    flags = ["--audit", tmp_path / "audit"]
    undistorted = make_split(
        tmp_path, "val", ROWS, experts=("clip", "dino"), changes={"is_distorted": [0] * ROWS}
    )
    assert run(tmp_path, undistorted, *flags)["splits"]["val"]["content"]["robust_auc"]["auc"] is None
    page = read_page(tmp_path / "out" / "report.html")
    rows = table_rows(page, "AUCs, content control, and what exceeds it")
    assert [row[1] for row in rows[1:]] == ["Clean AUC", "AUC"]
    metrics = table_rows(page, "All metrics of the split")
    assert len({len(row) for row in metrics}) == 1 and "n/a: no distorted images" in metrics[1]
    text = (tmp_path / "out" / "metrics.md").read_text().split("## Content control")[1].split("## ")[0]
    assert "clean AUC" in text and "robust" not in text


def test_a_control_of_some_images_is_compared_on_these(tmp_path, split, capsys):
    path, own = split
    control = with_control(tmp_path, own, slice(40, None))
    found = run(tmp_path, path, "--audit", tmp_path / "audit")["splits"]["val"]["content"]["auc"]
    expected = next_to(own["label"][40:], own["score"][40:], control[40:])
    assert found == pytest.approx(expected, abs=1e-12) and found["images"] == ROWS - 40
    assert "- val: the content control has 120 of 160 images" in capsys.readouterr().out
    assert "are over 120 of them" in (tmp_path / "out" / "report.html").read_text()


def test_a_split_without_images_in_the_audit_has_no_control(tmp_path, split, caplog):
    path, own = split
    with_control(tmp_path, own)
    other = make_split(tmp_path, "other", 40, seed=1, experts=("clip", "dino"))
    result = run(tmp_path, path, other, "--audit", tmp_path / "audit")["splits"]
    assert "content" in result["val"] and "content" not in result["other"]
    assert "other: the content control of the audit has none of its images" in caplog.text


def test_a_control_of_other_images_is_one_line(tmp_path, split):
    path, own = split
    flags = ["--audit", tmp_path / "audit"]
    with_control(tmp_path, own)
    content = tmp_path / "audit" / "content.csv"
    good = content.read_text()
    lines = good.splitlines(keepends=True)
    name, label, score = lines[1].split(",")
    for text, message in (
        (good + lines[1], "names of several images"),
        (
            good.replace(lines[1], f"{name},{1 - int(label)},{score}"),
            "labels are not those of the predictions",
        ),
        (good.replace(lines[1], f"{name},2,{score}"), "label must be 0, 1 or empty"),
        (good.replace("name,label", "name,class"), "must have the columns name,label,score"),
        (lines[0] + "other.jpg,0,0.5\n", "has none of the images; audit the manifest"),
    ):
        content.write_text(text)
        with pytest.raises(UserError, match=message):
            run(tmp_path, path, *flags)
    content.write_text(good.replace(lines[1], f"{name},,{score}"))
    assert run(tmp_path, path, *flags)["splits"]["val"]["content"]["auc"]["images"] == ROWS
    content.unlink()
    with pytest.raises(
        UserError, match=r"content\.csv.* does not exist; run data_prep\.audit with --content"
    ):
        run(tmp_path, path, *flags)


def test_runs_are_compared_within_strata_too(tmp_path, split):
    path, own = split
    other = tmp_path / "other.csv"
    rows = zip(own["name"], own["clip"].tolist(), strict=True)
    other.write_text("name,score\n" + "".join(f"{name},{score}\n" for name, score in rows))
    flags = ["--labels", str(tmp_path / "val_manifest.csv"), "--strata", "scale"]
    assert evaluate.main(["compare", str(path), str(other), *flags, "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["strata"] == "scale"
    stratum = np.searchsorted(np.sort(own["scale"].astype(float))[31:-1:32], own["scale"].astype(float))
    expected = next_to(own["label"], own["score"], own["clip"], stratum)
    pair = next(pair for pair in found["differences"] if pair["metric"] == "auc_within_strata")
    sign = 1 if pair["first"] == "val" else -1
    assert pair["difference"] == pytest.approx(sign * expected["exceeds"], abs=1e-12)
    assert sorted(np.abs([pair["low"], pair["high"]])) == pytest.approx(
        sorted(np.abs([expected["exceeds_low"], expected["exceeds_high"]])), abs=1e-12
    )
    assert "AUC within scale" in (tmp_path / "out" / "comparison.md").read_text()
    with pytest.raises(UserError, match="--strata few: no stratum holds"):
        evaluate.main(["compare", str(path), str(other), *flags[:-1], "few", "--out", str(tmp_path / "b")])
