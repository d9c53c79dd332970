"""Predictions and labels to the challenge's metrics: one row a split, and where each expert wins and loses.

    python evaluate.py --predictions val.csv val_hard.csv --out scores
    python evaluate.py --predictions val.csv --labels val_labels.csv --threshold-from holdout.csv --out scores
    python evaluate.py --compare run_a/val.csv run_b/val.csv --out comparison
    python evaluate.py --protocol genimage --predictions genimage.csv --out scores
    python evaluate.py --sweep holdout.csv --experts runs/paper/stage2/*/expert --out sweep

Labels are a manifest or an official label file, by default the manifest in the predictions' sidecar. A split
is called what its predictions file is called; with `hard` in the name it gives the metrics of the hard split.

| file in `--out` | holds |
|---|---|
| `metrics.json` | all that was found |
| `metrics.csv` | a line a metric: `split,metric,value,low,high,n` |
| `metrics.md` | the same as tables |
| `report.html` | all of it as a page with charts and the surest mistakes, in one file; `--no-report`: none |

`--compare` writes `comparison.json`, `.csv` and `.md`; `--protocol` writes `protocol.json`, `.csv` and `.md`,
a row a generator of the benchmark and the mean over them.

`--sweep` applies each operation at each level to labelled images, and writes `sweep.json`, `.csv` and `.md`,
the AUC that is left, and `sweep.html`; a report in the same folder shows it too. A sweep that was killed is
continued by the same command. With `--explain EXPERT`, the page shows below each of the surest mistakes where
that expert looks. These two alone need PyTorch.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from featdistill import atomic, command_line
from featdistill.command_line import UserError
from featdistill.evaluation import (
    bootstrap,
    comparison,
    leaderboard,
    protocols,
)
from featdistill.evaluation import (
    splits as evaluation,
)
from featdistill.evaluation import (
    tables as score_tables,
)
from featdistill.evaluation.bootstrap import Resampling
from featdistill.report import page as report
from featdistill.report.gallery import Explainer
from featdistill.sweep import plan as sweep_plan


def build_parser() -> command_line.Parser:
    parser = command_line.Parser(description=__doc__.split("\n\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--predictions", nargs="+", metavar="FILE", help="one file a split")
    what.add_argument(
        "--compare", nargs="+", metavar="FILE", help="predictions of several runs for the same images"
    )
    what.add_argument("--sweep", metavar="MANIFEST", help="distort its labelled images in every way")
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="FILE",
        help="manifests or official label files: one for each predictions file in the same order, or one "
        "for all; where none is given, the manifest in each sidecar",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--threshold-from",
        nargs="+",
        metavar="SPLIT",
        help="also give accuracies at the threshold of the best balanced accuracy on other images: one of "
        "the splits, or a predictions file and, where its sidecar names none, its labels",
    )
    parser.add_argument(
        "--audit",
        metavar="DIR",
        help="what data_prep.audit wrote: sets its pixel-free baseline beside the AUCs",
    )
    parser.add_argument(
        "--leaderboard", action="store_true", help="set any split beside the published results"
    )
    parser.add_argument(
        "--protocol",
        metavar="NAME",
        help=f"score by the generators of a benchmark: {' or '.join(protocols.PROTOCOLS)}",
    )
    parser.add_argument("--draws", type=int, default=1000, help="bootstrap draws of the intervals; 0: none")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other images")
    parser.add_argument("--no-report", action="store_true", help="write no page")
    parser.add_argument(
        "--gallery",
        type=int,
        metavar="N",
        help=f"mistakes of each class that the page shows as pictures (default: {report.GALLERY}); 0: none",
    )
    parser.add_argument(
        "--explain",
        metavar="EXPERT",
        help="an expert's folder: the page shows below each mistake where this expert looks",
    )
    sweep_plan.add_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.draws < 0 or args.seed < 0:
        raise UserError("--draws and --seed must be 0 or more")
    if args.gallery is not None and args.gallery < 0:
        raise UserError("--gallery must be 0 or more")
    if args.sweep:
        return sweep_robustness(args)
    sweep_plan.refuse_flags(args)
    if args.protocol:
        return score_by_protocol(args)
    return compare(args) if args.compare else score(args)


def score(args: argparse.Namespace) -> int:
    """Write the metrics of each split that has labels."""
    resampling = Resampling(args.draws, args.seed)
    explainer = choose_explainer(args)
    splits = evaluation.load_splits(args.predictions, args.labels)
    threshold = evaluation.choose_threshold(args.threshold_from, splits) if args.threshold_from else None
    pixel_free = evaluation.read_audit(args.audit) if args.audit else None
    results = {}
    for split in splits:
        if split.frame.empty:
            print(f"{split.name} is left out: {split.labels} has no labels")
            continue
        results[split.name] = evaluation.score_split(split, resampling, threshold, pixel_free)
    published, notes = leaderboard.chosen_splits(results, args.leaderboard)
    result = {
        **evaluation.official_metrics(results),
        "splits": results,
        "bootstrap": {"draws": args.draws, "seed": args.seed, "confidence": bootstrap.CONFIDENCE},
        "notes": notes,
        "pixel_free": pixel_free,
        "leaderboard": leaderboard.leaderboard(published) if published else None,
    }
    print(score_tables.summary(result), end="")
    out = Path(args.out)
    save(out, "metrics", result, score_tables.markdown(result), score_tables.csv_rows(result))
    if not args.no_report:
        most = report.GALLERY if args.gallery is None else args.gallery
        found = report.read_sweep(out / "sweep.json")
        lost = report.write_report(
            out / "report.html", result, splits, sweep=found, gallery=most, explainer=explainer
        )
        if lost:
            line = f"{len(lost)} pictures of the report could not be shown; the first: {lost[0]}"
            print(line, file=sys.stderr)
    return 0


def choose_explainer(args: argparse.Namespace) -> Explainer | None:
    """Return what makes the maps of `--explain`, or None where none is asked for."""
    if not args.explain:
        return None
    if args.no_report or args.gallery == 0:
        flag = "--no-report" if args.no_report else "--gallery 0"
        raise UserError(f"--explain adds to the page's pictures; leave out {flag}")
    # As for `--sweep`, PyTorch is for this alone.
    from featdistill.interactive import explain

    return explain.explainer(args.explain)


def score_by_protocol(args: argparse.Namespace) -> int:
    """Write a benchmark's table: a row a generator, and the mean over them."""
    if not args.predictions:
        raise UserError("--protocol goes with --predictions")
    for flag in ("threshold_from", "audit", "leaderboard", "no_report", "gallery", "explain"):
        if getattr(args, flag):
            raise UserError(f"--{flag.replace('_', '-')} does not go with --protocol")
    result = protocols.score(args.protocol, args.predictions, args.labels)
    text = protocols.markdown(result)
    print(text, end="")
    save(Path(args.out), "protocol", result, text, protocols.csv_rows(result), protocols.CSV_HEADER)
    return 0


