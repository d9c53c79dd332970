"""The zip for Codabench: what is written, what is refused, and the script."""

import base64
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from submission_folders import (
    GOOD,
    GOOD_HARD,
    LOCK,
    ROWS,
    as_csv,
    content,
    make,
    names_of,
    rewrite,
    scores_of,
    submission_folder,
    zipped,
)

import make_submission
from featdistill.atomic import sha256_of
from featdistill.command_line import UserError
from featdistill.records.manifest import make_manifest, write_manifest
from featdistill.submission.profiles import PROFILES, adapted, label
from featdistill.submission.writing import Part, replace_submission

folder = submission_folder
# Small parts with scores that are easily written in another way, and the zips of them, in base64.
SMALL = {
    "val": Part(["0a.jpg", "0b.jpg"], np.array([0.25, 1e-17])),
    "val_hard": Part(["0c.jpg", "0d.jpg"], np.array([0.1 + 0.2, 1])),
    "test": Part(["0e.jpg", "0f.jpg"], np.array([0, 0.5])),
}
SLOTS_OF = {"val": ("val", "val_hard"), "test": ("test",), "test-card": ("test",)}
STORED = {
    "val": (
        "UEsDBBQAAAAAAAAAIQD+Aw34KgAAACoAAAAOAAAAc3VibWlzc2lvbi5jc3ZpbWFnZV9uYW1lLHNjb3JlCjBhLmpwZywwLjI1"
        "CjBiLmpwZywxZS0xNwpQSwMEFAAAAAAAAAAhAJfZBTs3AAAANwAAABMAAABzdWJtaXNzaW9uX2hhcmQuY3N2aW1hZ2VfbmFt"
        "ZSxzY29yZQowYy5qcGcsMC4zMDAwMDAwMDAwMDAwMDAwNAowZC5qcGcsMS4wClBLAQIUAxQAAAAAAAAAIQD+Aw34KgAAACoA"
        "AAAOAAAAAAAAAAAAAACkAQAAAABzdWJtaXNzaW9uLmNzdlBLAQIUAxQAAAAAAAAAIQCX2QU7NwAAADcAAAATAAAAAAAAAAAA"
        "AACkAVYAAABzdWJtaXNzaW9uX2hhcmQuY3N2UEsFBgAAAAACAAIAfQAAAL4AAAAAAA=="
    ),
    "test": (
        "UEsDBBQAAAAAAAAAIQDn4QsUJwAAACcAAAATAAAAc3VibWlzc2lvbl9oYXJkLmNzdmltYWdlX25hbWUsc2NvcmUKMGUuanBn"
        "LDAuMAowZi5qcGcsMC41ClBLAQIUAxQAAAAAAAAAIQDn4QsUJwAAACcAAAATAAAAAAAAAAAAAACkAQAAAABzdWJtaXNzaW9u"
        "X2hhcmQuY3N2UEsFBgAAAAABAAEAQQAAAFgAAAAAAA=="
    ),
    "test-card": (
        "UEsDBBQAAAAAAAAAIQCnhcRPHgAAAB4AAAAOAAAAc3VibWlzc2lvbi5jc3ZpbWFnZV9uYW1lLHByZWQKMGUsMC4wCjBmLDAu"
        "NQpQSwECFAMUAAAAAAAAACEAp4XETx4AAAAeAAAADgAAAAAAAAAAAAAApAEAAAAAc3VibWlzc2lvbi5jc3ZQSwUGAAAAAAEA"
        "AQA8AAAASgAAAAAA"
    ),
}


@pytest.mark.parametrize("name", PROFILES)
def test_the_zip_of_each_profile_is_the_stored_one_byte_for_byte(tmp_path, name):
    parts = {slot: SMALL[slot] for slot in SLOTS_OF[name]}
    with replace_submission(tmp_path / "submission.zip", parts, PROFILES[name]):
        assert not (tmp_path / "submission.zip").exists()
    assert (tmp_path / "submission.zip").read_bytes() == base64.b64decode(STORED[name])
    assert [path.name for path in tmp_path.iterdir()] == ["submission.zip"]


def test_a_failing_body_leaves_the_previous_zip(tmp_path):
    path = tmp_path / "submission.zip"
    path.write_bytes(b"former")
    with pytest.raises(ValueError), replace_submission(path, {"test": SMALL["test"]}, PROFILES["test"]):
        raise ValueError
    assert path.read_bytes() == b"former" and [path.name for path in tmp_path.iterdir()] == [path.name]


