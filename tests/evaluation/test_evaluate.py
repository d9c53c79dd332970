"""`evaluate.py` from files to tables: matching of names, official metrics, label files of every kind."""

import json

import numpy as np
import pytest
from audit_folders import write_audit
from sklearn.metrics import roc_auc_score

import evaluate
from featdistill.command_line import UserError
from featdistill.evaluation import leaderboard
from featdistill.evaluation.intervals import auc_interval
from featdistill.evaluation.metrics import best_threshold
from featdistill.records.manifest import make_manifest, write_manifest
from featdistill.records.predictions import manifest_entry, write_predictions

ROWS = 40


class Split:
    """A made-up split: predictions of two experts, its labels as a manifest and as an official file."""

    def __init__(self, folder, name, seed=0):
        rng = np.random.default_rng(seed)
        self.folder, self.name = folder, name
        self.names = [f"{seed:x}{number:019x}.jpg" for number in range(ROWS)]
        self.label = rng.permutation(np.arange(ROWS) % 2)
        self.is_distorted = np.arange(ROWS) % 4 // 2
        self.score = np.round(0.4 * self.label + 0.6 * rng.random(ROWS), 3)
        pool = np.array(["jpeg", "downscale", "gausblur"])
        self.chains = [
            rng.permutation(pool)[: rng.integers(1, 4)].tolist() if state else []
            for state in self.is_distorted
        ]
        self.generator = [
            "" if not ai else ("flux", "sdxl")[row % 3 == 0] for row, ai in enumerate(self.label)
        ]
        self.path, self.manifest = folder / f"{name}.csv", folder / f"{name}_manifest.csv"
        self.write_manifest()
        self.write_predictions()

    def write_manifest(self, **changes):
        columns = {
            "image": self.names,
            "name": self.names,
            "label": self.label.tolist(),
            "generator": self.generator,
            "is_distorted": self.is_distorted.tolist(),
            "distortions": [json.dumps([[name, 2.0] for name in chain]) for chain in self.chains],
        }
        write_manifest(make_manifest({**columns, **changes}), self.manifest)

    def write_predictions(self, keep=slice(None), errors=()):
        names = np.array(self.names, dtype=object)[keep].tolist()
        experts = {"clip": self.score[keep] ** 2, "dino": np.roll(self.score, 1)[keep]}
        sidecar = {"manifest": manifest_entry(self.manifest, self.path)}
        write_predictions(self.path, names, self.score[keep], experts, sidecar, errors)

    def official_labels(self, mark="", index=False, extension=True, columns=5):
        header = ["image_name", "label", "distortions", "distortion_scales", "is_distorted"][:columns]
        lines = [([""] if index else []) + header]
        for row, name in enumerate(self.names):
            chain = self.chains[row]
            cells = [
                name if extension else name.removesuffix(".jpg"),
                str(self.label[row]),
                f'"{chain}"' if chain else ("", "[]")[row % 2],
                f'"{[2] * len(chain)}"' if chain else "",
                str(self.is_distorted[row]),
            ][:columns]
            lines.append(([str(row)] if index else []) + cells)
        path = self.folder / f"{self.name}_labels.csv"
        path.write_bytes((mark + "\r\n".join(",".join(line) for line in lines) + "\r\n").encode())
        return path

    def auc(self, rows):
        return roc_auc_score(self.label[rows], self.score[rows])


@pytest.fixture
def val(tmp_path):
    return Split(tmp_path, "val")


@pytest.fixture
def val_hard(tmp_path):
    return Split(tmp_path, "val_hard", seed=1)


def run(out, *splits, labels=(), more=("--no-report",)):
    flags = [*(["--labels", *map(str, labels)] if labels else []), *more]
    paths = [str(split.path) for split in splits]
    assert evaluate.main(["--predictions", *paths, *flags, "--out", str(out)]) == 0
    return json.loads((out / "metrics.json").read_text())


