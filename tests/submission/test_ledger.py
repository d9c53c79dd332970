"""The ledger of submissions: each is listed once, even by concurrent processes, and no zip is ever lost."""

import csv
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest
from submission_folders import LOCK, ROWS, make, names_of, rewrite, scores_of, submission_folder

import make_submission
from featdistill.atomic import sha256_of
from featdistill.command_line import UserError
from featdistill.submission import ledger

folder = submission_folder
DAY = "2026-03-01"
BOTH = ("val", "val_hard")


def line(number=0, date=DAY, **cells):
    return {"date": date, "file": f"{number}.zip", "sha256": f"{number:064x}", "profile": "val", **cells}


def lines(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


def change_scores(folder, slot, seed, **sidecar):
    rewrite(folder, slot, names_of(slot), np.random.default_rng(seed).random(ROWS[slot]), **sidecar)


def test_every_column_of_an_entry(folder):
    hashes = {"clip_a": "01" * 32, "siglip, b": "ab" * 32}
    rewrite(folder, "val", names_of("val"), scores_of("val"), experts=hashes)
    rewrite(folder, "val_hard", names_of("val_hard"), scores_of("val_hard"), experts={"clip_a": "01" * 32})
    splits = {
        "val": {"clean_auc": 0.97294, "robust_auc": 0.86789, "auc": 0.9},
        "val_hard": {"clean_auc": None, "robust_auc": 0.5},
    }
    (folder / "metrics.json").write_text(json.dumps({"splits": splits}))
    flags = ["--date", "2026-03-01T12:00+02:00", "--scores", folder / "metrics.json", "--note", 'a, "b"\nc']
    make(folder, "val", *flags, "--file-name", "val=a.csv", slots=BOTH)
    assert lines(folder / "submissions.csv") == [
        {
            "date": "2026-03-01T10:00:00Z",
            "file": "submission.zip",
            "sha256": sha256_of(folder / "submission.zip"),
            "profile": "val val=a.csv",
            "slots": "val=a.csv:12; val_hard=submission_hard.csv:8",
            "experts": "clip_a:010101010101; siglip, b:abababababab",
            "local_aucs": "val clean 0.9729 robust 0.8679; val_hard clean n/a robust 0.5000",
            "note": 'a, "b"\nc',
        }
    ]


def test_submissions_are_listed_in_order_and_earlier_lines_stay(folder):
    for number, profile in enumerate(("val", "test", "test-card")):
        slots = BOTH if profile == "val" else ("test",)
        make(folder, profile, "--date", f"2026-03-0{number + 1}", slots=slots, out=f"{profile}.zip")
    found = lines(folder / "submissions.csv")
    assert [row["file"] for row in found] == ["val.zip", "test.zip", "test-card.zip"]
    assert [row["profile"] for row in found] == ["val", "test", "test-card"]
    assert [row["date"][:10] for row in found] == ["2026-03-01", "2026-03-02", "2026-03-03"]


def test_repeating_a_command_changes_nothing(folder):
    for _ in range(2):
        make(folder, "val", "--note", "first", "--date", DAY, slots=BOTH)
        data = (folder / "submission.zip").read_bytes(), (folder / "submissions.csv").read_bytes()
        assert len(lines(folder / "submissions.csv")) == 1
        make(folder, "val", "--note", "first", "--date", DAY, slots=BOTH)
        assert data == ((folder / "submission.zip").read_bytes(), (folder / "submissions.csv").read_bytes())


def test_the_same_zip_on_the_same_day_updates_its_line(tmp_path):
    path = tmp_path / "submissions.csv"
    assert ledger.add(path, line(1, f"{DAY}T01:00:00Z", note="old", local_aucs="x")) == 1
    assert ledger.add(path, line(2, f"{DAY}T02:00:00Z")) == 2
    assert ledger.add(path, line(1, f"{DAY}T23:00:00Z", note="new", local_aucs="")) == 2
    found = lines(path)
    assert [row["file"] for row in found] == ["1.zip", "2.zip"]
    assert found[0]["date"] == f"{DAY}T01:00:00Z"
    assert (found[0]["note"], found[0]["local_aucs"]) == ("new", "x")


@pytest.mark.parametrize(
    "other", [{"sha256": "f" * 64}, {"profile": "test"}, {"date": "2026-03-02T00:00:00Z"}]
)
def test_another_zip_profile_or_day_is_another_line(tmp_path, other):
    path = tmp_path / "submissions.csv"
    ledger.add(path, line())
    ledger.add(path, line() | other)
    assert len(lines(path)) == 2


def test_the_sixth_of_a_day_causes_a_warning(folder, capsys):
    for number in range(6):
        change_scores(folder, "test", number)
        make(folder, "test", "--date", f"{DAY}T1{number}:00", slots=("test",))
        shown, warnings = capsys.readouterr()
        assert f"{number + 1} listed for {DAY} (UTC); the challenge accepts 5 per day" in shown
        assert ("warning: more submissions are listed" in warnings) == (number == 5)
    make(folder, "test", "--date", "2026-03-02", slots=("test",))
    shown, warnings = capsys.readouterr()
    assert "1 listed for 2026-03-02" in shown and not warnings


def test_a_day_ends_at_midnight_in_utc(tmp_path):
    path = tmp_path / "submissions.csv"
    ledger.add(path, line(1, "2026-03-01T23:59:59Z"))
    assert ledger.add(path, line(2, "2026-03-02T01:00:00+02:00")) == 2
    assert ledger.add(path, line(3, "2026-03-02T00:00:00Z")) == 1


def test_the_default_date_is_now(folder):
    before = datetime.now(UTC).replace(microsecond=0)
    make(folder, "test", slots=("test",))
    (found,) = lines(folder / "submissions.csv")
    assert found["date"].endswith("Z") and before <= ledger.parse_date(found["date"]) <= datetime.now(UTC)


def test_other_columns_are_preserved(tmp_path):
    path = tmp_path / "submissions.csv"
    # As a spreadsheet saves it: a byte order mark, its own line ends, and a column of the team's.
    text = "\ufeffpublic score,date,file,sha256,profile\r\n0.8558,last Monday,0.zip,00,val\r\n"
    path.write_text(text, encoding="utf-8", newline="")
    assert ledger.add(path, line(1)) == 1
    data = path.read_bytes()
    assert b"\r" not in data
    assert data.startswith(b"public score,date,file,sha256,profile,slots,experts,local_aucs,note\n")
    found = lines(path)
    assert (found[0]["public score"], found[0]["date"], found[0]["note"]) == ("0.8558", "last Monday", "")
    assert (found[1]["public score"], found[1]["file"]) == ("", "1.zip")


@pytest.mark.parametrize("note", ["a,b", "one\ntwo", 'say "yes"', "=1+1", "näh 图", " blank "])
def test_any_note_is_read_back_unchanged(tmp_path, note):
    path = tmp_path / "submissions.csv"
    for number in range(2):
        ledger.add(path, line(number, note=note))
    assert [row["note"] for row in lines(path)] == [note, note]


@pytest.mark.parametrize(("note", "kept"), [("a\rb\r\nc", "a\nb\nc"), ("a\udcffb", "a\\udcffb")])
def test_a_note_that_would_damage_the_ledger_is_cleaned(tmp_path, note, kept):
    path = tmp_path / "submissions.csv"
    for number in range(2):
        ledger.add(path, line(number, note=note))
    assert [row["note"] for row in lines(path)] == [kept, kept]


def test_lines_added_at_the_same_time_are_all_kept(tmp_path):
    path = tmp_path / "submissions.csv"
    with ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(lambda number: ledger.add(path, line(number)), range(40)))
    assert sorted(counts) == list(range(1, 41))
    assert sorted(int(row["sha256"], 16) for row in lines(path)) == list(range(40))
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, "submissions.csv"]


