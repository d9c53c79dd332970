"""Zip and tar archives are listed alike; a hostile member is left out with a reason, the others are used."""

import io
import os
import stat
import tarfile
import zipfile

import pytest
from archive_files import write_tar, write_zip

from data_prep.reading import archives
from featdistill.command_line import UserError
from featdistill.images import reading as image_io

FILES = {"set/0_real/a.png": b"a", "set/1_fake/b.JPG": b"b", "set/labels.csv": b"c"}
HIDDEN = {".DS_Store": b"x", "set/.thumbs/a.png": b"x", "__MACOSX/set/a.png": b"x"}


def make(path, members):
    return write_zip(path, members) if path.suffix == ".zip" else write_tar(path, members)


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_zip_and_tar_are_listed_alike(tmp_path, name):
    container = archives.open_archive(make(tmp_path / name, {**FILES, **HIDDEN}))
    assert container.is_archive and container.path == str(tmp_path / name)
    assert container.files == tuple(FILES)
    assert container.images == ("set/0_real/a.png", "set/1_fake/b.JPG")
    assert container.ignored == tuple(HIDDEN) and not container.left_out and not container.unusable
    for file, data in FILES.items():
        assert container.location(file) == f"{tmp_path / name}::{file}"
        assert image_io.read_bytes(container.location(file)) == data


def test_a_tar_as_the_command_line_makes_it_is_listed_without_folders_and_leading_dots(tmp_path):
    (tmp_path / "data" / "set").mkdir(parents=True)
    (tmp_path / "data" / "set" / "a.png").write_bytes(b"a")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "data", arcname=".")
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert archive.getnames() == [".", "./set", "./set/a.png"]
    container = archives.open_archive(tmp_path / "a.tar")
    assert container.files == ("set/a.png",)
    assert image_io.read_bytes(container.location("set/a.png")) == b"a"