def test_the_challenges_metrics_stand_at_the_top_by_their_names(tmp_path, val, val_hard):
    found = run(tmp_path / "out", val, val_hard)
    assert list(found)[:5] == ["clean_auc", "robust_auc", "clean_hard_auc", "robust_hard_auc", "splits"]
    assert found["clean_auc"] == val.auc(val.is_distorted == 0)
    assert found["robust_auc"] == val.auc(val.is_distorted == 1)
    assert found["clean_hard_auc"] == val_hard.auc(val_hard.is_distorted == 0)
    assert found["robust_hard_auc"] == val_hard.auc(val_hard.is_distorted == 1)


def test_all_else_is_nested_by_split(tmp_path, val):
    found = run(tmp_path / "out", val)["splits"]["val"]
    assert found["images"] == ROWS and found["undefined"] == {}
    assert set(found["experts"]["experts"]) == {"clip", "dino"}
    # A monotone function of the score has the score's ranks.
    assert found["experts"]["experts"]["clip"] == found["experts"]["ensemble"]
    own = np.array([name == "flux" for name in val.generator])
    part = found["generators"]["flux"]
    assert (part["auc"], part["n"]) == (val.auc(own | (val.label == 0)), int(own.sum()))
    rows = np.array(["jpeg" in chain for chain in val.chains])
    part = found["distortions"]["jpeg"]
    assert (part["auc"], part["n"]) == (val.auc(rows), int(rows.sum()))
    part = found["chain_lengths"]["0"]
    assert (part["auc"], part["n"]) == (val.auc(val.is_distorted == 0), ROWS // 2)
    assert sum(group["n"] for group in found["chain_lengths"].values()) == ROWS


def test_repetition_gives_the_same_bytes(tmp_path, val, val_hard):
    for out in ("a", "b"):
        run(tmp_path / out, val, val_hard, more=())
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files == {"metrics.json", "metrics.csv", "metrics.md", "report.html"}
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_every_auc_has_an_interval(tmp_path, val):
    found = run(tmp_path / "out", val)
    split = found["splits"]["val"]
    assert found["intervals"] == {"method": "DeLong", "confidence": 0.95}
    rows = val.is_distorted == 1
    expected = list(auc_interval(val.label[rows], val.score[rows])[1:])
    assert split["intervals"]["robust_auc"] == expected
    assert split["experts"]["ensemble"]["intervals"]["robust_auc"] == expected
    assert all(low <= high for low, high in split["intervals"].values())
    assert set(split["intervals"]) == {"clean_auc", "robust_auc", "auc"}
    for part in ("generators", "distortions", "levels", "chain_lengths"):
        for row in split[part].values():
            assert min(row["real"], row["ai"]) < 2 or row["low"] <= row["auc"] <= row["high"]


def test_what_is_printed_is_the_beginning_of_what_is_written(tmp_path, val, capsys):
    run(tmp_path / "out", val)
    shown, text = capsys.readouterr().out, (tmp_path / "out" / "metrics.md").read_text()
    assert text.startswith(f"# Metrics\n\n{shown}")
    assert f"{val.auc(val.is_distorted == 1):.4f}" in shown.splitlines()[4]
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "## Splits",
        "## Metrics of the challenge",
        "## Experts",
        "## Generators",
        "## Distortions",
        "## Levels",
        "## Chain length",
        "## Sources",
        "## Image size",
    ]


def test_every_table_is_a_markdown_table_of_one_width(tmp_path, val, val_hard):
    val.generator = [name and f"{name} | of\na lab" for name in val.generator]
    val.write_manifest()
    val.write_predictions()
    run(tmp_path / "out", val, val_hard)
    blocks = (tmp_path / "out" / "metrics.md").read_text().strip().split("\n\n")
    found = [block.splitlines() for block in blocks if block.startswith("|")]
    assert len(found) == 8
    for lines in found:
        assert len({(len(line), line.replace("\\|", "").count("|")) for line in lines}) == 1


