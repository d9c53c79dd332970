"""Predictions and labels to the challenge's metrics: one row a split, and where each expert wins and loses.

    python evaluate.py --predictions val.csv val_hard.csv --out metrics
    python evaluate.py --predictions val.csv --labels val_labels.csv --out metrics

Labels are a manifest or an official label file, by default the manifest in the predictions' sidecar. A split
is called what its predictions file is called; with `hard` in the name it gives the metrics of the hard split.
`metrics.json` and `metrics.md` are written into `--out`.
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd

from featdistill import atomic, command_line, label_files, metrics
from featdistill.command_line import UserError
from featdistill.manifest import parse_distortions, read_manifest
from featdistill.predictions import (
    manifest_of,
    match_names,
    name_list,
    parse_csv,
    read_errors,
    read_predictions,
)


def build_parser() -> command_line.Parser:
    parser = command_line.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--predictions", nargs="+", required=True, metavar="FILE", help="one file a split")
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="FILE",
        help="manifests or official label files: one for each predictions file in the same order, or one "
        "for all; where none is given, the manifest in each sidecar",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for metrics.json and metrics.md")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    splits = evaluate(args.predictions, args.labels)
    text = "\n".join(tables(splits))
    print(text, end="")
    out = Path(args.out)
    atomic.write_json(out / "metrics.json", {**official_metrics(splits), "splits": splits})
    atomic.write_text(out / "metrics.md", f"# Metrics\n\n{text}")
    return 0


def evaluate(predictions: list[str], labels: list[str] | None = None) -> dict[str, dict]:
    """Return the metrics of each predictions file, by the name of its split, but for those without labels.

    Args:
        labels: one file for each of `predictions`, one for all, or None: the manifests in the sidecars.

    Raises:
        UserError: the number of label files fits neither, two splits have one name, a prediction has no label
            row, a label row has no prediction, or no split has labels.
    """
    if labels and len(labels) not in (1, len(predictions)):
        raise UserError(
            f"{len(labels)} label files for {len(predictions)} predictions; give one for each or one for all"
        )
    named = [Path(path).stem for path in predictions]
    for name in named:
        if named.count(name) > 1:
            raise UserError(f"two predictions files are called {name}; splits go by that name, rename one")
    splits = []
    for place, path in enumerate(predictions):
        source = labels[place % len(labels)] if labels else manifest_of(path)
        if source is None:
            raise UserError(
                f"{path} has no sidecar that names a manifest; say with --labels where its labels are"
            )
        frame, truth = read_predictions(path), read_labels(source)
        if frame.empty:
            raise UserError(f"{path} holds a header and no rows; predict again")
        splits.append((path, source, frame, truth, _positions(path, source, frame, truth)))
    shared = labels is not None and len(labels) == 1
    results = {}
    for name, (path, source, frame, truth, position) in zip(named, splits, strict=True):
        # One label file may hold several splits: what a file with other images covers is not missing here.
        others = [other[-1] for other in splits if shared and not np.isin(other[-1], position).any()]
        unreadable = _check_coverage(path, source, truth, np.concatenate([position, *others]))
        truth = truth.iloc[position].reset_index(drop=True)
        known = (truth["label"] >= 0).to_numpy()
        if not known.any():
            print(f"{name} is left out: {source} has no labels")
            continue
        counts = {"unreadable": unreadable, "unlabelled": int((~known).sum())}
        results[name] = {**counts, **split_metrics(frame[known], truth[known])}
    if not results:
        raise UserError(f"no split has labels: {', '.join(named)}; give their label files with --labels")
    return results


def split_metrics(frame: pd.DataFrame, truth: pd.DataFrame) -> dict:
    """Return all metrics of the rows of `read_predictions` and those of `read_labels` that belong to them.

    Returns:
        What `metrics.headline` returns, and `experts`, `generators`, `distortions`, `chain_lengths`
        from the functions `metrics.per_...`.
    """
    label, is_distorted = truth["label"].to_numpy(), truth["is_distorted"].to_numpy()
    score, chains = frame["score"].to_numpy(), truth["chain"].tolist()
    experts = {name: frame[name].to_numpy() for name in frame if name not in ("name", "score")}
    # A distorted image whose chain is not given has a length that is not known.
    length = np.select(
        [is_distorted == 0, is_distorted == 1], [0, [len(chain) or -1 for chain in chains]], -1
    )
    return {
        **metrics.headline(label, score, is_distorted),
        "experts": metrics.per_expert(label, score, is_distorted, experts),
        "generators": metrics.per_generator(label, score, truth["generator"].tolist()),
        "distortions": metrics.per_distortion(label, score, chains),
        "chain_lengths": metrics.per_chain_length(label, score, length),
    }


def official_metrics(splits: dict[str, dict]) -> dict[str, float | None]:
    """Return the challenge's metrics by its names.

    They come from the splits called val and val_hard; without them, from the only other split of its
    kind, if there is just one.
    """
    result = {}
    for suffix, is_hard in (("auc", False), ("hard_auc", True)):
        of_kind = {name: split for name, split in splits.items() if ("hard" in name) == is_hard}
        chosen = of_kind.get("val_hard" if is_hard else "val")
        if chosen is None and len(of_kind) == 1:
            chosen = next(iter(of_kind.values()))
        if chosen is not None:
            result.update({f"{kind}_{suffix}": chosen[f"{kind}_auc"] for kind in ("clean", "robust")})
    return result


def read_labels(path: str | Path) -> pd.DataFrame:
    """Read a manifest or an official label file (`image_name,label`, and for val and test the distortions).

    Returns:
        A frame with `name`, `label` (0, 1, -1 not known), `is_distorted` (likewise), `generator` (empty where
        it is not known) and `chain` (tuple of the names of the distortions).

    Raises:
        UserError: the file is missing or neither of the two, a name appears twice, or a cell cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"labels {path} do not exist")
    header, _ = parse_csv(path.read_bytes(), str(path))
    if "image" in header and "name" in header:
        frame = read_manifest(path)
    elif "image_name" in header and "label" in header:
        frame = label_files.read_labels(str(path)).rename(columns={"image_name": "name"}).assign(generator="")
    else:
        raise UserError(
            f"{path} is neither a manifest (image,name,label,...) nor an official label file "
            f"(image_name,label,...); its columns are {','.join(header)}"
        )
    labels = frame[["name", "generator"]].reset_index(drop=True)
    for column in ("label", "is_distorted"):
        labels[column] = [-1 if pd.isna(state) else int(state) for state in frame[column]]
    labels["chain"] = pd.Series([_chain(cell, path) for cell in frame["distortions"]], dtype=object)
    return labels


