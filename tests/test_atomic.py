"""Files and folders are there whole or not at all, whatever happens while they are written."""

import errno
import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from featdistill import atomic


class Stopped(Exception):
    """What ends the writing in these tests."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "deep" / "a.txt"
    with atomic.replace_file(path) as temporary:
        temporary.write_text("whole")
        assert temporary.parent == path.parent and temporary != path
        assert not path.exists()
    assert path.read_text() == "whole" and names(path.parent) == ["a.txt"]


def test_a_file_that_fails_leaves_the_old_one_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(Stopped), atomic.replace_file(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise Stopped
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_file_is_replaced_not_written_into(tmp_path):
    path, link = tmp_path / "a.txt", tmp_path / "same.txt"
    path.write_text("old")
    os.link(path, link)
    atomic.write_text(path, "new")
    assert (path.read_text(), link.read_text()) == ("new", "old")


def test_a_body_that_writes_nothing_is_an_error_and_leaves_the_old_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(FileNotFoundError), atomic.replace_file(tmp_path / "a.txt"):
        pass
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "run" / "expert"
    for generation in ("old", "new"):
        with atomic.replace_folder(path) as temporary:
            (temporary / generation).mkdir()
            (temporary / generation / "file").write_text(generation)
        assert names(path) == [generation] and names(path.parent) == ["expert"]


def test_a_folder_that_fails_leaves_the_old_one_and_nothing_beside_it(tmp_path):
    path = tmp_path / "expert"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(Stopped), atomic.replace_folder(path) as temporary:
        (temporary / "half").touch()
        assert names(path) == ["old"]
        raise Stopped
    assert names(path) == ["old"] and names(tmp_path) == ["expert"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    path = tmp_path / "expert"
    path.mkdir()
    (path / "old").touch()
    rename = os.replace

    def refuse_the_new_one(source, target):
        if str(source).endswith(".part"):
            raise OSError("no space left")
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuse_the_new_one)
    with pytest.raises(OSError, match="no space left"), atomic.replace_folder(path) as temporary:
        (temporary / "new").touch()
    assert names(path) == ["old"] and names(tmp_path) == ["expert"]


def test_what_a_killed_run_left_of_a_folder_does_not_get_into_the_next(tmp_path):
    with atomic.replace_folder(tmp_path / "expert") as temporary:
        (temporary / "left").touch()
        left = temporary.name
        os.rename(temporary, tmp_path / "kept")
        temporary.mkdir()
    (tmp_path / "kept").rename(tmp_path / left)
    with atomic.replace_folder(tmp_path / "expert") as temporary:
        (temporary / "new").touch()
    assert names(tmp_path / "expert") == ["new"]


def test_text_is_utf_8_with_unix_line_ends(tmp_path):
    atomic.write_text(tmp_path / "a.txt", "größe\n日本\n")
    assert (tmp_path / "a.txt").read_bytes() == "größe\n日本\n".encode()


def test_json_is_read_back_as_it_was(tmp_path):
    value = {"a": [1, 2.5, None, True], "größe": "日本", "deep": {"x": []}}
    atomic.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "größe" in text and text.endswith("}\n")


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    atomic.write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        atomic.write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == 1 and names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("data", [b"", b"abc", b"\0" * 300_000])
def test_the_hash_is_that_of_the_bytes(tmp_path, data):
    (tmp_path / "a").write_bytes(data)
    assert atomic.sha256_of(tmp_path / "a") == hashlib.sha256(data).hexdigest()


# As PyTorch and safetensors word it, with the number of the error that is expected.
REFUSALS = {
    "Error while serializing: I/O error: No space left on device (os error 28)": errno.ENOSPC,
    "Error while serializing: I/O error: File too large (os error 27)": errno.EFBIG,
    "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534": errno.EIO,
    "PytorchStreamWriter failed writing file data/0: file write failed": errno.EIO,
}


@pytest.mark.parametrize("replace", [atomic.replace_file, atomic.replace_folder])
@pytest.mark.parametrize("text", REFUSALS)
def test_what_libraries_say_of_a_full_disk_is_the_systems_error(tmp_path, replace, text):
    path = tmp_path / "out"
    with pytest.raises(OSError) as raised, replace(path):
        raise RuntimeError(text)
    assert (raised.value.errno, raised.value.filename) == (REFUSALS[text], str(path))
    assert names(tmp_path) == []


def test_an_unreported_reason_is_a_full_disk_where_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: SimpleNamespace(free=4096))
    with pytest.raises(OSError, match="No space left on device"), atomic.replace_file(tmp_path / "a"):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), atomic.replace_file(tmp_path / "a"):
        raise RuntimeError("shapes do not match")