def test_a_line_of_the_csv_holds_one_metric(tmp_path, val, read_rows):
    found = run(tmp_path / "out", val)["splits"]["val"]
    rows = read_rows(tmp_path / "out" / "metrics.csv")
    assert list(rows) == ["split", "metric", "value", "low", "high", "n"]
    assert not rows.duplicated(["split", "metric"]).any()
    rows = rows.set_index("metric")
    assert float(rows.loc["robust_auc", "value"]) == found["robust_auc"]
    assert float(rows.loc["robust_auc", "low"]) == found["intervals"]["robust_auc"][0]
    assert int(rows.loc["robust_auc", "n"]) == ROWS // 2 and rows.loc["eer", "low"] == ""
    flux = found["generators"]["flux"]
    assert float(rows.loc["generators/flux/auc", "high"]) == flux["high"]
    assert int(rows.loc["generators/flux/auc", "n"]) == flux["real"] + flux["ai"]
    jpeg = found["distortion_levels"].get("jpeg", {})
    assert all(f"distortion_levels/jpeg/{level}/auc" in rows.index for level in jpeg)


def test_a_split_without_generators_has_no_row_in_their_table(tmp_path, val, val_hard):
    val_hard.write_manifest(generator=[""] * ROWS)
    val_hard.write_predictions()
    run(tmp_path / "out", val, val_hard)
    text = (tmp_path / "out" / "metrics.md").read_text()
    table = text.split("## Generators\n\n")[1].split("## Distortions")[0]
    assert "| val |" in table.replace("  ", "") and "val_hard" not in table


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("extension", [False, True])
def test_official_label_files_give_what_the_manifest_gives(tmp_path, val, mark, index, extension):
    from_manifest = run(tmp_path / "a", val)["splits"]["val"]
    official = val.official_labels(mark, index, extension)
    from_labels = run(tmp_path / "b", val, labels=[official])["splits"]["val"]
    assert from_labels.pop("generators") == {}
    from_manifest.pop("generators")
    assert from_labels == from_manifest


def test_training_labels_know_no_distortions(tmp_path, val, capsys):
    found = run(tmp_path / "out", val, labels=[val.official_labels(index=True, columns=2)])
    assert found["clean_auc"] is None and found["robust_auc"] is None
    assert found["splits"]["val"]["auc"] == val.auc(val.label >= 0)
    shown = capsys.readouterr().out
    assert "- val: clean auc, robust auc n/a: the labels do not say which images are distorted" in shown
    assert "n/a" in shown.splitlines()[4] and "0.5000 [" not in shown


@pytest.mark.parametrize(("score_column", "extension"), [("score", True), ("pred", False)])
def test_a_submission_of_either_convention_can_be_evaluated(tmp_path, val, score_column, extension):
    direct = run(tmp_path / "a", val)
    names = val.names if extension else [name.removesuffix(".jpg") for name in val.names]
    rows = [f"{name},{score}" for name, score in zip(names, val.score.tolist(), strict=True)]
    val.path.write_text("\n".join([f"image_name,{score_column}", *rows[::-1]]) + "\n")
    (tmp_path / "val.csv.json").unlink()
    found = run(tmp_path / "b", val, labels=[val.manifest])
    assert found["robust_auc"] == direct["robust_auc"]
    assert found["splits"]["val"]["generators"] == direct["splits"]["val"]["generators"]
    assert "no columns of single experts" in (tmp_path / "b" / "metrics.md").read_text()


def test_label_files_go_with_predictions_in_their_order(tmp_path, val, val_hard):
    expected = run(tmp_path / "a", val, val_hard)
    labels = [val.official_labels(), val_hard.official_labels()]
    found = run(tmp_path / "b", val, val_hard, labels=labels)
    assert found["robust_hard_auc"] == expected["robust_hard_auc"]
    with pytest.raises(UserError, match="are not in"):
        run(tmp_path / "c", val, val_hard, labels=labels[::-1])


