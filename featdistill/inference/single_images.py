"""Scores of a few images as a table for a person, or as JSON for a program; no file is written."""

from collections.abc import Sequence
from typing import Any

from featdistill.inference.detector import Detection, Detector


def as_json(detector: Detector, rows: Sequence[Detection]) -> dict[str, Any]:
    """Return rows under `images`, with what decided the scores: see `Detector.describe`."""
    return {"images": [row.as_dict() for row in rows], **detector.describe()}


def as_table(detector: Detector, rows: Sequence[Detection]) -> str:
    """Return rows as aligned lines: P(AI), fused and by each expert."""
    made_by = detector.describe()
    experts, fusion = made_by["experts"], made_by["fusion"]
    width = max(5, *(len(row.name) for row in rows))
    columns = ["P(AI)", *experts]
    lines = [f"{'image':{width}}" + "".join(f"  {column:>6}" for column in columns)]
    for row in rows:
        if row.error:
            lines.append(f"{row.name:{width}}  could not be read: {row.error}")
            continue
        scores = zip((row.score, *row.experts.values()), columns, strict=True)
        cells = (f"  {_shown(score):>{max(6, len(column))}}" for score, column in scores)
        lines.append(f"{row.name:{width}}" + "".join(cells))
    how = fusion if isinstance(fusion, str) else f"{fusion['method']}, weighted"
    views = "" if made_by["tta"] == "none" else f", averaged over the views of {made_by['tta']}"
    lines.append(f"\nP(AI) is the probability of being AI-generated{views}: {how} of")
    longest = max(map(len, experts))
    lines += [f"  {name:{longest}}  {own['backbone']}, from {own['folder']}" for name, own in experts.items()]
    return "\n".join(lines)


def _shown(score: float) -> str:
    # Rounding must not show an uncertain score as certain.
    return f"{min(max(score, 0.0001), 0.9999):.4f}" if 0 < score < 1 else f"{score:.4f}"
