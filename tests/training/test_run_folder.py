import copy
import os
import signal
import time

import pytest
from processes import fork, needs_fork, statuses
from training_runs import SMALL, weights

import train
from featdistill.command_line import UserError
from featdistill.records.provenance import Claim
from featdistill.training import run_folder
from featdistill.training.run_folder import RunFolder, git_commit
from featdistill.training.trainer import Trainer

DESCRIPTION = {
    "stage": 2,
    "recipe": {"name": "demo", "seed": 1, "workers": 2, "cache": None, "equalize": "a/equalise.json"},
    "data": {
        "train": [{"path": "a/train.csv", "sha256": "1"}],
        "val": [{"path": "a/val.csv", "sha256": "2"}],
    },
    "files": {"equalize": {"path": "a/equalise.json", "sha256": "4"}},
    "teacher": {"path": "a/expert", "weights_sha256": "3"},
    "versions": {"torch": "2.8"},
    "git_commit": None,
}


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "run")
    assert run.claim(DESCRIPTION, "auto") is Claim.NEW
    run.start(DESCRIPTION)
    return run


def changed(path: str, value: object) -> dict:
    """The description with the value at `outer.inner` replaced."""
    description = copy.deepcopy(DESCRIPTION)
    *outer, key = path.split(".")
    part = description
    for name in outer:
        part = part[int(name) if isinstance(part, list) else name]
    part[key] = value
    return description


@pytest.mark.parametrize(
    "path",
    [
        *("recipe.workers", "recipe.cache", "recipe.equalize", "data.train.0.path", "files.equalize.path"),
        *("teacher.path", "versions.torch", "git_commit"),
    ],
)
def test_a_run_continues_where_only_what_does_not_decide_the_result_has_changed(run, path):
    assert run.claim(changed(path, "other"), "auto") is Claim.UNFINISHED
    assert run.claim(changed(path, "other"), "auto", finished=True) is Claim.FINISHED


@pytest.mark.parametrize(
    "path",
    [
        *("stage", "recipe.seed", "data.train.0.sha256", "data.val.0.sha256", "files.equalize.sha256"),
        "teacher.weights_sha256",
    ],
)
def test_a_run_with_other_settings_data_or_teacher_is_refused_by_name(run, path):
    with pytest.raises(
        UserError, match=rf"different settings: {path} was .*, is \"other\"; choose another --out"
    ):
        run.claim(changed(path, "other"), "auto")


def test_a_damaged_checkpoint_never_replaces_a_whole_one(tmp_path):
    run = RunFolder(tmp_path)
    for step in (1, 2):
        run.save_state({"step": step})
    (tmp_path / "resume" / "state.pt").write_bytes(b"damaged")
    assert run.load_state()["step"] == 1
    run.save_state({"step": 3})
    (tmp_path / "resume" / "state.pt").write_bytes(b"damaged")
    assert RunFolder(tmp_path).load_state()["step"] == 1


def test_an_installed_package_has_no_commit_even_inside_another_checkout(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    installed = tmp_path / "venv" / "featdistill" / "training" / "run_folder.py"
    monkeypatch.setattr(run_folder, "__file__", str(installed))
    assert git_commit() is None


@pytest.mark.parametrize("name", ["expert", "expert-last", "resume"])
def test_a_folder_without_a_record_of_its_run_is_not_written_to(name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists and was not written by this command; choose another"):
        RunFolder(tmp_path).claim({}, "auto")
    assert RunFolder(tmp_path / "new").claim({}, "auto") is Claim.NEW


def test_two_runs_do_not_write_to_one_folder(sets, tmp_path):
    out = tmp_path / "run"
    with (
        RunFolder(out).locked(),
        pytest.raises(UserError, match="another process is training in"),
    ):
        train.main([*SMALL, *sets, "--out", str(out)])
    assert [path.name for path in out.iterdir()] == ["run.lock"]


@needs_fork
def test_a_lock_ends_with_its_process(tmp_path):
    def killed() -> None:
        with RunFolder(tmp_path).locked():
            if not os.fork():  # a loader worker may live a little longer
                time.sleep(20)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)

    assert statuses(fork(killed)) == [-signal.SIGKILL]
    with RunFolder(tmp_path).locked():
        pass


def test_epochs_shorter_than_the_time_between_checkpoints_write_none(sets, tmp_path, monkeypatch):
    class Killed(BaseException):
        """Stands for SIGKILL."""

    def step(trainer, stream):
        if trainer.scored_epochs == 1:
            raise Killed
        take_step(trainer, stream)

    take_step, whole, run = Trainer._step, tmp_path / "whole", tmp_path / "run"
    train.main([*SMALL, *sets, "--out", str(whole)])
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", step)
        with pytest.raises(Killed):
            train.main([*SMALL, *sets, "--out", str(run)])
    assert (run / "expert").is_dir() and not (run / "resume").exists()
    assert train.main([*SMALL, *sets, "--out", str(run)]) == 0
    assert weights(run) == weights(whole)
    assert RunFolder(run).load_state()["task"] is None
