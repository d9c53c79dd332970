"""The content control of an audit: its AUC over all images, the training images, and the held-out ones."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd

from data_prep.content import banks, control
from featdistill import atomic
from featdistill.command_line import UserError

CONTENT_FILE, BANK = "content.csv", "content"


def check(rows: pd.DataFrame) -> None:
    """Raise a `UserError` unless the control can be measured on `audit.read_rows`' rows."""
    for label, name in ((0, "real"), (1, "AI-generated")):
        groups = rows["group"][rows["label"] == label].nunique()
        if groups < 2:
            unlabeled = int(rows["label"].isna().sum())
            reason = f"; {unlabeled} of {len(rows)} images have no label in the manifest" if unlabeled else ""
            raise UserError(
                f"--content needs {name} images in at least two groups; there are {groups}{reason}"
            )


def measure_content(rows: pd.DataFrame, out: Path, arguments: Namespace) -> dict:
    """Embed what rows show, score them, write `content.csv`, and return the AUCs.

    Args:
        rows: of `audit.read_rows`.
        out: the audit's folder, where the bank is kept.
        arguments: with the flags of `banks.add_flags`, `seed` and `workers`.
    """
    bank = banks.make_bank(rows, dict(list(rows.groupby("manifest", sort=False))), out / BANK, arguments)
    feature = bank.record["features"][0]
    label = rows["label"].to_numpy(dtype=np.float64, na_value=np.nan)
    group = rows["group"].to_numpy(dtype=str)
    fold = rows["fold"].fillna("").to_numpy(dtype=str) if "fold" in rows else None
    held = rows["held_out"].to_numpy(dtype=bool)
    values = bank.values(bank.feature(feature), bank.views[0])
    scores = control.control_scores(values, label, held, group, fold, arguments.seed)
    known = np.isfinite(scores.score)
    lines = zip(rows["name"], rows["label"].astype("string").fillna(""), scores.score.tolist(), strict=True)
    lines = [line for line, is_known in zip(lines, known, strict=True) if is_known]
    atomic.write_text(out / CONTENT_FILE, atomic.csv_text(["name", "label", "score"], lines))
    known &= ~np.isnan(label)
    sides = {"train": known & ~scores.held, "held_out": known & scores.held}
    whole, *parts = (
        _interval(label[side], scores.score[side], group[side], arguments.seed)
        for side in (known, *sides.values())
    )
    return {
        "side": bank.record["views"]["control_side_px"],
        "backbone": arguments.backbone or banks.BACKBONE,
        "weights_sha256": bank.record["weights"]["sha256"],
        "feature": feature,
        **whole,
        **dict(zip(sides, parts, strict=True)),
        "folds": scores.folds,
    }


def _interval(label: np.ndarray, score: np.ndarray, group: np.ndarray, seed: int) -> dict:
    # Imported late: scikit-learn takes a while to import.
    from data_prep.auditing.shortcut import auc_interval

    auc = auc_interval(label.astype(np.int64), score, np.unique(group, return_inverse=True)[1], seed)
    auc, low, high = (None if value is None else round(value, 4) for value in auc)
    return {"images": len(label), "auc": auc, "low": low, "high": high}
