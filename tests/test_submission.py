"""The zip for Codabench: what is written, what is refused, and the check of other people's files."""

import io
import warnings
import zipfile

import numpy as np
import pytest

import make_submission
from featdistill.command_line import UserError
from featdistill.manifest import make_manifest, write_manifest
from featdistill.predictions import manifest_entry, write_predictions
from featdistill.submission import PROFILES, check_submission

ROWS = {"val": 12, "val_hard": 8, "test": 9}


def names_of(slot):
    return [f"{slot.replace('_', '')}{number:04x}.jpg" for number in range(ROWS[slot])]


def scores_of(slot):
    return (np.arange(ROWS[slot]) + 0.5) / ROWS[slot]


@pytest.fixture
def folder(tmp_path):
    """A folder with predictions and a manifest of each slot."""
    for slot in ROWS:
        names = names_of(slot)
        manifest = tmp_path / f"{slot}_manifest.csv"
        write_manifest(
            make_manifest({"image": [f"{slot}/{name}" for name in names], "name": names}), manifest
        )
        path = tmp_path / f"{slot}.csv"
        write_predictions(path, names, scores_of(slot), {}, {"manifest": manifest_entry(manifest, path)})
    return tmp_path


def rewrite(folder, slot, names, score, errors=()):
    path = folder / f"{slot}.csv"
    sidecar = {"manifest": manifest_entry(folder / f"{slot}_manifest.csv", path)}
    write_predictions(path, names, np.asarray(score), {}, sidecar, errors)


def make(folder, profile, *flags, slots=(), out="submission.zip"):
    files = [text for slot in slots for text in (f"--{slot.replace('_', '-')}", str(folder / f"{slot}.csv"))]
    return make_submission.main(["--profile", profile, *files, "--out", str(folder / out), *map(str, flags)])


def content(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def as_csv(header, names, score):
    return (
        "\n".join([header, *(f"{name},{value!r}" for name, value in zip(names, score, strict=True))]) + "\n"
    )


def zipped(path, members):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        warnings.simplefilter("ignore")
        for name, text in members:
            archive.writestr(name, text)
    return path


GOOD = as_csv("image_name,score", names_of("val"), scores_of("val").tolist())
GOOD_HARD = as_csv("image_name,score", names_of("val_hard"), scores_of("val_hard").tolist())


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


def test_repetition_gives_the_same_bytes_and_nothing_else_is_left(folder):
    before = {path.name for path in folder.iterdir()}
    for out in ("a.zip", "b.zip"):
        make(folder, "val", slots=("val", "val_hard"), out=out)
    data = (folder / "a.zip").read_bytes()
    assert data == (folder / "b.zip").read_bytes()
    assert {path.name for path in folder.iterdir()} == before | {"a.zip", "b.zip"}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for member in archive.infolist():
            assert member.date_time == (1980, 1, 1, 0, 0, 0) and member.compress_type == zipfile.ZIP_STORED


def test_rows_follow_the_manifest_and_scores_that_nearly_tie_stay_apart(folder):
    names = names_of("val")
    score = 1 - np.arange(ROWS["val"]) * 2.0**-53
    rewrite(folder, "val", names[::-1], score[::-1])
    make(folder, "val", slots=("val", "val_hard"))
    rows = [line.split(",") for line in content(folder / "submission.zip")["submission.csv"].splitlines()[1:]]
    assert [name for name, _ in rows] == names
    assert [float(text) for _, text in rows] == score.tolist()


def test_a_manifest_without_extensions_takes_those_of_its_files(folder):
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
    assert not list(folder.glob(".*"))
    return str(caught.value)


def test_missing_rows_are_refused_by_up_to_five_names_or_filled(folder, capsys):
    names = names_of("val")
    rewrite(folder, "val", names[7:], scores_of("val")[7:], errors=[(names[2], "OSError: truncated")])
    message = refused(folder, r"missing rows \(7\)")
    assert ", ".join(names[:5]) + " and 2 more" in message and names[5] not in message
    assert "1 of them could not be read" in message
    make(folder, "val", "--fill-missing", "0.5", slots=("val", "val_hard"))
    assert "val: missing rows filled with 0.5: 7" in capsys.readouterr().out
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
        ("val0003.jpg,nan", "column score holds 'nan', .* for val0003.jpg"),
        ("val0003.jpg,", "column score holds ''"),
        ("val0003.jpg,high", "column score holds 'high'"),
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
        ([], ("val", "val_hard", "test"), "--test has no place"),
        (["--fill-missing", "2"], ("val", "val_hard"), "between 0 and 1"),
        (["--extension", "drop"], ("val", "val_hard"), "unknown --extension"),
        (["--file-name", "val=submission_hard.csv"], ("val", "val_hard"), "cannot have one name"),
        (["--file-name", "val=../x.csv"], ("val", "val_hard"), "plain name"),
        (["--file-name", "x.csv"], ("val", "val_hard"), "SLOT=NAME"),
        (["--check", "x.zip"], ("val", "val_hard"), "without --out"),
    ],
)
def test_wrong_flags_are_users_errors(folder, flags, slots, message):
    refused(folder, message, *flags, slots=slots)


