"""Predictions and labels to the challenge's metrics: one row per split, and where each expert wins and loses.

    python evaluate.py --predictions val.csv val_hard.csv --out scores
    python evaluate.py --predictions val.csv --labels val_labels.csv --threshold-from holdout.csv --out scores
    python evaluate.py --predictions val.csv --calibrator calibrator.json --gate baseline.json --out scores
    python evaluate.py compare run_a/val.csv run_b/val.csv --out comparison
    python evaluate.py protocol genimage --predictions genimage.csv --out scores
    python evaluate.py sweep holdout.csv --experts runs/paper/stage2/*/expert --out sweep

Labels are a manifest or an official label file, by default the manifest in the predictions' sidecar. A split
has the name of its predictions file; one with `hard` in its name provides the metrics of the hard split.

docs/evaluation.md lists the files in `--out`. A sweep that was killed continues with the same command; a
report in its folder shows it too. Only `sweep` and `--explain` need PyTorch.
"""

import logging
import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

# All else is imported when a command runs, so that --help answers at once.
from featdistill import atomic, command_line
from featdistill.command_line import Parser, UserError, one_of, within
from featdistill.inference.flags import add_flags
from featdistill.records.flags import add_labels

_log = logging.getLogger("featdistill.evaluate")


def score_parser() -> Parser:
    parser = Parser(
        prog="evaluate.py",
        description="Score predictions: the challenge's metrics, as tables and as a report.",
        epilog="Further commands: evaluate.py compare, protocol and sweep; each has its own --help.",
    )
    parser.add_argument(
        "--predictions", nargs="+", required=True, metavar="FILE", help="predictions files, one per split"
    )
    _add_labels_and_out(parser)
    parser.add_argument(
        "--threshold-from",
        nargs="+",
        metavar="SPLIT",
        help="also report accuracies at the threshold with the best balanced accuracy on other images: those "
        "of a split, or of a predictions file and, unless its sidecar names them, its labels",
    )
    parser.add_argument(
        "--audit",
        metavar="DIR",
        help="folder of data_prep.audit: shows its pixel-free baseline next to the AUCs, and its content "
        "control, with what each AUC exceeds it by",
    )
    _add_strata(parser)
    parser.add_argument(
        "--by",
        nargs="+",
        default=[],
        metavar="COLUMN",
        help="also break the AUCs down by columns of the labels' manifest; numbers are put in five bins",
    )
    parser.add_argument(
        "--leaderboard", action="store_true", help="show any split next to the published results"
    )
    parser.add_argument(
        "--calibrator",
        metavar="FILE",
        help="show what the promise of a calibrator becomes on these images, by is_distorted, source and "
        "the columns of --by; the file is written by python -m featdistill calibrate",
    )
    gate = parser.add_argument_group("gate, for whoever releases a new expert")
    gate.add_argument("--keep-baseline", metavar="FILE.json", help="keep the scores for a later --gate")
    gate.add_argument(
        "--gate",
        metavar="FILE.json",
        help="compare with a baseline over the same images; the exit status is 4 if an AUC is worse",
    )
    gate.add_argument(
        "--gate-by",
        nargs="+",
        default=[],
        metavar="COLUMN",
        help="compare each category by these columns of the labels' manifest too",
    )
    gate.add_argument(
        "--gate-margin",
        type=within(0, 1, float),
        metavar="DROP",
        help="how far the AUC of a category may fall (default: 0.02)",
    )
    report = parser.add_argument_group("report")
    report.add_argument("--no-report", action="store_true", help="write no report.html")
    report.add_argument(
        "--gallery",
        type=within(0),
        default=8,
        metavar="N",
        help="most confident errors per class to show as pictures; 0 for none",
    )
    report.add_argument(
        "--explain",
        metavar="EXPERT",
        help="folder of an expert, or published:NAME: shows below each picture where this expert looks",
    )
    return parser


