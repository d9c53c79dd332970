"""The gate: a planted drop is found, equal runs pass, and other images are refused."""

import json

import numpy as np
import pytest
from scipy.special import expit

import evaluate
from featdistill.command_line import UserError
from featdistill.evaluation import gate
from featdistill.evaluation.intervals import auc_covariance, placements
from featdistill.evaluation.splits import load_splits
from featdistill.records.manifest import make_manifest, write_manifest
from featdistill.records.predictions import manifest_entry, write_predictions

CATEGORIES = [f"category_{number}" for number in range(3)]


class Runs:
    """Runs over 3 categories of 300 images each."""

    def __init__(self, folder, seed=0):
        rng = np.random.default_rng(seed)
        self.folder, self.rng = folder, rng
        self.names = [f"{number:05d}.jpg" for number in range(900)]
        self.label = np.arange(900) % 2
        self.category = np.repeat(CATEGORIES, 300)
        self.manifest = folder / "labels.csv"
        self.image = rng.normal(3 * self.label, 1.5)
        self.write_manifest()

    def write_manifest(self):
        columns = {"image": self.names, "name": self.names, "label": self.label.tolist()}
        write_manifest(make_manifest(columns | {"kind": self.category.tolist()}), self.manifest)

    def write(self, folder, drop=0.0, keep=slice(None)):
        """Write predictions of a run; `drop` is the noise that it has more in one category."""
        noise = np.where(self.category == CATEGORIES[2], drop, 0)
        logit = self.image + self.rng.normal(0, 0.5, 900) + noise * self.rng.normal(size=900)
        path = self.folder / folder / "val.csv"
        sidecar = {"manifest": manifest_entry(self.manifest, path)}
        write_predictions(path, self.names[keep], expit(logit[keep]), {}, sidecar)
        return str(path)


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def split_of(runs, path):
    return load_splits([path], [str(runs.manifest)], ["kind"])


def judge(runs, path, *flags, out="out"):
    flags = ["--labels", str(runs.manifest), "--no-report", "--out", str(runs.folder / out), *flags]
    return evaluate.main(["--predictions", path, *flags])


def test_a_planted_drop_is_found_in_its_category_and_ends_with_status_4(runs, capsys):
    baseline, by = str(runs.folder / "baseline.json"), ["--gate-by", "kind"]
    assert judge(runs, runs.write("old"), "--keep-baseline", baseline) == 0
    assert judge(runs, runs.write("equal"), "--gate", baseline, *by) == 0
    assert judge(runs, runs.write("worse", drop=3), "--gate", baseline, *by) == gate.STATUS == 4
    assert "beyond chance, in: val: all images; val: kind category_2." in capsys.readouterr().out
    result = json.loads((runs.folder / "out" / "gate.json").read_text())
    assert [row["category"] for row in result["rows"] if row["is_worse"]] == ["all images", "kind category_2"]
    assert len(result["rows"]) == 4 and result["rows"][1]["real"] == result["rows"][1]["ai"] == 150
    # It is not kept as the next baseline either.
    kept = (runs.folder / "baseline.json").read_bytes()
    worse = str(runs.folder / "worse" / "val.csv")
    assert judge(runs, worse, "--gate", baseline, "--keep-baseline", baseline) == 4
    assert (runs.folder / "baseline.json").read_bytes() == kept
    # A margin above the drop lets it pass.
    assert judge(runs, worse, "--gate", baseline, *by, "--gate-margin", "0.5") == 0


def test_a_category_is_compared_by_the_paired_test_of_its_aucs(runs):
    baseline, path = runs.folder / "baseline.json", runs.write("old")
    gate.write_baseline(baseline, split_of(runs, path))
    path = runs.write("new")
    rows = gate.compare(split_of(runs, path), baseline, ["kind"])["rows"]
    old, new = (
        np.genfromtxt(runs.folder / name / "val.csv", delimiter=",", skip_header=1)[:, 1]
        for name in ("old", "new")
    )
    for row, category in zip(rows[1:], CATEGORIES, strict=True):
        own = runs.category == category
        covariance = auc_covariance(runs.label[own], np.stack([new[own], old[own]]))
        width = 1.959964 * np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
        bounds = row["difference"] + np.array([-width, width])
        np.testing.assert_allclose([row["low"], row["high"]], bounds, rtol=1e-6)


def test_equal_runs_are_stopped_at_most_once_in_twenty(tmp_path):
    rng = np.random.default_rng(0)
    label, stopped, trials = np.arange(300) % 2, 0, 100
    for _ in range(trials):
        values = []
        for _ in range(6):
            image = rng.normal(2 * label, 1.5)
            scores = image + rng.normal(0, 0.7, (2, 300))
            covariance = auc_covariance(label, scores)
            first, second = placements(label, scores)[1].mean(axis=1)
            variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
            values.append(float(gate.ndtr((first - second) / np.sqrt(variance))))
        # Without a margin: the correction alone keeps the rate.
        stopped += min(gate.holm(values)) < gate.LEVEL
    assert stopped / trials < 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials)


def test_the_same_run_is_never_worse(runs):
    splits, baseline = split_of(runs, runs.write("old")), runs.folder / "baseline.json"
    gate.write_baseline(baseline, splits)
    assert gate.compare(splits, baseline, ["kind"], margin=0)["worse"] == []


def test_holm_is_the_step_down_of_bonferroni():
    assert gate.holm([0.01, None, 0.04, 0.03]) == [0.03, None, 0.06, 0.06]
    assert gate.holm([]) == [] and gate.holm([None, 0.9, 0.8]) == [None, 1.0, 1.0]


def test_other_images_labels_or_files_are_refused_in_one_line(runs):
    baseline = runs.folder / "baseline.json"
    splits = split_of(runs, runs.write("old"))
    gate.write_baseline(baseline, splits)
    record = json.loads(baseline.read_text())
    kept = record["splits"]["val"]
    for name, changed, message in (
        (
            "less",
            {key: values[1:] for key, values in kept.items()},
            r"images \(1 are in one of them .*: 00000",
        ),
        ("labels", kept | {"labels": [1 - one for one in kept["labels"]]}, r"labels \(900\): 00000"),
        ("scores", kept | {"scores": [None, *kept["scores"][1:]]}, "is damaged"),
        ("short", kept | {"scores": kept["scores"][1:]}, "is damaged"),
    ):
        file = runs.folder / f"{name}.json"
        file.write_text(json.dumps(record | {"splits": {"val": changed}}))
        with pytest.raises(UserError, match=message):
            gate.compare(splits, file)
    other = runs.folder / "other.json"
    other.write_text("{}")
    with pytest.raises(UserError, match="this version reads format 'featdistill baseline'; keep one"):
        gate.compare(splits, other)
    with pytest.raises(UserError, match="was not written by this command"):
        gate.write_baseline(other, splits)
    with pytest.raises(UserError, match="does not exist"):
        gate.compare(splits, runs.folder / "none.json")
    with pytest.raises(UserError, match="with --gate only"):
        judge(runs, str(splits[0].predictions), "--gate-by", "kind")
