"""What counts is which images a run is trained on, not where they are."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from quoted_commands import ROOT
from training_runs import SMALL, SMALL_STAGE_2, weights

import train
from data_prep import combine, equalize
from featdistill.command_line import UserError
from featdistill.models.expert import create_expert, save_expert
from featdistill.records.manifest import fingerprint, read_manifest
from featdistill.training.trainer import Trainer


def stopped_after_the_first_epoch(arguments: list[str], monkeypatch) -> None:
    score = Trainer._score_epoch

    def stop(trainer):
        score(trainer)
        trainer.must_stop = True

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_score_epoch", stop)
        assert train.main(arguments) == 0


@pytest.mark.parametrize("absolute", [False, True])
def test_a_run_continues_after_its_data_have_moved(make_set, tmp_path, monkeypatch, absolute):
    data = make_set("train", 24).parent
    settings = tmp_path / "equal" / "equalise.json"
    equalize.main([str(data / "manifest.csv"), "--out", str(settings.parent), "--workers", "1"])
    shutil.move(settings, data / "equalise.json")

    def arguments(folder: Path, run: str) -> list[str]:
        if absolute:
            rows = pd.read_csv(folder / "manifest.csv")
            rows["image"] = [str(folder / Path(image).name) for image in rows["image"]]
            rows.to_csv(folder / "manifest.csv", index=False)
        manifest = str(folder / "manifest.csv")
        equal = ["--equalize", str(folder / "equalise.json")]
        return [*SMALL, "--train", manifest, "--val", manifest, *equal, "--out", str(tmp_path / run)]

    train.main(arguments(data, "whole"))
    stopped_after_the_first_epoch(arguments(data, "run"), monkeypatch)
    moved = Path(shutil.move(data, tmp_path / "elsewhere"))
    assert train.main(arguments(moved, "run")) == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_run_from_manifests_in_parts_is_the_one_from_files(sets, tmp_path):
    in_parts = list(sets)
    for at in (1, 3):
        in_parts[at] = str(tmp_path / f"parts{at}")
        flags = ["--no-duplicates-check", "--rows-per-part", "8", "--out", in_parts[at]]
        assert combine.main([sets[at], *flags]) == 0
    for name, data in (("files", sets), ("parts", in_parts)):
        train.main([*SMALL, *data, "--epochs", "1", "--out", str(tmp_path / name)])
    assert weights(tmp_path / "parts") == weights(tmp_path / "files")


def test_other_images_labels_or_contents_are_other_data(make_set):
    path = make_set("train", 6)
    rows = read_manifest(path)
    same = fingerprint(rows)
    assert fingerprint(rows.assign(licence="MIT", generator="x", distortions="[]")) == same
    first = rows["image"][0]
    others = [
        rows.assign(label=1 - rows["label"]),
        rows.assign(name="new_" + rows["name"]),
        rows.assign(group="a"),
        rows.iloc[1:],
        rows.iloc[::-1],
        rows.assign(image=[first.replace(Path(first).name, "missing.jpg"), *rows["image"][1:]]),
    ]
    hashes = {fingerprint(frame) for frame in others}
    assert len(hashes) == len(others) and same not in hashes
    with open(first, "ab") as file:
        file.write(b"more")
    assert fingerprint(rows) != same


def test_the_backbones_weights_may_move_too(sets, tmp_path, monkeypatch):
    save_expert(create_expert("timm:test_vit", "random"), tmp_path / "expert")
    state = {}
    import safetensors.torch

    for key, value in safetensors.torch.load_file(tmp_path / "expert" / "expert.safetensors").items():
        if key.startswith("backbone.model."):
            state[key.removeprefix("backbone.model.")] = value
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    common = [*SMALL, *sets, "--backbone", "timm:test_vit", "--out", str(tmp_path / "run"), "--weights"]
    stopped_after_the_first_epoch([*common, str(tmp_path / "weights.safetensors")], monkeypatch)
    os.rename(tmp_path / "weights.safetensors", tmp_path / "other.safetensors")
    assert train.main([*common, str(tmp_path / "other.safetensors")]) == 0
    with pytest.raises(UserError, match=r"different settings: recipe\.weights was .*, is \"random\""):
        train.main([*common, "random"])


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("train.py", ["--weights", "/none/at.pth"], "weights file /none/at.pth does not exist"),
        ("train.py", ["--equalize", "/none/at.json"], "cannot read /none/at.json"),
        ("train.py", ["--val", "/none/at.csv"], "manifest /none/at.csv does not exist"),
        ("distill.py", ["--teacher", "/none"], "/none is not an expert"),
    ],
)
def test_a_missing_path_is_told_before_pytorch_is_loaded(sets, tmp_path, script, options, message):
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    data = sets[:2] if "--val" in options else sets
    small = SMALL_STAGE_2 if script == "distill.py" else SMALL
    command = [str(ROOT / script), *small, *data, "--out", str(tmp_path / "run"), *options]
    ended = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and message in ended.stderr and ended.stderr.count("\n") == 1
    assert ended.stdout.splitlines()[-1] == "False"
