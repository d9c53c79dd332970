"""What the report shows of one split. A part that its data do not define is not there at all."""

import math

import numpy as np

from featdistill.evaluation.metrics import ACCURACIES, THRESHOLD, one_class, parts_of, roc_curve, tpr_at_fpr
from featdistill.evaluation.splits import Split
from featdistill.report.charts import (
    bar_chart,
    curve_chart,
    heat_map,
    histogram_chart,
    reliability_chart,
    roc_chart,
    tenth_below,
)
from featdistill.report.drawing import legend
from featdistill.report.experts import expert_parts
from featdistill.report.gallery import Explainer, gallery
from featdistill.report.markup import (
    Content,
    Html,
    bounds,
    data_table,
    element,
    interval_note,
    measured,
    number,
    share,
    table,
)

_METRICS = {
    "robust_auc": ("Robust AUC", "over the distorted images; the challenge ranks by it"),
    "clean_auc": ("Clean AUC", "over the undistorted images"),
    "auc": ("AUC", "over all images: how often an AI-generated one scores above a real one"),
    "average_precision": ("Average precision", "area under precision and recall; depends on the AI share"),
    "tpr_at_fpr_1": ("TPR at 1 % FPR", "AI-generated images found where 1 of 100 real ones is called AI"),
    "tpr_at_fpr_5": ("TPR at 5 % FPR", "the same where 5 of 100 real ones are called AI"),
    "eer": ("Equal error rate", "where as many real images are called AI as AI-generated ones are missed"),
    "accuracy": (f"Accuracy at {THRESHOLD}", "images on the right side of the threshold"),
    "real_accuracy": (f"Real accuracy at {THRESHOLD}", "the same of the real images"),
    "ai_accuracy": (f"AI accuracy at {THRESHOLD}", "the same of the AI-generated images"),
    "brier": ("Brier score", "mean squared distance of score and label; 0 is best"),
    "ece": ("Calibration error", "how far scores are from the shares that they claim; 0 is best"),
}
_CURVES = {
    "robust_auc": ("robust", "distorted"),
    "clean_auc": ("clean", "clean"),
    "auc": ("all", "all images"),
}
# False positive rates at which the table of the ROC curves gives the true ones.
_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_BINS = 20
_GROUP_HEADER = ("AUC", "95 % interval", "real", "AI")


def split_section(
    identity: str, split: Split, found: dict, most: int, explainer: Explainer | None = None
) -> tuple[Html, list[str]]:
    """Return the section of a split, and a line for each of its pictures that could not be shown.

    Args:
        identity: begins the identities of all that the section holds.
        found: what `evaluation.score_split` returns.
        most: pictures of mistakes of each class; 0 for none.
        explainer: see `report_gallery.gallery`.
    """
    cards = [
        _headline(found),
        _roc(identity, split, found),
        _histogram(identity, split),
        _reliability(identity, found),
        _chain_lengths(identity, found),
        _generators(identity, found),
        _distortions(identity, found),
    ]
    experts = expert_parts(identity, split, found)
    cards += [_card("Experts", experts, wide=True)] if experts else []
    lost: list[str] = []
    if most and found["brier"] is not None:
        pictures, lost = gallery(split.frame, most, explainer)
        cards.append(_card("Surest mistakes", pictures, wide=True))
    left_out = [
        f"; left out: {found[state]:,} {state}" for state in ("unreadable", "unlabelled") if found[state]
    ]
    counts = f"{found['images']:,} images, {found['real']:,} real and {found['ai']:,} AI-generated"
    counts += f"; {found['clean']:,} clean and {found['distorted']:,} distorted{''.join(left_out)}."
    head = element("h2", "Split ", element("bdi", split.name))
    body = element("div", cards, class_="cards")
    return element("section", head, element("p", counts), _tiles(found), body, id=identity), lost


def _card(title: str, *content: Content, wide: bool = False) -> Html:
    return element("section", element("h3", title), content, class_="card wide" if wide else "card")


def _note(text: str) -> Html:
    return element("p", text, class_="note")


