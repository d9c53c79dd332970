"""The command that checks a GPU, in its tiny form on the CPU."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import device_check
from benchmarks.device_checks import start_up
from benchmarks.device_checks.runner import Bench, Part, Skip, run_parts
from benchmarks.device_checks.scoring_checks import computes_float8
from featdistill.command_line import UserError


def test_what_a_cpu_can_check_passes(tmp_path, capsys):
    level = logging.getLogger("featdistill").level
    out = tmp_path / "device.json"
    titles = ["precisions", "fp8 of every", "automatic batch", "PGD", "stage 1 in half", "stage 2, dense"]
    titles += ["killed run", "overflow", "scoring speed in bf16", "training speed of", "other ways"]
    titles += ["JPEGs decoded on the device", "where JPEGs are decoded"]
    flags = ["--device", "cpu", "--tiny", "--out", str(out), "--only", *titles]
    assert device_check.main(flags) == 0, capsys.readouterr().out
    report = json.loads(out.read_text())
    statuses = {one["part"]: one["status"] for one in report["parts"]}
    skipped = {"automatic batch size", "steps that overflow are skipped"}
    skipped |= set() if computes_float8() else {"fp8 of every family"}
    assert statuses == {part: "skipped" if part in skipped else "ok" for part in statuses}
    assert len(statuses) == len(titles) + 2 and report["versions"]["torch"] == torch.__version__
    figures = {one["part"]: one.get("figures") for one in report["parts"]}
    resumed = figures["a killed run continues to the same weights"]
    assert resumed["largest difference of a weight"] == 0
    assert figures["JPEGs decoded on the device"]["420 levels"] == "0.000 at most 0"
    assert {row["expert"] for row in report["scoring"]} == {"tiny_clip", "tiny_siglip", "ensemble"}
    assert {row["option"] for row in report["training"]} == {"eager", "plain", "selective"}
    assert logging.getLogger("featdistill").level == level


def test_a_part_that_fails_or_does_not_fit_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    def fail(bench):
        raise ValueError("wrong\nby far")

    def skip(bench):
        raise Skip("no such thing here")

    bench = Bench(torch.device("cpu"), False, tmp_path, {"device": "here"})
    parts = [Part("one", 1, fail), Part("two", 1, skip), Part("long", 600, fail)]
    parts += [Part("three", 1, lambda bench: {"value": 0.12345678, "name": "x"})]
    results = run_parts(parts, bench, 8, tmp_path / "out.json")
    assert [one["status"] for one in results] == ["FAILED", "skipped", "skipped", "ok"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FAILED  one") and lines[0].endswith("ValueError: wrong")
    assert lines[1].endswith("no such thing here") and "takes 600 s, 4" in lines[2]
    assert lines[3].endswith("value 0.1235, name x")
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["device"] == "here" and saved["parts"] == results
    monkeypatch.setattr(device_check, "PARTS", [Part("wrong", 1, fail), Part("fine", 1, lambda bench: {})])
    assert device_check.main(["--device", "cpu", "--tiny"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 ok, 0 skipped, 1 FAILED"


def test_a_part_that_crashes_or_hangs_costs_only_itself(tmp_path):
    def crash(bench):
        os.kill(os.getpid(), signal.SIGKILL)

    def hang(bench):
        (tmp_path / "hangs").write_text(str(os.getpid()))
        time.sleep(600)

    bench = Bench(torch.device("cpu"), False, tmp_path)
    parts = [Part("crash", 1, crash), Part("hang", 0.5, hang), Part("fine", 1, lambda bench: {})]
    results = {one["part"]: one for one in run_parts(parts, bench, 8, None)}
    assert results["crash"]["why"] == "its process ended with status -9"
    assert results["hang"]["why"].startswith("stopped after 2 s")
    assert results["fine"]["status"] == "ok"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "hangs").read_text()), 0)


def test_parts_that_share_the_device_run_together_and_others_alone(tmp_path):
    def meet(bench):
        """Wait until the other part is there, too."""
        mine = tmp_path / f"here-{os.getpid()}"
        mine.touch()
        while len(list(tmp_path.glob("here-*"))) < 2:
            time.sleep(0.01)
        bench.facts["met"] = True
        return {}

    def alone(bench):
        return {"seen": len(list(tmp_path.glob("here-*"))), "met": bench.facts["met"]}

    bench = Bench(torch.device("cpu"), True, tmp_path)
    parts = [Part("a", 1, meet, shares=True), Part("b", 1, meet, shares=True), Part("c", 1, alone)]
    results = run_parts(parts, bench, 2, None, jobs=2)
    assert [one["status"] for one in results] == ["ok"] * 3 and results[-1]["part"] == "c"
    assert results[-1]["figures"] == {"seen": 2, "met": True}


def test_the_times_of_a_run_are_those_of_the_lines_in_its_log(tmp_path, monkeypatch):
    script = "import pathlib, time; log = pathlib.Path('log').open('a')\n"
    script += "for number in range(3): print(number, file=log, flush=True); time.sleep(.1)\n"
    monkeypatch.setattr(start_up, "ROOT", tmp_path)
    found, ended = start_up._timed([sys.executable, "-c", script], tmp_path / "log", dict(os.environ))
    times = [at for at, _ in found]
    assert [line for _, line in found] == [0, 1, 2] and times == sorted(times)
    assert times[2] - times[0] > 0.15 and ended - times[2] > 0.05
    steps = [(4, 0), (5, 0), (8, 1), (9, 1), (13, 2), (14, 2)]
    lines = [(at, {"loss": 1, "epoch": epoch}) for at, epoch in steps]
    monkeypatch.setattr(start_up, "_timed", lambda *arguments: (lines, 17))
    figures = start_up.start_up(Bench(torch.device("cpu"), True, tmp_path))
    names = ("to the first step", "between epochs", "a step", "after the last step")
    assert figures == dict(zip(names, (4, 3.5, 1, 3), strict=True))


def test_what_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(UserError, match="no part has such a title"):
        device_check.main(["--only", "nothing of the kind"])
    with pytest.raises(UserError, match="without a GPU, use --tiny"):
        device_check.main(["--device", "cpu"])
    with pytest.raises(UserError, match="--device foo is not a device"):
        device_check.main(["--device", "foo", "--tiny"])
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(UserError, match=r"mine\.json already exists"):
        device_check.main(["--device", "cpu", "--tiny", "--out", str(tmp_path / "mine.json")])


def test_without_the_device_nothing_else_is_tried(monkeypatch, capsys):
    def fail(bench):
        raise ValueError("no such device")

    monkeypatch.setattr(device_check, "FIRST", Part("device", 1, fail))
    assert device_check.main(["--device", "cpu", "--tiny"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("ValueError: no such device")


def test_an_interrupt_ends_all_that_parts_have_started(tmp_path):
    def launch(bench):
        child = subprocess.Popen(["sleep", "600"])
        (tmp_path / "started").write_text(str(child.pid))
        child.wait()

    def interrupt(bench):
        while not ((tmp_path / "started").is_file() and (tmp_path / "started").read_text()):
            time.sleep(0.01)
        os.kill(parent, signal.SIGINT)
        time.sleep(600)

    parent, bench = os.getpid(), Bench(torch.device("cpu"), True, tmp_path)
    parts = [Part("a", 1, launch, shares=True), Part("b", 1, interrupt, shares=True)]
    with pytest.raises(KeyboardInterrupt):
        run_parts(parts, bench, 0.5, None, jobs=2)
    # Ended, even if nobody has asked for its status.
    stat = Path("/proc", (tmp_path / "started").read_text(), "stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
