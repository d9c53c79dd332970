"""Does an exported graph give the logits of the experts it was made from?"""

import dataclasses
import logging
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from featdistill.command_line import UserError, counted
from featdistill.inference.predictor import Predictor
from featdistill.inference.scoring import score_all
from featdistill.records.logits import logits_of, probabilities
from featdistill.runtimes.graph_expert import GraphExpert

_log = logging.getLogger(__name__)
# By precision, how far a logit may move. The last bits of float32 differ between any two programs.
MAX_DIFFERENCE = {"fp32": 1e-4, "fp16": 0.05, "int8": 0.1}
MAX_AUC_LOSS = 0.002
# Further out, a difference in the logit is none in the score; fused probabilities lose digits there, too.
_MAX_LOGIT = 15.0
_BATCH = 16


@dataclass(frozen=True)
class Parity:
    """How an exported graph compares with the experts in PyTorch.

    Attributes:
        images: number of images compared.
        max_difference, mean_difference: of the logits, absolute.
        auc_before, auc_after: on the images with a label; None unless there are both labels.
    """

    images: int
    max_difference: float
    mean_difference: float
    auc_before: float | None = None
    auc_after: float | None = None

    def as_text(self) -> str:
        """Return the figures in one line."""
        text = f"logits of {counted(self.images, 'image')} differ by {self.max_difference:.2g} at most"
        if self.auc_before is None:
            return text
        return f"{text}; AUC {self.auc_before:.4f} in PyTorch, {self.auc_after:.4f} exported"


@dataclass(frozen=True)
class Reference:
    """Images with the logits of the experts in PyTorch.

    Attributes:
        rows: of a manifest, readable images only.
        logits: (N,) of the fused scores.
    """

    rows: pd.DataFrame
    logits: np.ndarray


def reference(predictor: Predictor, rows: pd.DataFrame) -> Reference:
    """Score images with the experts.

    Args:
        predictor: the experts, on the CPU in float32.
        rows: of a manifest; labels may be missing.

    Raises:
        UserError: no image can be read.
    """
    settings = predictor.settings() | {"batch_size": _BATCH}
    logits, broken = score_all([*predictor.experts.values()], predictor.dataset(rows), **settings)
    if broken:
        _log.warning("%s could not be read, and not compared", counted(len(broken), "image"))
    good = np.setdiff1d(np.arange(len(rows)), list(broken))
    if not len(good):
        raise UserError("none of the images can be read")
    fused = logits_of(predictor.fusion.apply(logits[:, good], predictor.names))
    return Reference(rows.iloc[good].reset_index(drop=True), fused)


def compare(predictor: Predictor, expected: Reference, graph: GraphExpert) -> Parity:
    """Score images with a graph, and compare with the experts."""
    settings = predictor.settings() | {"batch_size": _BATCH}
    logits, _ = score_all([graph], predictor.dataset(expected.rows), **settings)
    found = logits_of(probabilities(logits[0]))
    ours, theirs = (np.clip(one, -_MAX_LOGIT, _MAX_LOGIT) for one in (found, expected.logits))
    difference = np.abs(ours - theirs)
    parity = Parity(len(found), float(difference.max()), float(difference.mean()))
    labels = expected.rows["label"]
    known = labels.notna().to_numpy()
    if set(labels[known]) != {0, 1}:
        return parity
    classes = labels[known].astype(int)
    before, after = (float(roc_auc_score(classes, one[known])) for one in (expected.logits, found))
    return dataclasses.replace(parity, auc_before=before, auc_after=after)


def require_parity(parity: Parity, precision: str) -> None:
    """Raise a `UserError` with the figure if a graph differs too much from its experts."""
    limit, remedy = MAX_DIFFERENCE[precision], "nothing was written"
    if precision == "int8":
        remedy += "; use --precision fp16"
    # NaN is too far as well.
    if not parity.max_difference <= limit:
        raise UserError(
            f"the {precision} graph is refused: it moves a logit by {parity.max_difference:.3g}, and "
            f"{limit:g} is allowed ({counted(parity.images, 'image')}); {remedy}"
        )
    if parity.auc_before is None:
        if precision == "int8":
            raise UserError("int8 is checked by the AUC, and the images do not have both labels")
    elif not parity.auc_before - parity.auc_after <= MAX_AUC_LOSS:
        raise UserError(
            f"the {precision} graph is refused: it lowers the AUC from {parity.auc_before:.4f} to "
            f"{parity.auc_after:.4f}, and {MAX_AUC_LOSS:g} is allowed; {remedy}"
        )