def test_an_unknown_profile_names_the_nearest(folder):
    refused(folder, "did you mean test-card", profile="test-crad", slots=("test",))


def test_one_file_in_both_slots_is_refused(folder):
    flags = ["--val", folder / "val.csv", "--val-hard", folder / "val.csv"]
    refused(folder, r"images in more than one file \(12\)", *flags, slots=())


def test_swapped_slots_are_pointed_out(folder, capsys):
    make(folder, "val", "--val", folder / "val_hard.csv", "--val-hard", folder / "val.csv")
    assert "are the two swapped?" in capsys.readouterr().out


def test_names_that_become_one_without_extension_are_refused(folder):
    names = ["a.jpg", "a.png", "b.jpg"]
    write_manifest(make_manifest({"image": names, "name": names}), folder / "test_manifest.csv")
    rewrite(folder, "test", names, [0.1, 0.2, 0.3])
    refused(folder, r"duplicate names \(1\): a$", profile="test-card", slots=("test",))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (b"image_name,score\nval0000.jpg,2\n", r"submission\.zip: submission\.csv: scores outside"),
        (b"image_name,score\nval0000.jpg,0.5\n", r"submission\.zip: submission\.csv: missing rows \(11\)"),
    ],
)
def test_the_written_bytes_are_checked_before_the_zip_gets_its_name(folder, monkeypatch, written, message):
    monkeypatch.setattr("featdistill.submission._csv_bytes", lambda *_: written)
    refused(folder, message)


@pytest.mark.parametrize("profile", [*PROFILES, None])
def test_our_own_zips_pass_the_check(folder, profile, capsys):
    slots = {"val": ("val", "val_hard"), "test": ("test",), "test-card": ("test",)}
    for name in [profile] if profile else PROFILES:
        make(folder, name, slots=slots[name])
        capsys.readouterr()
        flags = ["--profile", profile] if profile else []
        manifests = [
            text
            for slot in slots[name]
            for text in (f"--{slot.replace('_', '-')}-manifest", str(folder / f"{slot}_manifest.csv"))
        ]
        assert make_submission.main(["--check", str(folder / "submission.zip"), *flags, *manifests]) == 0
        assert f"profile {name}\n" in capsys.readouterr().out


def test_the_check_prints_rows_mean_share_and_hash(folder, capsys):
    (folder / "submission.csv").write_text("image_name,score\na.jpg,0.25\nb.jpg,0.75\nc.jpg,0.8\n")
    assert make_submission.main(["--check", str(folder / "submission.csv")]) == 0
    shown = capsys.readouterr().out
    digest = make_submission.sha256_of(folder / "submission.csv")
    assert f"submission.csv    3     0.6000    66.7 % {digest}" in shown


