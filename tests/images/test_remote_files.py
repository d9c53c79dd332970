"""Files at addresses, without a server: fsspec's own memory, a storage that fails, and a web server."""

import contextlib
import http.server
import threading
import zipfile

import pyarrow
import pyarrow.parquet
import pytest
from archive_files import write_tar, write_zip
from fsspec.implementations.memory import MemoryFileSystem

from featdistill import remote_files
from featdistill.command_line import UserError
from featdistill.data.reading_ahead import reading_ahead
from featdistill.images import reading
from featdistill.images.listing import absolute, image_files, list_folder, split_location
from featdistill.images.reading import BrokenImage, read_bytes
from featdistill.records.manifest import fingerprint, read_manifest, write_manifest
from featdistill.storage import Folder


class Flaky(MemoryFileSystem):
    """Fails as often as `failures` says, one error of the list each time; None breaks off in the middle."""

    cachable = False
    failures: list = []  # noqa: RUF012 (of the class, as is the memory)
    reads = 0

    def cat_file(self, path, start=None, end=None, **kwargs):
        Flaky.reads += 1
        data = super().cat_file(path, start, end, **kwargs)
        if not self.failures:
            return data
        error = self.failures.pop(0)
        if error is not None:
            raise error
        return data[: len(data) // 2]


class Refused(Exception):
    """What an HTTP client raises for an answer with a status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class NoCredentialsError(Exception):
    """Of the name that botocore's has."""


@pytest.fixture(autouse=True)
def flaky(monkeypatch):
    """Let `memory://` fail on request; forget what is in it and what is known of its archives."""
    monkeypatch.setattr(remote_files, "WAITS_S", (0.0,) * 3)
    remote_files._system.cache_clear()
    remote_files._failed.clear()
    reading._open_archive.cache_clear()
    monkeypatch.setattr("fsspec.filesystem", lambda scheme, **options: Flaky())
    MemoryFileSystem.store.clear()
    Flaky.failures, Flaky.reads = [], 0
    yield Flaky
    remote_files._system.cache_clear()
    reading._open_archive.cache_clear()


MEMBERS = {"a/1.jpg": b"\xff\xd8\xff" + bytes(range(256)) * 20, "a/2.jpg": b"\xff\xd8\xff" + b"x" * 900}


def put(path, address: str) -> str:
    remote_files.write(address, path.read_bytes())
    return address


def test_every_kind_of_location_gives_the_bytes_of_the_local_one(tmp_path):
    write_zip(tmp_path / "x.zip", MEMBERS, zipfile.ZIP_DEFLATED)
    write_tar(tmp_path / "x.tar", MEMBERS)
    table = pyarrow.table({"image": pyarrow.array(list(MEMBERS.values()), pyarrow.binary())})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    for archive in ("x.zip", "x.tar", "x.parquet"):
        address = put(tmp_path / archive, f"memory://bucket/{archive}")
        for row, name in enumerate(MEMBERS):
            member = row if archive == "x.parquet" else name
            assert read_bytes(f"{address}::{member}") == MEMBERS[name]
    with pytest.raises(BrokenImage, match=r"^no member none in memory://bucket/x\.zip$"):
        read_bytes("memory://bucket/x.zip::none")
    remote_files.write("memory://bucket/one.jpg", MEMBERS["a/1.jpg"])
    assert read_bytes("memory://bucket/one.jpg") == MEMBERS["a/1.jpg"]
    with pytest.raises(BrokenImage, match=r"memory://bucket/none\.jpg does not exist"):
        read_bytes("memory://bucket/none.jpg")


def test_a_member_of_a_zip_takes_one_request_once_the_archive_is_listed(tmp_path, flaky):
    write_zip(tmp_path / "x.zip", MEMBERS)
    put(tmp_path / "x.zip", "memory://bucket/x.zip")
    read_bytes("memory://bucket/x.zip::a/1.jpg")
    before = flaky.reads
    read_bytes("memory://bucket/x.zip::a/2.jpg")
    assert flaky.reads == before + 1


@pytest.mark.parametrize("error", [None, ConnectionResetError("reset"), Refused(503), TimeoutError()])
def test_what_passes_is_tried_again_and_in_the_end_a_reason(tmp_path, flaky, error):
    write_zip(tmp_path / "x.zip", MEMBERS)
    put(tmp_path / "x.zip", "memory://bucket/x.zip")
    location = "memory://bucket/x.zip::a/1.jpg"
    read_bytes(location)
    flaky.failures = [error] * 3
    assert read_bytes(location) == MEMBERS["a/1.jpg"]
    flaky.failures = [error] * 4
    with pytest.raises(BrokenImage, match=r"memory://bucket/x\.zip: .*, 4 tries"):
        read_bytes(location)
    assert read_bytes(location) == MEMBERS["a/1.jpg"]


def test_an_archive_whose_list_breaks_off_is_not_called_damaged(tmp_path, flaky):
    write_zip(tmp_path / "x.zip", MEMBERS)
    write_tar(tmp_path / "x.tar", MEMBERS)
    for name in ("x.zip", "x.tar"):
        address = put(tmp_path / name, f"memory://bucket/{name}")
        flaky.failures = [Refused(500)] * 4
        with pytest.raises(BrokenImage, match="status 500, 4 tries"):
            read_bytes(f"{address}::a/1.jpg")
        assert read_bytes(f"{address}::a/1.jpg") == MEMBERS["a/1.jpg"]


def test_what_does_not_pass_is_not_tried_again(flaky):
    remote_files.write("memory://bucket/one.jpg", b"1")
    for error, kind, reason in (
        (PermissionError("Forbidden"), BrokenImage, "access denied"),
        (Refused(403), BrokenImage, "access denied"),
        (Refused(401), UserError, "refuses the credentials"),
        (NoCredentialsError("Unable to locate credentials"), UserError, "Unable to locate credentials"),
        (ConnectionRefusedError(), UserError, "cannot be reached"),
    ):
        before = flaky.reads
        flaky.failures = [error] * (4 if isinstance(error, ConnectionRefusedError) else 1)
        with pytest.raises(kind, match=reason):
            read_bytes("memory://bucket/one.jpg")
        assert flaky.failures == [] and flaky.reads - before in (1, 4)


def test_an_outage_ends_the_run_and_single_failures_do_not(flaky):
    for number in range(30):
        remote_files.write(f"memory://bucket/{number}.jpg", b"1")
    for number in range(30):  # every second one
        flaky.failures = [Refused(503)] * (4 * (number % 2))
        with contextlib.suppress(BrokenImage):
            read_bytes(f"memory://bucket/{number}.jpg")
    flaky.failures, broken = [Refused(503)] * 400, 0
    with pytest.raises(
        UserError, match=r"^memory://bucket: 20 files in a row could not be read, .* status 503; "
    ):
        for number in range(30):
            with contextlib.suppress(BrokenImage):
                read_bytes(f"memory://bucket/{number}.jpg")
            broken += 1
    assert broken == 18  # the last of the first loop failed, too


def test_access_is_checked_by_three_images_of_a_bucket(flaky):
    images = [f"memory://bucket/{number}.jpg" for number in range(5)]
    for image in images:
        remote_files.write(image, b"1")
    flaky.failures = [PermissionError("Forbidden")] * 3
    with pytest.raises(UserError, match=r"memory://bucket/0\.jpg: access denied .*; check the credentials"):
        reading.check_access(["here.jpg", *images])
    # A single one may be missing where nobody may list the bucket.
    flaky.failures, flaky.reads = [PermissionError("Forbidden")] * 2, 0
    reading.check_access(images)
    assert flaky.reads == 3


def test_only_known_kinds_of_addresses_are_opened(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"\xff\xd8\xffsecret")
    for address in (f"file://{tmp_path}/secret.jpg", "local:///etc/passwd", "github://a:b@c/d", "dask://x"):
        with pytest.raises(UserError, match="addresses are not read; known: s3://"):
            read_bytes(address)
    for chain in (f"simplecache::file://{tmp_path}/secret.jpg", f"memory://x::file://{tmp_path}/secret.jpg"):
        with pytest.raises(BrokenImage, match=r"does not exist|No such file"):
            read_bytes(chain)
    with pytest.raises(BrokenImage, match=r"does not exist|No such file"):
        read_bytes(f"zip://secret.jpg::{tmp_path}/x.zip".replace("zip://", "zip:/"))


def test_a_missing_package_is_one_line(monkeypatch):
    def missing(scheme, **options):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.filesystem", missing)
    with pytest.raises(UserError, match=r"^s3:// addresses need the package s3fs; pip install s3fs$"):
        read_bytes("s3://bucket/x.jpg")


def test_an_object_above_the_limit_is_refused_before_it_is_read(flaky, monkeypatch):
    monkeypatch.setattr(reading, "MAX_BYTES", 5 << 20)
    remote_files.write("memory://bucket/large.jpg", bytes(9 << 20))
    with pytest.raises(BrokenImage, match=f"more bytes than the limit of {5 << 20}"):
        read_bytes("memory://bucket/large.jpg")
    assert flaky.reads == 1
    remote_files.write("memory://bucket/large.jpg", bytes(5 << 20))
    assert len(read_bytes("memory://bucket/large.jpg")) == 5 << 20


def test_addresses_keep_their_form(tmp_path):
    assert absolute("s3://bucket/a/../b.jpg") == "s3://bucket/a/../b.jpg"
    assert split_location("s3://b/x.zip::y.jpg") == ("s3://b/x.zip", "y.jpg")
    assert split_location("http://[::1]:80/y.jpg") == ("http://[::1]:80/y.jpg", None)
    assert remote_files.join("s3://b/manifests", "../images/x.jpg") == "s3://b/images/x.jpg"
    assert remote_files.join("s3://b/manifests", "gs://c/x.jpg") == "gs://c/x.jpg"
    assert not remote_files.is_remote("C:\\x.jpg") and not remote_files.is_remote("a/b::c")


def test_a_manifest_at_an_address_names_images_next_to_it_elsewhere_and_here(tmp_path):
    cells = ["1.jpg", "../x.zip::a/1.jpg", "gs://other/2.jpg", "gs://other/x.zip::2.jpg", "/data/3.jpg"]
    text = "image,name,label\n" + "".join(f"{cell},{number},1\n" for number, cell in enumerate(cells))
    remote_files.write("memory://bucket/set/val.csv", text.encode())
    rows = read_manifest("memory://bucket/set/val.csv")
    expected = ["memory://bucket/set/1.jpg", "memory://bucket/x.zip::a/1.jpg", *cells[2:]]
    assert rows["image"].tolist() == expected and rows.attrs["path"] == "memory://bucket/set/val.csv"
    write_manifest(rows, tmp_path / "copy.csv")
    copy = read_manifest(tmp_path / "copy.csv")
    assert copy["image"].tolist() == expected and fingerprint(copy) == fingerprint(rows)
    with pytest.raises(UserError, match=r"manifest memory://bucket/none\.csv does not exist"):
        read_manifest("memory://bucket/none.csv")


def test_a_folder_at_an_address_is_listed_without_system_files():
    for name in ("a/1.jpg", "a/.hidden/2.jpg", "b/3.png", "notes.txt", "4", "5"):
        remote_files.write(f"memory://bucket/photos/{name}", b"\x89PNG\r\n\x1a\n" if name == "4" else b"text")
    listing = list_folder("memory://bucket/photos")
    assert listing.files == ["4", "5", "a/1.jpg", "b/3.png", "notes.txt"]
    assert listing.ignored == ["a/.hidden/2.jpg"]
    assert list(image_files("memory://bucket/photos", listing.files)) == ["4", "a/1.jpg", "b/3.png"]
    with pytest.raises(UserError, match="memory://bucket/none is not a folder with files"):
        list_folder("memory://bucket/none")


def test_a_tree_at_an_address_becomes_the_manifest_of_the_local_one(tmp_path):
    from data_prep import folders

    for name, content in {
        "real/1.jpg": b"1",
        "ai/x/2.jpg": b"22",
        "ai/x/3.jpg": b"22",
        "real/4": b"text",
    }.items():
        remote_files.write(f"memory://bucket/tree/{name}", content)
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(content)
    frames = []
    for root in ("memory://bucket/tree/", str(tmp_path / "tree")):
        assert folders.main(["--root", root, "--out", str(tmp_path / "out.csv")]) == 0
        frames.append(read_manifest(tmp_path / "out.csv"))
    remote, local = frames
    assert remote["image"].tolist() == ["memory://bucket/tree/ai/x/2.jpg", "memory://bucket/tree/real/1.jpg"]
    assert remote.drop(columns="image").equals(local.drop(columns="image"))


def test_a_folder_is_alike_here_and_at_an_address(tmp_path):
    for address in (str(tmp_path / "parts"), "memory://bucket/parts"):
        folder = Folder(address)
        assert folder.names() == [] and folder.create("a.json", b"1") and not folder.create("a.json", b"2")
        folder.write("b.parquet", b"34")
        folder.write(".hidden", b"")
        assert folder.names() == ["a.json", "b.parquet"] and folder.names(".json") == ["a.json"]
        assert folder.read("a.json") == b"1" and folder.open("b.parquet").read() == b"34"
        folder.remove("a.json")
        folder.remove("a.json")
        assert folder.names() == ["b.parquet"]
        for read in (folder.read, folder.open):
            with pytest.raises(FileNotFoundError):
                read("a.json")
    with pytest.raises(UserError, match="hf:// addresses cannot be shared by several processes"):
        Folder("hf://datasets/a/b").create("x", b"")


def test_images_are_read_ahead_in_order_within_a_budget(monkeypatch):
    from featdistill.data import reading_ahead as module

    addresses = [f"memory://bucket/{number}.jpg" for number in range(40)]
    for number, address in enumerate(addresses):
        if number != 7:
            remote_files.write(address, bytes([number]) * 1000)
    monkeypatch.setattr(module, "BUDGET_BYTES", 1500)
    with reading_ahead(addresses) as read:
        for number, address in enumerate(addresses):
            if number == 7:
                with pytest.raises(BrokenImage, match="does not exist"):
                    read(address)
            else:
                assert read(address) == bytes([number]) * 1000
    # Leaving early waits for nothing, and what is read twice is right.
    with reading_ahead(addresses) as read:
        assert read(addresses[1]) == read(addresses[1]) == b"\x01" * 1000


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves a dict of files; ranges unless `ranges` is off; a `status` for `/status`."""

    files: dict[str, bytes] = {}  # noqa: RUF012 (shared by all requests)
    ranges = True

    def do_GET(self):
        data = self.files.get(self.path)
        if data is None:
            code = self.path.split("/")[1]
            self.send_error(int(code) if code.isdigit() else 404)
            return
        wanted, status = self.headers.get("Range"), 200
        if wanted and self.ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            data, status = data[int(first) : int(last) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def web(monkeypatch):
    pytest.importorskip("aiohttp", reason="needs aiohttp")
    from fsspec.implementations.http import HTTPFileSystem

    monkeypatch.setattr("fsspec.filesystem", lambda scheme, **options: HTTPFileSystem(**options))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Handler.ranges = True
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_images_and_members_of_archives_are_read_from_a_web_server(web, tmp_path, monkeypatch):
    write_zip(tmp_path / "x.zip", MEMBERS)
    Handler.files = {"/1.jpg": MEMBERS["a/1.jpg"], "/x.zip": (tmp_path / "x.zip").read_bytes()}
    assert read_bytes(f"{web}/1.jpg") == MEMBERS["a/1.jpg"]
    assert read_bytes(f"{web}/x.zip::a/2.jpg") == MEMBERS["a/2.jpg"]
    for path, reason in (("none.jpg", "does not exist"), ("403", "access denied"), ("401", "access denied")):
        with pytest.raises(BrokenImage, match=reason):
            read_bytes(f"{web}/{path}")
    for path in ("503", "503/x.zip::a/1.jpg"):
        with pytest.raises(BrokenImage, match="4 tries"):
            read_bytes(f"{web}/{path}")
    with pytest.raises(BrokenImage, match="access denied"):
        read_bytes(f"{web}/403/x.zip::a/1.jpg")
    with pytest.raises(UserError, match="a web server does not list its files"):
        list_folder(web)
    reading._open_archive.cache_clear()
    Handler.ranges = False
    with pytest.raises(BrokenImage, match="the server does not serve ranges of bytes"):
        read_bytes(f"{web}/x.zip::a/2.jpg")
    # A server that never stops sending is read up to the limit only.
    monkeypatch.setattr(reading, "MAX_BYTES", 1000)
    with pytest.raises(BrokenImage, match="more bytes than the limit of 1000"):
        read_bytes(f"{web}/1.jpg")
