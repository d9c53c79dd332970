"""What `calibrate` prints, and what `evaluate.py --calibrator` adds to its tables."""

from collections.abc import Iterator

import numpy as np

from featdistill.calibration.calibrator import Calibrator, share
from featdistill.calibration.conformal import expected_rate, rate_quantile
from featdistill.calibration.reading import ALL
from featdistill.text_tables import number, table

_RATES = {"fpr": "real images called AI", "fnr": "AI images called real", "unsure": "unsure"}
VERDICT_HEADER = ["images", *_RATES.values()]
_ERRORS = {"log_loss": "log loss", "ece": "calibration error"}
_WHEN = ["scores as they are", "calibrated"]


def markdown(calibrator: Calibrator) -> str:
    """Return what was fitted, and what held-out images say of it."""
    facts, lines = calibrator.facts, []
    header = ["", "images", "threshold", "P(AI)", "promised", "expected", "95 of 100 below"]
    sides = {
        "real": ("real images called AI", calibrator.fpr),
        "ai": ("AI images called real", calibrator.fnr),
    }
    for side, (title, rate) in sides.items():
        for name, one in facts["thresholds"].get(side, {}).items():
            n, threshold = one["n"], one["threshold"]
            cells = [title if name == ALL else f"{title}: {name}", f"{n:,}", number(threshold)]
            cells += [number(calibrator.probability(np.array([threshold]))[0]), share(rate)]
            cells += [share(expected_rate(n, rate)), share(rate_quantile(n, rate, 0.95))]
            lines.append(cells)
    parts = ["## Thresholds", table(header, lines)]
    low, high = calibrator.real_threshold, calibrator.ai_threshold
    if low is None:
        parts.append(
            f"AI above logit {high:.4f}, else unsure: without AI-generated images nothing is called real."
        )
    elif low == high:
        parts.append(
            f"The classes are so far apart that one threshold keeps both promises: logit {high:.4f}."
        )
    else:
        parts.append(f"AI above logit {high:.4f}, real below {low:.4f}, unsure in between.")
    parts += ["## Held-out images", _held_out_text(calibrator)]
    parts += [calibrator.promise()] + ([f"Assumption: {facts['assumes']}"] if facts["assumes"] else [])
    return "\n\n".join(parts) + "\n"


def _held_out_text(calibrator: Calibrator) -> str:
    facts = calibrator.facts
    held_out = facts["held_out"]
    if "reason" in held_out:
        return f"Not checked: {held_out['reason']}."
    rates = held_out["rates"].items()
    lines = [[name, *(_rate(one[key]) for key in _RATES)] for name, one in rates]
    text = table([f"over {held_out['folds']} folds", *_RATES.values()], lines)
    images = calibrator.real + calibrator.ai
    if facts["groups_of_images"] < images:
        text += f"\n\n{images:,} images in {facts['groups_of_images']:,} groups: images of a group are not "
        text += 'independent, so rates vary more than the intervals and "95 of 100 below" say.'
    if errors := facts["held_out_errors"]:
        lines = [[name, *(number(one[key]) for key in _ERRORS)] for name, one in errors.items()]
        text += "\n\n" + table(["P(AI)", *_ERRORS.values()], lines)
        text += f"\n\nProbabilities are by {calibrator.method}, which has the lower log loss."
    return text


def check_markdown(checks: dict[str, dict]) -> str:
    """Return the tables of `check.check_split`, by the name of the split."""
    promise = next(iter(checks.values()))["promise"]
    sentences = [f"- {name}: {text}" for name, one in checks.items() for text in one["sentences"]]
    values = [
        [f"{name}, {title}", *(number(one[when][key]) for when in ("before", "after"))]
        for name, one in checks.items()
        for key, title in _ERRORS.items()
    ]
    rows = [[f"{name}, {row[0]}", *row[1:]] for name, one in checks.items() for row in verdict_rows(one)]
    parts = ["## Verdicts", promise, table(VERDICT_HEADER, rows), "\n".join(sentences)]
    return "\n\n".join([*parts, table(["", *_WHEN], values)]) + "\n"


def verdict_rows(check: dict | None) -> list[list[str]]:
    """Return the rows of `VERDICT_HEADER` of `check.check_split`: all images, then each group."""
    if check is None:
        return []
    rows = {"all images": check} | {
        f"{column} {group}": rates
        for column, groups in check["groups"].items()
        for group, rates in groups.items()
    }
    return [[name, *(_rate(rates[key]) for key in _RATES)] for name, rates in rows.items()]


def check_csv_rows(checks: dict[str, dict]) -> Iterator[tuple]:
    """Yield rows `split, metric, value, low, high, n` of `check.check_split`."""
    for name, one in checks.items():
        tables = {"": one} | {
            f"{column}/{group}/": rates
            for column, groups in one["groups"].items()
            for group, rates in groups.items()
        }
        for path, rates in tables.items():
            for key in ("fpr", "fnr", "unsure"):
                found = rates[key]
                yield name, f"verdicts/{path}{key}", found["rate"], found["low"], found["high"], found["n"]
        for key, found in (one["flips"] or {}).items():
            yield name, f"verdicts/{key}", found["rate"], found["low"], found["high"], found["n"]
        for when in ("before", "after"):
            for key, value in one[when].items():
                yield name, f"verdicts/{key}_{when}", value, None, None, one["unsure"]["n"]


def _rate(one: dict) -> str:
    """Return `5.1 % [4.2, 6.2] of 1,000`."""
    if one["rate"] is None:
        return "n/a"
    return f"{100 * one['rate']:.1f} % [{100 * one['low']:.1f}, {100 * one['high']:.1f}] of {one['n']:,}"
