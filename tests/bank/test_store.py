"""The files of a bank are used only if they are what was written."""

import os
from pathlib import Path

import pytest

from featdistill import atomic
from featdistill.bank import embed
from featdistill.bank.embed import Settings
from featdistill.bank.probe_plan import Settings as ProbeSettings
from featdistill.bank.probe_plan import make_plan
from featdistill.bank.store import open_bank
from featdistill.bank.views import ViewPlan
from featdistill.command_line import UserError
from featdistill.inference.processes import Processes
from featdistill.models.features import Atom

FILES = ("pool.npy", "drawn.jsonl", "errors.csv", "manifest.csv")


def make(manifest: Path, out: Path) -> int:
    values = {"backbone": "tiny_clip", "weights": "random", "input_size": 32, "views": ViewPlan()}
    return embed.embed(Settings(**values, workers=0, device="cpu"), [manifest], out, Processes())


@pytest.fixture
def manifest(make_set) -> Path:
    return make_set("some", 12)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def add(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x,y\n")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip_bit, cut, add, os.remove])
def test_a_file_that_has_changed_is_refused_wherever_it_is_used(name, damage, manifest, tmp_path):
    bank = tmp_path / "bank"
    make(manifest, bank)
    before = {file: (bank / file).read_bytes() for file in FILES}
    opened = open_bank(bank)
    damage(bank / name)
    remedy = "run its embed command again" if name == "manifest.csv" else "remove the bank and embed again"
    message = rf"{name} (has changed since it was written|cannot be read \(No such file).*; {remedy}"
    with pytest.raises(UserError, match=message):
        (opened.array(Atom("pool")), list(opened.drawn()), opened.rows)
    with pytest.raises(UserError, match=message):
        make_plan(ProbeSettings([str(bank)])).train.features("pool")
    if name == "manifest.csv":
        assert make(manifest, bank) == 0
        assert make_plan(ProbeSettings([str(bank)])).train.features("pool")
        assert before == {file: (bank / file).read_bytes() for file in FILES}
    else:
        with pytest.raises(UserError, match=message):
            make(manifest, bank)


def test_a_file_is_hashed_once_while_it_stays_the_same(manifest, tmp_path, monkeypatch):
    make(manifest, tmp_path / "bank")
    hashed, sha256_of = [], atomic.sha256_of
    monkeypatch.setattr(atomic, "sha256_of", lambda path: hashed.append(Path(path).name) or sha256_of(path))
    for _ in range(3):
        bank = open_bank(tmp_path / "bank")
        assert len(bank.rows) == len(list(bank.drawn())) == len(bank.array(Atom("pool"))) == 12
    assert sorted(hashed) == sorted(FILES)
    os.utime(bank.path / "pool.npy", ns=(1, 1))
    assert len(bank.array(Atom("pool"))) == 12 and hashed.count("pool.npy") == 2
