import importlib.util
import json
import math

import pytest
import torch
from accelerate import Accelerator

from featdistill.command_line import UserError
from featdistill.training import log as training_log
from featdistill.training.log import TrainingLog, tracker_names
from featdistill.training.run_folder import RunFolder


@pytest.fixture
def log(tmp_path):
    return TrainingLog(RunFolder(tmp_path), Accelerator(cpu=True))


def lines(log: TrainingLog) -> list[dict]:
    return [json.loads(line) for line in (log.run.path / "metrics.jsonl").read_text().splitlines()]


def output(loss: float, **parts: float) -> dict[str, torch.Tensor]:
    return {key: torch.tensor(value) for key, value in {"loss": loss, **parts}.items()}


def test_a_line_holds_means_over_the_steps_that_were_taken(log):
    log.learning_rate = 0.5
    log.add([output(1.0, bce=0.5), output(2.0, bce=1.0)], gradient_norm=3.0)
    log.add_skipped()
    log.add([output(3.0, bce=1.5), output(4.0, bce=2.0)], gradient_norm=5.0)
    shown = log.write(3, 0)
    (line,) = lines(log)
    expected = {"step": 3, "epoch": 0, "loss": 2.5, "bce": 1.25, "learning_rate": 0.5}
    expected |= {"gradient_norm": 4.0, "skipped": 1}
    assert {key: line[key] for key in expected} == expected
    assert {"images_per_s", "data_wait"} <= line.keys() and "memory_gib" not in line
    assert shown["loss"] == "2.5000" and shown["bce"] == "1.2500"
    assert shown["lr"] == "5.0e-01" and shown["skipped"] == "1"


def test_a_line_of_skipped_steps_alone_has_no_loss_and_an_empty_one_is_not_written(log):
    assert log.write(0, 0) == {} and not (log.run.path / "metrics.jsonl").exists()
    log.add_skipped()
    log.write(1, 0)
    (line,) = lines(log)
    assert line["skipped"] == 1 and "loss" not in line and "gradient_norm" not in line


def test_a_part_that_is_not_finite_is_null_in_the_file(log):
    log.add([output(1.0, share=math.nan)], gradient_norm=1.0)
    log.write(1, 0)
    assert lines(log)[0]["share"] is None


def test_a_restored_log_writes_the_line_of_an_undisturbed_one(log):
    log.add([output(1.0)], gradient_norm=3.0)
    log.add_skipped()
    state = log.state()
    other = TrainingLog(log.run, log.accelerator)
    other.restore(state)
    for half in (log, other):
        half.add([output(3.0)], gradient_norm=5.0)
        half.write(3, 0)
    first, second = lines(log)
    timed = ("images_per_s", "data_wait")
    assert {key: value for key, value in first.items() if key not in timed} == {
        key: value for key, value in second.items() if key not in timed
    }
    assert first["loss"] == 2.0 and first["skipped"] == 1


def test_a_tracker_that_is_unknown_or_not_installed_is_one_clear_error(monkeypatch):
    assert tracker_names(None) == tracker_names("") == []
    with pytest.raises(UserError, match=r"unknown tracker 'tensorbord' \(did you mean tensorboard\?\)"):
        tracker_names("tensorbord")
    monkeypatch.setattr(training_log, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(UserError, match="tracker wandb is not installed; run pip install"):
        tracker_names("wandb")
    monkeypatch.setattr(training_log, "get_available_trackers", lambda: ["tensorboard", "wandb"])
    assert tracker_names("tensorboard, wandb") == ["tensorboard", "wandb"]


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard_gets_the_numbers_of_each_line(tmp_path):
    from accelerate.utils import ProjectConfiguration
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from featdistill.training.recipe import Recipe

    run = RunFolder(tmp_path / "run")
    accelerator = Accelerator(
        cpu=True,
        log_with=tracker_names("tensorboard"),
        project_config=ProjectConfiguration(logging_dir=str(run.path / "tensorboard")),
    )
    assert not run.path.exists()
    run.path.mkdir()
    training_log.start_trackers(accelerator, Recipe(), run)
    log = TrainingLog(run, accelerator)
    log.add([output(1.5)], gradient_norm=1.0)
    log.write(4, 0)
    accelerator.end_training()
    events = EventAccumulator(str(run.path / "tensorboard" / "featdistill")).Reload()
    (event,) = events.Scalars("loss")
    assert (event.step, event.value) == (4, 1.5)