def test_the_search_finds_zip_tar_and_csv_once_each(tmp_path):
    for name in ("a.zip", "b/c.tar", "b/d.csv", "b/e.tar.gz", "b/f.jpg", "b/c.tar.index.npz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "z.tar").symlink_to(tmp_path / "b" / "c.tar")
    tree = archives.search(tmp_path, 1)
    assert [tree.relative(path) for path in tree.files] == ["a.zip", "z.tar", "b/d.csv", "b/e.tar.gz"]


HOSTILE_NAMES = {
    "../evil.png": "leads out of the archive",
    "a/../../evil.png": "leads out of the archive",
    "a\\..\\..\\evil.png": "leads out of the archive",
    "/etc/evil.png": "leads out of the archive",
    "\\\\host\\evil.png": "leads out of the archive",
    "C:/evil.png": "leads out of the archive",
    "a\nb.png": "has control characters or invalid UTF-8 in its name",
    "a\x1b[2Jb.png": "has control characters or invalid UTF-8 in its name",
    "a\x7fb.png": "has control characters or invalid UTF-8 in its name",
}


@pytest.mark.parametrize("member", HOSTILE_NAMES)
@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_a_member_with_a_hostile_name_is_left_out_and_the_others_can_be_read(tmp_path, name, member):
    path = make(tmp_path / name, {"good.png": b"good", member: b"evil"})
    container = archives.open_archive(path)
    assert container.images == container.files == ("good.png",)
    assert list(container.left_out.values()) == [f"the member {HOSTILE_NAMES[member]}"]
    with pytest.raises(image_io.BrokenImage, match=HOSTILE_NAMES[member]) as broken:
        image_io.read_bytes(f"{path}::{member}")
    assert "\n" not in str(broken.value) and "\x1b" not in str(broken.value)
    assert image_io.read_bytes(f"{path}::good.png") == b"good"


TAR_KINDS = {
    tarfile.SYMTYPE: "is a symbolic link",
    tarfile.LNKTYPE: "is a hard link",
    tarfile.CHRTYPE: "is a device or a pipe",
    tarfile.BLKTYPE: "is a device or a pipe",
    tarfile.FIFOTYPE: "is a device or a pipe",
    tarfile.GNUTYPE_SPARSE: "is a sparse file",
}


@pytest.mark.parametrize("kind", TAR_KINDS)
def test_a_member_of_a_tar_that_is_no_plain_file_is_left_out(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        good, evil = tarfile.TarInfo("good.png"), tarfile.TarInfo("evil.png")
        evil.type, evil.linkname, good.size = kind, "good.png", 4
        archive.addfile(good, io.BytesIO(b"good"))
        archive.addfile(evil)
    container = archives.open_archive(tmp_path / "a.tar")
    assert container.images == ("good.png",)
    assert container.left_out == {"evil.png": f"the member {TAR_KINDS[kind]}"}
    with pytest.raises(image_io.BrokenImage, match=f"member 'evil.png' {TAR_KINDS[kind]}"):
        image_io.read_bytes(f"{tmp_path}/a.tar::evil.png")
    assert image_io.read_bytes(f"{tmp_path}/a.tar::good.png") == b"good"


def zip_with(path, *, mode=0, flags=0, method=None):
    with zipfile.ZipFile(path, "w", method or zipfile.ZIP_STORED) as archive:
        archive.writestr("good.png", b"good", zipfile.ZIP_STORED)
        member = zipfile.ZipInfo("evil.png")
        member.external_attr, member.compress_type = mode << 16, method or zipfile.ZIP_STORED
        archive.writestr(member, b"good.png")
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= flags
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"mode": stat.S_IFLNK | 0o777}, "is a symbolic link"),
        ({"flags": 1}, "is encrypted"),
        ({"method": zipfile.ZIP_LZMA}, "is compressed by a method other than deflate"),
        ({"method": zipfile.ZIP_BZIP2}, "is compressed by a method other than deflate"),
    ],
)
def test_a_link_in_a_zip_or_what_cannot_be_read_in_place_is_left_out(tmp_path, options, fault):
    zip_with(tmp_path / "a.zip", **options)
    container = archives.open_archive(tmp_path / "a.zip")
    assert container.images == ("good.png",)
    assert container.left_out == {"evil.png": f"the member {fault}"}
    with pytest.raises(image_io.BrokenImage, match=f"member 'evil.png' {fault}"):
        image_io.read_bytes(f"{tmp_path}/a.zip::evil.png")
    assert image_io.read_bytes(f"{tmp_path}/a.zip::good.png") == b"good"


def test_damaged_missing_and_compressed_archives_end_in_one_line(tmp_path):
    for name in ("a.zip", "a.tar"):
        path = make(tmp_path / name, {f"{place}.png": os.urandom(3000) for place in range(9)})
        path.write_bytes(path.read_bytes()[:14_000])
        with pytest.raises(UserError, match=f"{name}.*; download it again"):
            archives.open_archive(path)
        path.unlink()
        with pytest.raises(UserError, match=f"cannot read .*{name}: No such file"):
            archives.open_archive(path)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(UserError, match=r"decompress it once to a plain \.tar$"):
        archives.open_archive(tmp_path / "a.tar.gz")


def test_two_colons_in_paths_and_members_are_read(tmp_path):
    (tmp_path / "x.zip::y").mkdir()
    for name in ("a::b.zip", "x.zip::y/c.tar", "a::b.tar"):
        container = archives.open_archive(make(tmp_path / name, {"dd::e.png": b"good"}))
        assert image_io.read_bytes(container.location("dd::e.png")) == b"good"
    (tmp_path / "x.zip::y" / "f.png").write_bytes(b"file")
    (tmp_path / "g::h.png").write_bytes(b"file")
    assert image_io.read_bytes(str(tmp_path / "x.zip::y" / "f.png")) == b"file"
    assert image_io.read_bytes(str(tmp_path / "g::h.png")) == b"file"