def _chain(cell: str, path: Path) -> tuple[str, ...]:
    try:
        return tuple(name for name, _ in parse_distortions(cell))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: distortions {cell!r} are no JSON list of [name, scale]") from error


def _positions(path: str, source: str | Path, frame: pd.DataFrame, truth: pd.DataFrame) -> np.ndarray:
    """Return the label row of each prediction."""
    names = frame["name"].to_numpy(dtype=object)
    position = match_names(names.tolist(), truth["name"].tolist())
    unknown = names[position < 0]
    if len(unknown):
        raise UserError(f"{path}: names that are not in {source} ({len(unknown)}): {name_list(unknown)}")
    twice = names[pd.Series(position).duplicated().to_numpy()]
    if len(twice):
        raise UserError(f"{path}: names of images that have a row already ({len(twice)}): {name_list(twice)}")
    return position


def _check_coverage(path: str, source: str | Path, truth: pd.DataFrame, covered: np.ndarray) -> int:
    """Refuse label rows without a prediction; return how many of them are listed as unreadable."""
    absent = np.delete(truth["name"].to_numpy(dtype=object), covered)
    listed = match_names([name for name, _ in read_errors(path)], absent.tolist())
    lost = np.delete(absent, listed[listed >= 0])
    if len(lost):
        raise UserError(f"{path}: images of {source} without a prediction ({len(lost)}): {name_list(lost)}")
    return len(absent)


def tables(splits: dict[str, dict]) -> list[str]:
    """Return the lines of all tables, in Markdown that is aligned for a terminal."""
    notes = _notes(splits)
    lines = [
        "## Splits",
        "",
        *_headline_table(splits),
        *([""] if notes else []),
        *(f"- {note}" for note in notes),
    ]
    lines += ["", "## Experts", "", *_expert_table(splits)]
    for title, key in (
        ("Generators", "generators"),
        ("Distortions", "distortions"),
        ("Chain length", "chain_lengths"),
    ):
        lines += ["", f"## {title}", "", *_group_table(splits, key, title)]
    official = official_metrics(splits)
    if official:
        row = [_number(value) for value in official.values()]
        lines += ["", "## Metrics of the challenge", "", *_table(list(official), [row])]
    return [*lines, ""]


