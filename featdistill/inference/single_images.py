"""A few images scored at once, for a person or a program to read; no file is written."""

import json
from typing import Any

import numpy as np
import pandas as pd

from featdistill.inference.compute import DEFAULT_BATCH_SIZE, full_memory_is_an_error
from featdistill.inference.fusion import probabilities
from featdistill.inference.predictor import Predictor
from featdistill.inference.scoring import score_dataset

# Worker processes take longer to start than these few images take to decode.
_WITHOUT_WORKERS = 16


def score_images(predictor: Predictor, rows: pd.DataFrame) -> dict[str, Any]:
    """Score rows and return what is to be shown of them.

    Returns:
        `images`: for each row `name` and either `score` and `experts` (name -> P(AI)), or `error`; and what
        made the scores, as in the sidecar of a predictions file.
    """
    names = rows["name"].tolist()
    predictor.batch_size = predictor.batch_size or min(len(names), DEFAULT_BATCH_SIZE)
    settings = predictor.settings()
    if len(names) <= _WITHOUT_WORKERS:
        settings["workers"] = 0
    found: list[dict[str, Any]] = [{} for _ in names]
    with full_memory_is_an_error():
        settled = predictor.decide(rows)
        models = predictor.models(**settled)
        dataset, batch_size = predictor.dataset(rows), settled["batch_size"]
        for batch in score_dataset(models, dataset, batch_size=batch_size, **settings):
            fused, single = predictor.fusion.apply(batch.logits, predictor.names), probabilities(batch.logits)
            for place, row in enumerate(batch.rows):
                scores = dict(zip(predictor.names, single[:, place].tolist(), strict=True))
                found[row] = {"name": names[row], "score": float(fused[place]), "experts": scores}
            for row, reason in batch.broken:
                found[row] = {"name": names[row], "error": reason}
    return {"images": found, **predictor.sidecar(), **settled}


def as_json(found: dict[str, Any], sources: dict[str, dict[str, str]]) -> str:
    """Return what `score_images` found as JSON.

    Args:
        sources: by the expert's name, its `folder` (or file) and its `backbone`.
    """
    hashes = found["experts"]
    experts = {name: {**source, "weights_sha256": hashes[name]} for name, source in sources.items()}
    return json.dumps(found | {"experts": experts}, indent=2, ensure_ascii=False)


def as_table(found: dict[str, Any], sources: dict[str, dict[str, str]]) -> str:
    """Return what `score_images` found as aligned lines: P(AI), fused and by each expert; see `as_json`."""
    columns = ["P(AI)", *sources]
    width = max([5, *(len(image["name"]) for image in found["images"])])
    widths = [max(6, len(column)) for column in columns]
    lines = ["  ".join([f"{'image':{width}}", *(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True))])]
    for image in found["images"]:
        if "error" in image:
            lines.append(f"{image['name']:{width}}  could not be read: {image['error']}")
            continue
        scores = [image["score"], *image["experts"].values()]
        cells = [f"{_shown(score):>{w}}" for score, w in zip(scores, widths, strict=True)]
        lines.append("  ".join([f"{image['name']:{width}}", *cells]))
    fusion = found["fusion"] if isinstance(found["fusion"], str) else f"{found['fusion']['method']}, weighted"
    views = "" if found["tta"] == "none" else f", averaged over the views of {found['tta']}"
    lines.append(f"\nP(AI) is the probability of being AI-generated{views}: {fusion} of")
    longest = max(map(len, sources))
    lines += [f"  {name:{longest}}  {s['backbone']}, from {s['folder']}" for name, s in sources.items()]
    return "\n".join(lines)


def _shown(score: float) -> str:
    # Rounding must not make a certainty of what is none.
    return f"{np.clip(score, 0.0001, 0.9999):.4f}" if 0 < score < 1 else f"{score:.4f}"
