"""The content control finds what images show, and only that; matching makes both classes show the same."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data_prep import audit, demo
from data_prep.auditing import content, page
from data_prep.content import banks
from data_prep.content.control import control_scores
from featdistill.bank.store import open_bank
from featdistill.command_line import UserError
from featdistill.evaluation.metrics import roc_auc
from featdistill.records.manifest import make_manifest, read_manifest, write_manifest

SIDE = 160  # that of the network, so that nothing is resized before
# A tiny network with random weights: enough for shapes this large, and made in a moment.
TINY = ["--backbone", "timm:test_vit", "--weights", "random", "--device", "cpu", "--workers", "1"]


def stripes(rng: np.random.Generator) -> np.ndarray:
    """Wide stripes of two colors, (S, S, 3) uint8."""
    period, start = rng.uniform(36, 56), rng.uniform(0, 56)
    bands = (np.indices((SIDE, SIDE))[1] + start) % period < period / 2
    return _colored(bands, rng)


def disc(rng: np.random.Generator) -> np.ndarray:
    """One large disc on a plain ground, (S, S, 3) uint8."""
    (row, column), radius = rng.uniform(60, 100, 2), rng.uniform(30, 50)
    rows, columns = np.indices((SIDE, SIDE))
    return _colored((rows - row) ** 2 + (columns - column) ** 2 < radius**2, rng)


def _colored(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    dark, light = rng.uniform(20, 100, 3), rng.uniform(150, 235, 3)
    if rng.random() < 0.5:
        dark, light = light, dark
    picture = np.where(mask[..., None], light, dark) + rng.normal(0, 6, (SIDE, SIDE, 3))
    return np.clip(picture, 0, 255).astype(np.uint8)


@pytest.fixture
def draw(tmp_path):
    """Return a function that writes a manifest of pictures, and gives its path.

    `kinds` are pairs of a label and a function that draws; further columns are lists.
    """

    def write(name: str, kinds, count: int, **columns) -> str:
        rows = {"image": [], "name": [], "label": [], "group": []}
        for number in range(count):
            label, picture = kinds[number % len(kinds)]
            path = tmp_path / f"{name}-{number:03d}.png"
            Image.fromarray(picture(np.random.default_rng(number))).save(path)
            for column, value in zip(rows, (str(path), path.name, label, f"g{number // 2}"), strict=True):
                rows[column].append(value)
        write_manifest(make_manifest(rows | columns), tmp_path / f"{name}.csv")
        return str(tmp_path / f"{name}.csv")

    return write


def content_of(tmp_path, *manifests, name="audit", network=TINY, flags=()) -> dict:
    """Return the content control alone; the rest of an audit takes longer."""
    out = ["--out", str(tmp_path / name)]
    arguments = audit.build_parser().parse_args([*manifests, *out, *network, *flags])
    rows = audit.read_rows(list(manifests))
    content.check(rows)
    return content.measure_content(rows, arguments.out, arguments)


def test_two_subjects_are_told_apart_and_one_is_not(draw, tmp_path, capsys):
    two = draw("two", [(0, stripes), (0, stripes), (1, disc), (1, disc)], 80)
    audit.main([two, "--out", str(tmp_path / "audit"), "--content", *TINY])
    result = json.loads((tmp_path / "audit" / "audit.json").read_text())["content"]
    assert result["auc"] > 0.95 and result["low"] > 0.9
    assert result["images"] == result["train"]["images"] == 80 and result["held_out"]["auc"] is None
    assert (
        result["side"] == SIDE // 9 == 17
        and result["folds"] == "5 folds of groups"
        and result["feature"] == "pool"
    )
    shown = capsys.readouterr().out
    assert "WARNING: what the images show tells real from AI-generated ones. Content at 17 px" in shown
    table = (tmp_path / "audit" / "audit.md").read_text()
    assert "## Content" in table and f"{result['auc']:.4f}" in table
    scores = pd.read_csv(tmp_path / "audit" / "content.csv")
    assert list(scores) == ["name", "label", "score"] and scores["score"].between(0, 1).all()
    assert roc_auc(scores["label"].to_numpy(), scores["score"].to_numpy()) == pytest.approx(
        result["auc"], abs=1e-4
    )
    kinds = [(label, picture) for picture in (stripes, disc) for label in (0, 0, 1, 1)]
    same = content_of(tmp_path, draw("same", kinds, 80), name="same")
    assert 0.3 < same["auc"] < 0.7


@pytest.mark.parametrize(("side", "expected"), [(40, 4), (112, 12), (260, 28), (700, 28)])
def test_small_images_are_reduced_further(tmp_path, side, expected):
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    for number, path in enumerate(paths):
        Image.new("RGB", (side + 30, side + number - 1)).save(path)
    assert banks.default_side([*paths, str(tmp_path / "missing.png")]) == expected


def test_the_classes_of_the_demo_show_the_same(shared, tmp_path):
    weights = shared / "weights" / "tf_efficientnet_lite0.safetensors"
    if not weights.is_file():
        pytest.skip(f"{weights} with the weights of EfficientNet-Lite0 is not there")
    codebooks, rows = demo._fit_on_scenes(0), {"image": [], "name": [], "label": []}
    for index in range(160):
        made = demo.make_image(index, "train", 0, codebooks)
        (tmp_path / made.name).write_bytes(made.data)
        for column, value in zip(rows, (str(tmp_path / made.name), made.name, made.label), strict=True):
            rows[column].append(value)
    write_manifest(make_manifest(rows), tmp_path / "demo.csv")
    lite0 = ["--backbone", "timm:tf_efficientnet_lite0", "--weights", str(weights), "--device", "cpu"]
    result = content_of(tmp_path, str(tmp_path / "demo.csv"), network=lite0)
    assert result["side"] == 12 and 0.45 <= result["auc"] <= 0.6


def test_traces_of_one_pixel_do_not_survive(draw, tmp_path):
    def with_trace(rng):
        checks = 16 * (np.indices((SIDE, SIDE)).sum(0) % 2)[..., None] - 8
        return np.clip(disc(rng).astype(int) + checks, 0, 255).astype(np.uint8)

    path = draw("traces", [(0, disc), (0, disc), (1, with_trace), (1, with_trace)], 80)
    assert 0.3 < content_of(tmp_path, path)["auc"] < 0.7
    # At a side that keeps pixels, the same features see the trace.
    assert content_of(tmp_path, path, name="large", flags=["--content-side", str(SIDE)])["auc"] > 0.95


def test_folds_and_the_hold_out_follow_the_manifest(draw, tmp_path):
    kinds = [(0, stripes), (1, disc), (1, disc), (0, stripes)]
    split = ["train"] * 48 + ["holdout"] * 16
    fold = [str(number // 16) for number in range(48)] + ["-1"] * 16
    result = content_of(tmp_path, draw("folds", kinds, 64, split=split, fold=fold))
    assert result["folds"] == "column fold"
    assert result["train"]["images"] == 48 and result["held_out"]["images"] == 16
    assert min(result["auc"], result["train"]["auc"], result["held_out"]["auc"]) > 0.9
    assert ", held out AUC" in page.content_line(result)


def test_heads_never_see_the_group_of_what_they_score():
    rng = np.random.default_rng(0)
    count, label = 120, np.arange(120) % 2.0
    noise = rng.normal(size=(count, 200)).astype(np.float32)
    noise[1::2] = noise[::2] + 0.01 * noise[1::2]  # pairs of both classes that look alike
    group = np.char.add("g", (np.arange(count) // 4).astype(str))
    held = np.arange(count) >= 80
    scores = control_scores(noise, label, held, group)
    assert np.isfinite(scores.score).all() and scores.held.tolist() == held.tolist()
    # The label of a group, learned from others of it, would be found by all; here there is nothing to learn.
    label = np.repeat(rng.permutation(30) % 2, 4).astype(float)
    values = np.repeat(rng.normal(size=(30, 200)), 4, axis=0).astype(np.float32)
    whole, torn = ((np.arange(count) // size % 5).astype(str) for size in (4, 2))
    for fold, expected in ((whole, "column fold"), (torn, "5 folds of groups"), (None, "5 folds of groups")):
        scores = control_scores(values, label, np.zeros(count, bool), group, fold)
        assert scores.folds == expected
        assert 0.2 < roc_auc(label.astype(int), scores.score) < 0.8
    with pytest.raises(UserError, match="all training images share a group with held-out ones"):
        control_scores(values, label, np.arange(count) % 4 == 3, group)


def test_unlabeled_and_unreadable_images_and_a_hold_out_alone():
    rng = np.random.default_rng(1)
    label = np.arange(60) % 2.0
    values = (rng.normal(size=(60, 8)) + 4 * label[:, None]).astype(np.float32)
    values[3], label[10:14] = np.nan, np.nan
    group = np.arange(60).astype(str)
    scores = control_scores(values, label, np.ones(60, bool), group)
    assert np.flatnonzero(np.isnan(scores.score)).tolist() == [3]
    assert np.flatnonzero(scores.held).tolist() == [10, 11, 12, 13]
    assert max(scores.score[[10, 12]]) < min(scores.score[[11, 13]])


def test_a_killed_audit_continues_and_other_settings_are_refused(draw, tmp_path):
    path = draw("some", [(0, stripes), (0, stripes), (1, disc), (1, disc)], 16)
    first = content_of(tmp_path, path)
    files = {file: file.read_bytes() for file in (tmp_path / "audit").rglob("*.*")}
    assert content_of(tmp_path, path) == first
    assert files == {file: file.read_bytes() for file in (tmp_path / "audit").rglob("*.*")}
    assert open_bank(tmp_path / "audit" / "content").views == ["control"]
    audit.check_out(tmp_path / "audit")
    with pytest.raises(
        UserError, match=r"content was produced with different settings: views\.control_side_px"
    ):
        content_of(tmp_path, path, flags=["--content-side", "20"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--content-side", "20"], "--content-side has an effect with --content only"),
        (["--content", "--weights", "nowhere.pt"], r"weights file nowhere\.pt does not exist"),
        (["--content", "--feature", "registers", *TINY], "the backbone has no registers"),
    ],
)
def test_bad_flags_end_in_one_line(draw, tmp_path, flags, message):
    path = draw("some", [(0, stripes), (0, stripes), (1, disc), (1, disc)], 8)
    with pytest.raises(UserError, match=message):
        audit.main([path, "--out", str(tmp_path / "audit"), *flags])


def test_one_class_and_repeated_names_are_refused_before_the_work(draw, tmp_path):
    real = draw("real", [(0, disc)], 4)
    with pytest.raises(UserError, match="--content needs AI-generated images in at least two groups"):
        content_of(tmp_path, real)
    write_manifest(read_manifest(real).assign(label=pd.NA), Path(real))
    with pytest.raises(UserError, match="there are 0; 4 of 4 images have no label in the manifest"):
        content_of(tmp_path, real)
    kinds = [(0, stripes), (0, stripes), (1, disc), (1, disc)]
    path = draw("a", kinds, 8)
    rows = pd.read_csv(path)
    rows.to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(UserError, match=r"the name a-000\.png appears in two manifests \(8 repeated names\)"):
        content_of(tmp_path, path, str(tmp_path / "b.csv"))
