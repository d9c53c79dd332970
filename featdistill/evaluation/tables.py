"""What `evaluate.py` prints and writes of scores and comparisons: Markdown tables and a long CSV."""

import math
from collections.abc import Iterator

from featdistill.evaluation.comparison import METRICS
from featdistill.evaluation.metrics import ACCURACIES, AUCS
from featdistill.evaluation.splits import official_metrics
from featdistill.text_tables import number, table, with_interval

CSV_HEADER = ("split", "metric", "value", "low", "high", "n")
_GROUPS = {
    "generators": ("Generators", "Each against all real images."),
    "distortions": ("Distortions", "The images whose chain contains it."),
    "levels": ("Levels", "By the strongest distortion of the chain whose level is known."),
    "chain_lengths": ("Chain length", "By the number of distortions."),
    "sources": ("Sources", "One with a single class is set against all images of the other."),
    "sizes": ("Image size", "By the longer side."),
}
# These have an order of their own; the others are sorted hardest first.
_ORDERED = ("levels", "chain_lengths", "sizes")
_SHARES = ("accuracy", "ai_accuracy")
_MORE = {
    "average_precision": "AP",
    "tpr_at_fpr_1": "TPR@1%",
    "tpr_at_fpr_5": "TPR@5%",
    "eer": "EER",
    "accuracy": "acc@0.5",
    "real_accuracy": "real acc",
    "ai_accuracy": "AI acc",
    "brier": "Brier",
    "ece": "ECE",
}


def summary(result: dict) -> str:
    """Return the most important tables, aligned for a terminal.

    Args:
        result: what `evaluate.py` writes as `metrics.json`; so below.
    """
    return _joined(_summary(result))


def markdown(result: dict) -> str:
    """Return all tables."""
    splits = result["splits"]
    parts = ["# Metrics", *_summary(result), "## Experts", _expert_table(splits)]
    for key, (title, note) in _GROUPS.items():
        parts += [f"## {title}", *_group_table(splits, key, note)]
    return _joined(parts)


def csv_rows(result: dict) -> Iterator[tuple]:
    """Yield the rows of `CSV_HEADER`: every metric of every split; of a group as `generators/flux/auc`."""
    for name, split in result["splits"].items():
        of_part = {"clean_auc": split["clean"], "robust_auc": split["distorted"]}
        counts = of_part | {"real_accuracy": split["real"], "ai_accuracy": split["ai"]}
        for metric in (*AUCS, *_MORE):
            low, high = split["intervals"].get(metric, (None, None))
            yield name, metric, split[metric], low, high, counts.get(metric, split["images"])
        for metric in ACCURACIES if "threshold" in split else ():
            n = counts.get(metric, split["images"])
            yield name, f"threshold/{metric}", split["threshold"][metric], None, None, n
        for expert, row in split["experts"]["experts"].items():
            for metric, n in of_part.items():
                yield name, f"experts/{expert}/{metric}", row[metric], *row["intervals"][metric], n
        tables = {key: split[key] for key in _GROUPS}
        for distortion, levels in split["distortion_levels"].items():
            tables[f"distortion_levels/{distortion}"] = levels
        for key, groups in tables.items():
            for group, row in groups.items():
                n = row["real"] + row["ai"]
                yield name, f"{key}/{group}/auc", row["auc"], row["low"], row["high"], n
                for metric, of_class in zip(ACCURACIES, (n, row["real"], row["ai"]), strict=True):
                    yield name, f"{key}/{group}/{metric}", row[metric], None, None, of_class


def comparison_markdown(result: dict) -> str:
    """Return the ranking and the differences of `comparison.compare`."""
    runs = [
        [str(rank), run["name"], *(with_interval(run[key], run["intervals"][key]) for key in METRICS)]
        for rank, run in enumerate(result["runs"], start=1)
    ]
    verdicts = {True: "yes", False: "no", None: "n/a"}
    pairs = [
        [
            pair["first"],
            pair["second"],
            pair["metric"].replace("_", " "),
            f"{pair['difference']:+.4f}",
            "" if pair["low"] is None else f"{pair['low']:+.4f} to {pair['high']:+.4f}",
            verdicts[pair["beyond_chance"]],
        ]
        for pair in result["differences"]
        if pair["difference"] is not None
    ]
    left_out = f"; {result['left_out']:,} that some run did not score are left out"
    parts = [
        "# Comparison",
        f"{result['images']:,} images that all runs scored{left_out if result['left_out'] else ''}.",
        table(["place", "run", "robust AUC", "clean AUC", "AUC"], runs),
        "## Differences",
        "First minus second, with the paired 95 % interval (DeLong). Pairs are not corrected for their "
        "number: of twenty pairs of equal runs, expect one to seem different.",
        table(["first", "second", "metric", "difference", "95 %", "beyond chance"], pairs),
    ]
    return _joined(parts)


def comparison_rows(result: dict) -> Iterator[tuple]:
    """Yield the rows of `CSV_HEADER` of a comparison; `split` is the run, or `first - second`."""
    for run in result["runs"]:
        for metric, bounds in run["intervals"].items():
            yield run["name"], metric, run[metric], *bounds, result["n"][metric]
    for pair in result["differences"]:
        name, metric = f"{pair['first']} - {pair['second']}", pair["metric"]
        yield name, metric, pair["difference"], pair["low"], pair["high"], result["n"][metric]