def test_val_holds_two_files_with_every_image_once(folder):
    assert make(folder, "val", slots=("val", "val_hard")) == 0
    assert content(folder / "submission.zip") == {"submission.csv": GOOD, "submission_hard.csv": GOOD_HARD}


def test_test_puts_the_test_file_in_the_hard_slot(folder):
    make(folder, "test", slots=("test",))
    expected = as_csv("image_name,score", names_of("test"), scores_of("test").tolist())
    assert content(folder / "submission.zip") == {"submission_hard.csv": expected}
    make(folder, "test", slots=("test", "val"))
    assert content(folder / "submission.zip") == {"submission.csv": GOOD, "submission_hard.csv": expected}


def test_test_card_has_bare_names_and_pred(folder):
    make(folder, "test-card", slots=("test",))
    bare = [name.removesuffix(".jpg") for name in names_of("test")]
    expected = as_csv("image_name,pred", bare, scores_of("test").tolist())
    assert content(folder / "submission.zip") == {"submission.csv": expected}


def test_every_part_of_a_profile_can_be_set(folder):
    flags = ["--name-column", "id", "--score-column", "p", "--extension", "strip", "--index-column"]
    make(folder, "test", *flags, "--file-name", "test=submission.csv", slots=("test",))
    lines = content(folder / "submission.zip")["submission.csv"].splitlines()
    assert lines[:3] == [",id,p", f"0,test0000,{0.5 / 9!r}", f"1,test0001,{1.5 / 9!r}"]
    make(folder, "test-card", "--extension", "keep", slots=("test",))
    assert content(folder / "submission.zip")["submission.csv"].splitlines()[1].startswith("test0000.jpg,")


def test_the_same_input_produces_the_same_bytes_and_no_other_files(folder):
    before = {path.name for path in folder.iterdir()}
    for out in ("a.zip", "b.zip"):
        make(folder, "val", slots=("val", "val_hard"), out=out)
    data = (folder / "a.zip").read_bytes()
    assert data == (folder / "b.zip").read_bytes()
    assert {path.name for path in folder.iterdir()} == before | {"a.zip", "b.zip", "submissions.csv", LOCK}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for member in archive.infolist():
            assert member.date_time == (1980, 1, 1, 0, 0, 0) and member.compress_type == zipfile.ZIP_STORED


def test_rows_follow_the_manifest_and_near_ties_stay_distinct(folder):
    names = names_of("val")
    score = 1 - np.arange(ROWS["val"]) * 2.0**-53
    rewrite(folder, "val", names[::-1], score[::-1])
    make(folder, "val", slots=("val", "val_hard"))
    rows = [line.split(",") for line in content(folder / "submission.zip")["submission.csv"].splitlines()[1:]]
    assert [name for name, _ in rows] == names
    assert [float(text) for _, text in rows] == score.tolist()


def test_names_without_extension_get_that_of_their_file(folder):
    bare = [name.removesuffix(".jpg") for name in names_of("test")]
    images = [f"test_images.zip::test_images/{name}" for name in names_of("test")]
    write_manifest(make_manifest({"image": images, "name": bare}), folder / "bare.csv")
    make(folder, "test", "--test-manifest", folder / "bare.csv", slots=("test",))
    assert (
        content(folder / "submission.zip")["submission_hard.csv"].splitlines()[1].startswith("test0000.jpg,")
    )


def test_a_submission_csv_of_the_other_convention_can_be_converted(folder):
    make(folder, "test-card", slots=("test",))
    (folder / "card.csv").write_text(content(folder / "submission.zip")["submission.csv"])
    flags = ["--test", folder / "card.csv", "--test-manifest", folder / "test_manifest.csv"]
    make(folder, "test", *flags, out="converted.zip")
    make(folder, "test", slots=("test",), out="direct.zip")
    assert (folder / "converted.zip").read_bytes() == (folder / "direct.zip").read_bytes()


def refused(folder, message, *flags, profile="val", slots=("val", "val_hard")):
    with pytest.raises(UserError, match=message) as caught:
        make(folder, profile, *flags, slots=slots)
    assert not (folder / "submission.zip").exists()
    assert not list(folder.glob(".*")) and not (folder / "submissions.csv").exists()
    return str(caught.value)


