"""What `evaluate.py` prints and writes of scores and comparisons: Markdown tables and a long CSV."""

import math
from collections.abc import Iterator

from featdistill.evaluation.audits import content_meaning, pixel_free_meaning
from featdistill.evaluation.comparison import METRICS, WITHIN, metric_title
from featdistill.evaluation.metrics import ACCURACIES, AUCS
from featdistill.evaluation.splits import official_metrics
from featdistill.text_tables import difference, number, table, with_interval

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
    within = {name: split["within_strata"] for name, split in splits.items() if "within_strata" in split}
    if any(of_split["experts"] for of_split in within.values()):
        column = next(iter(within.values()))["column"]
        parts += [f"## Experts within strata of {column}", _within_table(within, of_experts=True)]
    for key, (title, note) in _GROUPS.items():
        groups = {name: split[key] for name, split in splits.items()}
        parts += [f"## {title}", *_group_table(groups, note, is_ordered=key in _ORDERED)]
    return _joined(parts)


def csv_rows(result: dict) -> Iterator[tuple]:
    """Yield the rows of `CSV_HEADER`: every metric of every split; of a group as `generators/flux/auc`."""
    for name, split in result["splits"].items():
        for row in _split_rows(split):
            yield name, *row


def _split_rows(split: dict) -> Iterator[tuple]:
    """Yield the rows of `CSV_HEADER` of a split, without its name."""
    of_part = {"clean_auc": split["clean"], "robust_auc": split["distorted"]}
    counts = of_part | {"real_accuracy": split["real"], "ai_accuracy": split["ai"]}
    for metric in (*AUCS, *_MORE):
        low, high = split["intervals"].get(metric, (None, None))
        yield metric, split[metric], low, high, counts.get(metric, split["images"])
        yield from _content_rows(metric, split.get("content", {}).get(metric))
    for metric in ACCURACIES if "threshold" in split else ():
        yield (
            f"threshold/{metric}",
            split["threshold"][metric],
            None,
            None,
            counts.get(metric, split["images"]),
        )
    for expert, row in split["experts"]["experts"].items():
        for metric, n in of_part.items():
            path = f"experts/{expert}/{metric}"
            yield path, row[metric], *row["intervals"][metric], n
            yield from _content_rows(path, row.get("content", {}).get(metric))
    tables = {key: split[key] for key in _GROUPS}
    for distortion, levels in split["distortion_levels"].items():
        tables[f"distortion_levels/{distortion}"] = levels
    tables |= {f"by/{column}": groups for column, groups in split["by"].items()}
    for key, groups in tables.items():
        for group, row in groups.items():
            path, n = f"{key}/{group}", row["real"] + row["ai"]
            yield f"{path}/auc", row["auc"], *_bounds(row), n
            yield from _content_rows(f"{path}/auc", row.get("content"))
            for metric, of_class in zip(ACCURACIES, (n, row["real"], row["ai"]), strict=True):
                yield f"{path}/{metric}", row[metric], None, None, of_class
    within = split.get("within_strata")
    for path, rows in _within_by_path(within).items() if within else ():
        for metric in AUCS:
            row = rows[metric]
            yield f"{path}/{metric}", row["auc"], *_bounds(row), row["images"]
            yield from _content_rows(f"{path}/{metric}", row.get("content"))


def _within_by_path(within: dict) -> dict[str, dict]:
    """Return the AUCs within strata of the ensemble and of each expert by the start of their CSV names."""
    start = f"within_strata/{within['column']}"
    experts = {f"{start}/experts/{name}": rows for name, rows in within["experts"].items()}
    return {start: within, **experts}


def _content_rows(path: str, content: dict | None) -> Iterator[tuple]:
    if content is not None:
        n, bounds = content["images"], (content["exceeds_low"], content["exceeds_high"])
        yield f"{path}/content", content["auc"], *_bounds(content), n
        yield f"{path}/exceeds_content", content["exceeds"], *bounds, n


def _summary(result: dict) -> list[str]:
    splits = result["splits"]
    parts = ["## Splits", _headline_table(splits)]
    more = [[name, *(number(split[key]) for key in _MORE)] for name, split in splits.items()]
    parts.append(table(["split", *_MORE.values()], more))
    within = {name: split["within_strata"] for name, split in splits.items() if "within_strata" in split}
    if within:
        column = next(iter(within.values()))["column"]
        note = f"Over the pairs of a real and an AI-generated image that are alike in {column}."
        parts += [f"## Within strata of {column}", note, _within_table(within)]
    for column in dict.fromkeys(column for split in splits.values() for column in split["by"]):
        groups = {name: split["by"][column] for name, split in splits.items()}
        parts += [f"## By {column}", *_group_table(groups, _GROUPS["sources"][1], is_ordered=True)]
    notes = [*_notes(splits), *result.get("notes", ())]
    if result.get("pixel_free"):
        notes.append(_pixel_free_note(result["pixel_free"]))
    parts += ["\n".join(f"- {note}" for note in notes)] if notes else []
    if result.get("content"):
        parts += ["## Content control", content_meaning(result["content"]), _content_table(splits)]
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
        for state in ("unreadable", "unlabeled"):
            if split[state]:
                notes.append(f"{name}: {state} images, left out: {split[state]:,}")
        images = split["content"]["auc"]["images"] if "content" in split else split["images"]
        if images < split["images"]:
            notes.append(
                f"{name}: the content control has {images:,} of {split['images']:,} images; it, and what "
                "exceeds it, are over these"
            )
        within = split.get("within_strata")
        if within and within["unknown"]:
            notes.append(f"{name}: images without {within['column']}, in no stratum: {within['unknown']:,}")
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
    return f"files alone, without any pixels, reach AUC {reached} on {where}: {pixel_free_meaning(baseline)}"