def test_a_failed_write_leaves_the_old_ledger_and_the_new_zip(folder, monkeypatch):
    make(folder, "test", "--date", DAY, slots=("test",))
    before = (folder / "submissions.csv").read_bytes()
    change_scores(folder, "test", 1)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(ledger.atomic, "write_text", full)
    with pytest.raises(UserError, match=r"submission\.zip is written and valid, but not listed: No space"):
        make(folder, "test", "--date", DAY, slots=("test",))
    assert (folder / "submissions.csv").read_bytes() == before
    assert make_submission.main(["--check", str(folder / "submission.zip"), "--profile", "test"]) == 0


DAMAGED = {
    "column sha256, profile is missing": b"date,file\n1,2\n",
    "is not a ledger of submissions": b"name,score\na.jpg,0.5\n",
    "row 2 has 1 fields": b"date,file,sha256,profile\na,b,c,d\ncut o\n",
    "readable CSV": b"date,file,sha256,profile\n\xff,b,c,d\n",
    "is empty": b"",
    "a column appears twice": b"date,file,sha256,profile,date\n",
}


@pytest.mark.parametrize("message", DAMAGED)
def test_a_damaged_ledger_is_left_alone_and_the_zip_is_written(folder, capsys, message):
    (folder / "submissions.csv").write_bytes(DAMAGED[message])
    with pytest.raises(UserError, match=f"is written and valid, but not listed: .*{message}"):
        make(folder, "test", slots=("test",))
    assert (folder / "submissions.csv").read_bytes() == DAMAGED[message]
    assert f"SHA-256 {sha256_of(folder / 'submission.zip')}" in capsys.readouterr().out
    (folder / "submissions.csv").unlink()
    assert make(folder, "test", slots=("test",)) == 0
    assert len(lines(folder / "submissions.csv")) == 1


