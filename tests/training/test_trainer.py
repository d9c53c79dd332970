import json
import math
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import fork, needs_fork, statuses
from training_runs import SMALL, SMALL_STAGE_2, lines, losses, weights

import distill
import train
from featdistill.command_line import UserError
from featdistill.data.preprocessing import prepare
from featdistill.images.reading import limit_side, read_image
from featdistill.inference.predictor import load_ensemble
from featdistill.interactive.explain import explain
from featdistill.models.expert import create_expert, latest_experts, load_expert, read_card
from featdistill.records.manifest import read_manifests
from featdistill.training.run_folder import RunFolder
from featdistill.training.tasks import ClassifyTask
from featdistill.training.trainer import Trainer


def test_a_run_folder_holds_what_the_contract_says(sets, tmp_path):
    run = tmp_path / "run"
    assert train.main([*SMALL, *sets, "--out", str(run)]) == 0
    description = json.loads((run / "run.json").read_text())
    assert description["stage"] == 1 and description["recipe"]["backbone"] == "tiny_clip"
    assert description["versions"]["torch"] == torch.__version__
    logged = lines(run)
    assert [line["step"] for line in logged if "loss" in line] == list(range(1, 11))
    scored = [line for line in logged if "holdout_robust_auc" in line]
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
    with pytest.raises(
        UserError, match=r"different settings: recipe\.seed was 1, is 7; choose another --out"
    ):
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


def test_the_card_carries_the_limit_on_the_longer_side_and_scoring_applies_it(sets, tmp_path):
    run, common = tmp_path / "run", [*SMALL, *sets, "--epochs", "1", "--out"]
    train.main([*common, str(run), "--distortions", "official,max_side_px=40"])
    assert read_card(run / "expert")["preprocessing"]["max_side_px"] == 40
    expert = load_expert(run / "expert")
    assert expert.preprocessing.key == (32, "crop", 40)
    predictor, rows = load_ensemble([run / "expert"], workers=0), read_manifests(sets[3:])
    (seen,) = predictor.dataset(rows)[0]["images"].values()
    image = read_image(rows["image"][0])
    expected = prepare(limit_side(image, 40), 32, "crop")
    assert torch.equal(seen, expected)
    probability = expert(expected[None]).sigmoid().item()
    assert explain(expert, image)["probability"] == pytest.approx(probability, abs=1e-6)
    (recorded,) = predictor.sidecar()["preprocessing"].values()
    assert recorded["max_side_px"] == 40
    # Without a limit nothing is recorded, and a card from before is read as one without.
    train.main([*common, str(tmp_path / "plain")])
    assert "max_side_px" not in read_card(tmp_path / "plain" / "expert")["preprocessing"]
    assert load_expert(tmp_path / "plain" / "expert").preprocessing.key == (32, "crop")


