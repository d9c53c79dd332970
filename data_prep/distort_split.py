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

import json
import os
from functools import partial

import pandas as pd

from data_prep.writing import copies as image_copies
from featdistill import atomic, command_line
from featdistill.command_line import Parser, UserError
from featdistill.distortions.plan import Plan, apply_plan, describe
from featdistill.distortions.presets import PRESETS, parse_policy
from featdistill.images.reading import encode_jpeg, limit_side, read_image
from featdistill.records.label_files import format_labels
from featdistill.records.manifest import read_manifest
from featdistill.seeds import evaluation_generator, hash_ranks

# High enough that the storage itself leaves next to no trace beside the distortions.
STORAGE_QUALITY = 95


def choose_distorted(frame: pd.DataFrame, share: float, seed: int) -> pd.Series:
    """Return which rows are distorted: of each class the `share` whose hash of (seed, name) is smallest."""
    rank = pd.Series(hash_ranks(frame["name"], seed), index=frame.index)
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
        help=f"what is drawn: {', '.join(PRESETS)}; with changes, as in official,max_operations=5",
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
    frame = read_manifest(arguments.manifest)
    made_with = {"manifest_sha256": atomic.sha256_of(arguments.manifest)}
    made_with |= {flag: getattr(arguments, flag) for flag in ("preset", "share", "seed")}
    copy = image_copies.ImageCopy(arguments.out, "distort_split.json", made_with)
    status = copy.finished_status()
    if status is not None:
        return status
    frame_copy = frame.assign(name=image_copies.file_names(frame["name"], ".jpg"))
    chosen = choose_distorted(frame, arguments.share, arguments.seed)
    plans: list[Plan] = [
        policy.draw(evaluation_generator(arguments.seed, name)) if distorted else ()
        for name, distorted in zip(frame["name"], chosen, strict=True)
    ]
    copy.work.mkdir(parents=True, exist_ok=True)
    paths = [copy.work / f"{row}.jpg" for row in range(len(frame))]
    make = partial(distorted_jpeg, max_side_px=policy.max_side_px)
    tasks = list(zip(frame["image"], plans, strict=True))
    errors = image_copies.make_files(tasks, paths, make, arguments.workers, "distorting")
    good = [row for row in range(len(frame)) if row not in errors]
    rows, chains = frame_copy.iloc[good].copy(), [describe(plans[row]) for row in good]
    rows["distortions"] = [json.dumps(chain) for chain in chains]
    rows["is_distorted"] = [int(bool(chain)) for chain in chains]
    labels = ["" if pd.isna(label) else int(label) for label in rows["label"]]
    text = format_labels(zip(rows["name"], labels, chains, rows["is_distorted"].tolist(), strict=True))
    atomic.write_text(copy.out / "labels.csv", text)
    broken = [(frame["name"][row], errors[row]) for row in sorted(errors)]
    status = copy.finish(rows, [paths[row] for row in good], broken)
    distorted = sum(rows["is_distorted"])
    print(f"{copy.out}: {len(good)} images, {distorted} of them distorted, preset {arguments.preset}")
    return status


def distorted_jpeg(location: str, plan: Plan, max_side_px: int | None) -> bytes:
    """Return the file of a copy: the image, reduced to a longest side, distorted as planned, as a JPEG.

    Raises:
        BrokenImage: it cannot be read, or is too small to be distorted.
    """
    image = apply_plan(limit_side(read_image(location), max_side_px), plan)
    return encode_jpeg(image, STORAGE_QUALITY)


if __name__ == "__main__":
    command_line.run(main)