def test_missing_rows_are_refused_with_up_to_five_names_or_filled(folder, capsys):
    names = names_of("val")
    rewrite(folder, "val", names[7:], scores_of("val")[7:], errors=[(names[2], "OSError: truncated")])
    message = refused(folder, r"missing rows \(7\)")
    assert ", ".join(names[:5]) + " and 2 more" in message and names[5] not in message
    assert "1 of them could not be read" in message
    make(folder, "val", "--fill-missing", "0.5", slots=("val", "val_hard"))
    assert "val: 7 missing rows filled with 0.5" in capsys.readouterr().out
    lines = content(folder / "submission.zip")["submission.csv"].splitlines()
    assert lines[1:8] == [f"{name},0.5" for name in names[:7]]
    assert lines[8:] == GOOD.splitlines()[8:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names, score: ([*names, "other.jpg"], [*score, 0.5]), r"unknown names \(1\): other\.jpg"),
        (lambda names, score: ([*names, names[0][:-4]], [*score, 0.5]), r"duplicate names \(1\): val0000;?$"),
        (lambda names, score: (names, [1.5, *score[1:]]), r"scores outside 0\.\.1 \(1\): val0000\.jpg"),
        (lambda names, score: (names, [-1e-9, *score[1:]]), r"scores outside 0\.\.1 \(1\): val0000\.jpg"),
        (lambda names, score: (names, [0.5] * len(names)), r"every score is 0\.5, a constant"),
    ],
)
def test_bad_predictions_are_refused_before_anything_is_written(folder, change, message):
    rewrite(folder, "val", *change(names_of("val"), scores_of("val").tolist()))
    refused(folder, message)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("val0003.jpg,nan", "column score contains 'nan', .* for val0003.jpg"),
        ("val0003.jpg,", "column score contains ''"),
        ("val0003.jpg,high", "column score contains 'high'"),
        ("val0002.jpg,0.3", r"repeated names \(1\): val0002\.jpg"),
    ],
)
def test_broken_rows_of_a_predictions_file_are_refused(folder, row, message):
    path = folder / "val.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], row, *lines[5:]]) + "\n")
    refused(folder, message)


def test_a_constant_is_not_hidden_by_filled_rows(folder):
    rewrite(folder, "val", names_of("val")[1:], [0.25] * (ROWS["val"] - 1))
    refused(folder, "every score is 0.25", "--fill-missing", "0.5")


def test_the_manifest_must_be_known_and_unchanged(folder):
    (folder / "val_manifest.csv").write_text("image,name\nval/val0000.jpg,val0000.jpg\n")
    refused(folder, "has changed")
    (folder / "val.csv.json").unlink()
    refused(folder, "--val-manifest")


@pytest.mark.parametrize(
    ("flags", "slots", "message"),
    [
        ([], ("val",), "--val-hard is missing"),
        ([], ("val", "val_hard", "test"), "has no file for --test"),
        (["--fill-missing", "2"], ("val", "val_hard"), "from 0 to 1"),
        (["--extension", "drop"], ("val", "val_hard"), "unknown --extension"),
        (["--file-name", "val=submission_hard.csv"], ("val", "val_hard"), "cannot have the same name"),
        (["--file-name", "val=../x.csv"], ("val", "val_hard"), "such as a.csv"),
        (["--file-name", "x.csv"], ("val", "val_hard"), "SLOT=NAME"),
        (["--name-column", "score"], ("val", "val_hard"), "cannot both be in the column score"),
        (["--check", "x.zip"], ("val", "val_hard"), "without --out"),
        (["--out", "x.csv"], ("val", "val_hard"), "must be the name of a .zip file"),
    ],
)
def test_wrong_flags_are_users_errors(folder, flags, slots, message):
    refused(folder, message, *flags, slots=slots)


def test_an_unknown_profile_suggests_the_nearest(folder):
    refused(folder, "did you mean test-card", profile="test-crad", slots=("test",))


def test_one_file_in_both_slots_is_refused(folder):
    flags = ["--val", folder / "val.csv", "--val-hard", folder / "val.csv"]
    refused(folder, r"images in more than one file \(12\)", *flags, slots=())


def test_swapped_slots_are_pointed_out(folder, capsys):
    make(folder, "val", "--val", folder / "val_hard.csv", "--val-hard", folder / "val.csv")
    assert "are the two swapped?" in capsys.readouterr().err


def test_names_that_are_the_same_without_extension_are_refused(folder):
    names = ["a.jpg", "a.png", "b.jpg"]
    write_manifest(make_manifest({"image": names, "name": names}), folder / "test_manifest.csv")
    rewrite(folder, "test", names, [0.1, 0.2, 0.3])
    refused(folder, r"duplicate names \(1\): a \(row 2\)$", profile="test-card", slots=("test",))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"image_name,score\nval0000.jpg,2\n", r"submission\.zip: submission\.csv: scores outside"),
        (b"image_name,score\nval0000.jpg,0.5\n", r"submission\.zip: submission\.csv: missing rows \(11\)"),
    ],
)
def test_the_written_bytes_are_checked_before_the_zip_gets_its_name(folder, monkeypatch, data, message):
    monkeypatch.setattr("featdistill.submission.writing._csv_bytes", lambda *_: data)
    refused(folder, message)


