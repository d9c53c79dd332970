"""A half-distorted copy of any manifest: a local validation or test split of one's own.

    python -m data_prep.distort_split data/holdout.csv --preset official --out data/holdout_distorted

Half of the images of each class are distorted as a preset of the policy draws it, the others stay clean, as
in the challenge: no image is there twice. Clean or distorted, every image is stored the same way, as a JPEG
of quality 95. What is drawn for an image is a function of (seed, name).

| file | holds |
|---|---|
| `images.zip` | the images, below `images/` |
| `labels.csv` | labels and distortions as the challenge writes them |
| `manifest.csv` | the same as a manifest, with the other columns of the one that was copied |
| `errors.csv` | images that could not be read, where there are any; the status is then 1 |
| `distort_split.json` | what the copy was made from and with; written last |

A copy that was stopped is continued by the same command; a finished one is left as it is.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
from functools import partial
from pathlib import Path

import cv2
import pandas as pd

from featdistill import atomic, command_line
from featdistill.command_line import Parser, UserError, progress
from featdistill.distortion_policy import Plan, apply_plan, describe, evaluation_generator
from featdistill.distortion_presets import PRESETS, parse_policy
from featdistill.image_io import BrokenImage, encode_jpeg, limit_side, read_image, without_extension
from featdistill.label_files import format_labels
from featdistill.manifest import ARCHIVE_SEPARATOR, read_manifest, write_manifest
from featdistill.working_memory import keep_freed_memory

# High enough that the storage itself leaves next to no trace beside the distortions.
STORAGE_QUALITY = 95
_MARK = "distort_split.json"


def choose_distorted(frame: pd.DataFrame, share: float, seed: int) -> pd.Series:
    """Return which rows are distorted: of each class the `share` whose hash of (seed, name) is smallest."""
    rank = frame["name"].map(lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())
    classes = frame["label"].astype("string").fillna("")
    place = rank.groupby(classes).rank(method="first") - 1
    return place < (share * classes.groupby(classes).transform("size")).round()


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m data_prep.distort_split",
        description="Make a half-distorted copy of a manifest's images, as zip, label file and manifest.",
    )
    parser.add_argument("manifest", metavar="MANIFEST")
    parser.add_argument(
        "--preset",
        default="official",
        metavar="NAME[,KEY=VALUE...]",
        help=f"what is drawn: {', '.join(PRESETS)}",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder for the copy")
    parser.add_argument("--share", type=float, default=0.5, help="share of distorted images")
    parser.add_argument("--seed", type=int, default=0, help="another seed distorts other images otherwise")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if not 0 <= arguments.share <= 1 or arguments.seed < 0 or arguments.workers < 1:
        raise UserError("--share must lie between 0 and 1, --seed be 0 or more and --workers 1 or more")
    policy = parse_policy(arguments.preset)
    if policy.distort_at != "native":
        raise UserError("--preset: a copy has no network input to distort at; leave distort_at native")
    frame, out = read_manifest(arguments.manifest), Path(arguments.out)
    made_with = {
        "manifest_sha256": atomic.sha256_of(arguments.manifest),
        "preset": arguments.preset,
        "share": arguments.share,
        "seed": arguments.seed,
    }
    if _is_finished(out, made_with):
        print(f"{out} is finished; nothing to do")
        return int((out / "errors.csv").is_file())
    files = frame["name"].map(lambda name: f"{without_extension(name)}.jpg")
    if files.duplicated().any():
        raise UserError(f"{arguments.manifest}: two images would both be {files[files.duplicated()].iloc[0]}")
    plans: list[Plan] = [
        policy.draw(evaluation_generator(arguments.seed, name)) if chosen else ()
        for name, chosen in zip(
            frame["name"], choose_distorted(frame, arguments.share, arguments.seed), strict=True
        )
    ]
    work = out / f".work-{hashlib.sha256(json.dumps(made_with).encode()).hexdigest()[:16]}"
    work.mkdir(parents=True, exist_ok=True)
    errors = _make(frame["image"].tolist(), plans, work, policy.max_side_px, arguments.workers)
    good = [row for row in range(len(frame)) if row not in errors]
    atomic.write_zip(
        out / "images.zip", ((f"images/{files[row]}", (work / f"{row}.jpg").read_bytes()) for row in good)
    )
    copy = frame.iloc[good].assign(name=files)
    copy["image"] = [
        f"{out.absolute() / 'images.zip'}{ARCHIVE_SEPARATOR}images/{name}" for name in copy["name"]
    ]
    chains = [describe(plans[row]) for row in good]
    copy["distortions"] = [json.dumps(chain) for chain in chains]
    copy["is_distorted"] = [int(bool(chain)) for chain in chains]
    write_manifest(copy, out / "manifest.csv")
    labels = ["" if pd.isna(label) else int(label) for label in copy["label"]]
    rows = zip(copy["name"], labels, chains, copy["is_distorted"].tolist(), strict=True)
    atomic.write_text(out / "labels.csv", format_labels(rows))
    broken = [(frame["name"][row], errors[row]) for row in sorted(errors)]
    for name, reason in broken[:10]:
        print(f"could not be read: {name}: {reason}")
    if broken:
        atomic.write_text(out / "errors.csv", atomic.csv_text(("name", "reason"), broken))
    atomic.write_json(out / _MARK, made_with)
    shutil.rmtree(work)
    print(
        f"{out}: {len(good)} images, {sum(copy['is_distorted'])} of them distorted, preset {arguments.preset}"
    )
    return 1 if errors else 0


def _is_finished(out: Path, made_with: dict) -> bool:
    mark = out / _MARK
    if not mark.is_file():
        return False
    former = json.loads(mark.read_text(encoding="utf-8"))
    changed = [
        f"{key} was {former.get(key)}, is {made_with[key]}"
        for key in made_with
        if former.get(key) != made_with[key]
    ]
    if changed:
        raise UserError(f"{out} was made otherwise: {'; '.join(changed)}; give another --out")
    return True


def _make(
    images: list[str], plans: list[Plan], work: Path, max_side_px: int | None, workers: int
) -> dict[int, str]:
    """Write each row's image to `work/ROW.jpg` where it is not yet; return the rows that cannot be read."""
    tasks = [
        (row, image, plans[row]) for row, image in enumerate(images) if not (work / f"{row}.jpg").is_file()
    ]
    errors: dict[int, str] = {}
    make = partial(_make_one, work=work, max_side_px=max_side_px)
    # Fresh processes: a fork would inherit OpenCV's threads in an unknown state.
    pool = multiprocessing.get_context("spawn").Pool(workers, _set_up_worker)
    with pool, progress(len(images), "distorting", initial=len(images) - len(tasks)) as bar:
        for row, reason in pool.imap_unordered(make, tasks, chunksize=8):
            if reason is not None:
                errors[row] = reason
            bar.update()
    return errors


def _set_up_worker() -> None:
    cv2.setNumThreads(0)
    keep_freed_memory()


def _make_one(task: tuple[int, str, Plan], work: Path, max_side_px: int | None) -> tuple[int, str | None]:
    row, location, plan = task
    try:
        image = apply_plan(limit_side(read_image(location), max_side_px), plan)
    except BrokenImage as error:
        return row, str(error)
    with atomic.replace_file(work / f"{row}.jpg") as beside:
        beside.write_bytes(encode_jpeg(image, STORAGE_QUALITY))
    return row, None


if __name__ == "__main__":
    command_line.run(main)