def _tiles(found: dict) -> Html:
    tiles = []
    for key in _CURVES:
        if found[key] is None:
            continue
        interval = bounds(*found["intervals"][key])
        lines = [element("dt", _METRICS[key][0]), element("dd", number(found[key]), class_="big")]
        lines += [element("dd", interval)] if interval else []
        tiles.append(element("div", lines))
    return element("dl", tiles, class_="tiles") if tiles else Html()


def _headline(found: dict) -> Html:
    counts = {"clean_auc": "clean", "robust_auc": "distorted", "real_accuracy": "real", "ai_accuracy": "ai"}
    rows = []
    for key, (title, meaning) in _METRICS.items():
        reason = found["undefined"].get(key)
        images = f"{found[counts.get(key, 'images')]:,}"
        value = measured(found[key], *found["intervals"].get(key, ()))
        rows.append([title, value, images, f"n/a: {reason}" if reason else meaning])
    if "threshold" in found:
        own = found["threshold"]
        titles = ("Accuracy", "Real accuracy", "AI accuracy")
        for key, title in zip(ACCURACIES, titles, strict=True):
            images = f"{found[counts.get(key, 'images')]:,}"
            meaning = f"at the threshold of the best balanced accuracy on {own['chosen_on']}"
            rows.append([f"{title} at {own['value']:.4g}", number(own[key]), images, meaning])
    header = ("metric", "value", "images", "what it says")
    metrics = table("All metrics of the split", header, rows, text=(3,))
    return _card("Headline", interval_note([found]), metrics, wide=True)


def _roc(identity: str, split: Split, found: dict) -> Html | None:
    frame = split.frame
    label, score = frame["label"].to_numpy(), frame["score"].to_numpy()
    curves, names = {}, []
    seen: list[np.ndarray] = []
    parts = parts_of(frame["is_distorted"].to_numpy(), len(label))
    for key, (name, title) in _CURVES.items():
        rows = parts[key]
        # Where all images are distorted, one curve would hide the other.
        if not one_class(label[rows]) and not any((rows == other).all() for other in seen):
            seen.append(rows)
            curves[name] = roc_curve(label[rows], score[rows])
            names.append((key, name, title))
    if not curves:
        return None
    # The least rate that the images can show, between one in ten and one in ten thousand.
    least_rate = 10.0 ** min(max(math.floor(-math.log10(found["real"])), -4), -1)
    lines = {name: (fpr, tpr) for name, (fpr, tpr, _) in curves.items()}
    charts = [
        roc_chart(f"{identity}-roc", "ROC curves", lines),
        roc_chart(f"{identity}-roc-log", "ROC curves, logarithmic", lines, least_rate),
    ]
    shown = [(name, f"{title}, AUC {number(found[key])}") for key, name, title in names]
    rows = [
        [f"{100 * rate:g} %", *(share(tpr_at_fpr(curve, rate)) for curve in curves.values())]
        for rate in _RATES
    ]
    header = ("false positive rate", *(title for _, _, title in names))
    return _card(
        "ROC curves",
        _switch(f"{identity}-axis", charts),
        legend([*shown, ("chance", "pure chance")]),
        data_table("True positive rate at false positive rates", header, rows),
    )


def _switch(identity: str, charts: list[Html]) -> Html:
    """Return a linear and a logarithmic drawing, and the choice of the one that is shown."""
    choices = []
    for kind in ("linear", "log"):
        own = f"{identity}-{kind}"
        box = element("input", type="radio", name=identity, id=own, value=kind, checked=kind == "linear")
        choices.append(element("span", box, element("label", kind, for_=own)))
    asked = element("fieldset", element("legend", "Horizontal axis"), choices)
    panels = [
        element("div", chart, class_=kind) for kind, chart in zip(("linear", "log"), charts, strict=True)
    ]
    return element("div", asked, panels, class_="switch")


