"""Weights in proportion to each expert's robust AUC, measured on labeled predictions; nothing is fitted.

    python -m featdistill fuse --predictions val.csv --out fusion.json --weights-by robust_auc

Team PSU of the challenge weights its experts like this (NTIRE 2026, arXiv 2604.11487). AUCs between .5 and 1
make weights that differ by a factor of 2 at most, so the result is near the plain mean.
"""

from typing import Any

import numpy as np

from featdistill import __version__
from featdistill.command_line import UserError
from featdistill.evaluation.metrics import AUCS, parts_of, roc_auc
from featdistill.inference.fusion import FORMAT_VERSION, Fusion, probabilities
from featdistill.inference.fusion_fit import Labeled
from featdistill.text_tables import table


def by_robust_auc(rows: Labeled, method: str = "logit_mean") -> Fusion:
    """Return the fusion whose weights are in proportion to the AUCs over the distorted images of all rows.

    Raises:
        UserError: the rows have no distorted images of both classes, or all AUCs are 0.
    """
    aucs = {name: _aucs(rows, logits)["robust_auc"] for name, logits in _alone(rows).items()}
    if None in aucs.values():
        raise UserError(
            "--weights-by robust_auc needs distorted images of both classes among the labeled rows; add the "
            "predictions of such images, and labels that say which images are distorted (is_distorted)"
        )
    return Fusion(method, aucs)


def report(rows: Labeled, fusion: Fusion, files: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the fusion and its AUCs as plain JSON, which `fusion.read_fusion` reads.

    `scores` has the AUCs of each expert, of the plain mean, and of the weighted mean, on the rows that the
    weights are measured on.
    """
    plain = Fusion(fusion.method).apply(rows.logits, rows.names)
    scores = _alone(rows) | {
        f"{fusion.method}, equal weights": plain,
        f"{fusion.method}, weights by robust AUC": fusion.apply(rows.logits, rows.names),
    }
    return {
        "version": FORMAT_VERSION,
        **fusion.describe(),
        "weights_by": "robust_auc",
        "measured_on": {
            "rows": len(rows.label),
            "ai": int(rows.label.sum()),
            "distorted": int((rows.is_distorted == 1).sum()),
            "files": files,
        },
        "scores": {name: _aucs(rows, score) for name, score in scores.items()},
        "featdistill": __version__,
    }


def score_table(content: dict[str, Any]) -> str:
    """Return the scores of a `report` as a table."""
    lines = []
    for name, score in content["scores"].items():
        weight = content["weights"].get(name)
        cells = ["n/a" if score[key] is None else f"{score[key]:.5f}" for key in AUCS]
        lines.append([name, *cells, "" if weight is None else f"{weight:.3f}"])
    return table(("", "clean AUC", "robust AUC", "AUC", "weight"), lines)


def _alone(rows: Labeled) -> dict[str, np.ndarray]:
    return {name: probabilities(logits) for name, logits in zip(rows.names, rows.logits, strict=True)}


def _aucs(rows: Labeled, score: np.ndarray) -> dict[str, float | None]:
    parts = parts_of(rows.is_distorted, len(rows.label))
    return {name: roc_auc(rows.label[part], score[part]) for name, part in parts.items()}