def _summary(result: dict) -> list[str]:
    splits = result["splits"]
    parts = ["## Splits", _headline_table(splits)]
    more = [[name, *(number(split[key]) for key in _MORE)] for name, split in splits.items()]
    parts.append(table(["split", *_MORE.values()], more))
    notes = [*_notes(splits), *result.get("notes", ())]
    if result.get("pixel_free"):
        notes.append(_pixel_free_note(result["pixel_free"]))
    parts += ["\n".join(f"- {note}" for note in notes)] if notes else []
    official = official_metrics(splits)
    if official:
        cells = [number(value) for value in official.values()]
        parts += ["## Metrics of the challenge", table(list(official), [cells])]
    board = result.get("leaderboard")
    if board:
        teams = [
            [str(row["place"] or "local"), row["name"], number(row["clean_auc"]), number(row["robust_auc"])]
            for row in board["challenge"]
        ]
        backbones = []
        for row in board["table_2"]:
            aucs = row["val_robust_auc"], row["test_robust_auc"]
            backbones.append([row["name"], *("" if auc is None else number(auc) for auc in aucs)])
        parts += ["## Compared with the published results", f"This run is {board['note']}."]
        parts.append(table(["#", "team", "clean AUC", "robust AUC"], teams))
        parts += [
            f"FeatDistill's published robust AUC on {name}: {number(value)}."
            for name, value in board["featdistill_robust"].items()
        ]
        parts += ["Table 2 of the paper, robust AUC:", table(["backbone", "val", "test"], backbones)]
    return parts


def _notes(splits: dict[str, dict]) -> list[str]:
    """Return notes on the headline table: why a metric is missing, and what was left out."""
    notes = []
    for name, split in splits.items():
        for reason in dict.fromkeys(split["undefined"].values()):
            which = [key.replace("_", " ") for key, why in split["undefined"].items() if why == reason]
            notes.append(f"{name}: {', '.join(which)} n/a: {reason}")
        for state in ("unreadable", "unlabelled"):
            if split[state]:
                notes.append(f"{name}: {state} images, left out: {split[state]:,}")
        if "threshold" in split:
            threshold = split["threshold"]
            optimistic = " (the same images, so optimistic)" if threshold["chosen_on"] == name else ""
            shares = ", ".join(number(threshold[key]) for key in ACCURACIES)
            notes.append(
                f"{name}: accuracy, real, AI at {threshold['value']:.4g}, the threshold chosen on "
                f"{threshold['chosen_on']}{optimistic}: {shares}"
            )
    named = official_metrics(splits)
    for kind, title in ((False, "clean_auc"), (True, "clean_hard_auc")):
        rivals = [name for name in splits if ("hard" in name) == kind]
        if rivals and title not in named:
            robust = title.replace("clean", "robust")
            notes.append(
                f"{title} and {robust} are not at the top of metrics.json: several splits could provide them "
                f"({', '.join(rivals)})"
            )
    return notes


def _pixel_free_note(baseline: dict) -> str:
    where = ", ".join(baseline["manifests"])
    if baseline["auc"] is None:
        return f"the pixel-free baseline could not be measured on {where}"
    reached = with_interval(baseline["auc"], _bounds(baseline))
    return (
        f"files alone, without any pixels, reach AUC {reached} on {where}: an AUC close to it says little "
        "about the pixels"
    )


def _headline_table(splits: dict[str, dict]) -> str:
    header = ["split", "images", "AI share", "robust AUC", "clean AUC", "AUC"]
    rows = [
        [
            name,
            f"{split['images']:,}",
            f"{100 * split['ai_share']:.1f} %",
            *(with_interval(split[key], split["intervals"][key]) for key in METRICS),
        ]
        for name, split in splits.items()
    ]
    return table(header, rows)


def _expert_table(splits: dict[str, dict]) -> str:
    if not any(split["experts"]["experts"] for split in splits.values()):
        return "The predictions have no columns of single experts."
    rows = []
    for split, metrics in splits.items():
        experts = metrics["experts"]
        shown = experts["experts"] | {"mean of experts": experts["mean"], "ensemble": experts["ensemble"]}
        for name, row in shown.items():
            intervals = row.get("intervals", {})
            aucs = [with_interval(row[key], intervals.get(key)) for key in ("robust_auc", "clean_auc")]
            rows.append([name, split, *aucs])
    return table(["expert", "split", "robust AUC", "clean AUC"], rows)


def _group_table(splits: dict[str, dict], key: str, note: str) -> list[str]:
    """Return a table with one row per group and split: hardest first, or in the groups' own order."""
    rows = []
    pixel_free = any("pixel_free_auc" in row for split in splits.values() for row in split[key].values())
    for split, metrics in splits.items():
        groups = list(metrics[key].items())
        if key not in _ORDERED:
            groups.sort(
                key=lambda group: (math.inf if group[1]["auc"] is None else group[1]["auc"], group[0])
            )
        for name, row in groups:
            counts = [f"{row[count]:,}" for count in ("real", "ai")]
            cells = [with_interval(row["auc"], _bounds(row)), *(number(row[share]) for share in _SHARES)]
            cells += [number(row.get("pixel_free_auc"))] if pixel_free else []
            rows.append([name, split, *counts, *cells])
    if not rows:
        return ["The labels do not name any."]
    header = ["name", "split", "real", "AI", "AUC", *(_MORE[share] for share in _SHARES)]
    return [note, table([*header, *(["files alone"] if pixel_free else [])], rows)]


def _bounds(row: dict) -> tuple[float | None, float | None]:
    return row["low"], row["high"]


def _joined(parts: list[str]) -> str:
    return "\n\n".join(parts) + "\n"
