"""What the Hugging Face hub has of a data set, and fetching it, through the hub's own client.

The client is imported where it is used: that takes a while. It checks what it fetches. Its releases differ in
what a killed run costs: older ones continue the file that was cut off, newer ones fetch that file again.
"""

import contextlib
import fnmatch
import json
import queue
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from tqdm import tqdm

from featdistill import atomic
from featdistill.command_line import UserError

STATE_FILE = "download.json"
# Files up to this size are fetched several at a time, larger ones one by one, each with a bar of its own.
SMALL_BYTES = 32 << 20
_TIMEOUT_S = 60
# What releases of huggingface_hub that name partial files anew each time leave behind when they are killed.
_LEFTOVER = re.compile(r".+\.[0-9a-f]{8}\.incomplete")


@dataclass(frozen=True)
class HubFile:
    """A file of a data set: its path there, and its size in bytes."""

    path: str
    size: int


@dataclass(frozen=True)
class Plan:
    """What is fetched of one data set: the files at one commit, into a folder."""

    name: str
    repo: str
    commit: str
    folder: Path
    files: list[HubFile]

    def missing(self) -> list[HubFile]:
        """Return the files that are not in the folder with their size."""
        return [file for file in self.files if not _has_size(self.folder / file.path, file.size)]


def make_plan(api: Any, name: str, repo: str, revision: str | None, out: Path, patterns: list[str]) -> Plan:
    """Ask the hub for the files of a data set.

    Args:
        api: a `huggingface_hub.HfApi`.
        revision: branch, tag or commit; None for the commit of an earlier run, else the main branch.
        patterns: only files whose path matches one of them, as a shell would; empty for all.

    Raises:
        UserError: the hub does not answer or refuses, no file matches, a path leads out of the folder, or an
            earlier run into `out` fetched from elsewhere.
    """
    folder = out / name
    state = read_state(out).get(name) if folder.exists() else None
    if state and state["repo"] != repo:
        raise UserError(
            f"{folder} holds {state['repo']}, not {repo}; take another --out, or remove the folder"
        )
    with hub_errors(api, repo):
        # Two questions, since only the second is answered in pages: a data set may have very many files.
        wanted = revision or (state["commit"] if state else None)
        commit = api.dataset_info(repo, revision=wanted, timeout=_TIMEOUT_S).sha
        tree = api.list_repo_tree(repo, repo_type="dataset", revision=commit, recursive=True)
        # Folders, which are listed too, have no size.
        found = [HubFile(entry.path, entry.size) for entry in tree if hasattr(entry, "size")]
    if state and state["commit"] != commit:
        raise UserError(
            f"{folder} holds files of commit {state['commit'][:12]}, and --revision {revision} is "
            f"{commit[:12]}; take another --out, or remove the folder"
        )
    for file in found:
        if _leads_out(file.path):
            raise UserError(f"{repo}: the file name {file.path!r} leads out of the folder; do not use it")
    files = [
        file for file in found if not patterns or any(fnmatch.fnmatchcase(file.path, p) for p in patterns)
    ]
    if not files:
        first = ", ".join(file.path for file in found[:5]) or "none"
        raise UserError(
            f"{repo}: no file matches {' '.join(patterns) or '*'}; it has {len(found)}: {first} .."
        )
    return Plan(name, repo, commit, folder, sorted(files, key=lambda file: file.path))


def fetch(api: Any, plan: Plan, workers: int) -> None:
    """Fetch what a plan has that is not there yet.

    Raises:
        UserError: the hub does not answer or refuses, or a file has another size than the hub said.
    """
    from huggingface_hub import utils

    _remove_leftovers(plan.folder)

    def one(file: HubFile) -> HubFile:
        settings = {"repo_type": "dataset", "revision": plan.commit, "local_dir": plan.folder}
        with hub_errors(api, plan.repo):
            path = Path(api.hf_hub_download(plan.repo, file.path, **settings))
        if not _has_size(path, file.size):
            raise UserError(f"{path} has {path.stat().st_size} bytes, not {file.size}; remove it and repeat")
        return file

    small = [file for file in plan.files if file.size <= SMALL_BYTES]
    total = sum(file.size for file in small)
    bars_were_off = utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        with tqdm(total=total, desc=plan.name, unit="B", unit_scale=True, disable=not small) as bar:
            for file in _in_threads(one, small, workers):
                bar.update(file.size)
    finally:
        if not bars_were_off:
            utils.enable_progress_bars()
    for file in plan.files:
        if file.size > SMALL_BYTES:
            one(file)


