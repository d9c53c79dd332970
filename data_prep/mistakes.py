"""Mistakes of a run, or images that users report, to a manifest that later releases are tested on.

    python -m data_prep.mistakes --predictions val.csv --count 100 --out data/regression.csv
    python -m data_prep.mistakes --folder reported --label real --reason night --out data/regression.csv

Of a run, the most confident mistakes of each class: real images with the highest P(AI) above 0.5 and AI
images with the lowest, or with `--calibrator` those with a wrong verdict. Of a folder, all images, with the
label and the reason that you state.

Rows are added to a manifest that is there; images that it already has keep their rows. Column `reason` says
why an image is there, `score_then` which P(AI) it had. `evaluate.py --gate` with `--gate-by reason` compares
releases on it (docs/verdicts.md).
"""

import logging
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd

from data_prep.writing.flags import csv_file, folder
from featdistill import atomic, command_line
from featdistill.command_line import Parser, UserError, counted, within
from featdistill.images.listing import absolute, image_files, list_folder
from featdistill.records.manifest import join_rows, make_manifest, read_manifest, write_manifest

_log = logging.getLogger(__name__)
LABELS = {"real": 0, "ai": 1}
REASONS = ("real image called AI", "AI image called real")


def mistakes_of_run(predictions: str, labels: str | None, count: int, calibrator: str | None) -> pd.DataFrame:
    """Return the manifest rows of the most confident mistakes, at most `count` of each class.

    Raises:
        UserError: a file cannot be used, or the labels are not a manifest with the images' paths.
    """
    from featdistill.calibration import AI, REAL, Calibrator
    from featdistill.records.labels import label_rows, source_of
    from featdistill.records.logits import logits_of
    from featdistill.records.predictions import read_predictions, read_sidecar

    rows, scores = read_manifest(source_of(predictions, labels)), read_predictions(predictions)
    rows = rows.iloc[label_rows(scores, rows)].reset_index(drop=True)
    score = scores["score"].to_numpy(np.float64)
    called_ai, called_real = score > 0.5, score <= 0.5
    if calibrator is not None:
        loaded = Calibrator.load(calibrator)
        loaded.check(read_sidecar(predictions), predictions)
        verdicts = loaded.verdicts(logits_of(score))
        called_ai, called_real = verdicts == AI, verdicts == REAL
    label, names = rows["label"].fillna(-1).to_numpy(np.int64), rows["name"].to_numpy(str)
    parts = []
    for reason, is_wrong, order in (
        (REASONS[0], (label == 0) & called_ai, -score),
        (REASONS[1], (label == 1) & called_real, score),
    ):
        wrong = np.flatnonzero(is_wrong)
        chosen = wrong[np.lexsort((names[wrong], order[wrong]))][:count]
        parts.append(
            rows.iloc[chosen].assign(reason=reason, score_then=[f"{one:.6g}" for one in score[chosen]])
        )
        _log.info(
            "%s: %s, the most confident %d are taken", reason, counted(len(wrong), "image"), len(chosen)
        )
    return pd.concat(parts, ignore_index=True)


def reported_images(root: str, label: int, reason: str, source: str) -> pd.DataFrame:
    """Return a row for each image of a folder; its name is that of its bytes, so no image is listed twice."""
    files = list(image_files(Path(root), list_folder(Path(root)).files))
    if not files:
        raise UserError(f"{root} contains no images")
    paths = [absolute(str(Path(root) / file)) for file in files]
    by_name = {f"{atomic.sha256_of(path)[:20]}{Path(path).suffix.lower()}": path for path in reversed(paths)}
    count = len(by_name)
    columns = {"image": list(by_name.values()), "name": list(by_name), "label": [label] * count}
    columns |= {"source": [source] * count, "reason": [reason] * count, "score_then": [""] * count}
    return make_manifest(columns)


def add_rows(rows: pd.DataFrame, out: Path, *, of_run: bool) -> None:
    """Write the manifest, with the rows that it had before first.

    Args:
        of_run: whether the names are those of a run's manifest, not of the images' bytes.

    Raises:
        UserError: there is a file without a column `reason`, or an image has another label there, or is
            another file.
    """
    before = read_manifest(out) if out.exists() else rows.iloc[:0]
    if "reason" not in before:
        raise UserError(
            f"{out} has no column reason: it was not written by data_prep.mistakes; choose another --out"
        )
    both = rows.merge(before[["name", "label", "image"]], on="name", suffixes=("", "_before"))
    changed = both[both["label"] != both["label_before"]]
    if len(changed):
        raise UserError(f"{changed['name'].iloc[0]} has another label in {out}; correct one of them first")
    moved = both[both["image"] != both["image_before"]]
    if of_run and len(moved):
        first = moved.iloc[0]
        raise UserError(
            f"{out} has another image of the name {first['name']} ({counted(len(moved), 'image')} alike): "
            f"{first['image_before']}, not {first['image']}; choose another --out, and combine both manifests"
        )
    new = rows[~rows["name"].isin(before["name"])]
    write_manifest(join_rows([before, new]) if len(before) else new, out)
    _log.info("%s: %s added, %d were there", out, counted(len(new), "image"), len(before))


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m data_prep.mistakes",
        description="Collect mistakes of a run, or images that users report, for tests of releases.",
    )
    run = parser.add_argument_group("of a run")
    run.add_argument("--predictions", metavar="FILE", help="predictions of labeled images")
    run.add_argument("--labels", metavar="MANIFEST", help="their manifest (default: the one in the sidecar)")
    run.add_argument("--count", type=within(1), default=100, metavar="N", help="mistakes of each class")
    run.add_argument("--calibrator", metavar="FILE", help="mistakes are wrong verdicts of this calibrator")
    reported = parser.add_argument_group("of users")
    reported.add_argument("--folder", type=folder, metavar="DIR", help="folder of images that were reported")
    reported.add_argument("--label", choices=LABELS, help="what they are")
    reported.add_argument("--reason", metavar="TEXT", help="why they are listed, such as night")
    reported.add_argument("--source", default="reported", metavar="NAME", help="their source")
    parser.add_argument("--out", type=csv_file, required=True, metavar="FILE.csv", help="the manifest")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    _check(args)
    if args.predictions:
        rows = mistakes_of_run(args.predictions, args.labels, args.count, args.calibrator)
    else:
        rows = reported_images(args.folder, LABELS[args.label], args.reason, args.source)
    if rows.empty:
        _log.info("there are no mistakes; nothing is written")
        return 0
    add_rows(rows, args.out, of_run=bool(args.predictions))
    return 0


def _check(args: Namespace) -> None:
    if (args.predictions is None) == (args.folder is None):
        raise UserError("pass either --predictions FILE or --folder DIR")
    if args.folder and not (args.label and args.reason):
        raise UserError("--folder needs --label and --reason: what the images are, and why they are listed")
    if args.predictions and (args.label or args.reason):
        raise UserError("--label and --reason are for --folder; those of a run are known")


if __name__ == "__main__":
    command_line.run(main)
