"""Scores by Ray Data are those of the workers of predict.py, also when an actor is killed."""

import builtins
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.dataset
import pytest
import torch
from conftest import smooth_picture
from PIL import Image

from featdistill.__main__ import main
from featdistill.command_line import UserError
from featdistill.inference.parts import score_parts
from featdistill.inference.predictor import load_ensemble
from featdistill.models.expert import create_expert, save_expert
from featdistill.records.parts import part_name, table_bytes
from featdistill.storage import Folder

COUNT = 2000


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """4 parts of 500 rows of few images, one of them broken; and an expert."""
    root = tmp_path_factory.mktemp("ray")
    for number in range(7):
        Image.fromarray(smooth_picture(number, 40, 48)).save(root / f"{number}.jpg", quality=90)
    (root / "3.jpg").write_bytes(b"\xff\xd8\xff not an image")
    names = [f"n{number:04d}" for number in range(COUNT)]
    images = [f"../{number % 7}.jpg" for number in range(COUNT)]
    for number in range(4):
        rows = slice(number * 500, number * 500 + 500)
        data = table_bytes({"image": images[rows], "name": names[rows]})
        Folder(root / "parts").write(part_name(number), data)
    torch.manual_seed(0)
    save_expert(create_expert("tiny_clip", "random", input_size=48).eval(), root / "expert")
    return root


def score(ray, root, out, *more):
    """Score on two CPUs, as `python -m featdistill ray` does."""
    ray.shutdown()
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, _node_ip_address="127.0.0.1")
    flags = ["--manifest", root / "parts", "--out", out, "--experts", root / "expert", "--batch-size", "1"]
    return main(["ray", *map(str, flags), "--rows-per-call", "50", *more])


def by_name(folder):
    frame = pyarrow.dataset.dataset([str(path) for path in Path(folder).glob("*.parquet")]).to_table()
    return frame.to_pandas().sort_values("name", ignore_index=True)


@pytest.fixture(scope="module")
def expected(root):
    handler = signal.getsignal(signal.SIGTERM)
    predictor = load_ensemble([root / "expert"], device="cpu", workers=0, batch_size=1)
    assert score_parts(predictor, str(root / "parts"), str(root / "ours"), show=False) == 1
    signal.signal(signal.SIGTERM, handler)
    return by_name(root / "ours")


def actors():
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"MapBatches(Scorer)" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("killed", [False, True])
def test_scores_are_those_of_the_built_in_workers(ray, root, expected, tmp_path, killed):
    victims: list[int] = []

    def kill():
        deadline = time.monotonic() + 60
        while not victims and time.monotonic() < deadline:
            time.sleep(0.2)
            # Not before it has scored something.
            if (tmp_path / "out" / "ray_predictions.json").exists() and (running := actors()):
                time.sleep(0.5)
                victims.append(running[0])
                os.kill(running[0], signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    if killed:
        thread.start()
    assert score(ray, root, tmp_path / "out") == 1
    assert bool(victims) == killed
    found = by_name(tmp_path / "out")
    assert len(found) == COUNT
    pd.testing.assert_frame_equal(found[expected.columns], expected, check_dtype=False, check_exact=True)
    assert np.isnan(found["score"]).sum() == found["error"].notna().sum() == len(range(3, COUNT, 7))


def test_without_ray_one_line_says_what_to_do(root, tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name.startswith("ray"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    flags = ["--manifest", root / "parts", "--out", tmp_path / "out", "--experts", root / "expert"]
    with pytest.raises(UserError, match="Ray is not installed; run pip install"):
        main(["ray", *map(str, flags)])


def test_an_output_that_exists_is_left_alone(ray, root, tmp_path):
    (tmp_path / "ray_predictions.json").write_text("{}")
    flags = ["--manifest", root / "parts", "--out", tmp_path, "--experts", root / "expert"]
    with pytest.raises(UserError, match=r"already holds ray_predictions\.json; choose another --out"):
        main(["ray", *map(str, flags)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--actors", "2"], r"CPUs needed: 3, one for reading; Ray has 2; use fewer --actors"),
        (["--gpus-per-actor", "1"], r"GPUs needed: 1; Ray has 0; use fewer --actors"),
    ],
)
def test_actors_that_could_never_start_are_refused(ray, root, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        score(ray, root, tmp_path / "out", *flags)
