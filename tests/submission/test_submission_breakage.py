"""The ways to break a submission: each is refused in one line that names the file and the row."""

import io
import re
import struct
import tarfile
import zipfile

import pytest
from submission_folders import GOOD, GOOD_HARD, as_csv, names_of, zipped

from featdistill.command_line import UserError
from featdistill.submission.check import check_submission
from featdistill.submission.profiles import PROFILES, adapted

EXPECTED = {slot: names_of(slot) for slot in ("val", "val_hard")}
LINES = GOOD.splitlines(keepends=True)


def put(row: int, line: str) -> str:
    """Return the good table with another line in the place of a row, counted from 1."""
    return "".join([*LINES[:row], line, *LINES[row + 1 :]])


WITH_INDEX = "".join(f"{row - 1 if row else ''},{line}" for row, line in enumerate(LINES))

# What was done: the table, and how it is refused.
BROKEN_TABLES = {
    "the score column has another name": (GOOD.replace("score", "pred", 1), "column score is missing"),
    "the name column has another name": (
        GOOD.replace("image_name", "name", 1),
        "column image_name is missing",
    ),
    "there is no header": ("".join(LINES[1:]), r"column image_name, score is missing"),
    "the columns are exchanged": (GOOD.replace("image_name,score", "score,image_name", 1), "columns differ"),
    "it has an index column": (WITH_INDEX, "there is an index column"),
    "a column is called twice": (GOOD.replace("image_name", "score", 1), "a column appears twice"),
    "semicolons separate the cells": (GOOD.replace(",", ";"), "column image_name, score is missing"),
    "a second run was appended": (GOOD + GOOD, "the header appears again in row 13"),
    "a name is contains twice": (
        put(3, LINES[2]),
        r"duplicate names \(1\): val0001\.jpg \(row 3\)$",
    ),
    "a score is NaN": (
        put(3, "val0002.jpg,NaN\n"),
        r"NaN or empty \(1\): val0002\.jpg \(row 3\)$",
    ),
    "a score is empty": (
        put(3, "val0002.jpg,\n"),
        r"NaN or empty \(1\): val0002\.jpg \(row 3\)$",
    ),
    "a score is a word": (
        put(3, "val0002.jpg,high\n"),
        r"not numbers \(1\): val0002\.jpg \(row 3\): 'high'$",
    ),
    "a score is infinite": (
        put(3, "val0002.jpg,-inf\n"),
        r"not numbers \(1\): val0002\.jpg \(row 3\): '-inf'$",
    ),
    "a score is a number to Python alone": (put(3, "val0002.jpg,0.1_5\n"), r"not numbers .*'0\.1_5'"),
    "a score has a decimal comma": (put(3, "val0002.jpg,0,5\n"), "row 3 has 3 fields"),
    "a score has a percent sign": (put(3, "val0002.jpg,50%\n"), r"not numbers .*\(row 3\): '50%'"),
    "a score has a blank before it": (put(3, "val0002.jpg, 0.5\n"), r"not numbers .*\(row 3\): ' 0\.5'"),
    "a score is above 1": (
        put(3, "val0002.jpg,1.01\n"),
        r"outside 0\.\.1 \(1\): val0002\.jpg \(row 3\)$",
    ),
    "a score is below 0": (
        put(3, "val0002.jpg,-1e-9\n"),
        r"outside 0\.\.1 \(1\): val0002\.jpg \(row 3\)$",
    ),
    "a score is too large for a float": (put(3, "val0002.jpg,1e999\n"), r"outside 0\.\.1 \(1\)"),
    "all scores are the same": (
        as_csv("image_name,score", names_of("val"), [0.5] * 12),
        r"every score is 0\.5, a constant",
    ),
    "a name has no extension": (
        put(3, "val0002,0.2\n"),
        r"without their image extension \(1\): val0002 \(row 3\)",
    ),
    "a name is empty": (put(3, ",0.2\n"), r"empty or read as missing \(1\):  \(row 3\)"),
    "a name is read as missing": (put(3, "null,0.2\n"), r"empty or read as missing \(1\): null \(row 3\)"),
    "a name has a blank before it": (
        put(3, " val0002.jpg,0.2\n"),
        r"spaces around .*: ' val0002\.jpg' \(row 3\)",
    ),
    "a name holds a character of no width": (
        put(3, "val\u200b0002.jpg,0.2\n"),
        r"invisible characters \(1\): .*\(row 3\)",
    ),
    "a name holds a line end": (put(3, '"val0002.jpg\n",0.2\n'), r"invisible characters \(1\): .*\(row 3\)"),
    "a name has a folder": (
        put(3, "val_images/val0002.jpg,0.2\n"),
        r"names with a folder \(1\): val_.*\(row 3\)",
    ),
    "an image is missing": ("".join(LINES[:-1]), r"missing rows \(1\): val000b\.jpg$"),
    "an image is not of the split": (GOOD + "x.jpg,0.5\n", r"unknown names \(1\): x\.jpg \(row 13\)"),
    "it has a header but no rows": (LINES[0], "has a header but no rows"),
    "it is empty": ("", "is empty"),
    "it was cut off": (GOOD[:-3], r"row 12, the last, has no line end"),
    "a quotation mark is not closed": (put(3, '"val0002.jpg,0.2\n'), "readable CSV in UTF-8"),
    "a line is blank": (put(3, LINES[3] + "\n"), "line 5 is blank"),
    "its line ends are those of Windows": (GOOD.replace("\n", "\r\n"), "line 1 contains a carriage return"),
    "its line ends are those of old Macs": (GOOD.replace("\n", "\r"), "line 1 contains a carriage return"),
    "it starts with a byte order mark": ("\ufeff" + GOOD, "byte order mark"),
    "it is in UTF-16": (GOOD.encode("utf-16"), "readable CSV in UTF-8"),
    "a name is in Latin-1": (put(3, "vél.jpg,0.2\n").encode("latin-1"), "readable CSV in UTF-8"),
}


