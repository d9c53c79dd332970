"""The challenge's splits and other data sets, from the Hugging Face hub to a folder.

    python -m data_prep.download --list
    python -m data_prep.download ntire-train ntire-val --out data --dry-run
    python -m data_prep.download ntire-train ntire-val --out data

Each data set gets a folder with its name below `--out`. Files, sizes and free disk space are shown first, and
nothing is fetched if the disk is too small. The first run records the commit of each data set in
`download.json`; later runs fetch the same commit, even if the hub has a newer one. So the same command
continues an interrupted run: complete files stay, and a partial one is continued or fetched again, depending
on the release of huggingface_hub. The hub's client checks what it fetches, and sizes are checked here again.

A gated data set needs a token, from `hf auth login` or in the environment variable HF_TOKEN. Data sets that
are not on the hub are listed with the place to get them from.
"""

import contextlib
import os
import re
import shutil
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from featdistill import atomic, command_line
from featdistill.command_line import UserError, counted, worker_count
from featdistill.records.provenance import read_record

if TYPE_CHECKING:
    from huggingface_hub import HfApi


class HubSet(NamedTuple):
    """A data set on the hub: its id there, contents and terms, and whether the id is known to be correct."""

    repo: str
    holds: str
    is_certain: bool = True


_NTIRE = "deepfakesMSU/NTIRE-RobustAIGenDetection"
_DEFACTIFY = "Rajarshi-Roy-research/Defactify_Image_Dataset"
_CF = "OwensLab/CommunityForensics"
HUB_SETS = {
    "ntire-train": HubSet(f"{_NTIRE}-train", "shard_0.zip .. shard_5.zip, 114 GB, clean"),
    "ntire-val": HubSet(f"{_NTIRE}-val", "val and val_hard, 12,500 images"),
    "ntire-test-public": HubSet(f"{_NTIRE}-test-public", "public_test, 2,500 images, 0.85 GB"),
    "ditfake": HubSet("lioooox/DiTFake", "three diffusion transformers and COCO; terms unknown"),
    "defactify": HubSet(
        _DEFACTIFY, "five generators and real images, 42,000 for training; no licence stated"
    ),
    "deepfake60k": HubSet(
        "prithivMLmods/Deepfake-vs-Real-60K", "60,000 faces; terms unknown; also on Kaggle"
    ),
    "community_forensics": HubSet(_CF, "AI images of thousands of generators; very large", False),
    "community_forensics_small": HubSet(f"{_CF}-Small", "a part with real images; non-commercial", False),
    "openfake": HubSet("ComplexDataLab/OpenFake", "recent generators and real images", False),
}
# Where to get the data sets that are not on the hub.
ELSEWHERE = {
    "diffface": "DiffFace-Edit: a netdisk, linked in arXiv 2601.13551; DiffusionFace: Zenodo records "
    "10865300 and 10865065, linked in the code repository Rapisurazurite/DiffFace",
    "genimage": "a netdisk, linked in the code repository GenImage-Dataset/GenImage; non-commercial",
    "universalfakedetect": "linked in the code repositories of UniversalFakeDetect and of CNNDetection "
    "(ForenSynths); non-commercial",
    "aigcdetect": "linked in the code repository of AIGCDetectBenchmark; Chameleon from its authors on "
    "request, non-commercial",
}
STATE_FILE = "download.json"
_TIMEOUT_S = 60
# Left by killed runs of the client's newer releases, which name partial files anew each time.
_LEFTOVER = re.compile(r".+\.[0-9a-f]{8}\.incomplete")


@dataclass(frozen=True)
class Plan:
    """The files of one data set at one commit, with their sizes in bytes, to be fetched into a folder."""

    name: str
    repo: str
    commit: str
    folder: Path
    sizes: dict[str, int]

    def missing(self) -> dict[str, int]:
        """Return the files that are not in the folder with their size."""
        return {file: size for file, size in self.sizes.items() if _size_of(self.folder / file) != size}


