"""Probes give experts with the scores of the bank, hold out what they say, and refuse what does not fit."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import set_maker

import evaluate
import predict
from featdistill.__main__ import main
from featdistill.bank import embed, heads, probe_plan
from featdistill.bank.embed import Settings
from featdistill.bank.heads import HeadOptions
from featdistill.bank.joined import ChosenTokens, Joined
from featdistill.bank.probe import folder_name, probe
from featdistill.bank.store import open_bank
from featdistill.bank.views import ViewPlan
from featdistill.command_line import UserError
from featdistill.data.loading import ScoreDataset
from featdistill.data.sampling import balance_weights
from featdistill.distortions.presets import parse_policy
from featdistill.evaluation.metrics import roc_auc
from featdistill.inference.processes import Processes
from featdistill.inference.scoring import score_all
from featdistill.models.expert import load_expert, read_card
from featdistill.models.features import Atom, fisher_scores, top_positions
from featdistill.recipe_groups import Augmentation
from featdistill.records.logits import probabilities
from featdistill.records.manifest import read_manifest, write_manifest

TRAIN = ViewPlan(1, "training", 5, Augmentation(distortions="official"))
EVALUATION = ViewPlan(2, "evaluation", 0, Augmentation(distortions="official"), 8)
FEATURES = ("pool", "projection", "mean:1,2")
FAST = HeadOptions(path=(1e-4, 1e-2, 1.0))


def make(manifest: Path, out: Path, views: ViewPlan, **changes) -> Path:
    values = {"backbone": "tiny_clip", "weights": "random", "input_size": 32, "features": FEATURES}
    values |= {"views": views, "dtype": "float32", "keep_tokens": True, "workers": 0, "device": "cpu"}
    settings = Settings(**values | changes)
    assert Processes().run(lambda processes: embed.embed(settings, [manifest], out, processes)) == 0
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Banks of 40 images: `train`, `score`, `other` of another backbone, and `redrawn` with another seed."""
    folder = tmp_path_factory.mktemp("banks")
    path = set_maker(folder)("some", 40)
    rows = read_manifest(path)
    number = np.arange(40)
    rows["split"] = np.where(number < 30, "train", "test")
    rows["source"] = [f"source {n}" for n in number // 2 % 3]
    rows["generator"] = np.where(number % 2, [f"generator {n}" for n in number // 2 % 4], "")
    rows["group"] = [f"group {n}" for n in number // 2]
    write_manifest(rows, path)
    make(path, folder / "train", TRAIN)
    make(path, folder / "score", EVALUATION)
    make(path, folder / "other", EVALUATION, backbone="tiny_siglip", features=("pool", "mean:2"))
    make(path, folder / "redrawn", dataclasses.replace(TRAIN, seed=6), features=("pool",))
    return folder


def settings(folder: Path, **changes) -> probe_plan.Settings:
    values = {
        "banks": [str(folder / "train")],
        "features": ["mean:1,2"],
        "head": FAST,
        "write_experts": False,
    }
    return probe_plan.Settings(**values | changes)


def scores(path: Path) -> pd.Series:
    return pd.read_csv(path, index_col="name")["score"]


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_an_expert_has_the_scores_of_the_bank_clean_and_distorted(folder, tmp_path, kind):
    head = HeadOptions(kind, (0.01, 1.0), hidden=8)
    features = ["pool", "projection", "mean:1,2", "top_tokens:3"]
    asked = settings(
        folder, score=[str(folder / "score")], train=["split=train"], features=features, head=head
    )
    content = probe(dataclasses.replace(asked, write_experts=True), tmp_path)
    rows = read_manifest(folder / "score" / "manifest.csv")
    held = rows[rows["split"] == "test"].reset_index(drop=True)
    for text, result in zip(features, content["results"], strict=True):
        of_feature = tmp_path / folder_name(text)
        expert = load_expert(of_feature / "expert")
        card = read_card(of_feature / "expert")
        assert card["recipe"]["feature"] == text and card["metrics"]["holdout"]["images"] == 10
        assert card["probe"]["strength"] == result["strength"]
        assert bool(expert.spec.positions) == (text == "top_tokens:3")
        for number, view in enumerate(("clean", "evaluation-1", "evaluation-2")):
            policy = parse_policy("official") if number else None
            images = ScoreDataset(held, [expert.preprocessing.key], policy, max(0, number - 1))
            logits, _ = score_all([expert], images)
            of_bank = scores(of_feature / f"holdout-{view}.csv")[held["name"]]
            assert np.abs(probabilities(logits[0]) - of_bank).max() < 1e-5
        assert of_bank.max() - of_bank.min() > 0.001
    manifest = tmp_path / "manifests" / "holdout-clean.csv"
    flags = [
        "--manifest",
        str(manifest),
        "--out",
        str(tmp_path / "s.csv"),
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    assert predict.main([*flags, "--experts", str(tmp_path / "pool" / "expert")]) == 0
    predicted, of_bank = scores(tmp_path / "s.csv"), scores(tmp_path / "pool" / "holdout-clean.csv")
    assert np.abs(predicted - of_bank[predicted.index]).max() < 1e-5
    # The images of these labels are not distorted: an expert would score clean ones.
    flags[1] = str(tmp_path / "manifests" / "holdout-evaluation-2.csv")
    with pytest.raises(UserError, match="labels of a bank's view evaluation-2"):
        predict.main([*flags, "--experts", str(tmp_path / "pool" / "expert")])


def test_scores_of_training_images_come_from_heads_without_their_fold(folder, tmp_path):
    asked = settings(folder, score=[str(folder / "score")], folds="source", views=["clean"])
    result = probe(asked, tmp_path)["results"][0]
    joined = Joined([open_bank(folder / "score")])
    x = joined.values(joined.features("mean:1,2"), ["clean", "evaluation-1", "evaluation-2"])
    fold = pd.factorize(joined.rows["source"])[0]
    logits = heads.cross_fit(lambda seen: (x[:, :1], x), joined.labels, fold, options=FAST)
    expected = heads.chosen_logits(logits, joined.labels, fold)
    for number, view in enumerate(("clean", "evaluation-1", "evaluation-2")):
        found = scores(tmp_path / "mean_1_2" / f"folds-{view}.csv")[joined.rows["name"]]
        assert np.abs(found - probabilities(expected[:, number])).max() < 1e-9
    part = result["parts"]["folds"]
    assert part["clean"]["auc"] == pytest.approx(roc_auc(joined.labels, expected[:, 0]))
    robust = [roc_auc(joined.labels, expected[:, number]) for number in (1, 2)]
    assert part["robust"]["auc"] == pytest.approx(np.mean(robust))
    # The content control: the same on its view.
    x = joined.values(joined.features("mean:1,2"), ["control"])
    logits = heads.cross_fit(x, joined.labels, fold, options=FAST)
    control = roc_auc(joined.labels, heads.chosen_logits(logits, joined.labels, fold)[:, 0])
    assert part["clean"]["control"]["auc"] == pytest.approx(control)
    assert part["clean"]["exceeds"]["difference"] == pytest.approx(part["clean"]["auc"] - control)


def test_evaluate_reads_the_scores_with_what_was_drawn(folder, tmp_path):
    probe(settings(folder, score=[str(folder / "score")], train=["split=train"]), tmp_path / "probe")
    files = sorted((tmp_path / "probe" / "mean_1_2").glob("*-*.csv"))
    assert len(files) == 6
    evaluate.main(["--predictions", *map(str, files), "--out", str(tmp_path / "report")])
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())["splits"]
    part = json.loads((tmp_path / "probe" / "probe.json").read_text())["results"][0]["parts"]["holdout"]
    assert metrics["holdout-clean"]["clean_auc"] == pytest.approx(part["clean"]["auc"])
    both = [metrics[f"holdout-evaluation-{number}"]["robust_auc"] for number in (1, 2)]
    assert np.mean(both) == pytest.approx(part["robust"]["auc"])
    drawn = read_manifest(tmp_path / "probe" / "manifests" / "holdout-evaluation-2.csv")
    joined = Joined([open_bank(folder / "score")])
    chains = dict(zip(joined.rows["name"], joined.chains("evaluation-2"), strict=True))
    assert [json.loads(text) for text in drawn["distortions"]] == [chains[name] for name in drawn["name"]]


@pytest.mark.parametrize("column", ["source", "generator"])
def test_each_value_is_left_out_with_its_groups(folder, column):
    plan = probe_plan.make_plan(settings(folder, leave_out=column))
    assert plan.fold_names == [f"{column} {n}" for n in range(3 if column == "source" else 4)]
    own = plan.train.rows[column].to_numpy()
    for number, name in enumerate(plan.fold_names):
        held = plan.fold == number
        assert set(own[held]) <= {name, ""} and (own[held] == name).any()
        seen = ~held & ~plan.groups_of(held)
        assert not set(plan.train.groups[held]) & set(plan.train.groups[seen])
    # Real images have no generator: whole groups of them are held out with each one.
    assert set(plan.fold) == set(range(len(plan.fold_names)))


def test_left_out_values_are_set_against_held_out_images(folder, tmp_path):
    asked = settings(folder, score=[str(folder / "score")], leave_out="generator")
    (result,) = probe(asked, tmp_path)["results"]
    rows = read_manifest(folder / "score" / "manifest.csv")
    found = scores(tmp_path / "mean_1_2" / "leave-out-clean.csv")[rows["name"]].to_numpy()
    assert [each["value"] for each in result["values"]] == [f"generator {n}" for n in range(4)]
    for each in result["values"]:
        assert each["against"] == "all real" and each["real"] == 0 and each["ai"] == 5
        inside = ((rows["generator"] == each["value"]) | (rows["label"] == 0)).to_numpy()
        assert each["clean"]["auc"] == pytest.approx(
            roc_auc(rows["label"].to_numpy(int)[inside], found[inside])
        )
    table = pd.read_csv(tmp_path / "probe.csv")
    assert list(table["part"]) == ["leave-out"] + ["value"] * 4
    assert "generator 2" in (tmp_path / "probe.md").read_text()


def test_several_banks_get_one_head_whose_fusion_has_its_logits(folder, tmp_path):
    text = "mean:1,2/mean:2"
    banks = [str(folder / "score"), str(folder / "other")]
    asked = settings(folder, banks=banks, features=[text], train=["split=train"], views=["clean"])
    probe(dataclasses.replace(asked, write_experts=True), tmp_path)
    of_feature = tmp_path / folder_name(text)
    experts = [str(of_feature / name / "expert") for name in ("score_bank", "other")]
    manifest = str(tmp_path / "manifests" / "holdout-clean.csv")
    flags = ["--manifest", manifest, "--out", str(tmp_path / "s.csv"), "--workers", "0", "--device", "cpu"]
    fusion = ["--fusion", str(of_feature / "fusion.json")]
    assert predict.main([*flags, "--experts", *experts, *fusion]) == 0
    predicted, of_bank = scores(tmp_path / "s.csv"), scores(of_feature / "holdout-clean.csv")
    assert len(predicted) == 10 and np.abs(predicted - of_bank[predicted.index]).max() < 1e-5
    joined = Joined([open_bank(bank) for bank in banks])
    x = joined.values(joined.features(text), ["clean"])
    seen = (joined.rows["split"] == "train").to_numpy()
    candidates = heads.fit_heads(x[seen], joined.labels[seen], options=FAST)
    expected = [probabilities(head.logits(x[~seen])[:, 0]) for head in candidates]
    held = of_bank[joined.rows["name"][~seen]].to_numpy()
    assert min(np.abs(each - held).max() for each in expected) < 1e-9


def test_new_images_alone_are_scored_by_the_head_that_held_out_views_choose(folder, tmp_path):
    rows = read_manifest(folder / "some" / "manifest.csv")
    for part in ("train", "test"):
        write_manifest(rows[rows["split"] == part], tmp_path / f"{part}.csv")
        make(tmp_path / f"{part}.csv", tmp_path / part, EVALUATION)
    asked = settings(folder, banks=[str(tmp_path / "train")], score=[str(tmp_path / "test")])
    (apart,) = probe(asked, tmp_path / "apart")["results"]
    banks = [str(folder / "score")]
    (together,) = probe(settings(folder, banks=banks, train=["split=train"]), tmp_path / "together")[
        "results"
    ]
    assert list(apart["parts"]) == ["holdout"] and apart["strength"] == together["strength"]
    of_both = [scores(tmp_path / name / "mean_1_2" / "holdout-clean.csv") for name in ("apart", "together")]
    assert np.abs(of_both[0] - of_both[1][of_both[0].index]).max() < 1e-9
    assert apart["parts"]["holdout"]["clean"]["control"] == together["parts"]["holdout"]["clean"]["control"]
    (rows[rows["split"] == "test"].assign(name=rows["name"].iloc[0]).iloc[:1]).pipe(
        write_manifest, tmp_path / "x.csv"
    )
    make(tmp_path / "x.csv", tmp_path / "clash", EVALUATION)
    with pytest.raises(UserError, match="name of a training image and of another"):
        probe(dataclasses.replace(asked, score=[str(tmp_path / "clash")]), tmp_path / "refused")


def test_images_count_as_the_balance_says(folder, tmp_path):
    asked = settings(folder, balance="source", views=["clean"])
    (result,) = probe(dataclasses.replace(asked, write_experts=True), tmp_path)["results"]
    joined = Joined([open_bank(folder / "train")])
    x = joined.values(joined.features("mean:1,2"), ["clean"])
    weights = balance_weights(joined.rows, "source")
    assert len(set(weights.round(6))) > 1
    path = HeadOptions(path=tuple(s for s in FAST.strengths if s <= result["strength"]))
    head = heads.fit_heads(x, joined.labels, weights=weights, options=path)[-1]
    expert = load_expert(tmp_path / "mean_1_2" / "expert")
    assert np.array_equal(expert.head[-1].weight.detach().numpy(), head.layers[0][0])


def test_tokens_are_chosen_on_training_images_only(folder):
    joined = Joined([open_bank(folder / "train")])
    views = ["clean", "training-1"]
    tokens = ChosenTokens(joined, joined.features("top_tokens:3"), views)
    seen = np.arange(40) % 5 != 0
    (feature,) = tokens.of(seen)
    array = joined.banks[0].array(Atom("tokens", 2))[seen].astype(np.float64)
    expected = fisher_scores(array.reshape(-1, *array.shape[2:]), np.repeat(joined.labels[seen], 2))
    assert feature.positions == top_positions(expected, 3)


def test_a_probe_is_continued_and_added_to_but_not_changed(folder, tmp_path, capsys):
    probe(settings(folder), tmp_path)
    before = (tmp_path / "mean_1_2" / "result.json").stat().st_mtime_ns
    content = probe(settings(folder, features=["pool", "mean:1,2"]), tmp_path)
    assert [each["feature"] for each in content["results"]] == ["mean:1,2", "pool"]
    assert (tmp_path / "mean_1_2" / "result.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="balance was"):
        probe(settings(folder, balance="class"), tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not written by this command"):
        probe(settings(folder), tmp_path / "mine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": ["split=trian"]}, "did you mean train"),
        ({"train": ["splt=train"]}, "did you mean split"),
        ({"train": ["split"]}, "not COLUMN=VALUE"),
        ({"train": ["label=1"]}, "0 real and 40 AI|0 real and 20 AI"),
        ({"features": ["mean:1,3"]}, "layers 1 to 2"),
        ({"features": ["class:1"]}, "does not hold class-1"),
        ({"features": ["pool/pool"]}, "2 parts for 1 banks"),
        ({"views": ["training-2"]}, "did you mean training-1"),
        ({"folds": "1"}, "at least 2"),
        ({"folds": "999"}, "--folds 999: one of the classes has only 20 groups of training images"),
        ({"folds": "gruop"}, "did you mean group"),
        ({"leave_out": "licence"}, "have 0 values"),
        ({"score": ["score", "other"]}, "names 2 banks for 1"),
        ({"score": ["other"]}, "different backbones"),
        ({"banks": ["train", "redrawn"], "features": ["pool"]}, "drawn differently"),
        ({"banks": ["score", "other"], "head": HeadOptions("mlp")}, "must be linear"),
    ],
)
def test_what_does_not_fit_is_refused(folder, tmp_path, changes, message):
    changes = {
        key: [str(folder / name) for name in value] if key in ("banks", "score") else value
        for key, value in changes.items()
    }
    with pytest.raises(UserError, match=message):
        probe(settings(folder, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_labels_are_named(folder, tmp_path):
    path = folder / "some" / "manifest.csv"
    rows = read_manifest(path)
    write_manifest(rows.assign(label=pd.NA), tmp_path / "unlabeled.csv")
    make(tmp_path / "unlabeled.csv", tmp_path / "bank", ViewPlan(), features=("pool",))
    for train in ([], ["split=train"]):
        with pytest.raises(
            UserError, match="0 real and 0 AI-generated, and 40 of all 40 have no label in the manifest"
        ):
            probe(settings(tmp_path, banks=[str(tmp_path / "bank")], train=train), tmp_path / "out")


def test_the_command_line(folder, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--bank", str(folder / "train"), "--out", str(out), "--features", "pool", "--no-experts"]
    assert not main(["probe", *flags, "--train", "split=train"])
    assert (out / "probe.md").read_text() in capsys.readouterr().out
    assert not (out / "pool" / "expert").exists()
    with pytest.raises(UserError, match="not a folder"):
        main(["probe", "--bank", str(tmp_path / "nowhere"), "--out", str(out)])