def test_the_lock_of_a_killed_process_does_not_last(tmp_path):
    (tmp_path / LOCK).touch()
    assert ledger.add(tmp_path / "submissions.csv", line()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, "submissions.csv"]


def test_a_ledger_elsewhere_lists_a_path_that_can_be_resolved(folder, tmp_path):
    flags = ["--ledger", folder / "deep" / "book.csv"]
    make(folder, "test", *flags, "--date", DAY, slots=("test",))
    make(folder, "test", *flags, "--date", "2026-03-02", slots=("test",), out="deep/b.zip")
    found = lines(folder / "deep" / "book.csv")
    assert [row["file"] for row in found] == [(folder / "submission.zip").resolve().as_posix(), "b.zip"]
    assert not (folder / "submissions.csv").exists()


def test_a_link_to_a_ledger_is_followed(folder, tmp_path):
    (folder / "submissions.csv").symlink_to(tmp_path / "shared.csv")
    make(folder, "test", slots=("test",))
    assert (folder / "submissions.csv").is_symlink()
    assert lines(tmp_path / "shared.csv")[0]["file"] == "submission/submission.zip"


def test_no_ledger_lists_nothing(folder, capsys):
    make(folder, "test", "--no-ledger", slots=("test",))
    assert not (folder / "submissions.csv").exists()
    shown = capsys.readouterr().out
    assert "listed" not in shown


def test_a_submission_that_is_refused_is_not_listed(folder):
    rewrite(folder, "test", names_of("test"), [0.5] * ROWS["test"])
    with pytest.raises(UserError, match="constant"):
        make(folder, "test", slots=("test",))
    assert not (folder / "submissions.csv").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--date", "yesterday"], "'yesterday' is not a date such as 2026-03-01"),
        (["--date", "0001-01-01T00:00+10:00"], "is not a date"),
        (["--scores", "none.json"], "--scores none.json does not exist"),
        (["--ledger", "a.csv", "--no-ledger"], "not allowed with"),
        (["--no-ledger", "--note", "x"], "nothing would be listed"),
    ],
)
def test_wrong_flags_are_refused_before_the_zip_is_written(folder, flags, message):
    with pytest.raises(UserError, match=message):
        make(folder, "test", *flags, slots=("test",))
    assert not (folder / "submission.zip").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"splits": {"val": {}}}', '{"splits": {"val": 1}}'])
def test_other_files_are_refused_as_scores(tmp_path, text):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(UserError, match=r"is not a metrics\.json"):
        ledger.read_aucs(tmp_path / "metrics.json")


def test_the_ledger_cannot_be_the_zip(folder):
    with pytest.raises(UserError, match="are the same file"):
        make(folder, "test", "--ledger", folder / "submission.zip", slots=("test",))
    assert not (folder / "submission.zip").exists()


def test_dates_are_read_in_any_zone():
    assert ledger.parse_date("2026-03-01") == datetime(2026, 3, 1, tzinfo=UTC)
    assert ledger.parse_date("2026-03-01T12:00:00Z") == datetime(2026, 3, 1, 12, tzinfo=UTC)
    east = datetime(2026, 3, 1, 1, tzinfo=timezone(timedelta(hours=2)))
    assert ledger.parse_date(east.isoformat()) == datetime(2026, 2, 28, 23, tzinfo=UTC)
