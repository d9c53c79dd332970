"""Folders of `data_prep.audit` for the tests of what reads them."""

import json

from featdistill import atomic


def write_audit(folder, names=(), label=(), score=(), *, auc=0.7, sources=(), content=True):
    """Write an audit with a pixel-free baseline and, with names, a content control; return the folder.

    Args:
        auc: of the baseline, with an interval of .1 on both sides.
        content: False for an audit of an earlier version, without a content control.
    """
    baseline = {"auc": auc, "low": auc - 0.1, "high": auc + 0.1, "verdict": "possible", "images": 9}
    baseline |= {"telling": ["bytes"], "sources": list(sources)}
    audit = {"manifests": ["val.csv"], "baseline": baseline}
    if content:
        audit["content"] = {
            "side": 28,
            "backbone": "timm:test_vit",
            "feature": "pool",
            "folds": "column fold",
        }
        rows = zip(names, label, score, strict=True)
        atomic.write_text(folder / "content.csv", atomic.csv_text(["name", "label", "score"], rows))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "audit.json").write_text(json.dumps(audit))
    return folder