def test_one_label_file_may_hold_several_splits(tmp_path, val, val_hard):
    expected = run(tmp_path / "a", val, val_hard)
    first, second = val.official_labels().read_text(), val_hard.official_labels().read_text()
    both = tmp_path / "both.csv"
    both.write_text(first + "".join(second.splitlines(True)[1:]))
    assert run(tmp_path / "b", val, val_hard, labels=[both])["robust_auc"] == expected["robust_auc"]
    with pytest.raises(UserError, match=r"without a prediction \(40\)"):
        run(tmp_path / "c", val, labels=[both])


def test_a_shared_label_file_does_not_hide_rows_that_one_of_two_models_lacks(tmp_path, val):
    other = Split(tmp_path, "other")
    other.write_predictions(keep=np.arange(ROWS) != 5)
    with pytest.raises(UserError, match=rf"other\.csv: images .* without a prediction \(1\): {val.names[5]}"):
        run(tmp_path / "out", val, other, labels=[val.manifest])


def test_predictions_and_labels_must_name_the_same_images(tmp_path, val):
    val.write_predictions(keep=np.arange(ROWS) >= 7)
    with pytest.raises(UserError, match=rf"without a prediction \(7\): {val.names[0]}.* and 2 more"):
        run(tmp_path / "out", val)
    val.write_predictions()
    labels = val.official_labels()
    labels.write_text("".join(labels.read_text().splitlines(True)[:-6]))
    with pytest.raises(UserError, match=rf"names that are not in .* \(6\): {val.names[-6]}.* and 1 more"):
        run(tmp_path / "out", val, labels=[labels])
    assert not (tmp_path / "out").exists()


def test_unreadable_images_are_counted_and_left_out(tmp_path, val, capsys):
    keep = ~np.isin(np.arange(ROWS), (3, 8))
    val.write_predictions(keep, errors=[(val.names[3], "truncated"), (val.names[8], "empty")])
    found = run(tmp_path / "out", val)
    assert found["robust_auc"] == val.auc(keep & (val.is_distorted == 1))
    assert found["splits"]["val"]["images"] == ROWS - 2 and found["splits"]["val"]["unreadable"] == 2
    assert "- val: unreadable images, left out: 2" in capsys.readouterr().out
    val.write_predictions(keep, errors=[(val.names[3], "truncated")])
    with pytest.raises(UserError, match=rf"without a prediction \(1\): {val.names[8]}"):
        run(tmp_path / "out", val)


def test_rows_without_a_label_are_counted_and_a_split_without_labels_is_an_error(tmp_path, val):
    val.write_manifest(label=[None, None, *val.label[2:].tolist()])
    val.write_predictions()
    found = run(tmp_path / "out", val)["splits"]["val"]
    assert found["unlabeled"] == 2 and found["images"] == ROWS - 2
    val.write_manifest(label=[None] * ROWS)
    val.write_predictions()
    with pytest.raises(UserError, match="no split has labels: val"):
        run(tmp_path / "out", val)


def test_a_split_without_labels_is_left_out_where_another_has_them(tmp_path, val, capsys):
    hard = Split(tmp_path, "val_hard", seed=3)
    hard.write_manifest(label=[None] * ROWS)
    hard.write_predictions()
    found = run(tmp_path / "out", val, hard)
    assert list(found["splits"]) == ["val"] and "val_hard is left out" in capsys.readouterr().out


def test_one_class_is_shown_as_n_a_with_the_reason(tmp_path, val, capsys):
    val.write_manifest(label=[1] * ROWS)
    val.write_predictions()
    assert run(tmp_path / "out", val)["robust_auc"] is None
    shown = capsys.readouterr().out
    assert "n/a: all distorted images are AI-generated" in shown
    assert "0.5000" not in shown


def test_distorted_images_without_a_chain_have_no_chain_length(tmp_path, val):
    val.write_manifest(distortions=["[]"] * ROWS)
    val.write_predictions()
    assert list(run(tmp_path / "out", val)["splits"]["val"]["chain_lengths"]) == ["0"]


