"""A listing leaves no image out without a word: suffixes, links, odd names, and what systems leave behind."""

import os
import unicodedata
import zipfile

import numpy as np
import pytest
from archive_files import write_tar, write_zip
from test_image_io import encode, pixels

from featdistill.images import listing
from featdistill.images.archives import Archive
from featdistill.images.formats import refusal_of_file
from featdistill.images.reading import BrokenImage, read_bytes, read_image
from featdistill.records.manifest import make_manifest, read_manifest, write_manifest
from featdistill.records.predictions import match_names

JPEG = encode(pixels())


def put(folder, *names):
    for name in names:
        path = os.path.join(os.fsencode(folder), name if isinstance(name, bytes) else os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(JPEG)


def images_of(folder):
    return list(listing.image_files(folder, listing.list_folder(folder).files))


def test_the_content_decides_where_the_suffix_says_nothing(tmp_path):
    images = ["a.JPG", "b.jfif", "c.jpe", "d", "e.jpg_large", "f.dat", "g.jpg.1", "h.pjpeg"]
    put(tmp_path, *images)
    for name in ("note.txt", "README", "list.csv", "x.unknown"):
        (tmp_path / name).write_bytes(b"BM or not, this is a text of some length")
    assert images_of(tmp_path) == images
    for name in images:
        assert read_image(str(tmp_path / name)).shape == (24, 40, 3)


@pytest.mark.parametrize(
    ("name", "head", "expected"),
    [
        ("a.jpg", b"", ""),
        ("a.heic", JPEG, ""),
        ("a.jxl", b"\xff\x0a", "JPEG XL is not supported"),
        ("a", b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000 is not supported"),
        ("a.nef", b"MM\0*", "raw file is not supported"),
        ("a.cr2", JPEG, ""),
        ("a.ppm", b"P6", ".ppm files are not supported"),
        ("a.bin", b"P6", None),
        ("a.bin", None, ""),
        ("a.txt", JPEG, None),
        ("closed/", None, ""),
    ],
)
def test_what_cannot_be_decoded_has_a_reason(name, head, expected):
    reason = refusal_of_file(name, lambda: head)
    assert reason == expected if not expected else expected in reason


SYSTEM_FILES = (
    *("@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "x/@eaDir/b.jpg", ".@__thumb/a.jpg", ".thumbnails/a.jpg"),
    *("__MACOSX/._a.jpg", "x/__MACOSX/a.jpg", "#recycle/a.jpg", "$RECYCLE.BIN/a.jpg", ".DS_Store", "Icon\r"),
    *("x/Icon\r", "Thumbs.db", "._a.jpg", "a.jpg@SynoResource", "lost+found/a.jpg"),
)


def test_system_files_are_ignored_in_folders_and_counted(tmp_path):
    put(tmp_path, "a.jpg", "x/b.jpg", *SYSTEM_FILES)
    found = listing.list_folder(tmp_path)
    assert found.files == ["a.jpg", "x/b.jpg"]
    assert len(found.ignored) == len(SYSTEM_FILES)
    assert listing.ignored_note(found.ignored).endswith(f" ignored: {len(SYSTEM_FILES)}, such as #recycle")
    assert all(map(listing.is_system_file, SYSTEM_FILES))
    assert not any(map(listing.is_system_file, ("a/../b.jpg", "./a.jpg", "icon.jpg", "eaDir/a.jpg")))


def test_linked_folders_are_entered_and_loops_end(tmp_path):
    put(tmp_path / "root", "a.jpg")
    put(tmp_path / "store", "b.jpg", "deep/c.jpg")
    (tmp_path / "root" / "linked").symlink_to("../store")
    (tmp_path / "store" / "deep" / "back").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "self").symlink_to(".")
    (tmp_path / "root" / "gone.jpg").symlink_to("nowhere")
    (tmp_path / "root" / "circle").symlink_to("circle")
    assert images_of(tmp_path / "root") == ["a.jpg", "gone.jpg", "linked/b.jpg", "linked/deep/c.jpg"]


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert images_of(tmp_path) == ["pipe.jpg"]
    with pytest.raises(BrokenImage, match="device or a pipe"):
        read_image(str(tmp_path / "pipe.jpg"))


ODD_NAMES = {
    b"caf\xe9.jpg": "caf\\xe9.jpg",
    b"\xff\xfe/b.jpg": "\\xff\\xfe/b.jpg",
    b"a\rb.jpg": "a\\x0db.jpg",
    b"a\nb.jpg": "a\\x0ab.jpg",
    b"\x1b[2J.jpg": "\\x1b[2J.jpg",
    b"a\x7f.jpg": "a\\x7f.jpg",
    b"a::b.jpg": "a::b.jpg",
    b"x.zip::y/c.jpg": "x.zip::y/c.jpg",
    b'q"uo,te.jpg': 'q"uo,te.jpg',
    b" a .jpg": " a .jpg",
    b"back\\slash.jpg": "back\\slash.jpg",
    "\u00e9.jpg".encode(): "\u00e9.jpg",
    "e\u0301.jpg".encode(): "e\u0301.jpg",
}


def test_images_with_odd_names_are_read_through_a_manifest(tmp_path):
    put(tmp_path, *ODD_NAMES)
    names = images_of(tmp_path)
    rows = make_manifest({"image": [os.path.join(tmp_path, name) for name in names], "name": names})
    write_manifest(rows, tmp_path / "rows.csv")
    (tmp_path / "rows.csv").read_text(encoding="utf-8")
    rows = read_manifest(tmp_path / "rows.csv")
    assert sorted(rows["name"]) == sorted(ODD_NAMES.values())
    for location in rows["image"]:
        assert read_bytes(location) == JPEG


def test_an_archive_with_an_odd_name_is_found(tmp_path):
    path = write_zip(tmp_path / "caf.zip", {"a.jpg": JPEG})
    os.rename(path, os.fsencode(tmp_path) + b"/caf\xe9.zip")
    assert read_bytes(f"{tmp_path}/caf\\xe9.zip::a.jpg") == JPEG


def test_two_dots_after_a_linked_folder_mean_the_parent_of_its_target(tmp_path):
    put(tmp_path, "far/deep/a.jpg", "far/b.jpg")
    os.makedirs(tmp_path / "near")
    (tmp_path / "near" / "link").symlink_to(tmp_path / "far" / "deep")
    assert listing.absolute(tmp_path / "near" / "link" / ".." / "b.jpg") == str(tmp_path / "far" / "b.jpg")
    assert listing.absolute(f"{tmp_path}/near/../far/./b.jpg") == str(tmp_path / "far" / "b.jpg")
    (tmp_path / "rows.csv").write_text("image,name\nnear/link/../b.jpg,b\nnear/../far/b.jpg,c\n")
    assert read_manifest(tmp_path / "rows.csv")["image"].tolist() == [str(tmp_path / "far" / "b.jpg")] * 2


@pytest.mark.parametrize("spelling", ["a/./b.jpg", "././a/b.jpg", "a//b.jpg", "./a/b.jpg", "a/b.jpg"])
@pytest.mark.parametrize("suffix", ["zip", "tar"])
def test_a_member_is_found_however_its_path_is_spelled(tmp_path, suffix, spelling):
    write = write_zip if suffix == "zip" else write_tar
    path = write(tmp_path / f"x.{suffix}", {spelling: JPEG, "c.jpg": b"c"})
    assert {entry.name for entry in Archive(str(path)).index} == {"a/b.jpg", "c.jpg"}
    for asked in (spelling, "a/b.jpg", "./a//b.jpg"):
        assert read_bytes(f"{path}::{asked}") == JPEG


def test_backslashes_separate_folders_in_a_zip_and_belong_to_names_in_a_tar(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"a\\b.jpg": JPEG, "c\\": b""})
    assert [entry.name for entry in Archive(str(path)).index] == ["a/b.jpg"]
    assert read_bytes(f"{path}::a\\b.jpg") == read_bytes(f"{path}::a/b.jpg") == JPEG
    path = write_tar(tmp_path / "x.tar", {"a\\b.jpg": JPEG})
    assert [entry.name for entry in Archive(str(path)).index] == ["a\\b.jpg"]


def test_a_name_in_utf_8_that_the_zip_does_not_declare_is_read_as_such(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("caf\u00e9.jpg", JPEG)
    data = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + flags + 1] &= ~0x08
    path.write_bytes(data)
    assert [entry.name for entry in Archive(str(path)).index] == ["caf\u00e9.jpg"]
    assert read_bytes(f"{path}::caf\u00e9.jpg") == JPEG


@pytest.mark.parametrize("suffix", ["zip", "tar"])
def test_the_first_bytes_of_a_member_tell_its_format(tmp_path, suffix):
    write = write_zip if suffix == "zip" else write_tar
    path = write(tmp_path / f"x.{suffix}", {"a": JPEG, "empty": b""})
    archive = Archive(str(path))
    assert archive.head("a") == JPEG[:64] and archive.head("empty") == b"" and archive.head("gone") is None


def test_names_match_in_either_spelling_of_an_accent():
    composed, apart = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    assert np.array_equal(match_names([f"{apart}.jpg", composed], [f"{composed}.jpg"]), [0, 0])