def make_plan(api: "HfApi", name: str, args: Namespace) -> Plan:
    """Ask the hub for the files of a data set; refuse those that do not fit `args` or an earlier run."""
    from huggingface_hub.utils import filter_repo_objects

    repo, folder = args.repo or HUB_SETS[name].repo, args.out / name
    recorded = read_commits(args.out).get(name) if folder.exists() else None
    if recorded and recorded["repo"] != repo:
        raise UserError(f"{folder} holds {recorded['repo']}, not {repo}; choose another --out, or remove it")
    with hub_errors(api, repo):
        # Two requests, since only the answer to the second comes in pages: there may be very many files.
        revision = args.revision or (recorded["commit"] if recorded else None)
        commit = api.dataset_info(repo, revision=revision, timeout=_TIMEOUT_S).sha
        tree = api.list_repo_tree(repo, repo_type="dataset", revision=commit, recursive=True)
        # Folders are listed too; they have no size.
        sizes = {entry.path: entry.size for entry in tree if hasattr(entry, "size")}
    if recorded and recorded["commit"] != commit:
        raise UserError(
            f"{folder} holds files of commit {recorded['commit'][:12]}, and --revision {args.revision} is "
            f"{commit[:12]}; choose another --out, or remove the folder"
        )
    for file in sizes:
        windows = PureWindowsPath(file)
        if ".." in windows.parts or windows.anchor or PurePosixPath(file).is_absolute():
            raise UserError(f"{repo}: the file name {file!r} leads out of the folder; do not use it")
    chosen = sorted(filter_repo_objects(sizes, allow_patterns=args.files or None))
    if not chosen:
        first = ", ".join(list(sizes)[:5]) or "none"
        patterns = " ".join(args.files) or "*"
        raise UserError(f"{repo}: no file matches {patterns}; it has {len(sizes)}: {first} ..")
    return Plan(name, repo, commit, folder, {file: sizes[file] for file in chosen})


def fetch(api: "HfApi", plan: Plan, args: Namespace) -> None:
    """Fetch the missing files of a plan, and record its commit."""
    from huggingface_hub import snapshot_download

    for path in (plan.folder / ".cache" / "huggingface" / "download").rglob("*.incomplete"):
        if _LEFTOVER.fullmatch(path.name):
            path.unlink()
    entry = {"repo": plan.repo, "commit": plan.commit}
    atomic.write_json(args.out / STATE_FILE, {**read_commits(args.out), plan.name: entry})
    settings = {"repo_type": "dataset", "revision": plan.commit, "local_dir": plan.folder}
    settings |= {"allow_patterns": args.files or None, "max_workers": args.workers, "endpoint": api.endpoint}
    # On Ctrl-C the client would first finish the files that it is fetching, however large.
    previous = signal.signal(signal.SIGINT, _leave)
    try:
        with hub_errors(api, plan.repo):
            snapshot_download(plan.repo, **settings)
    finally:
        signal.signal(signal.SIGINT, previous)
    for file, size in plan.missing().items():
        raise UserError(f"{plan.folder / file} does not have {size} bytes; remove it and repeat the command")


def read_commits(out: Path) -> dict[str, dict[str, str]]:
    """Return `repo` and `commit` of each data set that earlier runs fetched into a folder."""
    record = read_record(out / STATE_FILE) or {}
    try:
        return {name: {key: entry[key] for key in ("repo", "commit")} for name, entry in record.items()}
    except (KeyError, TypeError) as error:
        raise UserError(f"{out / STATE_FILE} is damaged; remove it to fetch the newest commit") from error


def _leave(*_: object) -> NoReturn:
    print("download.py: interrupted; run the same command again to continue", file=sys.stderr, flush=True)
    os._exit(130)


@contextlib.contextmanager
def hub_errors(api: "HfApi", repo: str) -> Iterator[None]:
    """Turn exceptions of the hub's client into a `UserError` of one line.

    Its network errors are those of an HTTP library that differs between its major releases, and not all of
    them are an `OSError`: so any exception is caught.
    """
    try:
        yield
    except Exception as error:
        raise UserError(_explain(error, api.endpoint, repo)) from error


def _explain(error: Exception, endpoint: str, repo: str) -> str:
    from huggingface_hub import errors, get_token

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        # The client could neither reach the hub nor find the file in the folder.
        error = error.__cause__
    page = f"{endpoint}/datasets/{repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    has_token = get_token() is not None
    add_token = "run `hf auth login`, or set the environment variable HF_TOKEN, with a token that may read it"
    if isinstance(error, errors.GatedRepoError):
        then = "with the account of your token" if has_token else f"then {add_token}"
        return f"{repo} is gated (HTTP {status}): accept its terms at {page}, {then}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no such revision; {page}/commits/main lists its revisions"
    if status in (401, 403):
        token = "your token was refused" if has_token else "there is no token"
        return f"{repo} needs a token (HTTP {status}; {token}), or has been renamed; {add_token}"
    if status == 404:
        return f"{repo} is not on the hub at {endpoint} (HTTP 404); if it was renamed, use --repo"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the environment variable HF_HUB_OFFLINE forbids network access; unset it"
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return f"cannot write {error.filename or repo}: {error.strerror}"
    reason = " ".join(str(error).split()) or "no reason given"
    advice = "check the network, then run the same command again to continue"
    return f"cannot fetch {repo} from {endpoint} ({type(error).__name__}: {reason}); {advice}"


