"""Scores of a manifest in parts: whatever happens to the workers, every image is scored once, and alike."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from conftest import smooth_picture
from PIL import Image
from tiny_experts import save_tiny_expert

import predict
from data_prep import combine
from featdistill.__main__ import calibrate
from featdistill.command_line import UserError
from featdistill.inference import parts as parts_module
from featdistill.inference.parts import score_parts
from featdistill.inference.predictor import load_ensemble
from featdistill.records.manifest import make_manifest, read_manifest, write_manifest
from featdistill.records.predictions import read_errors, read_predictions, read_sidecar

CHAOS_S = float(os.environ.get("FEATDISTILL_CHAOS_S", "6"))
BROKEN = "broken.jpg"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """40 parts of 3 images, one of which is broken, as a CSV and in parts; and an expert."""
    root = tmp_path_factory.mktemp("parts")
    names = [f"{number:03d}.jpg" for number in range(119)] + [BROKEN]
    for number, name in enumerate(names):
        Image.fromarray(smooth_picture(number, 40, 48)).save(root / name, quality=90)
    (root / BROKEN).write_bytes(b"\xff\xd8\xff not an image")
    labels = [number % 2 for number in range(len(names))]
    paths = [str(root / name) for name in names]
    write_manifest(make_manifest({"image": paths, "name": names, "label": labels}), root / "all.csv")
    settings = ["--no-duplicates-check", "--rows-per-part", "3", "--out", str(root / "parts")]
    assert combine.main([str(root / "all.csv"), *settings]) == 0
    save_tiny_expert(root / "expert", size=48)
    return root


@pytest.fixture(scope="module")
def predictor(root):
    return load_ensemble([root / "expert"], device="cpu", workers=0)


@pytest.fixture(scope="module")
def undisturbed(root, predictor):
    """The bytes of all parts of the output of one process."""
    assert score_parts(predictor, str(root / "parts"), str(root / "once"), show=False) == 1
    return contents(root / "once")


@pytest.fixture(autouse=True)
def handlers():
    previous = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, previous)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def test_every_image_of_the_manifest_has_a_row_and_the_score_of_a_plain_run(root, undisturbed, tmp_path):
    rows = pd.concat([pq.read_table(root / "once" / name).to_pandas() for name in undisturbed])
    assert rows["name"].tolist() == read_manifest(root / "all.csv")["name"].tolist()
    assert rows["name"][rows["error"].notna()].tolist() == [BROKEN]
    assert rows["score"].isna().tolist() == (rows["name"] == BROKEN).tolist()
    out = tmp_path / "plain.csv"
    assert predict.main(["--manifest", str(root / "all.csv"), *flags(root, out)]) == 1
    plain = read_predictions(out)
    good = rows[rows["error"].isna()]
    assert plain["name"].tolist() == good["name"].tolist()
    np.testing.assert_allclose(plain["score"], good["score"], rtol=0, atol=1e-6)


def test_merged_scores_are_a_predictions_file_that_a_plain_run_accepts(root, undisturbed, tmp_path, capsys):
    out = tmp_path / "merged.csv"
    assert predict.main(["--out", str(root / "once"), "--merge", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 119 scores\n"
    merged = read_predictions(out)
    rows = pd.concat([pq.read_table(root / "once" / name).to_pandas() for name in undisturbed])
    assert merged["score"].tolist() == rows["score"].dropna().tolist()
    assert merged["expert" if "expert" in merged else root.name].tolist() == merged["score"].tolist()
    assert [name for name, _ in read_errors(out)] == [BROKEN]
    assert read_sidecar(out)["manifest"]["path"] == str(root / "parts")
    assert predict.main(["--manifest", str(root / "parts"), *flags(root, out)]) == 1
    assert "finished; nothing to do" in capsys.readouterr().out


def work(predictor, manifest, out, lease_s):
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    score_parts(predictor, manifest, out, lease_s=lease_s, show=False)


def test_workers_that_are_killed_and_started_at_random_score_every_part_once(
    root, predictor, undisturbed, tmp_path, monkeypatch
):
    context, rng, out = multiprocessing.get_context("fork"), random.Random(0), tmp_path / "out"
    real = parts_module.score_dataset

    def slowly(*args, **kwargs):
        for batch in real(*args, **kwargs):
            time.sleep(CHAOS_S / 15)
            yield batch

    # Parts take so long that most kills hit one under way.
    monkeypatch.setattr(parts_module, "score_dataset", slowly)
    workers, killed, end = [], 0, time.monotonic() + CHAOS_S
    try:
        while time.monotonic() < end:
            workers = [worker for worker in workers if worker.is_alive()]
            while len(workers) < 8 and len(contents(out)) != len(undisturbed):
                arguments = (predictor, str(root / "parts"), str(out), 1.0)
                workers.append(context.Process(target=work, args=arguments, daemon=True))
                workers[-1].start()
            time.sleep(rng.uniform(0.05, 0.4))
            if workers and rng.random() < 0.5:
                victim = rng.choice(workers)
                os.kill(victim.pid, rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
                killed += 1
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    assert killed > 3
    monkeypatch.setattr(parts_module, "score_dataset", real)
    assert score_parts(predictor, str(root / "parts"), str(out), lease_s=1.0, show=False) == 1
    assert contents(out) == undisturbed
    # A worker killed after writing its part and before removing the lease leaves the lease behind.
    left = [name for name in os.listdir(out / "leases") if not name.startswith(".")]
    assert {name.rpartition(".")[0] for name in left} <= undisturbed.keys()


def test_a_slow_part_does_not_hold_the_others_up(root, predictor, undisturbed, tmp_path, monkeypatch):
    real, out, order = parts_module._logits, tmp_path / "out", []

    def logits(predictor, rows, sidecar, title, show):
        if title == "part-000007":
            deadline = time.monotonic() + 60
            while len(contents(out)) < len(undisturbed) - 1 and time.monotonic() < deadline:
                time.sleep(0.02)
            order.append(len(contents(out)))
        return real(predictor, rows, sidecar, title, show)

    monkeypatch.setattr(parts_module, "_logits", logits)
    context = multiprocessing.get_context("fork")
    arguments = (predictor, str(root / "parts"), str(out), 60.0)
    workers = [context.Process(target=work, args=arguments, daemon=True) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(90)
    # The slow part waited until all others were written, so it was the last one.
    assert contents(out) == undisturbed
    newest = max((out / name for name in undisturbed), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name == "part-000007.parquet"


def test_a_new_run_scores_new_parts_only(root, predictor, undisturbed, tmp_path, monkeypatch):
    manifest, out = tmp_path / "manifest", tmp_path / "out"
    shutil.copytree(root / "parts", manifest)
    later = [manifest / name for name in list(undisturbed)[30:]]
    kept = {path.name: path.read_bytes() for path in later}
    for path in later:
        path.unlink()
    assert score_parts(predictor, str(manifest), str(out), show=False) == 0
    assert contents(out) == {name: undisturbed[name] for name in list(undisturbed)[:30]}
    for name, data in kept.items():
        (manifest / name).write_bytes(data)
    scored, real = [], parts_module._score_part
    monkeypatch.setattr(parts_module, "_score_part", lambda *args: (scored.append(args[2]), real(*args))[1])
    assert score_parts(predictor, str(manifest), str(out), show=False) == 1
    assert sorted(scored) == sorted(kept)
    assert contents(out) == undisturbed


def flags(root, out):
    return ["--experts", str(root / "expert"), "--out", str(out), "--device", "cpu", "--workers", "0"]


def test_status_says_how_far_it_is(root, undisturbed, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(root / "once", out)
    for name in list(undisturbed)[:4]:
        (out / name).unlink()
    (out / "leases" / f"{next(iter(undisturbed))}.2").write_text('{"worker": "host-1", "beat": 3}')
    assert predict.main(["--out", str(out), "--status"]) == 0
    text = capsys.readouterr().out
    lines = [line.replace("|", " ").split() for line in text.splitlines()]
    for line in (["finished", "36", "108"], ["being", "scored", "1", "3"], ["waiting", "3", "9"]):
        assert line in lines
    assert "1 image could not be read" in text and "part-000000.parquet: host-1" in text
    with pytest.raises(UserError, match=r"4 parts not scored yet, such as part-000000.parquet; run predict"):
        predict.main(["--out", str(out), "--merge", str(tmp_path / "x.csv")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--tta", "hflip"], 'was produced with different settings: tta was "none", is "hflip"'),
        (["--stability", "2"], "--stability needs predictions in one file"),
    ],
)
def test_other_settings_are_refused(root, undisturbed, change, message):
    with pytest.raises(UserError, match=message):
        predict.main(["--manifest", str(root / "parts"), *flags(root, root / "once"), *change])
    assert contents(root / "once") == undisturbed


def test_a_changed_part_is_noticed(root, predictor, undisturbed, tmp_path):
    manifest, out = tmp_path / "manifest", tmp_path / "out"
    shutil.copytree(root / "parts", manifest)
    assert score_parts(predictor, str(manifest), str(out), show=False) == 1
    shutil.copy(manifest / "part-000001.parquet", manifest / "part-000000.parquet")
    message = (
        r"out/part-000000.parquet has the scores of other rows than .*manifest/part-000000.parquet; choose"
    )
    with pytest.raises(UserError, match=message):
        score_parts(predictor, str(manifest), str(out), show=False)
    assert contents(out) == undisturbed
    with pytest.raises(UserError, match=r"part-000000.parquet has changed since; remove .*part-000000"):
        predict.main(["--out", str(out), "--merge", str(tmp_path / "x.csv")])


def test_another_manifest_with_parts_of_the_same_names_is_refused(root, predictor, undisturbed, tmp_path):
    rows = read_manifest(root / "all.csv")[5:15]
    write_manifest(rows, tmp_path / "other.csv")
    flags = ["--no-duplicates-check", "--rows-per-part", "3", "--out", str(tmp_path / "other")]
    assert combine.main([str(tmp_path / "other.csv"), *flags]) == 0
    with pytest.raises(UserError, match="has the scores of other rows than"):
        score_parts(predictor, str(tmp_path / "other"), str(root / "once"), show=False)
    assert contents(root / "once") == undisturbed


def test_merging_replaces_nothing_but_the_same_predictions(root, undisturbed, tmp_path):
    target = tmp_path / "mine.csv"
    target.write_text("mine")
    with pytest.raises(UserError, match="already exists and was not written by this command; name another"):
        predict.main(["--out", str(root / "once"), "--merge", str(target)])
    assert target.read_text() == "mine"
    with pytest.raises(UserError, match=r"writes a file on this machine, not s3://bucket/x\.csv"):
        predict.main(["--out", str(root / "once"), "--merge", "s3://bucket/x.csv"])
    with pytest.raises(UserError, match="--status and --merge cannot be combined; use one at a time"):
        predict.main(["--out", str(root / "once"), "--status", "--merge", str(target)])
    again = tmp_path / "again.csv"
    for _ in range(2):
        assert predict.main(["--out", str(root / "once"), "--merge", str(again)]) == 0


def test_a_damaged_part_of_the_output_is_named(root, undisturbed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(root / "once", out)
    data = bytearray((out / "part-000002.parquet").read_bytes())
    data[4:60] = bytes(56)
    (out / "part-000002.parquet").write_bytes(data)
    with pytest.raises(UserError, match=r"out/part-000002.parquet is damaged; remove it and score again"):
        predict.main(["--out", str(out), "--merge", str(tmp_path / "x.csv")])


def test_scores_without_a_part_of_the_manifest_are_told(root, predictor, undisturbed, tmp_path, caplog):
    manifest, out = tmp_path / "manifest", tmp_path / "out"
    shutil.copytree(root / "parts", manifest)
    shutil.copytree(root / "once", out)
    (manifest / "part-000003.parquet").unlink()
    assert score_parts(predictor, str(manifest), str(out), show=False) == 1
    assert "scores that the manifest has no part for, such as part-000003.parquet" in caplog.text


def test_a_relative_manifest_is_found_from_anywhere(
    root, predictor, undisturbed, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(root)
    assert score_parts(predictor, "parts", str(tmp_path / "out"), show=False) == 1
    monkeypatch.chdir(tmp_path)
    assert predict.main(["--out", "out", "--status"]) == 0
    assert "1 image could not be read" in capsys.readouterr().out


def test_a_foreign_folder_is_left_alone(root, predictor, tmp_path):
    (tmp_path / "part-000000.parquet").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"already holds part-000000\.parquet, but no predictions\.json"):
        score_parts(predictor, str(root / "parts"), str(tmp_path), show=False)
    (tmp_path / "predictions.json").write_text("[]")
    with pytest.raises(UserError, match="is not the record of predictions"):
        score_parts(predictor, str(root / "parts"), str(tmp_path), show=False)
    assert (tmp_path / "part-000000.parquet").read_bytes() == b"mine"


def test_verdicts_are_columns(root, undisturbed, tmp_path):
    merged, calibrator = tmp_path / "merged.csv", tmp_path / "calibrator.json"
    predict.main(["--out", str(root / "once"), "--merge", str(merged)])
    labeled = read_predictions(merged)
    higher = (labeled["score"] > labeled["score"].median()).astype(int)
    labels = make_manifest({"image": [*labeled["name"]], "name": [*labeled["name"]], "label": [*higher]})
    write_manifest(labels, tmp_path / "labels.csv")
    settings = ["--labels", str(tmp_path / "labels.csv"), "--fpr", "0.2", "--out", str(calibrator)]
    calibrate(["--predictions", str(merged), *settings])
    out = tmp_path / "out"
    settings = [*flags(root, out), "--calibrator", str(calibrator)]
    assert predict.main(["--manifest", str(root / "parts"), *settings]) == 1
    rows = pd.concat([pq.read_table(out / name).to_pandas() for name in undisturbed])
    threshold = json.loads(calibrator.read_text())["ai_threshold"]
    logits = np.log(rows["score"] / (1 - rows["score"]))
    called = rows["verdict"] == "AI"
    np.testing.assert_array_equal(called, (logits > threshold) & rows["error"].isna())
    assert rows["verdict"].isna().tolist() == rows["error"].notna().tolist()
    assert called.any() and not called.all()
