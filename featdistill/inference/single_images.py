"""A few images scored at once, for a person or a program to read; no file is written."""

from typing import Any

import pandas as pd

from featdistill.inference.compute import DEFAULT_BATCH_SIZE, full_memory_is_an_error
from featdistill.inference.fusion import probabilities
from featdistill.inference.predictor import Predictor
from featdistill.inference.scoring import score_all

# Worker processes take longer to start than these few images take to decode.
_WITHOUT_WORKERS = 16


def score_images(predictor: Predictor, rows: pd.DataFrame) -> dict[str, Any]:
    """Score rows and return what to show, as plain JSON.

    Returns:
        `images`: for each row `name` and either `score` and `experts` (name -> P(AI)), or `error`;
        `experts`: name -> `folder` (or file), `backbone` and `weights_sha256`; and the rest of the sidecar of
        a predictions file.
    """
    names = rows["name"].tolist()
    predictor.batch_size = predictor.batch_size or min(len(names), DEFAULT_BATCH_SIZE)
    settings = predictor.settings()
    if len(names) <= _WITHOUT_WORKERS:
        settings["workers"] = 0
    with full_memory_is_an_error():
        settled = predictor.decide(rows)
        settings["batch_size"] = settled["batch_size"]
        logits, broken = score_all(predictor.models(**settled), predictor.dataset(rows), **settings)
    fused, single = predictor.fusion.apply(logits, predictor.names), probabilities(logits)
    images: list[dict[str, Any]] = []
    for row, name in enumerate(names):
        if row in broken:
            images.append({"name": name, "error": broken[row]})
        else:
            scores = dict(zip(predictor.names, single[:, row].tolist(), strict=True))
            images.append({"name": name, "score": float(fused[row]), "experts": scores})
    experts = {
        name: {**source, "weights_sha256": predictor.hashes[name]}
        for name, source in predictor.sources.items()
    }
    return {"images": images, **predictor.sidecar(), **settled, "experts": experts}


def as_table(scored: dict[str, Any]) -> str:
    """Return the result of `score_images` as aligned lines: P(AI), fused and by each expert."""
    experts, fusion = scored["experts"], scored["fusion"]
    width = max(5, *(len(image["name"]) for image in scored["images"]))
    columns = ["P(AI)", *experts]
    lines = [f"{'image':{width}}" + "".join(f"  {column:>6}" for column in columns)]
    for image in scored["images"]:
        if "error" in image:
            lines.append(f"{image['name']:{width}}  could not be read: {image['error']}")
            continue
        scores = zip((image["score"], *image["experts"].values()), columns, strict=True)
        cells = (f"  {_shown(score):>{max(6, len(column))}}" for score, column in scores)
        lines.append(f"{image['name']:{width}}" + "".join(cells))
    how = fusion if isinstance(fusion, str) else f"{fusion['method']}, weighted"
    views = "" if scored["tta"] == "none" else f", averaged over the views of {scored['tta']}"
    lines.append(f"\nP(AI) is the probability of being AI-generated{views}: {how} of")
    longest = max(map(len, experts))
    lines += [f"  {name:{longest}}  {own['backbone']}, from {own['folder']}" for name, own in experts.items()]
    return "\n".join(lines)


def _shown(score: float) -> str:
    # Rounding must not show an uncertain score as certain.
    return f"{min(max(score, 0.0001), 0.9999):.4f}" if 0 < score < 1 else f"{score:.4f}"
