"""Banks hold what the backbone returns, are the same however they are made, and refuse what does not fit."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from processes import fork, needs_fork, statuses

from featdistill.__main__ import main
from featdistill.bank import embed, writing
from featdistill.bank.embed import Settings
from featdistill.bank.joined import Joined
from featdistill.bank.store import open_bank
from featdistill.bank.views import ViewPlan
from featdistill.command_line import UserError
from featdistill.inference import jobs
from featdistill.inference.predictor import load_ensemble
from featdistill.inference.processes import Processes
from featdistill.models.expert import create_expert, save_expert
from featdistill.models.features import Atom
from featdistill.recipe_groups import Augmentation
from featdistill.records.manifest import read_manifest, write_manifest

VIEWS = ViewPlan(2, "training", 3, Augmentation(distortions="official"), 16)
FEATURES = ("pool", "projection", "class+mean:1,2")


def settings(**changes) -> Settings:
    values = {"backbone": "tiny_clip", "weights": "random", "input_size": 32, "features": FEATURES}
    values |= {"views": VIEWS, "dtype": "float32", "batch_size": 4, "workers": 0, "device": "cpu"}
    return Settings(**values | changes)


def make(manifest: Path, out: Path, **changes) -> int:
    return Processes().run(lambda processes: embed.embed(settings(**changes), [manifest], out, processes))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def manifest(make_set) -> Path:
    """Ten images, of which the sixth cannot be read."""
    path = make_set("some", 10)
    (path.parent / "00005.jpg").write_bytes(b"\xff\xd8\xff nothing")
    return path


def test_a_bank_of_an_expert_gives_the_logits_of_predict(make_set, tmp_path):
    manifest = make_set("some", 10)
    torch.manual_seed(0)
    expert = create_expert("tiny_clip", "random", input_size=32).eval()
    save_expert(expert, tmp_path / "expert")
    ensemble = load_ensemble([tmp_path / "expert"], device="cpu", workers=0, batch_size=4)
    jobs.predict(ensemble, manifest, tmp_path / "scores.csv", Processes())
    scores = pd.read_csv(tmp_path / "scores.csv")["score"].to_numpy()
    assert make(manifest, tmp_path / "bank", expert=str(tmp_path / "expert"), features=["projection"]) == 0
    bank = open_bank(tmp_path / "bank")
    assert bank.preprocessing == expert.preprocessing and bank.spec == expert.spec
    features = torch.from_numpy(bank.values(bank.feature("projection")))
    with torch.inference_mode():
        mine = torch.sigmoid(expert.head(features)[:, 0].double()).numpy()
    assert np.abs(mine - scores).max() < 1e-7
    assert len(set(scores)) > 5


def test_a_feature_is_made_of_its_atoms_and_broken_rows_are_nan(manifest, tmp_path, caplog):
    caplog.set_level("INFO")
    assert make(manifest, tmp_path / "bank", keep_tokens=True, tokens_before_last=1) == 1
    assert "9 images embedded" in caplog.text
    bank = open_bank(tmp_path / "bank")
    assert bank.views == ["clean", "training-1", "training-2", "control"]
    names = [atom.name for atom in bank.atoms]
    assert names == ["pool", "projection", "class-1", "mean-1", "class-2", "mean-2", "tokens-2", "hidden-1"]
    assert bank.array(Atom("tokens", 2)).shape == (10, 4, 4, 96)
    assert bank.array(Atom("hidden", 1)).shape == (10, 4, 5, 96)
    assert bank.rows["broken"].tolist() == [row == 5 for row in range(10)]
    assert len(Joined([bank]).rows) == 9 and "without 1 image that could not be read" in caplog.text
    assert bank.rows["label"].tolist() == [0, 1] * 5 and all(map(os.path.isabs, bank.rows["image"]))
    for atom in bank.atoms:
        array = bank.array(atom)
        assert np.isnan(array[5]).all() and np.isfinite(np.delete(array, 5, axis=0)).all()
        assert len(np.unique(array[0].reshape(4, -1), axis=0)) == 4
    values = bank.values(bank.feature("class+mean:1,2"), "training-2")
    parts = [bank.array(Atom(kind, layer))[:, 2] for layer in (1, 2) for kind in ("class", "mean")]
    assert np.array_equal(values, np.concatenate(parts, axis=1), equal_nan=True)
    tokens = bank.array(Atom("tokens", 2))[:, 1].mean(1)
    assert np.allclose(
        tokens, bank.values(bank.feature("mean_tokens"), "training-1"), atol=1e-5, equal_nan=True
    )
    (name, reason), drawn = pd.read_csv(tmp_path / "bank" / "errors.csv").iloc[0], list(bank.drawn())
    assert name == "00005.jpg" and reason and drawn[5] == [[]] * 4
    assert all(chains[0] == chains[3] == [] for chains in drawn)
    assert all(len(chain[0]) == 2 for chains in drawn for chain in chains[1:3] if chain)
    assert any(chains[1] for chains in drawn)


def test_views_and_other_features_do_not_change_a_value(manifest, tmp_path):
    make(manifest, tmp_path / "full")
    make(manifest, tmp_path / "small", views=ViewPlan(), features=["projection+pool"])
    full, small = open_bank(tmp_path / "full"), open_bank(tmp_path / "small")
    assert small.views == ["clean"] and small.fingerprint == full.fingerprint
    assert small.record["weights"] == full.record["weights"]
    for kind in ("pool", "projection"):
        mine = small.array(Atom(kind))[:, 0]
        assert np.array_equal(mine, full.array(Atom(kind))[:, 0], equal_nan=True)


def test_float16_is_the_rounded_float32_and_refuses_what_it_cannot_hold(manifest, tmp_path, monkeypatch):
    make(manifest, tmp_path / "full")
    make(manifest, tmp_path / "half", dtype="float16")
    full, half = (open_bank(tmp_path / name).array(Atom("mean", 2)) for name in ("full", "half"))
    assert half.dtype == np.float16 and np.array_equal(half, full.astype(np.float16), equal_nan=True)
    read = embed.read_atoms
    larger = 1e6
    monkeypatch.setattr(
        embed, "read_atoms", lambda *args: {atom: value * larger for atom, value in read(*args).items()}
    )
    with pytest.raises(UserError, match=r"beyond the range of float16 \(65504\); use --dtype float32"):
        make(manifest, tmp_path / "too large", dtype="float16")
    larger = float("nan")
    with pytest.raises(UserError, match="not a finite number"):
        make(manifest, tmp_path / "nothing")


def test_the_weights_of_a_bank_can_be_built_again(manifest, tmp_path):
    make(manifest, tmp_path / "bank")
    bank = open_bank(tmp_path / "bank")
    again = embed.state_hash(bank.backbone())
    assert again == bank.record["weights"]["sha256"]
    bank.record["weights"]["sha256"] = "0"
    with pytest.raises(UserError, match="are not those of the bank"):
        bank.backbone()


@needs_fork
@pytest.mark.parametrize("stage", ["arrays", "journal", "finish"])
def test_a_killed_run_continues_to_the_same_bytes(manifest, tmp_path, monkeypatch, stage):
    make(manifest, tmp_path / "whole")

    def killed() -> None:
        add, write_json = writing.BankWriter._add, writing.atomic.write_json

        def stop(self, line):
            add(self, line)
            if self.done.sum() == 2:
                path = self._journal
                if stage == "arrays":  # the second batch is written, its line is not
                    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
                else:  # part of its line is
                    path.write_bytes(path.read_bytes()[:-9])
                os.kill(os.getpid(), signal.SIGKILL)

        def stop_at_end(path, value, **options):
            if value.get("finished"):
                os.kill(os.getpid(), signal.SIGKILL)
            write_json(path, value, **options)

        if stage == "finish":
            monkeypatch.setattr(writing.atomic, "write_json", stop_at_end)
        else:
            monkeypatch.setattr(writing.BankWriter, "_add", stop)
        make(manifest, tmp_path / "killed")

    assert statuses(fork(killed)) == [-signal.SIGKILL]
    with pytest.raises(UserError, match="is not finished; run its embed command again to continue"):
        open_bank(tmp_path / "killed")
    batches = []
    write = writing.BankWriter.write
    monkeypatch.setattr(
        writing.BankWriter,
        "write",
        lambda self, number, *rest: batches.append(number) or write(self, number, *rest),
    )
    assert make(manifest, tmp_path / "killed") == 1
    assert batches == ([] if stage == "finish" else [1, 2])
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@needs_fork
def test_several_processes_make_the_bytes_of_one(manifest, tmp_path):
    make(manifest, tmp_path / "one")
    assert statuses(fork(lambda: make(manifest, tmp_path / "two"), world=2)) == [1, 0]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_finished_bank_follows_the_columns_of_its_manifest(manifest, tmp_path, capsys):
    make(manifest, tmp_path / "bank")
    before = (tmp_path / "bank" / "pool.npy").stat().st_mtime_ns
    rows = read_manifest(manifest)
    write_manifest(rows.assign(fold=["1"] * 10, label=[1] * 10), manifest)
    assert make(manifest, tmp_path / "bank") == 1
    assert "finished; nothing to do" in capsys.readouterr().out
    bank = open_bank(tmp_path / "bank")
    assert bank.rows["fold"].tolist() == ["1"] * 10 and bank.rows["label"].sum() == 10
    assert (tmp_path / "bank" / "pool.npy").stat().st_mtime_ns == before
    hashed = writing.atomic.sha256_of(tmp_path / "bank" / "manifest.csv")
    assert bank.record["files"]["manifest.csv"] == hashed
    write_manifest(rows[::-1], manifest)
    with pytest.raises(UserError, match="was produced with different settings: manifests"):
        make(manifest, tmp_path / "bank")


def test_other_settings_are_refused(manifest, tmp_path):
    make(manifest, tmp_path / "bank", views=ViewPlan())
    for changes in ({"batch_size": 3}, {"features": ["pool"]}, {"dtype": "float16"}, {"input_size": 48}):
        with pytest.raises(UserError, match="was produced with different settings"):
            make(manifest, tmp_path / "bank", views=ViewPlan(), **changes)
    with pytest.raises(
        UserError, match=r'settings: features was \["pool".*\], is \["pool"\]; kept was \["pool", "projection'
    ):
        make(manifest, tmp_path / "bank", views=ViewPlan(), features=["pool"])
    same = ["pool", "projection", "class+mean:1", "class+mean:2"]
    assert make(manifest, tmp_path / "bank", views=ViewPlan(), features=same) == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("Dear ...")
    with pytest.raises(UserError, match="already exists and was not written by this command"):
        make(manifest, tmp_path / "other")


def test_a_full_disk_shows_before_the_work(manifest, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(UserError, match=r"No space left on device .*make room, or keep fewer"):
            make(manifest, tmp_path / "bank")
    shutil.rmtree(tmp_path / "bank")
    with monkeypatch.context() as patch:
        patch.setattr(writing.BankWriter, "_cast", full)
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'bank'}'"):
            make(manifest, tmp_path / "bank")
    assert make(manifest, tmp_path / "bank") == 1


def test_what_is_not_a_bank_is_refused(manifest, tmp_path):
    with pytest.raises(UserError, match="is not a bank: it has no bank"):
        open_bank(tmp_path)
    make(manifest, tmp_path / "bank", features=["pool"], views=ViewPlan())
    bank = open_bank(tmp_path / "bank")
    with pytest.raises(UserError, match="does not hold mean-2, only pool; embed with it"):
        bank.feature("mean_tokens")
    with pytest.raises(UserError, match="has no view control, only clean"):
        bank.values(bank.feature("pool"), "control")
    (tmp_path / "bank" / "pool.npy").write_bytes(b"short")
    with pytest.raises(UserError, match=r"pool\.npy has changed since it was written"):
        bank.feature("pool")
    record = json.loads((tmp_path / "bank" / "bank.json").read_text())
    (tmp_path / "bank" / "bank.json").write_text(json.dumps(record | {"format": 0}))
    with pytest.raises(UserError, match="has format 0; this version reads format 1; "):
        open_bank(tmp_path / "bank")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--manifest", "nowhere.csv"], "manifest nowhere.csv does not exist"),
        (["--views", "2"], "needs --distortions"),
        (["--distortions", "official"], "with --views 2 or more only"),
        (["--views", "2", "--distortions", "oficial"], "did you mean official"),
        (
            ["--views", "2", "--distortions", "none", "--draw", "evaluation", "--flip", "0"],
            "--draw training only",
        ),
        (["--weights", "nowhere.safetensors"], "weights file nowhere.safetensors does not exist"),
        (["--features", "registers"], "has no registers"),
        (["--tokens-before-last", "2"], "between 1 and 1"),
        (["--precision", "fp8"], "needs fp32, bf16 or fp16"),
    ],
)
def test_bad_input_ends_in_one_line(manifest, tmp_path, flags, message):
    given = ["--backbone", "tiny_clip", "--weights", "random", "--manifest", str(manifest)]
    given = [
        word for pair in zip(given[::2], given[1::2], strict=True) if pair[0] not in flags for word in pair
    ]
    with pytest.raises(UserError, match=message):
        main(["embed", *given, "--out", str(tmp_path / "bank"), "--device", "cpu", *flags])
    assert not (tmp_path / "bank").exists()


def test_names_that_repeat_between_manifests_are_refused(make_set, tmp_path):
    first, second = make_set("one", 4), make_set("two", 4)
    with pytest.raises(UserError, match=r"the name 00000.jpg appears in two manifests \(4 repeated names\)"):
        embed.embed(settings(), [first, second], tmp_path / "bank", Processes())


def test_the_command_makes_the_bank(manifest, tmp_path):
    arguments = ["--backbone", "tiny_clip", "--weights", "random", "--input-size", "32", "--manifest"]
    arguments += [str(manifest), "--views", "3", "--distortions", "official", "--features", *FEATURES]
    arguments += ["--control-side", "16", "--seed", "3", "--dtype", "float32", "--batch-size", "4"]
    arguments += ["--workers", "0", "--device", "cpu"]
    assert main(["embed", *arguments, "--out", str(tmp_path / "command")]) == 1
    make(manifest, tmp_path / "bank")
    assert contents(tmp_path / "command") == contents(tmp_path / "bank")
