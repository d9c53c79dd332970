import json
import math

import numpy as np
import pytest
from PIL import Image

from featdistill.__main__ import main
from featdistill.command_line import UserError
from featdistill.training import plot_run


def write_run(folder, steps: int, shift: float = 0.0, *, wait: bool = True):
    folder.mkdir(parents=True)
    lines = []
    for step in range(10, steps + 1, 10):
        loss = 0.7 * math.exp(-step / 200) + shift
        line = {"step": step, "epoch": step // 100, "bce": loss, "dense": loss / 3, "loss": loss * 4 / 3}
        line |= {"learning_rate": 1e-5 * (1 + math.cos(step / 400 * math.pi)), "images_per_s": 600 + shift}
        line |= {"gradient_norm": 3 + shift, "skipped": 0} | ({"data_wait": 0.03} if wait else {})
        lines.append(line)
        if step % 100 == 0:
            auc = 0.9 - 20 / step - shift
            lines.append({"step": step, "epoch": step // 100, "holdout_images": 50})
            lines[-1] |= {"holdout_clean_auc": auc + 0.05, "holdout_robust_auc": auc}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_curves_are_read_by_key_and_a_half_written_last_line_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", 100)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 110, "epoch": 1, "lo')
    curves = plot_run.read_curves(run)
    steps, values = curves["loss"]
    assert steps == list(range(10, 101, 10))
    assert values[0] == pytest.approx(0.7 * math.exp(-0.05) * 4 / 3)
    assert curves["holdout_robust_auc"] == ([100], [pytest.approx(0.7)])
    assert not {"step", "epoch", "skipped", "holdout_images"} & curves.keys()


def test_numbers_that_are_missing_leave_a_gap_not_an_error(tmp_path):
    run = write_run(tmp_path / "run", 20)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[0]["bce"] = None
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot_run.read_curves(run)["bce"][0] == [20] and plot_run.read_curves(run)["loss"][0] == [10, 20]


def test_several_runs_become_one_picture_and_the_same_runs_the_same_bytes(tmp_path):
    runs = [write_run(tmp_path / "a", 400), write_run(tmp_path / "b", 250, 0.1, wait=False)]
    for name in ("one", "two"):
        main(["plot", *map(str, runs), "--out", str(tmp_path / f"{name}.png")])
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    picture = np.asarray(Image.open(tmp_path / "one.png").convert("RGB")).reshape(-1, 3)
    counts = [(picture == tuple(bytes.fromhex(color[1:]))).all(axis=1).sum() for color in plot_run.COLORS[:3]]
    assert min(counts[:2]) > 200 and counts[2] == 0


def test_a_run_without_metrics_or_with_damaged_ones_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"is not a run with metrics"):
        plot_run.read_runs([str(tmp_path)])
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"metrics.jsonl is empty"):
        plot_run.read_runs([str(tmp_path)])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo\n{"step": 2, "loss": 1.0}\n')
    with pytest.raises(UserError, match="line 1 is not JSON"):
        plot_run.read_runs([str(tmp_path)])
