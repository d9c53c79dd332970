"""What goes wrong in training ends in one line and costs nothing that was there before."""

from pathlib import Path

import pytest
import safetensors
import torch
from processes import fork, needs_fork, statuses
from training_runs import SMALL, lines

import train
from featdistill.command_line import UserError
from featdistill.data.sampling import TrainBatches
from featdistill.models import expert as experts
from featdistill.models.expert import load_expert, read_card
from featdistill.records.manifest import read_manifest
from featdistill.training import holdout, sharding
from featdistill.training.recipe import DistillRecipe, Recipe
from featdistill.training.tasks import ClassifyTask


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("distorted", [False, True])
def test_unreadable_images_of_both_sets_are_listed_and_counted_and_the_status_is_1(
    tmp_path, make_set, capsys, distorted
):
    manifest, val = make_set("train", 24), make_set("val", 16, first=500, distorted=distorted)
    victims = [*sorted(manifest.parent.glob("*.jpg"))[3:5], *sorted(val.parent.glob("*.jpg"))[1:4]]
    for victim in victims:
        spoil(victim)
    run = tmp_path / "run"
    arguments = [*SMALL, "--train", str(manifest), "--val", str(val), "--out", str(run)]
    assert train.main(arguments) == 1
    out = capsys.readouterr().out
    assert f"5 images could not be read, listed in {run / 'unreadable.csv'}" in out.splitlines()[-1]
    assert "on 13 images" in out and lines(run)[-1]["holdout_images"] == 13
    listed = (run / "unreadable.csv").read_text().splitlines()
    assert sorted(line.split(",")[0] for line in listed[1:]) == sorted(map(str, victims))
    # A finished run says the same again.
    assert train.main(arguments) == 1 and "5 images could not be read" in capsys.readouterr().out


def test_hold_out_images_that_are_trained_on_are_counted(tmp_path, make_set, sets, caplog):
    both = make_set("both", 16)
    assert train.main([*SMALL, "--train", str(both), "--val", str(both), "--out", str(tmp_path / "run")]) == 0
    assert "16 of 16 hold-out images are trained on" in caplog.text
    caplog.clear()
    train.main([*SMALL, *sets, "--out", str(tmp_path / "apart")])
    assert "are trained on" not in caplog.text


def test_a_hold_out_without_a_readable_image_is_an_error(tmp_path, make_set, sets):
    val = make_set("val", 4, first=500)
    for path in val.parent.glob("*.jpg"):
        spoil(path)
    with pytest.raises(UserError, match="no image of the hold-out can be read"):
        train.main([*SMALL, *sets[:2], "--val", str(val), "--out", str(tmp_path / "run")])


def test_a_learning_rate_that_is_far_too_high_is_one_line(sets, tmp_path):
    with pytest.raises(UserError, match=r"not finite.*lower --learning-rate"):
        train.main([*SMALL, *sets, "--learning-rate", "1e4", "--out", str(tmp_path / "run")])


def test_a_run_that_diverges_later_keeps_the_experts_of_earlier_epochs(sets, tmp_path, monkeypatch):
    run, score, calls = tmp_path / "run", holdout.score_dataset, []

    def diverged(*arguments, **options):
        calls.append(1)
        for batch in score(*arguments, **options):
            if len(calls) > 1:  # in the second epoch
                batch.logits[:, 0] = float("inf")
            yield batch

    monkeypatch.setattr(holdout, "score_dataset", diverged)
    with pytest.raises(UserError, match=r"diverged: 4 of 24 scores .* earlier epochs are kept"):
        train.main([*SMALL, *sets, "--out", str(run)])
    for name in ("expert", "expert-last"):
        assert read_card(run / name)["epoch"] == 1
        load_expert(run / name)


def test_a_full_disk_costs_no_expert_and_the_same_command_continues(sets, tmp_path, monkeypatch):
    run, write = tmp_path / "run", experts.safetensors.torch.save_file
    arguments = [*SMALL, *sets, "--out", str(run)]

    def full(state, path):
        if (run / "expert").exists():  # the first epoch's are written
            Path(path).write_bytes(b"half")
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        write(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(experts.safetensors.torch, "save_file", full)
        with pytest.raises(OSError, match=r"No space left on device: .*run/expert"):
            train.main(arguments)
    assert not list(run.glob(".*"))
    load_expert(run / "expert-last")
    assert train.main(arguments) == 0 and read_card(run / "expert-last")["epoch"] == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "memory is full; use a smaller --batch-size"),
        (torch._dynamo.exc.TorchDynamoException("no g++\n\nSet TORCHDYNAMO_VERBOSE=1"), r"\(no g\+\+\)"),
    ],
)
def test_a_device_without_memory_or_compiler_is_one_line(sets, tmp_path, monkeypatch, error, message):
    def fail(task, batch):
        raise error

    monkeypatch.setattr(ClassifyTask, "forward", fail)
    with pytest.raises(UserError, match=message):
        train.main([*SMALL, *sets, "--out", str(tmp_path / "run")])


@needs_fork
@pytest.mark.parametrize("accumulation", [1, 2])
def test_processes_end_together_when_one_has_no_readable_image(tmp_path, make_set, sets, accumulation):
    manifest = make_set("train", 24)
    batches = TrainBatches(24, 8, 1, seed=1, rank=1, world=2, accumulation=accumulation)
    paths = read_manifest(manifest)["image"]
    for _, index in list(batches)[accumulation]:  # the first pass of the second step
        spoil(Path(paths[index]))
    options = ["--accumulation", str(accumulation), "--seed", "1"]
    arguments = [*SMALL, "--train", str(manifest), *sets[2:], *options]

    def main() -> int:
        try:
            return train.main([*arguments, "--out", str(tmp_path / "two")])
        except UserError as error:
            return 2 if "none of the images of a batch can be read" in str(error) else 4

    assert statuses(fork(main, world=2)) == [2, 2]
    # A single process still has the other half of the batch.
    if accumulation == 1:
        assert train.main([*arguments, "--epochs", "1", "--out", str(tmp_path / "one")]) == 1


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(finetune="lora"), "lora does not work with FSDP"),
        (Recipe(sam_rho=0.1), "sam_rho does not work with FSDP"),
        (Recipe(ema=0.9), "averages of the weights and momentum teachers do not work with FSDP"),
        (Recipe(swa_start=1), "averages of the weights and momentum teachers do not work with FSDP"),
        (DistillRecipe(teacher_kind="momentum"), "averages of the weights and momentum teachers"),
    ],
)
def test_fsdp_refuses_what_needs_whole_weights_before_the_run_begins(
    sets, tmp_path, monkeypatch, recipe, message
):
    with pytest.raises(UserError, match=message):
        sharding.check(recipe)
    sharding.check(DistillRecipe())
    monkeypatch.setattr(sharding, "is_sharded", lambda accelerator: True)
    if recipe.ema:
        with pytest.raises(UserError, match=message):
            train.main([*SMALL, *sets, "--ema", "0.9", "--out", str(tmp_path / "run")])
        assert not (tmp_path / "run").exists()


def test_a_run_refused_before_its_first_step_binds_nobody_to_its_settings(sets, tmp_path):
    flags = [*SMALL, *sets, "--out", str(tmp_path / "run"), "--finetune", "last_n"]
    with pytest.raises(UserError, match="last_n 99"):
        train.main([*flags, "--last-n", "99"])
    assert train.main([*flags, "--last-n", "1"]) == 0
