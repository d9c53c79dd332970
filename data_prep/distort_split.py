"""A half-distorted copy of a manifest, as a validation or test split of your own.

    python -m data_prep.distort_split data/holdout.csv --preset official --out data/holdout_distorted

Half of the images of each class are distorted as a policy preset draws it, and the others stay clean, as in
the challenge: no image is included twice. Clean or distorted, every image is stored as a JPEG of quality 95.
What is drawn for an image is a function of (seed, name).

| file | holds |
|---|---|
| `images.zip` | the images, in `images/` |
| `labels.csv` | labels and distortions in the challenge's format |
| `manifest.csv` | the same as a manifest, with the other columns of the original manifest |
| `errors.csv` | images that could not be read, if any; the exit status is then 1 |
| `distort_split.json` | settings of the copy; written last |

A stopped run is continued by the same command; a finished copy is left as it is.
"""

import json
import logging
from functools import partial

import pandas as pd

from data_prep.writing.copies import ImageCopy, file_names
from data_prep.writing.flags import add_flags, copy_parser
from data_prep.writing.sampling import hash_positions
from featdistill import atomic, command_line
from featdistill.command_line import Parser, UserError, counted, within
from featdistill.distortions.plan import Plan, apply_plan, describe
from featdistill.distortions.presets import PRESETS, parse_policy
from featdistill.images.reading import encode_jpeg, limit_side, read_image
from featdistill.records.label_files import format_labels
from featdistill.records.manifest import read_manifest
from featdistill.records.parts import content_sha256
from featdistill.seeds import evaluation_generator

_log = logging.getLogger(__name__)
# High enough that storage leaves almost no trace compared with the distortions.
STORAGE_QUALITY = 95


def choose_distorted(frame: pd.DataFrame, share: float, seed: int) -> pd.Series:
    """Return which rows are distorted: of each class, the `share` with the smallest hash of (seed, name)."""
    classes = frame["label"].astype("string").fillna("")
    sizes = classes.groupby(classes).transform("size")
    return hash_positions(frame["name"], classes, seed) < (share * sizes).round()


def build_parser() -> Parser:
    parser = copy_parser("distort_split", "Make a half-distorted copy of a manifest's images.")
    parser.add_argument(
        "--preset",
        default="official",
        metavar="NAME[,KEY=VALUE...]",
        help=f"policy: {', '.join(PRESETS)}; with changes, as in official,max_operations=5",
    )
    parser.add_argument("--share", type=within(0, 1, float), default=0.5, help="share of distorted images")
    add_flags(parser, "seed", "workers")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    policy = parse_policy(arguments.preset)
    if policy.distort_at != "native":
        raise UserError("--preset: distort_at must be native, since a copy has no network input")
    frame = read_manifest(arguments.manifest)
    made_with = {"manifest_sha256": content_sha256(arguments.manifest)}
    made_with |= {flag: getattr(arguments, flag) for flag in ("preset", "share", "seed")}
    copy = ImageCopy(arguments.out, "distort_split.json", made_with, ".jpg")
    if (status := copy.finished_status()) is not None:
        return status
    renamed = frame.assign(name=file_names(frame["name"], ".jpg"))
    chosen = choose_distorted(frame, arguments.share, arguments.seed)
    plans: list[Plan] = [
        policy.draw(evaluation_generator(arguments.seed, name)) if distorted else ()
        for name, distorted in zip(frame["name"], chosen, strict=True)
    ]
    make = partial(distorted_jpeg, max_side_px=policy.max_side_px)
    tasks = list(zip(frame["image"], plans, strict=True))
    copy.start()
    errors = copy.make(tasks, make, arguments.workers, "distorting")
    rows = renamed.drop(index=list(errors))
    chains = [describe(plans[row]) for row in rows.index]
    rows["distortions"] = [json.dumps(chain) for chain in chains]
    rows["is_distorted"] = [int(bool(chain)) for chain in chains]
    labels = ["" if pd.isna(label) else int(label) for label in rows["label"]]
    text = format_labels(zip(rows["name"], labels, chains, rows["is_distorted"].tolist(), strict=True))
    atomic.write_text(copy.out / "labels.csv", text)
    status = copy.finish(rows, frame, errors)
    distorted = sum(rows["is_distorted"])
    _log.info(f"{copy.out}: {counted(len(rows), 'image')}, {distorted} distorted, preset {arguments.preset}")
    return status


def distorted_jpeg(location: str, plan: Plan, max_side_px: int | None) -> bytes:
    """Return the JPEG file of a copy: the image, reduced to a maximum side, with the planned distortions."""
    image = apply_plan(limit_side(read_image(location), max_side_px), plan)
    return encode_jpeg(image, STORAGE_QUALITY)


if __name__ == "__main__":
    command_line.run(main)
