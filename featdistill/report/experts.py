"""What the report says of an ensemble's experts: how good each is, and whether they see the same things."""

from featdistill.evaluation.experts import rank_correlations, rescues
from featdistill.evaluation.metrics import THRESHOLD
from featdistill.evaluation.splits import Split
from featdistill.report.charts import heat_map, tenth_below
from featdistill.report.markup import (
    Content,
    Html,
    data_table,
    element,
    interval_note,
    measured,
    number,
    share,
    table,
)


def expert_parts(identity: str, split: Split, found: dict) -> list[Content]:
    """Return a table of the experts of a split, and how they agree; nothing where there is but one.

    Args:
        identity: begins the identities of all drawings.
        found: what `evaluation.score_split` returns.
    """
    names = split.frame.attrs["experts"]
    if len(names) < 2:
        return []
    pairs = [_correlations(identity, split, names)]
    scores = [split.frame[f"expert {name}"] for name in names]
    if found["brier"] is not None and all(own.between(0, 1).all() for own in scores):
        pairs.append(_rescues(identity, split, names))
    return [interval_note([found]), _aucs(found["experts"]), element("div", pairs, class_="pair")]


def _aucs(experts: dict) -> Html:
    everyone = experts["experts"] | {
        "mean of experts": experts["mean"],
        "ensemble": experts["ensemble"],
    }
    rows = []
    for name, own in everyone.items():
        intervals = own.get("intervals", {})
        cells = (measured(own[key], *intervals.get(key, ())) for key in ("robust_auc", "clean_auc"))
        rows.append([name, *cells])
    return table("AUC by expert", ("expert", "robust AUC", "clean AUC"), rows)


def _correlations(identity: str, split: Split, names: list[str]) -> Html:
    values = rank_correlations([split.frame[f"expert {name}"].to_numpy() for name in names])
    scale = tenth_below(value for row in values for value in row), 1.0
    title = "Rank correlation of the experts' scores"
    rows = [[name, *map(number, row)] for name, row in zip(names, values, strict=True)]
    return element(
        "section",
        element("h4", "Do they rank alike?"),
        _note("Spearman's correlation of two experts' scores over all images; 1 is the same order."),
        heat_map(
            f"{identity}-correlation",
            title,
            _numbered(names),
            _numbers(names),
            values,
            scale,
        ),
        data_table(title, ("expert", *names), rows),
    )


def _rescues(identity: str, split: Split, names: list[str]) -> Html:
    scores = [split.frame[f"expert {name}"].to_numpy() for name in names]
    mistakes, values = rescues(split.frame["label"].to_numpy(), [*scores, split.frame["score"].to_numpy()])
    title = "Share of an expert's mistakes that others get right"
    everyone = [*names, "ensemble"]
    rows = [
        [name, f"{count:,}", *map(share, row)]
        for name, count, row in zip(everyone, mistakes, values, strict=True)
    ]
    return element(
        "section",
        element("h4", "Who saves whom?"),
        _note(f"Of the mistakes of a row's expert at {THRESHOLD}, the share that a column's gets right."),
        heat_map(
            f"{identity}-rescues",
            title,
            [*_numbered(names), "all: ensemble"],
            [*_numbers(names), "all"],
            values,
            (0.0, 1.0),
            is_share=True,
        ),
        data_table(title, ("expert", "mistakes", *everyone), rows),
    )


def _numbers(names: list[str]) -> list[str]:
    return [str(place) for place in range(1, len(names) + 1)]


def _numbered(names: list[str]) -> list[str]:
    return [f"{place}: {name}" for place, name in enumerate(names, start=1)]


def _note(text: str) -> Html:
    return element("p", text, class_="note")