def compare_parser() -> Parser:
    parser = Parser(
        prog="evaluate.py compare", description="Rank runs, and show which differences are beyond chance."
    )
    parser.add_argument(
        "predictions", nargs="+", metavar="FILE", help="predictions of two or more runs for the same images"
    )
    parser.add_argument(
        "--labels", metavar="FILE", help="manifest or official label file (default: manifest in the sidecar)"
    )
    _add_strata(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    return parser


def protocol_parser() -> Parser:
    parser = Parser(
        prog="evaluate.py protocol",
        description="Score by the protocol of a benchmark: one row per generator, and their mean.",
    )
    parser.add_argument("protocol", metavar="NAME", help="genimage or universalfakedetect")
    parser.add_argument(
        "--predictions", nargs="+", required=True, metavar="FILE", help="files that together hold the sets"
    )
    _add_labels_and_out(parser)
    return parser


def sweep_parser() -> Parser:
    parser = Parser(
        prog="evaluate.py sweep",
        description="Measure the AUC of an ensemble under every distortion and level.",
    )
    parser.add_argument("manifest", metavar="MANIFEST", help="labeled images; distorted ones are left out")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--libraries",
        nargs="+",
        metavar="NAME",
        help="distortion libraries: official, evaluation, extended, extras, redelivery (default: official)",
    )
    what.add_argument("--operations", nargs="+", metavar="NAME", help="operations (default: all)")
    what.add_argument(
        "--levels", nargs="+", type=int, choices=range(1, 6), metavar="LEVEL", help="1 to 5 (default: all)"
    )
    what.add_argument("--sample", type=within(2), default=500, metavar="N", help="images, of both classes")
    what.add_argument(
        "--distort-at",
        choices=("native", "input"),
        default="native",
        help="distort images at their stored size, or resized to the experts' input",
    )
    what.add_argument("--seed", type=within(0), default=0, help="random seed of sample and distortions")
    what.add_argument("--no-report", action="store_true", help="write no sweep.html")
    experts = parser.add_argument_group("ensemble and speed")
    add_flags(experts, "experts", "released", "fusion", "tta", "batch_size", "workers", "precision", "device")
    return parser


def main(argv: list[str] | None = None) -> int:
    command, *arguments = current_form(sys.argv[1:] if argv is None else argv)
    parser, run = COMMANDS[one_of("command", command, COMMANDS)]
    return run(parser().parse_args(arguments))


def current_form(argv: Sequence[str]) -> list[str]:
    """Return a command line with its command first, also for the form of earlier versions.

    There `--compare`, `--protocol` and `--sweep` chose the command, and `--draws` and `--seed` were about
    bootstrap intervals.
    """
    if argv and not argv[0].startswith("-"):
        return list(argv)
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    command = next((name for name in ("compare", "protocol", "sweep") if f"--{name}" in argv), "score")
    values = _take(argv, f"--{command}")
    for flag in ("--draws", "--seed"):
        if flag in argv and (flag, command) != ("--seed", "sweep"):
            _take(argv, flag)
            _log.warning("%s no longer has an effect: intervals are computed by DeLong's method", flag)
    return [command, *values, *argv]


def score(args: Namespace) -> int:
    """Write the metrics of each split that has labels."""
    explainer = None
    if args.explain:
        if args.no_report or args.gallery == 0:
            flag = "--no-report" if args.no_report else "--gallery 0"
            raise UserError(f"--explain adds to the pictures of the report; leave out {flag}")
        from featdistill.interactive import explain

        explainer = explain.explainer(args.explain)
    from featdistill.evaluation import audits, intervals, leaderboard, tables
    from featdistill.evaluation import splits as evaluation
    from featdistill.report import page

    if not args.gate and (args.gate_by or args.gate_margin is not None):
        raise UserError("--gate-by and --gate-margin have an effect with --gate only")
    calibrator = None
    if args.calibrator:
        from featdistill.calibration import Calibrator, check
        from featdistill.calibration import tables as verdict_tables

        calibrator = Calibrator.load(args.calibrator)
    columns = list(dict.fromkeys([*args.by, *([args.strata] if args.strata else []), *args.gate_by]))
    splits = evaluation.load_splits(args.predictions, args.labels, columns)
    threshold = evaluation.choose_threshold(args.threshold_from, splits) if args.threshold_from else None
    pixel_free, content = None, None
    if args.audit:
        pixel_free, content = audits.read_audit(args.audit), audits.read_content(args.audit)
    results = {}
    for split in splits:
        if split.frame.empty:
            _log.info("%s is left out: %s has no labels", split.name, split.labels)
            continue
        results[split.name] = evaluation.score_split(
            split, threshold, pixel_free, content=content, strata=args.strata, by=args.by
        )
        if calibrator is not None:
            results[split.name]["verdicts"] = check.check_split(split, calibrator, args.by)
    if content is not None and not any("content" in result for result in results.values()):
        raise UserError(f"{content.path} has none of the images; audit the manifest that is evaluated")
    published, notes = leaderboard.chosen_splits(results, args.leaderboard)
    result = {
        **evaluation.official_metrics(results),
        "splits": results,
        "intervals": intervals.METHOD,
        "notes": notes,
        "pixel_free": pixel_free,
        "content": None if content is None else content.facts,
        "leaderboard": leaderboard.leaderboard(published) if published else None,
    }
    summary, text, rows = tables.summary(result), tables.markdown(result), [*tables.csv_rows(result)]
    if calibrator is not None:
        checks = {name: one["verdicts"] for name, one in results.items()}
        verdicts = verdict_tables.check_markdown(checks)
        summary, text = f"{summary}\n{verdicts}", f"{text}\n{verdicts}"
        rows += verdict_tables.check_csv_rows(checks)
    print(summary, end="")
    out = Path(args.out)
    _save(out / "metrics", result, text, tables.CSV_HEADER, rows)
    if not args.no_report:
        sweep = page.read_sweep(out / "sweep.json")
        lost = page.write_report(
            out / "report.html", result, splits, sweep=sweep, gallery=args.gallery, explainer=explainer
        )
        if lost:
            _log.warning("%d pictures of the report could not be shown; the first: %s", len(lost), lost[0])
    return _gate(args, splits)


