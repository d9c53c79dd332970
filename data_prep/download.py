"""The challenge's splits and other data sets, from the Hugging Face hub to a folder.

    python -m data_prep.download --list
    python -m data_prep.download ntire-train ntire-val --out data --dry-run
    python -m data_prep.download ntire-train ntire-val --out data

Each data set gets a folder of its name below `--out`. Files, sizes and the free disk are shown first, and
nothing is fetched where the disk is too small. The first run notes the commit of each data set in
`download.json`; later runs fetch from the same commit, whatever the hub has by then. So a run that was
interrupted is continued by the same command: files that are whole stay, and the one that was cut off is
fetched again (older releases of huggingface_hub continue it). What was fetched is checked by the hub's own
client, and its size here once more.

A gated data set needs a token, from `hf auth login` or in the environment variable HF_TOKEN. Data sets that
are not on the hub are listed with the place to get them from.
"""

import argparse
import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep import hub
from featdistill import command_line
from featdistill.command_line import UserError


@dataclass(frozen=True)
class HubSet:
    """A data set on the hub.

    Attributes:
        repo: its id there.
        holds: what it holds, and its terms, for a person.
        prepare: the module of `data_prep` that makes a manifest of it.
        is_certain: whether the id is known to be the right one.
    """

    repo: str
    holds: str
    prepare: str
    is_certain: bool = True


_NTIRE = "deepfakesMSU/NTIRE-RobustAIGenDetection"
HUB_SETS = {
    "ntire-train": HubSet(f"{_NTIRE}-train", "shard_0.zip .. shard_5.zip, 114 GB, clean", "ntire"),
    "ntire-val": HubSet(f"{_NTIRE}-val", "val and val_hard, 12,500 images", "ntire"),
    "ntire-test-public": HubSet(f"{_NTIRE}-test-public", "public_test, 2,500 images, 0.85 GB", "ntire"),
    "ditfake": HubSet("lioooox/DiTFake", "three diffusion transformers and COCO; no terms known", "ditfake"),
    "defactify": HubSet(
        "Rajarshi-Roy-research/Defactify_Image_Dataset",
        "five generators and real images, 42,000 to train; states no licence",
        "defactify",
    ),
    "deepfake60k": HubSet(
        "prithivMLmods/Deepfake-vs-Real-60K", "60,000 faces; no terms known; also on Kaggle", "deepfake60k"
    ),
    "community_forensics": HubSet(
        "OwensLab/CommunityForensics",
        "images of thousands of generators, no real ones; very large",
        "community_forensics",
        is_certain=False,
    ),
    "community_forensics_small": HubSet(
        "OwensLab/CommunityForensics-Small",
        "a part of it, with real images; non-commercial",
        "community_forensics",
        is_certain=False,
    ),
    "openfake": HubSet(
        "ComplexDataLab/OpenFake", "recent generators and real images", "openfake", is_certain=False
    ),
}
# Data sets that come another way, and which.
ELSEWHERE = {
    "diffface": "DiffFace-Edit: a netdisk, linked in arXiv 2601.13551; DiffusionFace: Zenodo records "
    "10865300 and 10865065, linked in the code repository Rapisurazurite/DiffFace",
    "genimage": "a netdisk, linked in the code repository GenImage-Dataset/GenImage; non-commercial",
    "universalfakedetect": "linked in the code repositories of UniversalFakeDetect and of CNNDetection "
    "(ForenSynths); non-commercial",
    "aigcdetect": "linked in the code repository of AIGCDetectBenchmark; Chameleon on request of its "
    "authors, non-commercial",
}


def check_disk(out: Path, wanted_bytes: int, *, force: bool) -> None:
    """Print what is wanted and what is free; refuse where it does not fit, unless `force`.

    Raises:
        UserError: the disk is too small.
    """
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free_bytes = shutil.disk_usage(there).free
    print(f"to fetch: {_readable(wanted_bytes)}; free at {out}: {_readable(free_bytes)}")
    if wanted_bytes > free_bytes and not force:
        short = _readable(wanted_bytes - free_bytes)
        raise UserError(
            f"the disk of {out} is too small by {short}; make room, take another --out, or --force"
        )


