"""Scores of a few images as a table for a person, or as JSON for a program; no file is written."""

from collections.abc import Sequence
from typing import Any

from featdistill.inference.detector import Detection, Detector


def as_json(detector: Detector, rows: Sequence[Detection]) -> dict[str, Any]:
    """Return rows under `images`, with what decided the scores: see `Detector.describe`."""
    return {"images": [row.as_dict() for row in rows], **detector.describe()}


def as_table(detector: Detector, rows: Sequence[Detection]) -> str:
    """Return rows as aligned lines: P(AI) fused and by each expert, with verdict and stability if known."""
    made_by = detector.describe()
    experts, fusion = made_by["experts"], made_by["fusion"]
    width = max(5, *(len(row.name) for row in rows))
    columns = ["P(AI)", *experts]
    if detector.calibrator:
        columns.insert(0, "verdict")
    if detector.stability:
        columns += ["mean", "spread", *(["flips"] if detector.calibrator else [])]
    lines = [f"{'image':{width}}" + "".join(f"  {column:>6}" for column in columns)]
    for row in rows:
        if row.error:
            lines.append(f"{row.name:{width}}  could not be read: {row.error}")
            continue
        cells = [_shown(score) for score in (row.score, *row.experts.values())]
        if detector.calibrator:
            cells.insert(0, row.verdict)
        if row.stability:
            cells += [_shown(row.stability.mean), f"{row.stability.spread:.4f}"]
            cells += [f"{row.stability.flips:.0%}"] if detector.calibrator else []
        padded = (f"  {cell:>{max(6, len(column))}}" for cell, column in zip(cells, columns, strict=False))
        lines.append(f"{row.name:{width}}" + "".join(padded))
    lines += [f"{row.name}: {row.credentials.sentence()}" for row in rows if row.credentials]
    how = fusion if isinstance(fusion, str) else f"{fusion['method']}, weighted"
    views = "" if made_by["tta"] == "none" else f", averaged over the views of {made_by['tta']}"
    lines.append("")
    if detector.calibrator:
        lines.append(f"Verdicts: {detector.calibrator.promise()}")
    if detector.stability:
        which = "each image near a threshold" if detector.stability.near else "each image"
        changed = ", and the share whose verdict differs" if detector.calibrator else ""
        lines.append(
            f"Stability: mean and standard deviation of P(AI) of {detector.stability.copies} re-delivered "
            f"copies of {which}{changed}"
        )
    lines.append(f"P(AI) is the probability of being AI-generated{views}: {how} of")
    longest = max(map(len, experts))
    lines += [f"  {name:{longest}}  {own['backbone']}, from {own['folder']}" for name, own in experts.items()]
    return "\n".join(lines)


def _shown(score: float) -> str:
    # Rounding must not show an uncertain score as certain.
    return f"{min(max(score, 0.0001), 0.9999):.4f}" if 0 < score < 1 else f"{score:.4f}"