def refusal(path, expected=EXPECTED, profile=PROFILES["val"]) -> str:
    with pytest.raises(UserError) as caught:
        check_submission(path, profile, expected)
    message = str(caught.value)
    assert message.startswith(str(path))
    return message


@pytest.mark.parametrize("what", BROKEN_TABLES)
def test_a_broken_table_is_refused_in_a_zip_and_alone(tmp_path, what):
    table, message = BROKEN_TABLES[what]
    archive = zipped(tmp_path / "made.zip", [("submission.csv", table), ("submission_hard.csv", GOOD_HARD)])
    in_zip = refusal(archive)
    assert in_zip.startswith(f"{archive}: submission.csv") and re.search(message, in_zip)
    alone = tmp_path / "submission.csv"
    alone.write_bytes(table if isinstance(table, bytes) else table.encode())
    assert re.search(message, refusal(alone))


def test_the_tables_are_valid_before_they_are_broken(tmp_path):
    members = [("submission.csv", GOOD), ("submission_hard.csv", GOOD_HARD)]
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        files = check_submission(zipped(tmp_path / "made.zip", members, method), PROFILES["val"], EXPECTED)
        assert [(file.slot, file.rows) for file in files] == [("val", 12), ("val_hard", 8)]


def test_an_index_column_must_count_the_rows(tmp_path):
    path = tmp_path / "submission.csv"
    path.write_text(WITH_INDEX)
    profile = adapted("val", index_column=True)
    assert check_submission(path, profile, EXPECTED)[0].rows == 12
    path.write_text(WITH_INDEX.replace("\n3,", "\n2,"))
    assert r"is not 0, 1, 2, .. (1): 2 (row 4)" in refusal(path, profile=profile)


def good(path, method=zipfile.ZIP_DEFLATED):
    return zipped(path, [("submission.csv", GOOD), ("submission_hard.csv", GOOD_HARD)], method)


def members(*names):
    return lambda path: zipped(path, [(name, GOOD_HARD if "hard" in name else GOOD) for name in names])


def patched(offset_local: int, offset_central: int, form: str, value: int):
    """Return a writer of a zip with another value in a field of the first member's headers (APPNOTE 4.3)."""

    def write(path):
        data = bytearray(good(path).read_bytes())
        struct.pack_into(form, data, offset_local, value)
        struct.pack_into(form, data, data.index(b"PK\x01\x02") + offset_central, value)
        path.write_bytes(data)

    return write


def flipped(path):
    data = bytearray(good(path, zipfile.ZIP_STORED).read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def tarred(path):
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("submission.csv"), io.BytesIO())


def swapped(path):
    zipped(path, [("submission.csv", GOOD_HARD), ("submission_hard.csv", GOOD)])


def vast(path):
    with path.open("wb") as file:
        file.truncate(65 * 2**20)


BROKEN_ZIPS = {
    "a file is missing": (
        members("submission.csv"),
        r"is missing submission_hard\.csv; it contains submission\.csv",
    ),
    "it is empty": (members(), r"is missing submission\.csv and submission_hard\.csv; it contains nothing"),
    "the files are in a folder": (
        members("s/submission.csv", "s/submission_hard.csv"),
        r"contains s/submission\.csv, s/submission_hard\.csv, .*at the root, not in a folder",
    ),
    "there is a stray folder": (
        members("submission.csv", "submission_hard.csv", "__MACOSX/"),
        "contains __MACOSX/, which the profile does not allow",
    ),
    "there is a stray file": (
        members("submission.csv", "submission_hard.csv", ".DS_Store"),
        r"contains \.DS_Store, which the profile does not allow",
    ),
    "a file is contains twice": (
        members("submission.csv", "submission_hard.csv", "submission.csv"),
        r"contains twice \(1\): submission\.csv",
    ),
    "a name is in capitals": (
        members("Submission.csv", "submission_hard.csv"),
        r"contains Submission\.csv, which",
    ),
    "the two files are swapped": (swapped, r"submission\.csv: missing rows \(12\): val0000\.jpg, "),
    "a file is encrypted": (patched(6, 8, "<H", 1), r"encrypted files \(1\): submission\.csv"),
    "it is compressed by bzip2": (
        lambda path: good(path, zipfile.ZIP_BZIP2),
        r"not compressed by deflate \(2\): submission\.csv, submission_hard\.csv",
    ),
    "it is compressed by LZMA": (
        lambda path: good(path, zipfile.ZIP_LZMA),
        r"not compressed by deflate \(2\)",
    ),
    "it is compressed by Deflate64": (
        patched(8, 10, "<H", 9),
        r"not compressed by deflate \(1\): submission\.csv",
    ),
    "it unpacks to too much": (patched(22, 24, "<I", 65 * 2**20), "more than 64 MiB"),
    "it is vast": (vast, "more than 64 MiB"),
    "it was cut off": (lambda path: path.write_bytes(good(path).read_bytes()[:300]), "not a readable zip"),
    "a bit has flipped": (flipped, "not a readable zip: Bad CRC-32 for file 'submission.csv'"),
    "it is another kind of archive": (tarred, "is not a zip"),
    "it is not there": (lambda path: None, "does not exist"),
}


@pytest.mark.parametrize("what", BROKEN_ZIPS)
def test_a_broken_zip_is_refused(tmp_path, what):
    write, message = BROKEN_ZIPS[what]
    path = tmp_path / "made.zip"
    write(path)
    assert re.search(message, refusal(path))