def test_two_splits_of_one_kind_leave_the_official_names_out(tmp_path, val, val_hard, capsys):
    others = [Split(tmp_path, name, seed) for seed, name in ((2, "public_test"), (3, "private_test"))]
    found = run(tmp_path / "out", val_hard, *others)
    assert list(found)[:3] == ["clean_hard_auc", "robust_hard_auc", "splits"]
    assert (
        "not at the top of metrics.json: several splits could provide them (public_test, private_test)"
        in capsys.readouterr().out
    )
    found = run(tmp_path / "with_val", val, val_hard, *others)
    assert found["clean_auc"] == found["splits"]["val"]["clean_auc"]
    assert found["robust_hard_auc"] == found["splits"]["val_hard"]["robust_auc"]


def test_saturated_scores_keep_their_ranks(tmp_path, val):
    expected = run(tmp_path / "a", val)
    val.score = 1 - (1 - val.score) * 1e-12
    val.write_predictions()
    assert run(tmp_path / "b", val)["robust_auc"] == expected["robust_auc"]


def test_wrong_numbers_of_files_and_equal_names_are_users_errors(tmp_path, val, val_hard):
    with pytest.raises(UserError, match="2 label files for 1 predictions"):
        run(tmp_path / "out", val, labels=[val.manifest, val_hard.manifest])
    with pytest.raises(UserError, match="two predictions files are called val"):
        run(tmp_path / "out", val, val)
    (tmp_path / "val.csv.json").unlink()
    with pytest.raises(UserError, match="use --labels"):
        run(tmp_path / "out", val)


def test_a_threshold_may_come_from_another_split_or_other_files(tmp_path, val, val_hard, capsys):
    value = best_threshold(val_hard.label, val_hard.score)
    found = run(tmp_path / "a", val, val_hard, more=["--threshold-from", "val_hard"])
    own = found["splits"]["val"]["threshold"]
    assert own["value"] == value and own["chosen_on"] == "val_hard"
    right = (val.score > value) == (val.label == 1)
    assert own["accuracy"] == right.mean() and own["ai_accuracy"] == right[val.label == 1].mean()
    shown = capsys.readouterr().out
    assert shown.count("the threshold chosen on val_hard") == 2
    assert "val_hard (the same images, so optimistic)" in shown
    for files in ([val_hard.path], [val_hard.path, val_hard.official_labels()]):
        more = ["--threshold-from", *map(str, files)]
        assert run(tmp_path / "b", val, more=more)["splits"]["val"]["threshold"]["value"] == value
    with pytest.raises(UserError, match=r"nor a split \(did you mean val_hard\?\)"):
        run(tmp_path / "c", val, val_hard, more=["--threshold-from", "val_hart"])
    val_hard.write_manifest(label=[1] * ROWS)
    val_hard.write_predictions()
    with pytest.raises(UserError, match="needs real and AI-generated images"):
        run(tmp_path / "c", val, more=["--threshold-from", str(val_hard.path)])