def _histogram(identity: str, split: Split) -> Html:
    label, score = split.frame["label"].to_numpy(), split.frame["score"].to_numpy()
    low, high = min(0.0, float(score.min())), max(1.0, float(score.max()))
    edges = np.linspace(low, high, _BINS + 1)
    kinds = {"real": ("real", label == 0), "ai": ("AI-generated", label == 1)}
    kinds = {name: own for name, own in kinds.items() if own[1].any()}
    counts = {name: np.histogram(score[rows], edges)[0] for name, (_, rows) in kinds.items()}
    shares = {name: own / own.sum() for name, own in counts.items()}
    rows = [
        [f"{edges[place]:.3g} to {edges[place + 1]:.3g}", *(f"{own[place]:,}" for own in counts.values())]
        for place in range(_BINS)
    ]
    shown = [(name, f"{title}, {int(rows_of.sum()):,} images") for name, (title, rows_of) in kinds.items()]
    return _card(
        "Scores",
        histogram_chart(f"{identity}-scores", "Scores of real and AI-generated images", edges, shares),
        legend(shown),
        data_table("Images by score", ("score", *(title for title, _ in kinds.values())), rows),
    )


def _reliability(identity: str, found: dict) -> Html | None:
    bins = [one for one in found["reliability"] if one["n"]]
    if not bins:
        return None
    rows = [
        [
            f"{one['low']:.3f} to {one['high']:.3f}",
            number(one["mean_score"]),
            share(one["ai_share"]),
            f"{one['n']:,}",
        ]
        for one in bins
    ]
    return _card(
        "Reliability",
        reliability_chart(f"{identity}-reliability", "Reliability diagram", bins),
        legend([("robust", "ranges of the score; a larger dot holds more images"), ("chance", "as claimed")]),
        _note(f"Calibration error {number(found['ece'])}, Brier score {number(found['brier'])}."),
        data_table("Bins of the reliability diagram", ("score", "mean score", "AI share", "images"), rows),
    )


def _chain_lengths(identity: str, found: dict) -> Html | None:
    rows = _defined(found["chain_lengths"])
    if len(rows) < 2:
        return None
    return _card(
        "Chain length",
        curve_chart(f"{identity}-chains", "AUC by the number of distortions", rows, "number of distortions"),
        _group_data("AUC by the number of distortions", "distortions", rows),
    )


def _generators(identity: str, found: dict) -> Html | None:
    rows = sorted(_defined(found["generators"]), key=lambda own: (own[1]["auc"], own[0]))
    if not rows:
        return None
    return _card(
        "Generators",
        _note("Each against all real images, the hardest first. Bars begin at 0.5, what chance gives."),
        bar_chart(f"{identity}-generators", "AUC by generator", rows),
        _group_data("AUC by generator", "generator", rows),
    )


def _distortions(identity: str, found: dict) -> Html | None:
    rows = sorted(_defined(found["distortions"]), key=lambda own: (own[1]["auc"], own[0]))
    if not rows:
        return None
    levels = found["distortion_levels"]
    columns = sorted({level for own in levels.values() for level in own}, key=int)
    values, cells = [], []
    for name, row in rows:
        own = levels.get(name, {})
        values.append([row["auc"], *(own.get(level, {}).get("auc") for level in columns)])
        cells += [(f"{name}, all", row), *((f"{name}, level {level}", own[level]) for level in own)]
    scale = tenth_below(row["auc"] for _, row in cells), 1.0
    shown = "The images whose chain holds it, the hardest first; an empty cell has no AUC."
    if columns:
        shown += " Columns are levels, all first; a distortion without a known level has that one only."
    names = [name for name, _ in rows]
    chart = heat_map(
        f"{identity}-distortions", "AUC by distortion and level", names, ["all", *columns], values, scale
    )
    return _card(
        "Distortions", _note(shown), chart, _group_data("AUC by distortion and level", "distortion", cells)
    )


def _defined(table_of: dict[str, dict]) -> list[tuple[str, dict]]:
    return [(name, row) for name, row in table_of.items() if row["auc"] is not None]


def _group_data(caption: str, what: str, rows: list[tuple[str, dict]]) -> Html:
    cells = [
        [name, number(row["auc"]), bounds(row["low"], row["high"]), f"{row['real']:,}", f"{row['ai']:,}"]
        for name, row in rows
    ]
    return data_table(caption, (what, *_GROUP_HEADER), cells)