def _gate(args: Namespace, splits: Sequence) -> int:
    """Compare with a baseline and keep one, as requested; return the exit status."""
    from featdistill.evaluation import gate, tables

    result = None
    if args.gate:
        margin = gate.MARGIN if args.gate_margin is None else args.gate_margin
        result = gate.compare(splits, args.gate, args.gate_by, margin)
        text = gate.markdown(result)
        print(text, end="")
        _save(Path(args.out) / "gate", result, text, tables.CSV_HEADER, gate.csv_rows(result))
    if args.keep_baseline and result and result["worse"]:
        _log.warning("%s is not written: this run is worse than its baseline", args.keep_baseline)
    elif args.keep_baseline:
        gate.write_baseline(args.keep_baseline, splits)
    return gate.STATUS if result and result["worse"] else 0


def compare(args: Namespace) -> int:
    """Rank the runs, and show which differences are beyond chance."""
    from featdistill.evaluation import comparison, tables

    result = comparison.compare(args.predictions, args.labels, args.strata)
    text = comparison.markdown(result)
    print(text, end="")
    rows = comparison.csv_rows(result)
    _save(Path(args.out) / "comparison", result, text, tables.CSV_HEADER, rows)
    return 0


def protocol(args: Namespace) -> int:
    """Write the table of a benchmark: one row per generator, and their mean."""
    from featdistill.evaluation import protocols

    result = protocols.score(args.protocol, args.predictions, args.labels)
    text = protocols.markdown(result)
    print(text, end="")
    _save(Path(args.out) / "protocol", result, text, protocols.CSV_HEADER, protocols.csv_rows(result))
    return 0


def sweep(args: Namespace) -> int:
    """Write the AUCs that remain under each operation at each level."""
    # Read when PyTorch is loaded: waiting threads would keep cores busy that the loader's workers need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from featdistill.report import page
    from featdistill.sweep import run

    status, out = run.run(args), Path(args.out)
    if not args.no_report:
        result = page.read_sweep(out / "sweep.json")
        page.write_report(out / "sweep.html", {"splits": {}}, (), sweep=result)
    return status


COMMANDS = {
    "score": (score_parser, score),
    "compare": (compare_parser, compare),
    "protocol": (protocol_parser, protocol),
    "sweep": (sweep_parser, sweep),
}


def _add_labels_and_out(parser: Parser) -> None:
    add_labels(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results")


def _add_strata(parser: Parser) -> None:
    parser.add_argument(
        "--strata",
        metavar="COLUMN",
        help="also compare only images that are alike in this column of the manifest: AUCs over the pairs "
        "within its values; numbers are put in five bins",
    )


def _take(argv: list[str], flag: str) -> list[str]:
    """Remove a flag and its values from a command line, and return the values."""
    if flag not in argv:
        return []
    start = argv.index(flag)
    flags = (index for index in range(start + 1, len(argv)) if argv[index].startswith("--"))
    end = next(flags, len(argv))
    values = argv[start + 1 : end]
    del argv[start:end]
    return values


def _save(path: Path, result: dict, text: str, header: Sequence[str], rows: Iterable[tuple]) -> None:
    """Write a result as `path` with .json, .csv and .md."""
    atomic.write_json(path.with_suffix(".json"), result)
    atomic.write_text(path.with_suffix(".csv"), atomic.csv_text(header, rows))
    atomic.write_text(path.with_suffix(".md"), text)


if __name__ == "__main__":
    command_line.run(main)