def test_stage_2_starts_from_its_teacher_and_logs_its_parts(sets, tmp_path):
    train.main([*SMALL, *sets, "--out", str(tmp_path / "one")])
    teacher = tmp_path / "one" / "expert"
    arguments = ["--recipe", "demo_siglip_a", *SMALL_STAGE_2[2:], "--teacher", str(teacher)]
    distill.main([*arguments, *sets, "--out", str(tmp_path / "two")])
    first = lines(tmp_path / "two")[0]
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
    with pytest.raises(UserError, match="40 training images, fewer than a batch of 64"):
        train.main([*SMALL, *sets, "--out", str(tmp_path / "run"), "--batch-size", "64"])
    with pytest.raises(UserError, match="is not an expert"):
        distill.main([*SMALL_STAGE_2, "--teacher", str(tmp_path), *sets, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def teacher(sets, tmp_path_factory) -> Path:
    """A stage-1 expert of one epoch."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    train.main([*SMALL, *sets, "--epochs", "1", "--out", str(run)])
    return run / "expert"


# What each reading is called with besides the data; the second also has a moving average.
READINGS = {
    "stage 1": ("train.py", []),
    "reading A": ("distill.py", ["--objective", "dense", "--ema", "0.9"]),
    "reading B": (
        "distill.py",
        ["--objective", "crd", "--teacher-kind", "momentum", "--teacher-view", "other", "--crd-queue", "24"],
    ),
}


def arguments_of(reading: str, sets: list[str], teacher: Path) -> tuple[str, list[str]]:
    script, own = READINGS[reading]
    small = [*SMALL_STAGE_2, "--teacher", str(teacher)] if script == "distill.py" else SMALL
    return script, [*small, *sets, *own, "--checkpoint-every-s", "0", "--log-every", "3"]


def call(script: str, arguments: list[str]) -> int:
    return {"train.py": train.main, "distill.py": distill.main}[script](arguments)


def assert_equal_runs(run: Path, whole: Path) -> None:
    assert weights(run) == weights(whole)
    assert losses(run) == losses(whole)
    best = [(path / "expert" / "expert.safetensors").read_bytes() for path in (run, whole)]
    assert best[0] == best[1]


class Killed(BaseException):
    """Stands for SIGKILL: nothing between the step and the end of the process runs."""


@pytest.mark.parametrize("reading", READINGS)
def test_a_run_that_dies_at_three_random_steps_ends_like_an_undisturbed_one(
    reading, sets, teacher, tmp_path, monkeypatch
):
    script, arguments = arguments_of(reading, sets, teacher)
    call(script, [*arguments, "--out", str(tmp_path / "whole")])
    rng = np.random.default_rng(len(reading))
    deaths = sorted(rng.choice(np.arange(1, 10), 3, replace=False).tolist())
    take_step, save, write = Trainer._step, Trainer._save, torch.save
    for number, death in enumerate(deaths):
        # In the middle of a step, before the checkpoint of a step, and while a checkpoint is written.
        def step(trainer, stream, death=death, number=number):
            take_step(trainer, stream)
            if trainer.step == death + 1 and number == 0:
                raise Killed

        def die_before_saving(trainer, death=death, number=number):
            if trainer.step == death + 1 and number == 1:
                raise Killed
            save(trainer)

        def die_in_saving(state, path, death=death, number=number):
            if state["step"] == death + 1 and number == 2:
                Path(path).write_bytes(b"half a checkpoint")
                raise Killed
            write(state, path)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_step", step)
            patch.setattr(Trainer, "_save", die_before_saving)
            patch.setattr(torch, "save", die_in_saving)
            with pytest.raises(Killed):
                call(script, [*arguments, "--out", str(tmp_path / "run")])
        assert RunFolder(tmp_path / "run").load_state()["step"] == death
    assert call(script, [*arguments, "--out", str(tmp_path / "run")]) == 0
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")


def kill_after(script: str, arguments: list[str], run: Path, count: int) -> None:
    """Start a run and kill it once its log has so many lines."""
    (process,) = fork(lambda: call(script, [*arguments, "--out", str(run)]))
    log = run / "metrics.jsonl"
    while process.is_alive() and not (log.is_file() and log.read_bytes().count(b"\n") >= count):
        time.sleep(0.002)
    process.kill()
    assert statuses([process]) == [-signal.SIGKILL]


@needs_fork
def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(sets, teacher, tmp_path):
    # Lines of three steps: a kill leaves one that is half full.
    script, arguments = arguments_of("stage 1", sets, teacher)
    arguments = [*arguments, "--epochs", "8"]
    call(script, [*arguments, "--out", str(tmp_path / "whole")])
    run = tmp_path / "killed"
    # Four lines: the steps of the first epoch (two), its scores, and a line from the middle of the second.
    kill_after(script, arguments, run, 4)
    state = RunFolder(run).load_state()
    assert 5 <= state["step"] < 40 and state["task"] is not None
    assert call(script, [*arguments, "--out", str(run)]) == 0
    assert_equal_runs(run, tmp_path / "whole")


@needs_fork
@pytest.mark.skipif(not os.environ.get("FEATDISTILL_SLOW"), reason="takes minutes; set FEATDISTILL_SLOW=1")
@pytest.mark.parametrize("reading", READINGS)
def test_three_kills_of_each_reading_change_nothing(reading, sets, teacher, tmp_path):
    script, arguments = arguments_of(reading, sets, teacher)
    arguments = [*arguments, "--epochs", "10", "--workers", "1"]
    call(script, [*arguments, "--out", str(tmp_path / "whole")])
    run, rng = tmp_path / "run", np.random.default_rng(len(reading))
    # An epoch writes three lines; each kill comes after some that the run before it had not written.
    for count in np.cumsum(rng.integers(3, 9, 3)):
        kill_after(script, arguments, run, int(count))
    assert 0 < RunFolder(run).load_state()["step"] < 50
    assert call(script, [*arguments, "--out", str(run)]) == 0
    assert_equal_runs(run, tmp_path / "whole")


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(sets, tmp_path, capsys):
    arguments = [*SMALL, *sets, "--checkpoint-every-s", "0", "--log-every", "3"]
    train.main([*arguments, "--out", str(tmp_path / "whole")])
    run = tmp_path / "run"
    stop_at(6, [*arguments, "--out", str(run)])
    newest, previous = run / "resume" / "state.pt", run / "resume" / "state.previous.pt"
    states = [torch.load(path, weights_only=True)["step"] for path in (newest, previous)]
    assert states == [6, 5]
    newest.write_bytes(newest.read_bytes()[:1000])
    capsys.readouterr()
    assert train.main([*arguments, "--out", str(run)]) == 0
    shown = capsys.readouterr()
    assert "state.pt cannot be read; continuing from the checkpoint before it" in shown.err
    assert "at step 5 of 10" in shown.out
    assert_equal_runs(run, tmp_path / "whole")
    assert not previous.exists()
    for path in (newest, previous):
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"state\.pt cannot be read .* to start afresh"):
        train.main([*arguments, "--out", str(run)])


def stop_at(step: int, arguments: list[str], times: int = 1) -> int:
    """Call stage 1 and send this process SIGTERM in the middle of a step."""
    next_batch = Trainer._next_batch

    def interrupted(trainer, stream):
        if trainer.step == step - 1:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGTERM)
        return next_batch(trainer, stream)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_next_batch", interrupted)
        return train.main(arguments)


def test_sigterm_saves_leaves_with_0_and_says_how_to_continue(sets, tmp_path, capsys):
    arguments = [*SMALL, *sets, "--log-every", "3"]
    train.main([*arguments, "--out", str(tmp_path / "whole")])
    run, previous = tmp_path / "run", signal.getsignal(signal.SIGTERM)
    capsys.readouterr()
    assert stop_at(4, [*arguments, "--out", str(run)], times=2) == 0
    assert "stopped at step 4 of 10; the same command continues" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == previous
    assert RunFolder(run).load_state()["step"] == 4 and not (run / "expert").exists()
    # The last step of an epoch: the scores are owed.
    assert stop_at(5, [*arguments, "--out", str(run)]) == 0
    assert not (run / "expert").exists()
    assert train.main([*arguments, "--out", str(run)]) == 0
    assert_equal_runs(run, tmp_path / "whole")


def spoil(patch: pytest.MonkeyPatch, steps: set[int], value: float) -> None:
    """Make the loss of these forward passes (from 0) what it should not be."""
    forward, passes = ClassifyTask.forward, iter(range(1000))

    def spoiled(task, batch):
        output = forward(task, batch)
        # Like the cross-entropy of an infinite logit: the loss is infinite, its gradient is not.
        return output | ({"loss": output["loss"] + value} if next(passes) in steps else {})

    patch.setattr(ClassifyTask, "forward", spoiled)


def step_lines(run: Path) -> list[dict]:
    return [line for line in lines(run) if "skipped" in line]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_step_that_is_not_finite_is_skipped_without_a_trace_and_counted(value, sets, tmp_path, monkeypatch):
    stages: list[tuple[str, dict]] = []

    def keep(name, method):
        def kept(task, *arguments):
            method(task, *arguments)
            state = {key: value.clone() for key, value in task.expert.state_dict().items()}
            stages.append((name, state))

        return kept

    for name in ("after_step", "after_skip"):
        monkeypatch.setattr(ClassifyTask, name, keep(name, getattr(ClassifyTask, name)))
    with monkeypatch.context() as patch:
        spoil(patch, {3, 4}, value)
        arguments = [*SMALL, *sets, "--epochs", "1", "--log-every", "5", "--out", str(tmp_path / "run")]
        assert train.main(arguments) == 0
    assert [name for name, _ in stages] == ["after_step"] * 3 + ["after_skip"] * 2
    before, after = stages[2][1], stages[4][1]
    assert all(torch.equal(before[key], after[key]) for key in before)
    (line,) = step_lines(tmp_path / "run")
    assert line["skipped"] == 2 and math.isfinite(line["loss"]) and math.isfinite(line["gradient_norm"])


def test_too_many_skipped_steps_in_a_row_stop_the_run(sets, tmp_path, monkeypatch):
    arguments = [*SMALL, *sets, "--max-skipped-steps", "2", "--checkpoint-every-s", "0"]
    with monkeypatch.context() as patch:
        spoil(patch, {1, 2, 4, 5, 6}, float("nan"))
        message = r"not finite at 3 steps in a row, up to step 7; lower --learning-rate"
        with pytest.raises(UserError, match=message):
            train.main([*arguments, "--out", str(tmp_path / "run")])
    assert [line["skipped"] for line in step_lines(tmp_path / "run")] == [0, 1, 1, 0, 1, 1]
    # The count survives: a run that is started again does not get past the same place unnoticed.
    assert RunFolder(tmp_path / "run").load_state()["skipped_in_a_row"] == 2


@pytest.mark.parametrize("mode", ["frozen", "lora"])
def test_an_expert_that_was_trained_in_part_is_saved_as_a_plain_one(mode, sets, tmp_path):
    arguments = [*SMALL, *sets, "--finetune", mode, "--checkpoint-every-s", "0"]
    if mode == "lora":
        pytest.importorskip("peft")
        arguments += ["--lora-rank", "2"]
    run = tmp_path / "run"
    train.main([*arguments, "--out", str(run)])
    stopped = tmp_path / "stopped"
    stop_at(3, [*arguments, "--out", str(stopped)])
    train.main([*arguments, "--out", str(stopped)])
    assert weights(stopped) == weights(run)
    trained = load_expert(run / "expert-last").state_dict()
    torch.manual_seed(1)
    start = create_expert("tiny_clip", "random", input_size=32, resize="crop").state_dict()
    changed = {key for key in start if not torch.equal(start[key], trained[key])}
    assert trained.keys() == start.keys() and any(key.startswith("head.") for key in changed)
    backbone = {key.removeprefix("backbone.model.") for key in changed if key.startswith("backbone.")}
    assert not backbone if mode == "frozen" else {"blocks.0.attn.qkv.weight"} <= backbone
    assert not any("norm" in key or "patch_embed.backbone" in key for key in backbone)


def test_gradient_checkpointing_and_a_balance_and_a_cache_keep_the_run_going(sets, tmp_path):
    common = [*SMALL, *sets, "--epochs", "1", "--distortions", "official,distort_at=input"]
    train.main([*common, "--out", str(tmp_path / "plain")])
    both = ["--gradient-checkpointing", "--cache", str(tmp_path / "cache"), "--balance", "class"]
    train.main([*common, *both, "--out", str(tmp_path / "run")])
    assert len(losses(tmp_path / "run")) == len(losses(tmp_path / "plain")) == 5
    cached = [*common, "--cache", str(tmp_path / "cache"), "--gradient-checkpointing"]
    train.main([*cached, "--out", str(tmp_path / "cached")])
    found, wanted = losses(tmp_path / "cached"), losses(tmp_path / "plain")
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in wanted], rel=1e-4)


def test_stage_2_sees_no_image_of_stage_1_again(sets, teacher, tmp_path, monkeypatch):
    seen: dict[str, list] = {"one": [], "two": []}
    take = Trainer._next_batch
    taught = ["--teacher", str(teacher), "--objective", "crd", "--teacher-view", "same"]
    for name, call, flags in (
        ("one", train.main, SMALL),
        ("two", distill.main, [*SMALL_STAGE_2, *taught]),
    ):

        def keep(trainer, stream, name=name):
            batch = take(trainer, stream)
            seen[name] += zip(batch["index"].tolist(), batch["images"], strict=True)
            return batch

        monkeypatch.setattr(Trainer, "_next_batch", keep)
        call(
            [
                *flags,
                *sets,
                "--epochs",
                "1",
                "--distortions",
                "official",
                "--out",
                str(tmp_path / name),
            ]
        )
    order = {name: [index for index, _ in items] for name, items in seen.items()}
    assert order["one"] != order["two"] and sorted(order["one"]) == sorted(order["two"]) == list(range(40))
    one = dict(seen["one"])
    assert not any(torch.equal(image, one[index]) for index, image in seen["two"])