def _within_table(within: dict[str, dict], *, of_experts: bool = False) -> str:
    """Return the AUCs within strata of each split, or of each of its experts."""
    rows = []
    for split, of_split in within.items():
        shown = {(name, split): row for name, row in of_split["experts"].items()}
        for names, row in shown.items() if of_experts else [((split,), of_split)]:
            cells = [with_interval(row[key]["auc"], _bounds(row[key])) for key in METRICS]
            rows.append([*names, *cells, f"{row['auc']['strata']:,}", f"{row['auc']['pairs']:,}"])
    header = ["split", "robust AUC", "clean AUC", "AUC", "strata", "pairs"]
    return table([*(["expert"] * of_experts), *header], rows)


def _content_table(splits: dict[str, dict]) -> str:
    rows = []
    for name, split in splits.items():
        if "content" not in split:
            continue
        shown = [(key, split[key], split["intervals"][key], split["content"][key]) for key in METRICS]
        within = split.get("within_strata")
        for key in METRICS if within else ():
            row = within[key]
            shown.append((key + WITHIN, row["auc"], _bounds(row), row["content"]))
        for key, auc, bounds, content in shown:
            title = metric_title(key, within["column"] if within else None)
            # What is not defined is in the tables above, with the reason.
            if auc is not None:
                rows.append([name, title, with_interval(auc, bounds), *_content_cells(content)])
    return table(["split", "of", "AUC", "content control", "exceeds it by"], rows)


def _content_cells(content: dict | None) -> list[str]:
    if content is None:
        return ["", ""]
    exceeds = difference(content["exceeds"], (content["exceeds_low"], content["exceeds_high"]))
    return [with_interval(content["auc"], _bounds(content)), exceeds]


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
    rows, metrics_of_experts = [], ("robust_auc", "clean_auc")
    has_content = any("content" in split for split in splits.values())
    for split, metrics in splits.items():
        experts = metrics["experts"]
        shown = experts["experts"] | {"mean of experts": experts["mean"], "ensemble": experts["ensemble"]}
        for name, row in shown.items():
            intervals, content = row.get("intervals", {}), row.get("content")
            aucs = [with_interval(row[key], intervals.get(key)) for key in metrics_of_experts]
            exceeds = [_content_cells(content[key])[1] if content else "" for key in metrics_of_experts]
            rows.append([name, split, *aucs, *(exceeds if has_content else ())])
        if "content" in experts["ensemble"]:
            control = experts["ensemble"]["content"]
            cells = [_content_cells(control[key])[0] for key in metrics_of_experts]
            rows.append(["content control", split, *cells, "", ""])
    header = ["expert", "split", "robust AUC", "clean AUC"]
    return table([*header, *(["robust exceeds", "clean exceeds"] if has_content else ())], rows)


def _group_table(tables: dict[str, dict], note: str, *, is_ordered: bool) -> list[str]:
    """Return a table with one row per group and split: hardest first, or in the groups' own order.

    Args:
        tables: split -> breakdown.
    """
    rows = []
    everything = [row for groups in tables.values() for row in groups.values()]
    pixel_free = any("pixel_free_auc" in row for row in everything)
    has_content = any("content" in row for row in everything)
    for split, of_split in tables.items():
        groups = list(of_split.items())
        if not is_ordered:
            groups.sort(
                key=lambda group: (math.inf if group[1]["auc"] is None else group[1]["auc"], group[0])
            )
        for name, row in groups:
            counts = [f"{row[count]:,}" for count in ("real", "ai")]
            cells = [with_interval(row["auc"], _bounds(row))]
            cells += _content_cells(row.get("content")) if has_content else []
            cells += [number(row[share]) for share in _SHARES]
            cells += [number(row.get("pixel_free_auc"))] if pixel_free else []
            rows.append([name, split, *counts, *cells])
    if not rows:
        return ["The labels do not name any."]
    header = ["name", "split", "real", "AI", "AUC", *(["content control", "exceeds it by"] * has_content)]
    header += [*(_MORE[share] for share in _SHARES), *(["files alone"] * pixel_free)]
    return [note, table(header, rows)]


def _bounds(row: dict) -> tuple[float | None, float | None]:
    return row["low"], row["high"]


def _joined(parts: list[str]) -> str:
    return "\n\n".join(parts) + "\n"
