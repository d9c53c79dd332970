import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import set_maker

import distill
import train
from featdistill.command_line import UserError
from featdistill.engine import learning_rate_factor, parameter_groups
from featdistill.experts import create_expert, load_expert, read_card
from featdistill.recipes import Recipe
from featdistill.run_folder import RunFolder, latest_experts

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "--recipe",
    "demo_clip_a",
    "--input-size",
    "32",
    "--batch-size",
    "8",
    "--epochs",
    "2",
    "--log-every",
    "1",
]
SMALL += ["--workers", "0", "--score-batch-size", "8"]
# A transformer without BatchNorm and dropout: what an image gives does not depend on the others of its batch.
BATCH_FREE = ["--backbone", "timm:test_vit", "--head-dropout", "0"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A training manifest of 40 images and a hold-out of 12, made once."""
    make = set_maker(tmp_path_factory.mktemp("sets"))
    return ["--train", str(make("train", 40)), "--val", str(make("val", 12, first=1000))]


def weights(run: Path) -> bytes:
    return (run / "expert-last" / "expert.safetensors").read_bytes()


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_the_learning_rate_warms_up_and_falls_on_a_cosine():
    factors = [learning_rate_factor(step, 100, 0.1, 0.01) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1 and factors[10] == 1
    assert factors[55] == pytest.approx(0.505) and 0.01 < factors[99] < 0.0113
    assert factors[:10] == sorted(factors[:10]) and factors[9:] == sorted(factors[9:], reverse=True)
    assert learning_rate_factor(0, 1, 0.0, 0.01) == 1


def test_norms_and_biases_do_not_decay_and_the_head_learns_faster():
    expert = create_expert("tiny_siglip", "random", input_size=32)
    groups = parameter_groups(
        expert, Recipe(learning_rate=2.0, head_learning_rate_factor=5, weight_decay=0.3)
    )
    by_id = {id(p): group for group in groups for p in group["params"]}
    assert len(by_id) == len(list(expert.parameters()))
    named = {name: by_id[id(parameter)] for name, parameter in expert.named_parameters()}
    assert (
        named["head.0.weight"]["peak_learning_rate"] == 10 and named["head.0.weight"]["weight_decay"] == 0.3
    )
    assert named["backbone.model.blocks.0.attn.qkv.weight"]["weight_decay"] == 0.3
    for name in (
        "backbone.model.pos_embed",
        "backbone.model.norm.weight",
        "backbone.model.blocks.0.attn.qkv.bias",
    ):
        assert named[name]["weight_decay"] == 0 and named[name]["peak_learning_rate"] == 2


def test_a_run_folder_holds_what_the_contract_says(sets, tmp_path):
    run = tmp_path / "run"
    assert train.main([*SMALL, *sets, "--out", str(run)]) == 0
    description = json.loads((run / "run.json").read_text())
    assert description["stage"] == 1 and description["recipe"]["backbone"] == "tiny_clip"
    assert description["versions"]["torch"] == torch.__version__
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 11))
    scored = [line for line in lines if "holdout_robust_auc" in line]
    assert [line["epoch"] for line in scored] == [1, 2]
    card = read_card(run / "expert")
    best = max(scored, key=lambda line: line["holdout_robust_auc"])
    assert card["metrics"]["holdout"]["robust_auc"] == best["holdout_robust_auc"]
    assert card["epoch"] == best["epoch"] and read_card(run / "expert-last")["epoch"] == 2
    load_expert(run / "expert")
    assert latest_experts(tmp_path) == [run / "expert"]


def test_a_finished_run_is_left_alone_and_another_recipe_is_refused(sets, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = [*SMALL, *sets, "--out", str(run), "--epochs", "1"]
    train.main(arguments)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.suffix in (".safetensors", ".jsonl")}
    capsys.readouterr()
    assert train.main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert all(path.read_bytes() == content for path, content in before.items())
    with pytest.raises(UserError, match=r"other settings \(seed: 1 -> 7\)"):
        train.main([*arguments, "--seed", "7"])
    with pytest.raises(UserError, match="already holds a run"):
        train.main([*arguments, "--resume", "off"])


def test_workers_do_not_change_the_loss_curve(sets, tmp_path):
    for workers in ("0", "2"):
        train.main([*SMALL, *sets, "--out", str(tmp_path / workers), "--workers", workers])
    assert losses(tmp_path / "0") == losses(tmp_path / "2") and len(losses(tmp_path / "0")) == 10
    assert weights(tmp_path / "0") == weights(tmp_path / "2")


def test_another_seed_gives_another_loss_curve(sets, tmp_path):
    for seed in ("1", "2"):
        train.main([*SMALL, *sets, "--out", str(tmp_path / seed), "--epochs", "1", "--seed", seed])
    assert losses(tmp_path / "1") != losses(tmp_path / "2")


def test_accumulation_takes_the_same_steps_as_the_larger_batch(sets, tmp_path):
    for parts in ("1", "4"):
        arguments = [*SMALL, *sets, *BATCH_FREE, "--out", str(tmp_path / parts), "--accumulation", parts]
        train.main([*arguments, "--epochs", "1"])
    whole, parted = losses(tmp_path / "1"), losses(tmp_path / "4")
    assert [loss for _, loss in parted] == pytest.approx([loss for _, loss in whole], rel=1e-4)


def test_stage_2_starts_from_its_teacher_and_logs_its_parts(sets, tmp_path):
    train.main([*SMALL, *sets, "--out", str(tmp_path / "one")])
    teacher = tmp_path / "one" / "expert"
    arguments = ["--recipe", "demo_siglip_a", *SMALL[2:], "--teacher", str(teacher)]
    distill.main([*arguments, *sets, "--out", str(tmp_path / "two")])
    first = json.loads((tmp_path / "two" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"bce", "dense", "token_cosine"} <= first.keys()
    assert first["loss"] == pytest.approx(first["bce"] + first["dense"], rel=1e-5)
    card = read_card(tmp_path / "two" / "expert")
    assert card["stage"] == 2 and card["backbone"] == read_card(teacher)["backbone"]
    assert card["recipe"]["backbone"] == "tiny_clip"
    assert card["teacher"]["weights_sha256"] == read_card(teacher)["weights_sha256"]


def test_an_unreadable_training_image_is_listed_and_left_out(tmp_path, make_set):
    manifest, val = make_set("train", 24), make_set("val", 8, first=500)
    victim = sorted(manifest.parent.glob("*.jpg"))[3]
    victim.write_bytes(victim.read_bytes()[:200])
    train.main([*SMALL, "--train", str(manifest), "--val", str(val), "--out", str(tmp_path / "run")])
    listed = (tmp_path / "run" / "unreadable.csv").read_text()
    assert victim.name in listed and listed.count("\n") == 2


def test_data_that_cannot_be_trained_on_are_one_clear_error(tmp_path, make_set, sets):
    manifest = make_set("train", 8)
    text = manifest.read_text()
    one_class = tmp_path / "one.csv"
    one_class.write_text(text.replace(",1,", ",0,"))
    with pytest.raises(UserError, match=r"all 8 rows .* have the same label"):
        train.main([*SMALL, "--train", str(one_class), *sets[2:], "--out", str(tmp_path / "run")])
    with pytest.raises(UserError, match=r"manifest .*none\.csv does not exist"):
        train.main([*SMALL, "--train", str(tmp_path / "none.csv"), *sets[2:], "--out", str(tmp_path / "run")])
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        train.main([*SMALL, *sets, "--out", str(tmp_path / "run"), "--precision", "fp16"])
    with pytest.raises(UserError, match=r"unknown distortion preset 'ofical'.*did you mean official"):
        train.main([*SMALL, *sets, "--out", str(tmp_path / "run"), "--distortions", "ofical"])
    with pytest.raises(UserError, match="40 training images are fewer than one batch of 64"):
        train.main([*SMALL, *sets, "--out", str(tmp_path / "run"), "--batch-size", "64"])
    with pytest.raises(UserError, match="is no expert"):
        distill.main([*SMALL, "--teacher", str(tmp_path), *sets, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def start(script: str, arguments: list[str]) -> subprocess.Popen:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *arguments], env=environment, stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(sets, tmp_path):
    # Lines of three steps: a kill leaves one that is half full.
    arguments = [*SMALL, *sets, "--checkpoint-every-s", "0", "--epochs", "8", "--log-every", "3"]
    train.main([*arguments, "--out", str(tmp_path / "whole")])
    run = tmp_path / "killed"
    process = start("train.py", [*arguments, "--out", str(run)])
    log, deadline = run / "metrics.jsonl", time.monotonic() + 60
    # Four lines: the steps of the first epoch (two), its scores, and a line from the middle of the second.
    while time.monotonic() < deadline and process.poll() is None:
        if log.is_file() and log.read_bytes().count(b"\n") >= 4:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    state = RunFolder(run).load_state()
    assert 5 <= state["step"] < 40 and state["task"] is not None
    assert train.main([*arguments, "--out", str(run)]) == 0
    assert weights(run) == weights(tmp_path / "whole")
    assert losses(run) == losses(tmp_path / "whole")
    best = [(path / "expert" / "expert.safetensors").read_bytes() for path in (run, tmp_path / "whole")]
    assert best[0] == best[1]


def test_two_processes_take_the_steps_of_one(sets, tmp_path):
    """gloo on the CPU: the joint gradient of two halves of a batch is that of the whole."""
    common = [*SMALL, *sets, *BATCH_FREE, "--epochs", "1"]
    train.main([*common, "--out", str(tmp_path / "one")])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ]
    command = [*launch, str(ROOT / "train.py"), *common, "--out", str(tmp_path / "two")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [step for step, _ in two] == [step for step, _ in one]
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-4)
    scores = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()][-1]
        for name in ("one", "two")
    ]
    assert scores[0]["holdout_images"] == scores[1]["holdout_images"] == 12
    assert scores[1]["holdout_clean_auc"] == pytest.approx(scores[0]["holdout_clean_auc"], abs=0.06)