def compare(args: argparse.Namespace) -> int:
    """Rank the runs, and say which differences are beyond chance."""
    if args.labels and len(args.labels) != 1:
        raise UserError("--compare holds all runs against one label file; give one with --labels")
    for flag in ("threshold_from", "audit", "leaderboard", "no_report", "gallery", "explain"):
        if getattr(args, flag):
            raise UserError(f"--{flag.replace('_', '-')} goes with --predictions, not with --compare")
    labels = args.labels[0] if args.labels else None
    result = comparison.compare(args.compare, labels, Resampling(args.draws, args.seed))
    text = score_tables.comparison_markdown(result)
    print(text, end="")
    save(Path(args.out), "comparison", result, text, score_tables.comparison_rows(result))
    return 0


def sweep_robustness(args: argparse.Namespace) -> int:
    """Write what each operation at each level leaves of the AUC."""
    for flag in ("labels", "threshold_from", "audit", "leaderboard", "protocol", "explain"):
        if getattr(args, flag):
            raise UserError(f"--{flag.replace('_', '-')} goes with --predictions, not with --sweep")
    # Threads that wait would else keep a core busy that the loader's workers need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # PyTorch is for this alone: all else runs where there is none.
    from featdistill.sweep import run as sweep

    status, out = sweep.run(args), Path(args.out)
    if not args.no_report:
        found = report.read_sweep(out / "sweep.json")
        report.write_report(out / "sweep.html", {"splits": {}}, (), sweep=found)
    return status


def save(
    out: Path,
    name: str,
    result: dict,
    text: str,
    rows: Iterable[tuple],
    header: Sequence[str] = score_tables.CSV_HEADER,
) -> None:
    """Write a result as JSON, CSV and Markdown."""
    atomic.write_json(out / f"{name}.json", result)
    atomic.write_text(out / f"{name}.csv", atomic.csv_text(header, rows))
    atomic.write_text(out / f"{name}.md", text)


if __name__ == "__main__":
    command_line.run(main)
