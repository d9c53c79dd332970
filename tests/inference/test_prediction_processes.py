"""Every image is accounted for: broken ones, killed runs, several processes, and their journals."""

import json
import multiprocessing
import os
import signal
import struct
import sys
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import smooth_picture
from PIL import Image
from processes import fork, statuses

import predict
from featdistill.command_line import UserError
from featdistill.data.loading import Broken
from featdistill.inference.journal import PartialScores, journal_path
from featdistill.inference.processes import Processes
from featdistill.inference.scoring import ScoredBatch
from featdistill.models.expert import create_expert, save_expert
from featdistill.records.manifest import make_manifest, write_manifest
from featdistill.records.predictions import read_errors, read_predictions, sidecar_path

COUNT, BATCH = 500, 8


def png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its pixels do not have."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 64)
    parts = [
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (head, data)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def break_image(path: Path, way: int) -> None:
    """Damage an image in one of ten ways."""
    good = path.read_bytes()
    as_png = cv2.imencode(".png", cv2.imdecode(np.frombuffer(good, np.uint8), 1))[1].tobytes()
    content = [
        None,
        b"",
        b"this is no image\n",
        bytes(2000),
        good[: len(good) // 2],
        as_png[: len(as_png) // 2],
        png(200_000, 200_000),
        good[:2] + good[600:],
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ]
    path.unlink()
    if way == len(content):
        path.mkdir()
    elif content[way] is not None:
        path.write_bytes(content[way])


def odd_images(folder: Path) -> list[Path]:
    """Images that look unlike a photograph in color and can be read all the same."""
    picture = Image.fromarray(smooth_picture(0, 44, 40))
    made = {
        "gray16.png": Image.fromarray(np.arange(40 * 44, dtype=np.uint16).reshape(44, 40) * 30),
        "cmyk.jpg": picture.convert("CMYK"),
        "palette.gif": picture.convert("P"),
        "alpha.png": picture.convert("RGBA"),
        "black_white.png": picture.convert("1"),
        "strip.png": picture.resize((1, 600)),
        "dot.png": picture.resize((1, 1)),
        "gray.jpg": picture.convert("L"),
    }
    for name, image in made.items():
        image.save(folder / name)
    return [folder / name for name in made]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """500 images, 20 of them broken in ten ways, and two tiny experts."""
    root = tmp_path_factory.mktemp("project")
    folder = root / "images"
    folder.mkdir()
    paths = odd_images(folder)
    for place in range(COUNT - len(paths)):
        path = folder / f"{place:05d}.jpg"
        path.write_bytes(cv2.imencode(".jpg", smooth_picture(place, 40 + place % 5, 44))[1].tobytes())
        paths.append(path)
    order = np.random.default_rng(0).permutation(COUNT)
    paths = [paths[place] for place in order]
    for way, path in enumerate([path for path in paths if path.stem.isdigit()][5::24][:20]):
        break_image(path, way % 10)
        (root / "broken.txt").open("a").write(f"{path.name}\n")
    columns = {"image": [str(path) for path in paths], "name": [path.name for path in paths]}
    write_manifest(make_manifest(columns), root / "manifest.csv")
    for seed, backbone in enumerate(("tiny_clip", "tiny_siglip")):
        torch.manual_seed(seed)
        expert = create_expert(backbone, "random", input_size=32, head_hidden=8).eval()
        save_expert(expert, root / backbone)
    return root


def start(project: Path, out: Path, world: int = 1) -> list[multiprocessing.Process]:
    """Start `predict.py` in processes of their own."""

    def task() -> int:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        experts = [str(project / name) for name in ("tiny_clip", "tiny_siglip")]
        arguments = ["--manifest", str(project / "manifest.csv"), "--out", str(out), "--experts", *experts]
        return predict.main([*arguments, "--batch-size", str(BATCH), "--workers", "0", "--device", "cpu"])

    return fork(task, world)


def done_batches(out: Path) -> list[int]:
    journals = [path.read_bytes() for path in out.parent.glob(f".{out.name}.partial*")]
    lines = [line for data in journals for line in data.splitlines(keepends=True)[1:] if line.endswith(b"\n")]
    return [json.loads(line)[0] for line in lines if line.strip()]


def test_killed_three_times_and_shared_by_processes_every_image_is_accounted_for(project, tmp_path):
    whole, out = tmp_path / "whole.csv", tmp_path / "killed.csv"
    undisturbed = start(project, whole)
    rng = np.random.default_rng()
    # One process, then two, then three: who continues need not be who began.
    for world in (1, 2, 3):
        until = len(done_batches(out)) + int(rng.integers(1, 8))
        running = start(project, out, world)
        while len(done_batches(out)) < until and all(process.is_alive() for process in running):
            time.sleep(0.001)
        time.sleep(rng.random() * 0.01)
        for process in running:
            process.kill()
        assert statuses(running)[0] == -signal.SIGKILL
        assert not out.is_file()
    done = done_batches(out)
    assert len(done) == len(set(done)) < COUNT // BATCH
    # What a kill in the middle of a line leaves.
    with journal_path(out, 1, 2).open("ab") as file:
        file.write(b'[7, "AAAA')
    assert statuses([*undisturbed, *start(project, out, 2)]) == [1, 1, 0]
    for written, expected in ((out, whole), (sidecar_path(out), sidecar_path(whole))):
        assert written.read_bytes() == expected.read_bytes()
    assert not list(tmp_path.glob(".*.partial*"))
    broken = (project / "broken.txt").read_text().split()
    assert len(set(broken)) == 20 and sorted(name for name, _ in read_errors(out)) == sorted(broken)
    assert all(reason for _, reason in read_errors(out))
    found = read_predictions(out)
    assert len(found) == COUNT - 20 and {"strip.png", "gray16.png", "cmyk.jpg"} <= set(found["name"])


def fail_in_process_1(failure) -> list[int | None]:
    """Return how two processes end that share a task in which the second one fails."""

    def task() -> int:
        processes = Processes()

        def work() -> None:
            if not processes.is_main:
                failure()

        try:
            return processes.run(lambda _: processes.together(work))
        except UserError as error:
            sys.stderr.write(f"{error}\n")
            return 2

    return statuses(fork(task, 2))


def test_an_error_in_one_process_ends_all_and_the_main_one_reports_it(capfd):
    def failure() -> None:
        raise UserError("the GPU's memory is full")

    assert fail_in_process_1(failure) == [2, 0]
    assert capfd.readouterr().err == "process 1 of 2 failed: the GPU's memory is full\n"


def test_a_process_that_is_killed_does_not_leave_the_others_waiting(capfd):
    assert fail_in_process_1(lambda: os.kill(os.getpid(), signal.SIGKILL)) == [2, -signal.SIGKILL]
    assert "lost another process" in capfd.readouterr().err


def test_what_the_main_process_finds_out_all_know(tmp_path):
    def task() -> int:
        processes = Processes()

        def find_out(_: Processes) -> int:
            found = processes.on_main(lambda: {"rank": processes.rank, "pid": os.getpid()})
            (tmp_path / str(processes.rank)).write_text(str(found))
            return 1

        return processes.run(find_out)

    assert statuses(fork(task, 2)) == [1, 0]
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() != ""


WHAT = {"experts": {"a": "1", "b": "2"}, "batch_size": 3}


def batch_of(number: int, rows: list[int], broken: tuple = ()) -> ScoredBatch:
    logits = np.random.default_rng(number).normal(size=(2, len(rows))).astype(np.float32)
    return ScoredBatch(number, rows, logits, list(broken))


def test_a_journal_gives_back_every_bit(tmp_path):
    out = tmp_path / "val.csv"
    extreme = np.array([[1e-45, -3.4e38, 1 / 3], [np.pi, -0.0, 17.000001]], np.float32)
    partial = PartialScores(out, WHAT, 2, 8)
    partial.append(ScoredBatch(1, [3, 4, 5], extreme, []))
    partial.append(batch_of(2, [7], [Broken(6, 'Grund: ü, "quoted"')]))
    again = PartialScores(out, WHAT, 2, 8)
    assert again.logits.tobytes() == partial.logits.tobytes()
    assert again.logits[:, 3:6].tobytes() == extreme.tobytes() and np.isnan(again.logits[:, :3]).all()
    assert again.missing() == [0] and again.broken == {6: 'Grund: ü, "quoted"'}


def test_a_line_cut_short_or_damaged_costs_its_batch_alone(tmp_path):
    out = tmp_path / "val.csv"
    partial = PartialScores(out, WHAT, 2, 9)
    for number in range(3):
        partial.append(batch_of(number, list(range(3 * number, 3 * number + 3))))
    lines = partial.path.read_bytes().splitlines(keepends=True)
    partial.path.write_bytes(lines[0] + lines[1] + b"\0" * 40 + b"\n" + lines[3][:-9])
    again = PartialScores(out, WHAT, 2, 9)
    assert again.missing() == [1, 2]
    again.append(batch_of(2, [6, 7, 8]))
    again.append(batch_of(1, [3, 4, 5]))
    assert np.array_equal(PartialScores(out, WHAT, 2, 9).logits, partial.logits)


def test_scores_under_way_for_another_ensemble_are_not_continued(tmp_path):
    out = tmp_path / "val.csv"
    PartialScores(out, WHAT, 2, 6).append(batch_of(0, [0, 1, 2]))
    for changed in ({"batch_size": 2}, {"experts": {"a": "1", "b": "3"}}):
        assert not PartialScores(out, WHAT | changed, 2, 6).done.any()


def test_journals_of_several_processes_are_read_as_one(tmp_path):
    out = tmp_path / "val.csv"
    parts = [PartialScores(out, WHAT, 2, 21, rank, 3) for rank in range(3)]
    parts[1].append(batch_of(4, [12, 13, 14]))
    assert parts[0].missing() == list(range(7))
    parts[0].refresh()
    assert parts[0].missing() == [0, 1, 2, 3, 5, 6]
    # Continued by another number of processes.
    assert PartialScores(out, WHAT, 2, 21, 0, 2).missing() == [0, 1, 2, 3, 5, 6]
    # Other predictions in the same folder have journals of their own.
    assert not PartialScores(tmp_path / "val.csv2", WHAT, 2, 21).done.any()


@pytest.mark.parametrize("variables", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}])
def test_a_rank_that_cannot_be_is_an_error(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="RANK"):
        Processes()
