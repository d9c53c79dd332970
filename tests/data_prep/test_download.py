"""Data sets from the hub: the same commit again, nothing twice, and one line for what a network does wrong.

A small server in this process stands for the hub; the client that is installed talks to it.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

from data_prep import download
from featdistill.command_line import UserError

PROJECT = Path(__file__).resolve().parents[2]
VAL, DITFAKE = (download.HUB_SETS[name].repo for name in ("ntire-val", "ditfake"))
NEW, OLD = "a" * 40, "b" * 40
FILES = {
    "README.md": b"# a card\n",
    "val_images.zip": bytes(range(256)) * 400,
    "val_labels.csv": b"image_name,label\n",
    "more/val_images_hard.zip": b"PK" * 3000,
}
OLD_FILES = {"README.md": b"# an older card\n", "val_images.zip": b"older" * 1000}


class Hub(ThreadingHTTPServer):
    """The endpoints that the client asks, for data sets given as {repo: {commit: {path: content}}}."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.sets = {VAL: {NEW: FILES, OLD: OLD_FILES}, DITFAKE: {NEW: {"a.bin": b"dit"}}}
        self.heads = {"main": NEW}
        self.asked: list[tuple[str, str, str]] = []
        # Status and X-Error-Code of the answers about data sets, and about files.
        self.api_fault: tuple[int, str] | None = None
        self.file_fault: tuple[int, str] | None = None
        # A file of this name is cut off after so many bytes, with a pause for the test to act in.
        self.cut: tuple[str, int] | None = None
        self.is_cut, self.is_over = threading.Event(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> list[str]:
        """The files whose content was asked for since the last time this was called."""
        files = [
            path.split("/resolve/")[1].split("/", 1)[1]
            for verb, path, _ in self.asked
            if verb == "GET" and "/resolve/" in path
        ]
        self.asked.clear()
        return sorted(files)


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path, self.headers.get("Authorization") or ""))
        is_api = path.startswith("/api/")
        fault = self.server.api_fault if is_api else self.server.file_fault
        if fault:
            return self.send(
                b'{"error": "stand-in"}', fault[0], {"X-Error-Code": fault[1]} if fault[1] else {}
            )
        parts = path.removeprefix("/api").removeprefix("/datasets/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        commits = self.server.sets.get(repo)
        if commits is None:
            return self.send(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        revision = rest[1] if rest else "main"
        commit = self.server.heads.get(revision, revision)
        if commit not in commits:
            return self.send(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
        if is_api and rest[:1] == ["tree"]:
            self.send_json(self.tree(commits[commit]))
        elif is_api:
            self.send_json({"id": repo, "sha": commit, "siblings": [], "tags": [], "private": False})
        else:
            self.send_file("/".join(rest[2:]), commit, commits[commit])

    @staticmethod
    def tree(files: dict[str, bytes]) -> list[dict]:
        entries = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in files.items()
        ]
        folders = {path.rpartition("/")[0] for path in files} - {""}
        return entries + [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders]

    def send_file(self, path: str, commit: str, files: dict[str, bytes]) -> None:
        if path not in files:
            return self.send(b"", 404, {"X-Error-Code": "EntryNotFound"})
        data = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        first = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0]
        status, body = (206, data[int(first) :]) if "Range" in self.headers else (200, data)
        if status == 206:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        cut = self.server.cut
        if self.command == "GET" and cut and path == cut[0]:
            self.start(status, {**headers, "Content-Length": str(len(body))})
            self.wfile.write(body[: cut[1]])
            self.wfile.flush()
            self.server.is_cut.set()
            # Until the client gives up or the test is over.
            self.server.is_over.wait(20)
            self.close_connection = True
            return None
        return self.send(body, status, headers)

    def send_json(self, value) -> None:
        self.send(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.start(status, {**headers, "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def start(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_) -> None:
        """Tests need no log."""


@pytest.fixture
def server(monkeypatch, tmp_path) -> Iterator[Hub]:
    started = Hub()
    thread = threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", started.url)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    yield started
    started.is_over.set()
    started.shutdown()
    thread.join()
    started.server_close()


def fetch(out: Path, *arguments: str) -> int:
    return download.main([*(arguments or ["ntire-val"]), "--out", str(out)])


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {path: data for path, data in found.items() if not path.startswith(".cache/")}


def partial_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.incomplete"))


def test_all_files_arrive_and_the_commit_is_noted(server, tmp_path, capsys):
    assert fetch(tmp_path) == 0
    assert contents(tmp_path / "ntire-val") == FILES
    assert json.loads((tmp_path / "download.json").read_text()) == {"ntire-val": {"repo": VAL, "commit": NEW}}
    said = capsys.readouterr().out
    assert "4 files, 108.4 kB" in said and "to fetch: 108.4 kB; free at" in said and "data_prep.ntire" in said


def test_what_is_there_is_not_fetched_again(server, tmp_path, capsys):
    fetch(tmp_path)
    assert server.fetched() == sorted(FILES)
    stamps = {path: (tmp_path / "ntire-val" / path).stat().st_mtime_ns for path in FILES}
    assert fetch(tmp_path) == 0
    assert server.fetched() == []
    assert {path: (tmp_path / "ntire-val" / path).stat().st_mtime_ns for path in FILES} == stamps
    assert "0 of them, 0 B, are not" in capsys.readouterr().out


def test_only_what_is_missing_or_damaged_is_fetched(server, tmp_path):
    fetch(tmp_path)
    server.fetched()
    folder = tmp_path / "ntire-val"
    (folder / "val_labels.csv").unlink()
    half = FILES["val_images.zip"][:1000]
    (folder / "val_images.zip").write_bytes(half)
    # The client takes a change within the second of the download for its own.
    later = time.time() + 10
    os.utime(folder / "val_images.zip", (later, later))
    assert fetch(tmp_path) == 0
    assert server.fetched() == ["val_images.zip", "val_labels.csv"]
    assert contents(folder) == FILES


def test_a_later_run_stays_at_the_commit_of_the_first(server, tmp_path):
    server.heads["main"] = OLD
    fetch(tmp_path)
    server.heads["main"] = NEW
    assert fetch(tmp_path) == 0
    assert contents(tmp_path / "ntire-val") == OLD_FILES
    assert fetch(tmp_path / "other") == 0
    assert contents(tmp_path / "other" / "ntire-val") == FILES


def test_a_revision_is_kept_and_another_one_is_refused(server, tmp_path):
    fetch(tmp_path, "ntire-val", "--revision", OLD)
    assert fetch(tmp_path) == 0 and fetch(tmp_path, "ntire-val", "--revision", OLD) == 0
    assert contents(tmp_path / "ntire-val") == OLD_FILES
    with pytest.raises(
        UserError, match=f"holds files of commit {OLD[:12]}, and --revision main is {NEW[:12]}"
    ):
        fetch(tmp_path, "ntire-val", "--revision", "main")
    shutil.rmtree(tmp_path / "ntire-val")
    assert fetch(tmp_path) == 0
    assert contents(tmp_path / "ntire-val") == FILES


def test_several_sets_get_a_folder_each_and_a_set_another_id(server, tmp_path):
    assert fetch(tmp_path, "ditfake", "ntire-val", "ditfake") == 0
    assert contents(tmp_path / "ditfake") == {"a.bin": b"dit"} and contents(tmp_path / "ntire-val") == FILES
    assert list(download.read_commits(tmp_path)) == ["ditfake", "ntire-val"]
    server.sets["someone/Else"] = {NEW: {"x.parquet": b"PAR1"}}
    assert fetch(tmp_path, "openfake", "--repo", "someone/Else") == 0
    assert contents(tmp_path / "openfake") == {"x.parquet": b"PAR1"}
    with pytest.raises(UserError, match="holds lioooox/DiTFake, not someone/Else"):
        fetch(tmp_path, "ditfake", "--repo", "someone/Else")


def test_patterns_choose_files(server, tmp_path):
    assert fetch(tmp_path, "ntire-val", "--files", "*.csv", "more/*") == 0
    chosen = {path: FILES[path] for path in ("val_labels.csv", "more/val_images_hard.zip")}
    assert contents(tmp_path / "ntire-val") == chosen
    with pytest.raises(UserError, match=r"no file matches shard_9; it has 4: README\.md"):
        fetch(tmp_path, "ntire-val", "--files", "shard_9")


def test_a_dry_run_shows_files_and_writes_nothing(server, tmp_path, capsys, monkeypatch):
    full_disk(monkeypatch)
    assert fetch(tmp_path / "out", "ntire-val", "--dry-run") == 0
    said = capsys.readouterr().out
    assert all(path in said for path in FILES) and "102.4 kB  val_images.zip" in said
    assert server.fetched() == [] and not (tmp_path / "out").exists()


def full_disk(monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage(10**6, 9 * 10**5, 10**5))


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_a_disk_that_is_too_small_is_refused_before_anything_is_fetched(server, tmp_path, monkeypatch):
    full_disk(monkeypatch)
    with pytest.raises(UserError, match=r"too small by 8.4 kB; choose another"):
        fetch(tmp_path / "out")
    assert server.fetched() == [] and not (tmp_path / "out").exists()
    assert fetch(tmp_path / "out", "ntire-val", "--force") == 0


def test_what_is_there_needs_no_room(server, tmp_path, monkeypatch):
    fetch(tmp_path, "ntire-val", "--files", "val_images.zip")
    full_disk(monkeypatch)
    assert fetch(tmp_path) == 0


REFUSALS = [
    ((401, ""), "", "needs a token .HTTP 401; there is no token.*hf auth login.*HF_TOKEN"),
    ((401, "RepoNotFound"), "", "needs a token .HTTP 401; there is no token"),
    ((401, ""), "hf_wrong", "needs a token .HTTP 401; your token was refused"),
    ((403, ""), "hf_weak", "needs a token .HTTP 403; your token was refused"),
    ((401, "GatedRepo"), "", "is gated .HTTP 401.: accept its terms at .*, then run `hf auth login`"),
    ((403, "GatedRepo"), "hf_new", "is gated .HTTP 403.: accept its terms at .* with the account of your"),
]
FAILURES = [
    ((404, "RepoNotFound"), "", "is not on the hub at .*HTTP 404.*use --repo"),
    ((500, ""), "", "cannot fetch .* from .*500.*run the same command again to continue"),
]


@pytest.mark.parametrize(
    ("where", "fault", "token", "message"),
    [
        *(("api_fault", *case) for case in REFUSALS + FAILURES),
        *(("file_fault", *case) for case in REFUSALS),
    ],
)
def test_a_refusal_is_one_line_that_says_what_to_do(
    server, tmp_path, monkeypatch, where, fault, token, message
):
    setattr(server, where, fault)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=message) as caught:
        fetch(tmp_path)
    text = str(caught.value)
    assert VAL in text and "\n" not in text and (not token or token not in text)
    assert any(given == (f"Bearer {token}" if token else "") for _, _, given in server.asked)
    setattr(server, where, None)
    assert fetch(tmp_path) == 0 and contents(tmp_path / "ntire-val") == FILES


def test_an_unknown_revision_and_an_unknown_set_are_said(server, tmp_path):
    with pytest.raises(UserError, match=f"{VAL} has no such revision"):
        fetch(tmp_path, "ntire-val", "--revision", "nightly")
    with pytest.raises(UserError, match="nobody/nothing is not on the hub"):
        fetch(tmp_path, "ntire-val", "--repo", "nobody/nothing")


def test_no_network_is_one_line(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot fetch .* from http://127.0.0.1:9 \(Conn.*check the network"):
        fetch(tmp_path)


def test_an_offline_client_is_said_as_such(server, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids network access; unset it"):
        fetch(tmp_path)


def test_a_full_disk_in_the_middle_is_said_as_such(server, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "part")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="cannot write part: No space left on device"):
        fetch(tmp_path)


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(b"x"), Path.unlink])
def test_a_file_that_is_missing_or_has_another_size_afterwards_is_an_error(
    server, tmp_path, monkeypatch, change
):
    real = huggingface_hub.snapshot_download

    def damaged(*args, **settings):
        folder = real(*args, **settings)
        change(Path(folder) / "val_labels.csv")
        return folder

    monkeypatch.setattr(huggingface_hub, "snapshot_download", damaged)
    with pytest.raises(UserError, match=r"val_labels\.csv does not have 17 bytes; remove it and repeat"):
        fetch(tmp_path)


@pytest.mark.parametrize("path", ["../outside.txt", "a/../../b", "/etc/passwd", "C:\\x", "a\\..\\..\\b"])
def test_a_file_name_that_leads_out_is_refused(server, tmp_path, path):
    server.sets[VAL][NEW] = {**FILES, path: b"x"}
    with pytest.raises(UserError, match="leads out of the folder"):
        fetch(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@contextlib.contextmanager
def running(server: Hub, out: Path) -> Iterator[subprocess.Popen]:
    """Run the command in a process of its own until the server has cut off `val_images.zip`."""
    server.cut = ("val_images.zip", 2000)
    command = [sys.executable, "-m", "data_prep.download", "ntire-val", "--out", str(out)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(out.parent / "home")}
    process = subprocess.Popen(
        command,
        cwd=PROJECT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        stdout=subprocess.DEVNULL,
        # A program in the background of a shell is started deaf to interruptions, and so are its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert server.is_cut.wait(60), "the command did not ask for the file"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        server.cut = None


def test_a_killed_download_is_continued_and_leaves_no_partial_file(server, tmp_path):
    out = tmp_path / "out"
    with running(server, out) as process:
        with pytest.raises(UserError, match=r"another download into .* is running"):
            fetch(out)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert "val_images.zip" not in contents(out / "ntire-val")
    assert download.read_commits(out)["ntire-val"]["commit"] == NEW
    leftovers = partial_files(out)
    server.fetched()
    assert fetch(out) == 0
    assert contents(out / "ntire-val") == FILES
    assert leftovers and not partial_files(out)


def test_an_interrupted_download_ends_with_130_and_says_how_to_continue(server, tmp_path, monkeypatch):
    with running(server, tmp_path / "out") as process:
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
        assert process.returncode == 130
        assert error.splitlines()[-1].endswith("interrupted; run the same command again to continue")
        assert "Traceback" not in error
    assert fetch(tmp_path / "out") == 0
    assert contents(tmp_path / "out" / "ntire-val") == FILES


@pytest.mark.parametrize("content", ["{", "[1]", '{"ntire-val": {"repo": "a/b"}}', '{"ntire-val": 3}'])
def test_a_damaged_note_is_said(server, tmp_path, content):
    (tmp_path / "ntire-val").mkdir()
    (tmp_path / "download.json").write_text(content)
    with pytest.raises(
        UserError,
        match=r"download.json (is damaged|is not readable JSON|must hold a JSON object).*; remove it",
    ):
        fetch(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which data set"),
        (["ntire"], "unknown data set 'ntire'.*did you mean"),
        (["genimage", "--out", "x"], "genimage is not on the hub. Get it from: .*netdisk"),
        (["diffface", "--out", "x"], "Zenodo records 10865300 and 10865065"),
        (["ntire-val"], "--out DIR is missing"),
        (["ntire-val", "ditfake", "--out", "x", "--repo", "a/b"], "one data set at a time"),
        (["ntire-val", "ditfake", "--out", "x", "--revision", "main"], "one data set at a time"),
        (["ntire-val", "--out", "x", "--repo", "a"], "must be OWNER/ID, not a"),
        (["ntire-val", "--out", "x", "--workers", "0"], "argument --workers: must be from 1 to 256"),
    ],
)
def test_wrong_command_lines_are_refused_without_the_network(arguments, message):
    with pytest.raises(UserError, match=message):
        download.main(arguments)


def test_the_list_names_every_set_and_says_which_ids_are_not_certain(capsys):
    assert download.main(["--list"]) == 0
    said = capsys.readouterr().out
    for name, hub_set in download.HUB_SETS.items():
        line = next(line for line in said.splitlines() if line.split()[:1] == [name])
        assert hub_set.repo in line and ("not certain" in line) == (not hub_set.is_certain)
    assert all(place in said for place in download.ELSEWHERE.values())