REPEATED = GOOD + GOOD
BAD_TABLES = {
    "column score is missing": GOOD.replace("score", "pred", 1),
    "column image_name is missing": GOOD.replace("image_name", "name", 1),
    "there is an index column": "\n".join(
        f"{'' if row == 0 else row - 1},{line}" for row, line in enumerate(GOOD.splitlines())
    ),
    "the columns differ": GOOD.replace("image_name,score", "score,image_name", 1),
    "the header appears again in row 13": REPEATED,
    r"duplicate names \(2\): val0000\.jpg, val0001\.jpg": GOOD + "".join(GOOD.splitlines(True)[1:3]),
    r"scores that are NaN or empty \(2\): x\.jpg, y\.jpg": GOOD + "x.jpg,NaN\ny.jpg,\n",
    r"scores that are no number \(1\): x\.jpg": GOOD + "x.jpg,high\n",
    r"scores outside 0\.\.1 \(2\): x\.jpg, y\.jpg": GOOD + "x.jpg,1.01\ny.jpg,-inf\n",
    "every score is 0.5, a constant": as_csv("image_name,score", names_of("val"), [0.5] * 12),
    r"names without their image extension \(1\): x;": GOOD + "x,0.5\n",
    "row 13 has 3 fields": GOOD + "x.jpg,0,5\n",
    "holds a header and no rows": "image_name,score\n",
    "is empty": "",
    "byte order mark": "\ufeff" + GOOD,
}


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("message", BAD_TABLES)
def test_the_check_refuses_a_bad_table_made_by_anyone(tmp_path, message, as_zip):
    path = tmp_path / ("made.zip" if as_zip else "submission.csv")
    if as_zip:
        zipped(path, [("submission.csv", BAD_TABLES[message]), ("submission_hard.csv", GOOD_HARD)])
    else:
        path.write_text(BAD_TABLES[message], newline="")
    with pytest.raises(UserError, match=message):
        check_submission(path, PROFILES["val"])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("submission.csv", GOOD)], r"holds no submission_hard\.csv; it holds submission\.csv"),
        ([], r"holds no submission\.csv and no submission_hard\.csv; it holds nothing"),
        ([("s/submission.csv", GOOD), ("s/submission_hard.csv", GOOD_HARD)], "at the root, not in a folder"),
        (
            [("submission.csv", GOOD), ("submission_hard.csv", GOOD_HARD), ("__MACOSX/", "")],
            "__MACOSX/, which do",
        ),
        ([("submission.csv", GOOD), ("submission_hard.csv", GOOD_HARD), ("a.txt", "")], r"a\.txt, which do"),
        ([("submission.csv", GOOD), ("submission.csv", GOOD)], "there twice"),
        ([("submission.csv", "0" * (65 * 2**20))], "more than 64 MiB"),
    ],
)
def test_the_check_refuses_a_zip_of_other_files(tmp_path, members, message):
    with pytest.raises(UserError, match=message):
        check_submission(zipped(tmp_path / "made.zip", members), PROFILES["val"])


def test_the_check_refuses_damaged_and_missing_files(tmp_path):
    path = zipped(tmp_path / "made.zip", [("submission.csv", GOOD), ("submission_hard.csv", GOOD_HARD)])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="no readable zip"):
        check_submission(path, PROFILES["val"])
    path.write_bytes(data[:60] + bytes([data[60] ^ 0xFF]) + data[61:])
    with pytest.raises(UserError, match="no readable zip"):
        check_submission(path, PROFILES["val"])
    with pytest.raises(UserError, match="does not exist"):
        check_submission(tmp_path / "none.zip", PROFILES["val"])


def test_the_check_compares_names_where_a_manifest_is_given(folder):
    path = folder / "submission.csv"
    flags = ["--check", str(path), "--profile", "val", "--val-manifest", str(folder / "val_manifest.csv")]
    path.write_text(GOOD)
    assert make_submission.main(flags) == 0
    path.write_text("".join(GOOD.splitlines(True)[:-1]))
    with pytest.raises(UserError, match=r"missing rows \(1\): val000b\.jpg"):
        make_submission.main(flags)
    path.write_text(GOOD + "other.jpg,0.5\n")
    with pytest.raises(UserError, match=r"unknown names \(1\): other\.jpg"):
        make_submission.main(flags)


def test_the_check_says_which_profile_it_chose(folder):
    path = zipped(folder / "made.zip", [("submission.csv", GOOD.replace("score", "pred", 1))])
    with pytest.raises(UserError, match=r"image extension \(12\).*checked as profile test-card"):
        make_submission.main(["--check", str(path)])