def test_the_pixel_free_baseline_stands_beside_the_aucs(tmp_path, val, capsys):
    val.write_manifest(source=["a", "b"] * (ROWS // 2))
    val.write_predictions()
    sources = [{"source": "a", "auc": 0.75, "low": 0.7, "high": 0.8}]
    more = ["--audit", str(write_audit(tmp_path / "audit", sources=sources, content=False))]
    found = run(tmp_path / "out", val, more=more)
    assert found["pixel_free"]["auc"] == 0.7 and found["content"] is None
    assert "content" not in found["splits"]["val"]
    rows = found["splits"]["val"]["sources"]
    assert rows["a"]["pixel_free_auc"] == 0.75 and rows["b"]["pixel_free_auc"] is None
    assert "reach AUC 0.7000 [0.6000, 0.8000] on val.csv: an AUC close to it" in capsys.readouterr().out
    assert "| files alone |" in (tmp_path / "out" / "metrics.md").read_text()
    write_audit(tmp_path / "audit", auc=0.45, content=False)
    run(tmp_path / "out", val, more=more)
    shown = capsys.readouterr().out + (tmp_path / "out" / "report.html").read_text()
    assert "on val.csv: no better than guessing" in shown and "close to it" not in shown
    (tmp_path / "audit" / "audit.json").write_text("[]")
    with pytest.raises(UserError, match="must hold a JSON object"):
        run(tmp_path / "out", val, more=more)
    with pytest.raises(UserError, match=r"has no audit\.json"):
        run(tmp_path / "out", val, more=["--audit", str(tmp_path)])


def test_only_the_challenges_own_test_split_is_set_beside_the_published_results(
    tmp_path, val, monkeypatch, capsys
):
    test = Split(tmp_path, "public_test", seed=4)
    assert run(tmp_path / "a", val, test)["leaderboard"] is None
    assert "public_test: 40 images, where the challenge has 2,500" in capsys.readouterr().out
    monkeypatch.setattr(leaderboard, "TEST_IMAGES", ROWS)
    board = run(tmp_path / "b", val, test)["leaderboard"]
    robust = [row["robust_auc"] for row in board["challenge"]]
    assert robust == sorted(robust, reverse=True) and len(robust) == 8
    (own,) = [row for row in board["challenge"] if row["place"] is None]
    assert own["name"] == "this run, public_test (local)"
    assert own["robust_auc"] == test.auc(test.is_distorted == 1)
    local = [row for row in board["table_2"] if row["local"]]
    assert (
        local[0]["val_robust_auc"] == val.auc(val.is_distorted == 1) and local[0]["test_robust_auc"] is None
    )
    assert board["featdistill_robust"] == {"public_test": 0.8558}
    shown = capsys.readouterr().out
    assert "local; the other rows are the published ones, mean of public and private test" in shown
    assert "MICV" in shown and "SigLIP" in shown


def test_any_split_is_set_beside_the_published_results_when_asked(tmp_path, val, val_hard):
    more = ["--leaderboard"]
    board = run(tmp_path / "a", val, val_hard, more=more)["leaderboard"]
    assert [row["name"] for row in board["table_2"] if row["local"]] == ["this run, val (local)"]
    board = run(tmp_path / "b", val_hard, more=more)["leaderboard"]
    assert [row["name"] for row in board["challenge"] if row["place"] is None] == [
        "this run, val_hard (local)"
    ]


@pytest.fixture
def runs(tmp_path):
    """Three runs over the same images: `good`, `bad`, and `same`, which differs from `good` by a hair."""
    made = {}
    for name, weight, noise in (("good", 0.3, 0.0), ("same", 0.3, 0.03), ("bad", 0.0, 0.0)):
        (tmp_path / name).mkdir()
        split = Split(tmp_path / name, "val")
        rng = np.random.default_rng(9)
        split.score = weight * split.label + (1 - weight) * rng.random(ROWS) * 0.9
        split.score += noise * np.random.default_rng(1).random(ROWS)
        split.write_predictions()
        made[name] = split
    return made


def compare(out, *splits, more=()):
    assert evaluate.main(["compare", *(str(split.path) for split in splits), *more, "--out", str(out)]) == 0
    return json.loads((out / "comparison.json").read_text())


def test_runs_are_ranked_by_robust_auc_and_chance_is_told_from_more(tmp_path, runs, capsys):
    found = compare(tmp_path / "out", runs["bad"], runs["same"], runs["good"])
    names = [run["name"] for run in found["runs"]]
    assert set(names[:2]) == {"good/val", "same/val"} and names[2] == "bad/val"
    robust = runs["bad"].is_distorted == 1
    assert found["runs"][2]["robust_auc"] == runs["bad"].auc(robust)
    of = {(pair["first"], pair["second"], pair["metric"]): pair for pair in found["differences"]}
    assert of[names[0], "bad/val", "robust_auc"]["beyond_chance"] is True
    assert of[names[0], names[1], "robust_auc"]["beyond_chance"] is False
    for pair in found["differences"]:
        assert pair["low"] <= pair["difference"] <= pair["high"]
    # Paired: what two nearly equal runs share is not in the interval of their difference.
    pair, alone = of[names[0], names[1], "auc"], found["runs"][0]["intervals"]["auc"]
    assert 0 < pair["high"] - pair["low"] < (alone[1] - alone[0]) / 3
    assert found["images"] == ROWS and found["n"]["robust_auc"] == ROWS // 2
    shown = capsys.readouterr().out
    assert (tmp_path / "out" / "comparison.md").read_text() == shown
    assert "beyond chance" in shown and "yes" in shown


def test_a_comparison_does_not_depend_on_the_order_of_its_files(tmp_path, runs):
    compare(tmp_path / "a", runs["bad"], runs["same"], runs["good"])
    compare(tmp_path / "b", runs["good"], runs["bad"], runs["same"])
    for file in ("comparison.json", "comparison.csv", "comparison.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_runs_are_compared_over_the_images_that_all_of_them_scored(tmp_path, runs, capsys):
    keep = np.arange(ROWS) >= 6
    runs["bad"].write_predictions(keep=keep)
    found = compare(tmp_path / "out", runs["good"], runs["bad"])
    assert (found["images"], found["left_out"]) == (ROWS - 6, 6)
    good = runs["good"]
    assert found["runs"][0]["robust_auc"] == good.auc(keep & (good.is_distorted == 1))
    assert "6 that some run did not score are left out" in capsys.readouterr().out


def test_what_cannot_be_compared_is_a_users_error(tmp_path, runs, val_hard):
    out = ["--out", str(tmp_path / "out")]
    good, bad = (str(runs[name].path) for name in ("good", "bad"))
    for flags, message in (
        (["compare", good], "two predictions files or more"),
        (["compare", good, good], "named twice"),
        (["compare", good, str(val_hard.path)], "are not in"),
        (["compare", good, bad, "--labels", good, bad], f"unexpected argument {bad}"),
        (["compare", good, bad, "--leaderboard"], "unknown argument --leaderboard"),
        (["compare", good, bad, "--lables", good], r"--lables \(did you mean --labels\?\)"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.main([*flags, *out])
    assert not (tmp_path / "out").exists()


def test_a_comparison_without_a_class_has_no_difference_and_no_verdict(tmp_path, runs):
    for name in ("good", "bad"):
        runs[name].write_manifest(label=[1] * ROWS)
        runs[name].write_predictions()
    found = compare(tmp_path / "out", runs["good"], runs["bad"])
    assert {pair["difference"] for pair in found["differences"]} == {None}
    assert {pair["beyond_chance"] for pair in found["differences"]} == {None}
    assert [run["name"] for run in found["runs"]] == ["bad/val", "good/val"]


def test_the_command_lines_of_earlier_versions_are_understood():
    forms = {
        "--compare a b --labels c --out o": "compare a b --labels c --out o",
        "--out o --labels c --compare a b": "compare a b --out o --labels c",
        "--protocol=genimage --predictions a b --out o": "protocol genimage --predictions a b --out o",
        "--predictions a --protocol genimage --out o": "protocol genimage --predictions a --out o",
        "--experts a b --sweep m --seed 3 --draws 9 --out o": "sweep m --experts a b --seed 3 --out o",
        "--predictions a b --out=o --draws 0 --seed 1": "score --predictions a b --out o",
        "compare a b --out=o": "compare a b --out=o",
        "": "score",
    }
    for former, current in forms.items():
        assert evaluate.current_form(former.split()) == current.split()
        command, *arguments = current.split()
        parser, _ = evaluate.COMMANDS[command]
        if arguments:
            assert parser().parse_args(arguments).out == "o"


def test_flags_without_an_effect_and_unknown_commands_are_named(tmp_path, val, capsys):
    expected = run(tmp_path / "a", val)
    capsys.readouterr()
    assert run(tmp_path / "b", val, more=["--draws", "50", "--seed", "3"]) == expected
    assert capsys.readouterr().err.count("no longer has an effect") == 2
    with pytest.raises(UserError, match=r"unknown command 'comparee' \(did you mean compare\?\)"):
        evaluate.main(["comparee", "a", "b"])
    with pytest.raises(UserError, match="required: --predictions, --out"):
        evaluate.main([])
