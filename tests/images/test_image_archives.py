"""Members of archives give their bytes where they lie; the list of a tar is kept as long as it is true."""

import io
import os
import tarfile
import threading
import zipfile

import numpy as np
import pytest
from archive_files import write_tar, write_zip

from featdistill.images import archive_index as member_index
from featdistill.images import archives as containers
from featdistill.images import reading as image_io
from featdistill.images.archive_index import Entry, Index
from featdistill.images.archives import Archive, ArchiveError
from featdistill.images.reading import BrokenImage

MEMBERS = {f"set/{place}/ä{place}.jpg": bytes([place]) * (100 * place + 1) for place in range(40)}
MEMBERS["a" * 150 + "/" + "b" * 120 + ".png"] = b"a name longer than a plain header holds"
MEMBERS["empty.png"] = b""


def index_path(archive):
    return archive.with_name(archive.name + ".index.npz")


def listing(path):
    """The names of an archive that is listed anew, as by another process."""
    containers._tar_index.cache_clear()
    return [entry.name for entry in Archive(str(path)).index]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.zip", {"method": zipfile.ZIP_STORED}),
        ("a.ZIP", {"method": zipfile.ZIP_DEFLATED}),
        ("a.tar", {"format": tarfile.GNU_FORMAT}),
        ("a.TAR", {"format": tarfile.PAX_FORMAT}),
    ],
)
def test_every_member_gives_its_bytes_in_any_order(tmp_path, name, options):
    write = write_zip if name.lower().endswith(".zip") else write_tar
    path = write(tmp_path / name, MEMBERS, **options)
    names = list(MEMBERS)
    assert listing(path) == names
    for place in np.random.default_rng(0).permutation(np.arange(2 * len(names))):
        member = names[place % len(names)]
        assert image_io.read_bytes(f"{path}::{member}") == MEMBERS[member]
    with pytest.raises(BrokenImage, match=r"no member set/0/ä1\.jpg in"):
        image_io.read_bytes(f"{path}::set/0/ä1.jpg")


def test_a_zip_that_python_reads_otherwise_is_read_alike(tmp_path):
    """Streamed members have their sizes after their data, and a zip may begin with something else."""

    class Stream(io.BytesIO):
        def seekable(self):
            return False

    stream = Stream()
    stream.write(b"#!/bin/sh\n" * 7)
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in MEMBERS.items():
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(data)
    (tmp_path / "a.zip").write_bytes(stream.getvalue())
    for name, data in MEMBERS.items():
        assert image_io.read_bytes(f"{tmp_path}/a.zip::{name}") == data


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_of_members_with_one_name_the_last_counts_and_a_leading_dot_does_not(tmp_path, write, recwarn):
    path = tmp_path / ("a.zip" if write is write_zip else "a.tar")
    write(path, {"./a.png": b"first", "b.png": b"second"})
    assert listing(path) == ["a.png", "b.png"]
    assert Archive(str(path)).read("./a.png") == Archive(str(path)).read("a.png") == b"first"
    if write is write_tar:
        with tarfile.open(path, "a") as archive:
            member = tarfile.TarInfo("a.png")
            member.size = 3
            archive.addfile(member, io.BytesIO(b"new"))
    else:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("a.png", b"new")
    assert listing(path) == ["b.png", "a.png"]
    assert Archive(str(path)).read("a.png") == b"new"