def check_disk(out: Path, needed_bytes: int, *, force: bool) -> None:
    """Show the needed and the free disk space; raise a `UserError` if it is too small, unless `force`."""
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free_bytes = shutil.disk_usage(existing).free
    print(f"to fetch: {_readable(needed_bytes)}; free at {out}: {_readable(free_bytes)}")
    if needed_bytes > free_bytes and not force:
        short = _readable(needed_bytes - free_bytes)
        raise UserError(f"the disk of {out} is too small by {short}; choose another --out, or use --force")


def _readable(size: float) -> str:
    """Format a number of bytes, in powers of 1000 as on the hub."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _size_of(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _print_list() -> None:
    print("on the hub:")
    for name, hub_set in HUB_SETS.items():
        doubt = "" if hub_set.is_certain else " (id not certain; --repo sets another)"
        print(f"  {name:26} {hub_set.repo}{doubt}\n  {'':26} {hub_set.holds}")
    print("elsewhere:")
    for name, place in ELSEWHERE.items():
        print(f"  {name:26} {place}")


def _print_plan(plan: Plan, *, list_files: bool) -> None:
    missing = plan.missing()
    total, rest = (_readable(sum(sizes.values())) for sizes in (plan.sizes, missing))
    print(
        f"{plan.name}: {plan.repo} at commit {plan.commit[:12]}: {counted(len(plan.sizes), 'file')}, {total}"
    )
    for file, size in plan.sizes.items() if list_files else ():
        print(f"  {_readable(size):>10}  {file}{'' if file in missing else '  (present)'}")
    print(f"  {len(missing)} of them, {rest}, are not in {plan.folder} yet")


def build_parser() -> command_line.Parser:
    about = "Fetch data sets from the Hugging Face hub; the same command continues a stopped run."
    parser = command_line.Parser(prog="python -m data_prep.download", description=about)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"data sets: {', '.join(HUB_SETS)}")
    parser.add_argument("--list", action="store_true", help="show what each data set is and where; then end")
    parser.add_argument("--out", type=Path, metavar="DIR", help="parent of the data sets' folders")
    parser.add_argument("--dry-run", action="store_true", help="list files and sizes, and fetch nothing")
    parser.add_argument(
        "--files", nargs="+", default=[], metavar="PATTERN", help="only these files, as in --files 'shard_0*'"
    )
    parser.add_argument(
        "--revision", help="branch, tag or commit; default: that of the earlier run, else main"
    )
    parser.add_argument("--repo", metavar="OWNER/ID", help="another id on the hub (one NAME only)")
    parser.add_argument(
        "--workers", type=worker_count(1), default=8, help="number of files to fetch in parallel"
    )
    parser.add_argument("--force", action="store_true", help="fetch even if the disk seems too small")
    return parser


def _check_arguments(args: Namespace) -> None:
    if not args.names:
        raise UserError(f"which data set? Known: {', '.join(HUB_SETS)}; see --list")
    for name in args.names:
        if name in ELSEWHERE:
            raise UserError(f"{name} is not on the hub. Get it from: {ELSEWHERE[name]}")
        command_line.one_of("data set", name, HUB_SETS)
    if len(set(args.names)) > 1 and (args.repo or args.revision):
        raise UserError("--repo and --revision are for one data set at a time")
    if args.repo and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo):
        raise UserError(f"--repo must be OWNER/ID, not {args.repo}")
    if not args.out:
        raise UserError("--out DIR is missing; see --help")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.list:
        _print_list()
        return 0
    _check_arguments(args)
    # Imported late: the client takes a while to import.
    from filelock import FileLock, Timeout
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    plans = []
    for name in dict.fromkeys(args.names):
        if not (HUB_SETS[name].is_certain or args.repo):
            print(f"note: {HUB_SETS[name].repo} may not be the right id of {name}; --repo sets another")
        plans.append(make_plan(api, name, args))
    for plan in plans:
        _print_plan(plan, list_files=args.dry_run)
    needed_bytes = sum(sum(plan.missing().values()) for plan in plans)
    check_disk(args.out, needed_bytes, force=args.force or args.dry_run)
    if args.dry_run:
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(args.out / ".download.lock", timeout=0):
            for plan in plans:
                fetch(api, plan, args)
                module = plan.name.partition("-")[0].removesuffix("_small")
                print(
                    f"{plan.folder}: complete, {counted(len(plan.sizes), 'file')}; next: data_prep.{module}"
                )
    except Timeout as error:
        raise UserError(f"another download into {args.out} is running; wait for it") from error
    return 0


if __name__ == "__main__":
    command_line.run(main)