def test_scores_that_tie_are_counted(folder, capsys):
    rewrite(folder, "test", names_of("test"), [0.1, 0.1, 0.2, 0.3, 0.3, 0.3, 0.4, 0.5, 0.6])
    make(folder, "test", slots=("test",))
    assert "warning: submission_hard.csv: 5 of 9 rows share their score" in capsys.readouterr().err
    make(folder, "val", slots=("val", "val_hard"))
    assert "share their score" not in capsys.readouterr().err


def test_names_that_differ_only_by_folder_are_refused(folder):
    names = ["a/x.jpg", "b/x.jpg"]
    write_manifest(make_manifest({"image": names, "name": names}), folder / "test_manifest.csv")
    rewrite(folder, "test", names, [0.1, 0.2])
    refused(folder, r"names with a folder \(2\): a/x\.jpg \(row 1\)", profile="test", slots=("test",))


@pytest.mark.parametrize(
    ("name", "files", "parts", "expected"),
    [
        ("val", [], {}, "val"),
        (
            "test",
            [],
            {"score_column": "pred", "index_column": True},
            "test score_column=pred index_column=True",
        ),
        ("test-card", [], {"extension": "keep", "score_column": "pred"}, "test-card extension=keep"),
        ("test", ["test=submission.csv"], {}, "test test=submission.csv"),
    ],
)
def test_the_label_of_a_profile_is_its_name_and_its_changes(name, files, parts, expected):
    assert label(name, adapted(name, files, **parts)) == expected


@pytest.mark.parametrize("profile", [*PROFILES, None])
def test_our_own_zips_pass_the_check(folder, profile, capsys):
    for name in [profile] if profile else PROFILES:
        make(folder, name, slots=SLOTS_OF[name])
        capsys.readouterr()
        flags = ["--profile", profile] if profile else []
        manifests = [
            text
            for slot in SLOTS_OF[name]
            for text in (f"--{slot.replace('_', '-')}-manifest", str(folder / f"{slot}_manifest.csv"))
        ]
        assert make_submission.main(["--check", str(folder / "submission.zip"), *flags, *manifests]) == 0
        assert f"profile {name}\n" in capsys.readouterr().out


def test_the_check_prints_rows_mean_share_and_hash(folder, capsys):
    (folder / "submission.csv").write_text("image_name,score\na.jpg,0.25\nb.jpg,0.75\nc.jpg,0.8\n")
    assert make_submission.main(["--check", str(folder / "submission.csv")]) == 0
    shown = capsys.readouterr().out
    digest = sha256_of(folder / "submission.csv")
    assert f"submission.csv    3     0.6000    66.7 % {digest}" in shown


def test_without_a_manifest_the_check_knows_the_size_of_the_splits(folder, capsys):
    flags = ["--check", str(folder / "submission.csv"), "--profile", "val"]
    (folder / "submission.csv").write_text(GOOD)
    assert make_submission.main(flags) == 0
    assert "submission.csv has 12 rows; the challenge's val has 10,000" in capsys.readouterr().err
    assert make_submission.main([*flags, "--val-manifest", str(folder / "val_manifest.csv")]) == 0
    assert "10,000" not in capsys.readouterr().err


def test_with_a_manifest_the_check_compares_names(folder):
    path = folder / "submission.csv"
    flags = ["--check", str(path), "--profile", "val", "--val-manifest", str(folder / "val_manifest.csv")]
    path.write_text(GOOD)
    assert make_submission.main(flags) == 0
    path.write_text("".join(GOOD.splitlines(True)[:-1]))
    with pytest.raises(UserError, match=r"missing rows \(1\): val000b\.jpg"):
        make_submission.main(flags)
    path.write_text(GOOD + "other.jpg,0.5\n")
    with pytest.raises(UserError, match=r"unknown names \(1\): other\.jpg \(row 13\)"):
        make_submission.main(flags)


def test_the_check_says_which_profile_it_chose(folder):
    path = zipped(folder / "made.zip", [("submission.csv", GOOD.replace("score", "pred", 1))])
    with pytest.raises(UserError, match=r"image extension \(12\).*checked as profile test-card"):
        make_submission.main(["--check", str(path)])


def test_help_is_shown_without_importing_pandas():
    code = "import sys, make_submission as m; m.build_parser(); sys.exit('pandas' in sys.modules)"
    folder = Path(make_submission.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 0