@pytest.mark.parametrize("system", ["reads at a place", "reads where the file stands"])
def test_threads_read_what_one_reads(tmp_path, monkeypatch, system):
    if system == "reads where the file stands":
        monkeypatch.delattr(os, "pread", raising=False)
    paths = [write_zip(tmp_path / "a.zip", MEMBERS), write_tar(tmp_path / "a.tar", MEMBERS)]
    wrong = []

    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(300):
            member = list(MEMBERS)[rng.integers(len(MEMBERS))]
            if image_io.read_bytes(f"{paths[rng.integers(2)]}::{member}") != MEMBERS[member]:
                wrong.append(member)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_list_of_a_tar_is_kept_and_used_until_the_tar_changes(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", MEMBERS)
    assert listing(path) == list(MEMBERS)
    kept = index_path(path).read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tar", "a.tar.index.npz"]

    def not_again(*arguments, **options):
        raise AssertionError("the tar is listed although its index is valid")

    with monkeypatch.context() as patched:
        patched.setattr(tarfile, "open", not_again)
        assert listing(path) == list(MEMBERS)
        assert Archive(str(path)).read("empty.png") == b""
    index_path(path).unlink()
    assert listing(path) == list(MEMBERS)
    assert index_path(path).read_bytes() == kept

    write_tar(path, {"other.png": b"other"})
    assert listing(path) == ["other.png"]
    status = path.stat()
    write_tar(path, {"third.png": b"third"})
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert path.stat().st_size == status.st_size and listing(path) == ["third.png"]


def test_a_damaged_or_foreign_index_is_made_anew(tmp_path):
    path = write_tar(tmp_path / "a.tar", MEMBERS)
    listing(path)
    whole = index_path(path).read_bytes()
    status = path.stat()
    stamp = [member_index.VERSION, status.st_size, status.st_mtime_ns]
    # An index that would give the whole archive, or what is behind it, for an image.
    for offset, size in ((0, -1), (0, status.st_size + 1), (-5, 3), (status.st_size + 1, 3)):
        Index.build([Entry("evil.png", "", offset, size, size, 0, 0)]).save(str(index_path(path)), stamp)
        assert listing(path) == list(MEMBERS)
    for damage in (
        b"",
        b"no index",
        whole[:-30],
        whole[: len(whole) // 2],
        whole.replace(b"keys.npy", b"kegs.npy"),
    ):
        index_path(path).write_bytes(damage)
        assert listing(path) == list(MEMBERS)
        assert index_path(path).read_bytes() == whole


def test_where_no_index_can_be_written_it_stays_in_memory(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", MEMBERS)

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(member_index.tempfile, "mkstemp", refuse)
    assert listing(path) == list(MEMBERS)
    assert Archive(str(path)).read("set/3/ä3.jpg") == MEMBERS["set/3/ä3.jpg"]
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar"]


def test_names_are_found_whatever_their_hash(monkeypatch):
    """All names of one hash: what is found is told by the name itself."""
    monkeypatch.setattr(member_index, "_key", lambda encoded: 7)
    index = Index.build(Entry(name, "", place, 1, 1, 0, 0) for place, name in enumerate("abc"))
    assert [index.find(name).offset for name in "cab"] == [2, 0, 1] and index.find("d") is None


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_is_refused_with_what_to_do_also_under_a_plain_name(tmp_path, mode):
    for name in (f"a.tar.{mode[2:]}", "a.tar"):
        with tarfile.open(tmp_path / name, mode) as archive:
            archive.addfile(tarfile.TarInfo("a.png"))
        with pytest.raises(BrokenImage, match=r"compressed as a whole.*decompress it once to a plain \.tar"):
            image_io.read_bytes(f"{tmp_path}/{name}::a.png")
    with pytest.raises(BrokenImage, match="compressed as a whole"):
        image_io.read_bytes(f"{tmp_path}/none.tgz::a.png")


def test_what_is_before_the_damage_of_a_tar_can_be_read(tmp_path):
    path = write_tar(tmp_path / "a.tar", MEMBERS, format=tarfile.GNU_FORMAT)
    whole = path.read_bytes()
    names = list(MEMBERS)
    place = whole.index(names[20].encode())
    cut_in_header, cut_in_data, damaged = whole[: place + 200], whole[: place + 1000], bytearray(whole)
    damaged[place : place + 300] = b"\xff" * 300
    for data in (cut_in_header, cut_in_data, bytes(damaged)):
        path.write_bytes(data)
        archive = Archive(str(path))
        assert [archive.read(name) for name in names[:20]] == [MEMBERS[name] for name in names[:20]]
        with pytest.raises(ArchiveError, match=r"no member .*; the archive is damaged or truncated after 2"):
            archive.read(names[30])
        assert not index_path(path).exists()
    # Without the zeros at its end it is whole all the same.
    path.write_bytes(whole.rstrip(b"\0") + b"\0" * (-len(whole.rstrip(b"\0")) % 512))
    assert listing(path) == names and Archive(str(path)).index.damage == ""


@pytest.mark.parametrize("content", [b"", b"<html>", b"\0" * 10240, b"x" * 5000])
def test_what_is_no_archive_is_said(tmp_path, content):
    for name, message in (
        ("a.tar", "is not a plain tar archive"),
        ("a.zip", "is not a complete zip archive"),
    ):
        (tmp_path / name).write_bytes(content)
        if content == b"\0" * 10240 and name == "a.tar":
            assert listing(tmp_path / name) == []
            continue
        with pytest.raises(ArchiveError, match=message):
            Archive(str(tmp_path / name))


def test_a_member_that_a_zip_misplaces_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a.png": b"x" * 50, "b.png": b"y" * 50})
    data = bytearray(path.read_bytes())
    place = data.rindex(b"PK\x01\x02")
    data[place + 42] += 3
    path.write_bytes(data)
    archive = Archive(str(path))
    assert archive.read("a.png") == b"x" * 50
    with pytest.raises(ArchiveError, match="is not where the zip's directory says"):
        archive.read("b.png")