@contextlib.contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Keep other downloads out of a folder: two would remove each other's partial files.

    Raises:
        UserError: there is another one.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".download.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another download into {out} is running; wait for it") from error
        yield


def _readable(size: float) -> str:
    """Return a number of bytes for a person, in powers of 1000 as the hub shows them."""
    if size < 1000:
        return f"{size:.0f} B"
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 1000:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} TB"


def _print_list() -> None:
    print("on the hub:")
    for name, hub_set in HUB_SETS.items():
        doubt = "" if hub_set.is_certain else " (id not certain; --repo gives another)"
        print(f"  {name:26} {hub_set.repo}{doubt}\n  {'':26} {hub_set.holds}")
    print("elsewhere:")
    for name, place in ELSEWHERE.items():
        print(f"  {name:26} {place}")


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.Parser(
        prog="python -m data_prep.download",
        description="Fetch data sets from the Hugging Face hub; the same command goes on where it stopped.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"data sets: {', '.join(HUB_SETS)}")
    parser.add_argument(
        "--list", action="store_true", help="say what each data set is and where it is; then end"
    )
    parser.add_argument("--out", metavar="DIR", help="folder that gets a folder for each data set")
    parser.add_argument("--dry-run", action="store_true", help="list the files and sizes, and fetch nothing")
    parser.add_argument(
        "--files", nargs="+", default=[], metavar="PATTERN", help="only these files, as in --files 'shard_0*'"
    )
    parser.add_argument(
        "--revision",
        help="branch, tag or commit; default: that of the earlier run, else main (one NAME only)",
    )
    parser.add_argument("--repo", metavar="OWNER/ID", help="another id on the hub (one NAME only)")
    parser.add_argument("--workers", type=int, default=8, help="small files that are fetched at a time")
    parser.add_argument("--force", action="store_true", help="fetch even where the disk seems too small")
    return parser


def _check_arguments(args: argparse.Namespace) -> None:
    names = list(dict.fromkeys(args.names))
    if not names:
        raise UserError(f"which data set? Known: {', '.join(HUB_SETS)}; --list says more")
    for name in names:
        if name in ELSEWHERE:
            raise UserError(f"{name} is not on the hub. Get it from: {ELSEWHERE[name]}")
        command_line.one_of("data set", name, HUB_SETS)
    if len(names) > 1 and (args.repo or args.revision):
        raise UserError("--repo and --revision are for one data set at a time")
    if args.repo and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo):
        raise UserError(f"--repo takes OWNER/ID, not {args.repo}")
    if not args.out:
        raise UserError("--out DIR is missing; see --help")
    if args.workers < 1:
        raise UserError(f"--workers must be 1 or more, not {args.workers}")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.list:
        _print_list()
        return 0
    _check_arguments(args)
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    out = Path(args.out)
    plans = []
    for name in dict.fromkeys(args.names):
        hub_set = HUB_SETS[name]
        if not (hub_set.is_certain or args.repo):
            print(f"note: {hub_set.repo} may not be the right id for {name}; --repo gives another")
        plans.append(hub.make_plan(api, name, args.repo or hub_set.repo, args.revision, out, args.files))
    for plan in plans:
        missing = plan.missing()
        sizes = [_readable(sum(file.size for file in files)) for files in (plan.files, missing)]
        print(f"{plan.name}: {plan.repo} at commit {plan.commit[:12]}: {len(plan.files)} files, {sizes[0]}")
        if args.dry_run:
            for file in plan.files:
                print(f"  {_readable(file.size):>10}  {file.path}{'' if file in missing else '  (there)'}")
        print(f"  {len(missing)} of them, {sizes[1]}, are not in {plan.folder} yet")
    wanted_bytes = sum(file.size for plan in plans for file in plan.missing())
    check_disk(out, wanted_bytes, force=args.force or args.dry_run)
    if args.dry_run:
        return 0
    with only_one(out):
        for plan in plans:
            hub.write_state(out, plan)
            hub.fetch(api, plan, args.workers)
            module = HUB_SETS[plan.name].prepare
            print(f"{plan.folder}: all {len(plan.files)} files are there; next: python -m data_prep.{module}")
    return 0


if __name__ == "__main__":
    command_line.run(main)