def _in_threads(work: Callable[[HubFile], HubFile], files: list[HubFile], workers: int) -> Iterator[HubFile]:
    """Yield `work(file)` of each file as it gets done; the first error is raised and ends the work.

    The standard library's pools wait for their threads even when the user interrupts, and one that waits for
    a network that is gone may do so for minutes: these threads end with the process.
    """
    todo: queue.SimpleQueue[HubFile] = queue.SimpleQueue()
    done: queue.SimpleQueue[HubFile | Exception] = queue.SimpleQueue()
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            try:
                done.put(work(todo.get_nowait()))
            except queue.Empty:
                return
            except Exception as error:
                done.put(error)

    for file in files:
        todo.put(file)
    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(workers, len(files)))]
    for thread in threads:
        thread.start()
    try:
        for _ in files:
            result = done.get()
            if isinstance(result, Exception):
                stop.set()
                for thread in threads:
                    thread.join()
                raise result
            yield result
    finally:
        stop.set()


@contextlib.contextmanager
def hub_errors(api: Any, repo: str) -> Iterator[None]:
    """Turn whatever the hub's client raises in the body into a `UserError` of one line.

    Its network errors are those of the HTTP library beneath, which is another one in each of its major
    releases and not always an `OSError`: so all exceptions are taken.
    """
    try:
        yield
    except Exception as error:
        raise UserError(_explain(error, api.endpoint, repo)) from error


def _explain(error: Exception, endpoint: str, repo: str) -> str:
    from huggingface_hub import errors, get_token

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        # How the client says that it could neither reach the hub nor find the file here.
        error = error.__cause__
    page = f"{endpoint}/datasets/{repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    has_token = get_token() is not None
    give_token = (
        "give a token that may read it: run `hf auth login`, or set the environment variable HF_TOKEN"
    )
    if isinstance(error, errors.GatedRepoError):
        wanted = "with the account of your token" if has_token else f"then {give_token}"
        return f"{repo} is gated (HTTP {status}): accept its terms at {page}, {wanted}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no such revision; see {page}/commits/main for those it has"
    if status in (401, 403):
        given = "the token given was refused" if has_token else "no token was given"
        return f"{repo} needs a token (HTTP {status}; {given}), or has another name by now; {give_token}"
    if status == 404:
        return f"{repo} is not on the hub at {endpoint} (HTTP 404); has it moved? --repo gives another id"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the environment variable HF_HUB_OFFLINE forbids the network; unset it"
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return f"cannot write {error.filename or repo}: {error.strerror}"
    reason = " ".join(str(error).split()) or "no reason given"
    return (
        f"cannot fetch {repo} from {endpoint} ({type(error).__name__}: {reason}); "
        "check the network, then run the same command again to continue"
    )


def read_state(out: Path) -> dict[str, dict[str, str]]:
    """Return what earlier runs fetched into a folder: `repo` and `commit` of each data set.

    Raises:
        UserError: the file is damaged.
    """
    path = out / STATE_FILE
    if not path.exists():
        return {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return {name: {"repo": entry["repo"], "commit": entry["commit"]} for name, entry in state.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it to start from the newest commit") from error


def write_state(out: Path, plan: Plan) -> None:
    """Note in a folder where the files of a data set come from; what is noted of others stays."""
    entry = {"repo": plan.repo, "commit": plan.commit}
    atomic.write_json(out / STATE_FILE, {**read_state(out), plan.name: entry})


def _remove_leftovers(folder: Path) -> None:
    for path in (folder / ".cache" / "huggingface" / "download").rglob("*.incomplete"):
        if _LEFTOVER.fullmatch(path.name):
            path.unlink()


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _leads_out(file: str) -> bool:
    windows = PureWindowsPath(file)
    return bool(".." in windows.parts or windows.anchor or PurePosixPath(file).is_absolute())