def _notes(splits: dict[str, dict]) -> list[str]:
    """Return what a reader of the headline table must know: why a metric is not there, what was left out."""
    notes = []
    for name, split in splits.items():
        for reason in dict.fromkeys(split["undefined"].values()):
            which = [key.replace("_", " ") for key, why in split["undefined"].items() if why == reason]
            notes.append(f"{name}: {', '.join(which)} n/a: {reason}")
        for state in ("unreadable", "unlabelled"):
            if split[state]:
                notes.append(f"{name}: {state} images, left out: {split[state]:,}")
    named = official_metrics(splits)
    for kind, title in ((False, "clean_auc"), (True, "clean_hard_auc")):
        rivals = [name for name in splits if ("hard" in name) == kind]
        if rivals and title not in named:
            notes.append(
                f"{title} and its robust twin are not at the top of metrics.json: "
                f"{', '.join(rivals)} could all give them"
            )
    return notes


def _headline_table(splits: dict[str, dict]) -> list[str]:
    keys = ("clean_auc", "robust_auc", "auc", "average_precision", "accuracy", "real_accuracy", "ai_accuracy")
    header = [
        "split",
        "images",
        "AI share",
        "clean AUC",
        "robust AUC",
        "AUC",
        "AP",
        "acc@0.5",
        "real acc",
        "AI acc",
    ]
    rows = [
        [
            name,
            f"{split['images']:,}",
            f"{100 * split['ai_share']:.1f} %",
            *(_number(split[key]) for key in keys),
        ]
        for name, split in splits.items()
    ]
    return _table(header, rows)


def _expert_table(splits: dict[str, dict]) -> list[str]:
    names = dict.fromkeys(expert for split in splits.values() for expert in split["experts"]["experts"])
    if not names:
        return ["The predictions hold no column of a single expert."]
    keys = ("clean_auc", "robust_auc")
    header = ["expert", *(f"{name} {kind}" for name in splits for kind in ("clean", "robust"))]
    rows = [
        [
            expert,
            *(
                _number(split["experts"]["experts"].get(expert, {}).get(key))
                for split in splits.values()
                for key in keys
            ),
        ]
        for expert in names
    ]
    for title, part in (("mean of experts", "mean"), ("ensemble", "ensemble")):
        rows.append(
            [title, *(_number(split["experts"][part][key]) for split in splits.values() for key in keys)]
        )
    return _table(header, rows)


def _group_table(splits: dict[str, dict], key: str, title: str) -> list[str]:
    """Return a table of AUC and number of images in each split: the hardest first, chain lengths in order."""
    splits = {name: split for name, split in splits.items() if split[key]}
    names = list(dict.fromkeys(name for split in splits.values() for name in split[key]))
    if not names:
        return ["The labels do not name any."]

    def hardest(name: str) -> float:
        found = [split[key][name]["auc"] for split in splits.values() if name in split[key]]
        return min((auc for auc in found if auc is not None), default=math.inf)

    names.sort(key=int if key == "chain_lengths" else lambda name: (hardest(name), name))
    rows = []
    for name in names:
        cells = [split[key].get(name) for split in splits.values()]
        parts = [(_number(cell["auc"]), f"{cell['n']:,}") if cell else ("", "") for cell in cells]
        rows.append([name, *(text for part in parts for text in part)])
    header = [title.lower().rstrip("s"), *(text for name in splits for text in (f"{name} AUC", "n"))]
    return _table(header, rows)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Return a Markdown table, the first column to the left, the others to the right."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    # Markdown wants two characters at least, to say how a column is aligned.
    width = [max(2, *map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        padded = [cell.rjust(size) for cell, size in zip(cells, width, strict=True)]
        return f"| {' | '.join([cells[0].ljust(width[0]), *padded[1:]])} |"

    rule = [":" + "-" * (width[0] - 1), *("-" * (size - 1) + ":" for size in width[1:])]
    return [line(header), line(rule), *(line(row) for row in rows)]


if __name__ == "__main__":
    command_line.run(main)
