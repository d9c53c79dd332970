"""The robustness sweep: its cells and images, its scores, how it continues after a kill, what it writes."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny_experts import save_tiny_pair

import evaluate
from featdistill.command_line import UserError
from featdistill.data.preprocessing import fit, prepare
from featdistill.data.views import cut_view, parse_tta
from featdistill.distortions.libraries import LIBRARIES
from featdistill.distortions.operation import LEVELS
from featdistill.distortions.plan import apply_plan
from featdistill.evaluation.metrics import roc_auc
from featdistill.images.reading import read_image
from featdistill.inference import journal as partial_scores
from featdistill.inference.fusion import Fusion
from featdistill.inference.scoring import score
from featdistill.models.expert import load_expert
from featdistill.records.manifest import make_manifest, read_manifest, write_manifest
from featdistill.sweep import run as sweep
from featdistill.sweep.plan import Cell, choose_cells, sample_rows
from featdistill.sweep.run import SweepDataset, measure

ROOT = Path(__file__).resolve().parents[2]
KEYS = [(48, "shorter"), (32, "squash")]
SETTINGS = ["--operations", "jpeg", "gausblur", "colorshift", "--levels", "1", "4"]


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> list[str]:
    return save_tiny_pair(tmp_path_factory.mktemp("experts"))


def run(manifest: Path, experts: list[str], out: Path, *flags: str) -> int:
    how = ["--workers", "0", "--batch-size", "5", "--device", "cpu", "--no-report"]
    return evaluate.main(
        ["sweep", str(manifest), "--experts", *experts, "--out", str(out), *SETTINGS, *how, *flags]
    )


def found_in(out: Path) -> dict:
    return json.loads((out / "sweep.json").read_text())


def test_the_cells_are_every_operation_at_every_level_that_can_be_applied_here():
    cells, left_out = choose_cells()
    assert [(cell.operation, cell.level) for cell in cells] == [
        (name, level) for name in LIBRARIES["official"] for level in range(1, 6)
    ]
    assert not left_out
    cells, left_out = choose_cells(["evaluation", "official"], ["jpeg_ai", "jpeg", "webp"], [4, 2, 4])
    assert cells == [
        Cell("evaluation", "webp", 2),
        Cell("evaluation", "webp", 4),
        Cell("official", "jpeg", 2),
        Cell("official", "jpeg", 4),
    ]
    assert left_out == [{"library": "evaluation", "operation": "jpeg_ai", "missing": "an adapter"}]
    with pytest.raises(UserError, match="no operation can be applied: jpeg_ai needs an adapter"):
        choose_cells(["evaluation"], ["jpeg_ai"])
    with pytest.raises(UserError, match=r"'gaussblur' \(did you mean gausblur\?\)"):
        choose_cells(["official"], ["gaussblur"])
    with pytest.raises(UserError, match=r"'oficial' \(did you mean official\?\)"):
        choose_cells(["oficial"])


def made_rows(real: int, ai: int) -> pd.DataFrame:
    label = [0] * real + [1] * ai
    names = [f"{number}.jpg" for number in range(real + ai)]
    frame = make_manifest({"image": names, "name": names, "label": label})
    frame.attrs["path"] = "made.csv"
    return frame


def test_a_sample_keeps_the_shares_of_the_classes_and_depends_on_names_alone():
    frame = made_rows(60, 40)
    rows = sample_rows(frame, 20, seed=3).rows
    assert rows["label"].value_counts().to_dict() == {0: 12, 1: 8}
    shuffled = frame.sample(frac=1, random_state=0)
    shuffled.attrs = frame.attrs
    assert set(sample_rows(shuffled, 20, seed=3).rows["name"]) == set(rows["name"])
    assert set(sample_rows(frame, 20, seed=4).rows["name"]) != set(rows["name"])
    assert len(sample_rows(frame, 500).rows) == 100
    assert sample_rows(made_rows(99, 1), 2).rows["label"].tolist() == [0, 1]


def test_a_sample_leaves_out_what_is_distorted_or_unlabeled_and_takes_both_classes():
    frame = made_rows(6, 6)
    frame.loc[[0, 6], "label"] = pd.NA
    frame.loc[[1, 2, 7], "is_distorted"] = 1
    sample = sample_rows(frame, 100)
    assert sample.rows["name"].tolist() == [f"{number}.jpg" for number in (3, 4, 5, 8, 9, 10, 11)]
    assert (sample.unlabeled, sample.distorted) == (2, 3)
    with pytest.raises(UserError, match=r"made\.csv has no labeled, undistorted AI-generated image"):
        sample_rows(frame[:6].copy().pipe(with_path), 100)


def with_path(frame: pd.DataFrame) -> pd.DataFrame:
    frame.attrs["path"] = "made.csv"
    return frame


@pytest.mark.parametrize("distort_at", ["native", "input"])
def test_what_an_image_gets_is_a_function_of_seed_name_operation_and_level(make_set, distort_at):
    rows = read_manifest(make_set("val", 4))
    cells = choose_cells(["official", "evaluation"], ["whitenoise", "downscale"], [2, 5])[0]
    dataset = SweepDataset(rows, KEYS, cells, 7, distort_at)
    others = SweepDataset(rows[::-1].reset_index(drop=True), KEYS[::-1], cells[::-1], 7, distort_at)
    assert len(dataset) == 4 * 5
    for image, path in enumerate(rows["image"]):
        pixels = read_image(path)
        for place, cell in enumerate([None, *cells]):
            item = dataset[image * 5 + place]
            other = others[(3 - image) * 5 + (5 - place if place else 0)]
            plan = (cell.step(7, rows["name"][image]),) if cell else ()
            for key in KEYS:
                expected = prepare(apply_plan(pixels, plan), *key)
                if distort_at == "input":
                    expected = prepare(apply_plan(fit(pixels, *key), plan), key[0], "squash")
                assert torch.equal(item["images"][key], expected)
                assert torch.equal(other["images"][key], expected)
    assert len({cell.step(seed, name).seed for cell in cells for seed in (7, 8) for name in "ab"}) == 16


@pytest.mark.parametrize("distort_at", ["native", "input"])
def test_views_of_test_time_augmentation_are_cut_after_the_operation(make_set, distort_at):
    rows, views = read_manifest(make_set("val", 2)), parse_tta("rapid")[1]
    cells = choose_cells(["official"], ["darken"], [3])[0]
    item = SweepDataset(rows, KEYS, cells, 7, distort_at, views)[1]
    pixels, plan = read_image(rows["image"][0]), (cells[0].step(7, rows["name"][0]),)
    assert len(item["images"]) == 7 * len(KEYS)
    for key in KEYS:
        for view in views:
            expected = cut_view(apply_plan(pixels, plan), *key, view=view)
            if distort_at == "input":
                expected = cut_view(apply_plan(fit(pixels, *key), plan), key[0], "squash", view=view)
            assert torch.equal(item["images"][view.key(key)], expected)


def test_an_image_is_decoded_once_for_all_cells_of_a_batch(make_set, monkeypatch):
    rows = read_manifest(make_set("val", 3))
    read = []
    monkeypatch.setattr(sweep, "load_image", lambda path, name: read.append(name) or read_image(path))
    dataset = SweepDataset(rows, KEYS, choose_cells()[0])
    for index in range(0, len(dataset), 7):
        dataset[index]
    assert read == rows["name"].tolist()


def test_an_auc_is_that_of_the_distorted_images_scored_one_by_one(make_set, tmp_path, experts):
    manifest = make_set("val", 14)
    assert run(manifest, experts, tmp_path / "out") == 0
    result, rows = found_in(tmp_path / "out"), read_manifest(manifest)
    loaded, label = [load_expert(folder) for folder in experts], rows["label"].to_numpy(dtype=int)

    def scored(images: pd.DataFrame) -> np.ndarray:
        return np.concatenate([batch.logits for batch in score(loaded, images)], axis=1)

    clean = Fusion().apply(scored(rows), ["alpha", "beta"])
    assert result["clean_auc"] == pytest.approx(roc_auc(label, clean), abs=1e-12)
    assert [(cell["operation"], cell["level"]) for cell in result["cells"]] == [
        (name, level) for name in ("gausblur", "colorshift", "jpeg") for level in (1, 4)
    ]
    for cell in result["cells"]:
        made = Cell(cell["library"], cell["operation"], cell["level"])
        for place, path in enumerate(rows["image"]):
            step = made.step(0, rows["name"][place])
            Image.fromarray(apply_plan(read_image(path), (step,))).save(tmp_path / f"{place}.png")
        logits = scored(rows.assign(image=[str(tmp_path / f"{place}.png") for place in range(14)]))
        fused = Fusion().apply(logits, ["alpha", "beta"])
        assert cell["auc"] == pytest.approx(roc_auc(label, fused), abs=1e-12)
        assert cell["experts"]["beta"] == pytest.approx(roc_auc(label, logits[1]), abs=1e-12)
        assert (cell["n"], cell["scale"]) == (14, made.scale)
        assert cell["drop"] == pytest.approx(result["clean_auc"] - cell["auc"], abs=1e-12)
    mean = np.mean([cell["auc"] for cell in result["cells"]])
    assert result["mean_robust_auc"] == pytest.approx(mean, abs=1e-12)
    assert result["libraries"]["official"]["mean_robust_auc"] == pytest.approx(mean, abs=1e-12)


def test_cells_are_compared_on_the_same_images():
    rng = np.random.default_rng(0)
    label = np.arange(200) % 2
    clean = label + rng.normal(0, 1, 200)
    fused = np.stack([clean, clean, rng.permutation(clean)])
    cells = [Cell("official", "gausblur", 1), Cell("official", "jpeg", 5)]
    found = measure(label, fused, {"only": fused}, cells)
    same, lost = found["cells"]
    assert (same["drop"], same["drop_low"], same["drop_high"]) == pytest.approx((0, 0, 0), abs=1e-9)
    assert [same["low"], same["high"]] == pytest.approx(found["clean_auc_interval"], abs=1e-12)
    assert same["low"] < same["auc"] < same["high"]
    assert 0 < lost["drop_low"] < lost["drop"] < lost["drop_high"]
    low, high = found["mean_robust_auc_interval"]
    assert low < found["mean_robust_auc"] == (same["auc"] + lost["auc"]) / 2 < high


def test_a_killed_sweep_goes_on_and_a_finished_one_is_left_as_it_is(make_set, tmp_path, experts, monkeypatch):
    manifest, whole, out = make_set("val", 6), tmp_path / "whole", tmp_path / "out"
    run(manifest, experts, whole)
    append, done = partial_scores.PartialScores.append, []

    def killed(self, batch):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(batch.number)
        append(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(partial_scores.PartialScores, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            run(manifest, experts, out)
    assert [path.name for path in out.iterdir()] == [".sweep.json.partial"]
    monkeypatch.setattr(
        partial_scores.PartialScores,
        "append",
        lambda self, batch: done.append(batch.number) or append(self, batch),
    )
    run(manifest, experts, out)
    # 6 images in 7 cells, the clean one among them, by batches of 5.
    assert done == list(range(9))
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert files == {path.name: path.read_bytes() for path in whole.iterdir()}
    assert sorted(files) == ["sweep.csv", "sweep.json", "sweep.md"]
    run(manifest, experts, out)
    assert len(done) == 9 and files == {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(
        UserError, match=r"sweep\.json was produced with different settings: sweep\.seed was 0, is 1"
    ):
        run(manifest, experts, out, "--seed", "1")


def test_a_broken_image_is_left_out_of_all_cells_and_named(make_set, tmp_path, experts, capsys):
    manifest = make_set("val", 10)
    (manifest.parent / "00003.jpg").write_bytes(b"broken")
    Image.new("RGB", (40, 12)).save(manifest.parent / "00006.jpg")
    assert run(manifest, experts, tmp_path / "out") == 1
    result = found_in(tmp_path / "out")
    assert [one["name"] for one in result["unreadable"]] == ["00003.jpg", "00006.jpg"]
    assert (result["images"], result["real"], result["ai"]) == (8, 4, 4)
    assert {cell["n"] for cell in result["cells"]} == {8}
    assert "could not be read: 00006.jpg: 40 x 12 px are too small" in capsys.readouterr().out
    rows = read_manifest(manifest)
    write_manifest(rows[~rows["name"].isin(["00003.jpg", "00006.jpg"])], manifest)
    run(manifest, experts, tmp_path / "rest")
    assert found_in(tmp_path / "rest")["mean_robust_auc"] == result["mean_robust_auc"]


def test_the_tables_say_what_the_json_says(make_set, tmp_path, experts, capsys):
    out = tmp_path / "out"
    run(make_set("val", 8), experts, out)
    result, said = found_in(out), capsys.readouterr().out
    with (out / "sweep.csv").open() as file:
        clean, *rows = csv.DictReader(file)
    assert (clean["operation"], float(clean["auc"])) == ("none", result["clean_auc"])
    for row, cell in zip(rows, result["cells"], strict=True):
        assert {key: str(cell[key]) for key in row} == row
    page = (out / "sweep.md").read_text()
    assert "| operation  | level 1 | level 4 |   mean |" in page
    jpeg = [cell["auc"] for cell in result["cells"] if cell["operation"] == "jpeg"]
    line = f"| jpeg       |  {jpeg[0]:.4f} |  {jpeg[1]:.4f} | {np.mean(jpeg):.4f} |"
    assert line in page and "official/jpeg" in said and line not in said


def test_what_a_user_can_get_wrong_is_one_line(make_set, tmp_path, experts):
    manifest = make_set("val", 4)
    with pytest.raises(UserError, match="unknown argument --labels"):
        run(manifest, experts, tmp_path, "--labels", "labels.csv")
    with pytest.raises(UserError, match="unknown argument --distort-at"):
        evaluate.main(["--predictions", "a.csv", "--out", str(tmp_path), "--distort-at", "input"])
    with pytest.raises(UserError, match="--sample: must be 2 or more, not 1"):
        run(manifest, experts, tmp_path, "--sample", "1")
    with pytest.raises(UserError, match="no experts are given; name their folders with --experts"):
        evaluate.main(["sweep", str(manifest), "--out", str(tmp_path)])
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match="was not written by this command"):
        run(manifest, experts, tmp_path)


def test_help_imports_no_large_library_and_scores_need_no_torch():
    code = (
        "import sys, evaluate\n"
        "from featdistill.command_line import UserError\n"
        "for parser, _ in evaluate.COMMANDS.values():\n    parser().format_help()\n"
        "print({'numpy', 'pandas', 'sklearn', 'matplotlib', 'torch'} & set(sys.modules))\n"
        "try:\n    evaluate.main(['--predictions', 'none.csv', '--out', 'out'])\n"
        "except UserError as error:\n    print(error)\n"
        "print('torch' in sys.modules, 'timm' in sys.modules)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    first, error, last = found.stdout.splitlines()
    assert (first, last) == ("set()", "False False") and "none.csv" in error


def test_the_help_names_every_library_and_level():
    text = evaluate.sweep_parser().format_help()
    assert all(library in text for library in LIBRARIES) and f"{LEVELS[0]} to {LEVELS[-1]}" in text
