"""What a probe writes: experts, held-out scores as predictions, and tables.

| file | holds |
|---|---|
| `FEATURE/expert/` | an expert for `predict.py` |
| `FEATURE/BANK/expert/`, `FEATURE/fusion.json` | instead, for several banks: experts to be fused |
| `FEATURE/PART-VIEW.csv` | held-out scores of one view, for `evaluate.py` |
| `manifests/PART-VIEW.csv` | the labels of these, with what the view's distortions were |
| `probe.json`, `probe.csv`, `probe.md` | the AUCs of all features |
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from featdistill import atomic, text_tables
from featdistill.bank.heads import Head
from featdistill.bank.probe_plan import Plan
from featdistill.bank.store import Bank
from featdistill.inference.fusion import FORMAT_VERSION, Fusion, probabilities
from featdistill.models.backbones import build
from featdistill.models.expert import Expert, save_expert
from featdistill.models.features import Feature
from featdistill.records.manifest import BANK_VIEW, write_manifest
from featdistill.records.predictions import manifest_entry, write_predictions

if TYPE_CHECKING:
    from featdistill.bank.probe import Fitted

RECORD_FILE, RESULT_FILE, FUSION_FILE = "probe.json", "result.json", "fusion.json"
_KINDS = ("clean", "robust")


def write_experts(plan: Plan, fitted: "Fitted", folder: Path, described: dict[str, Any]) -> list[str]:
    """Write one expert per bank, and for several banks the fusion that adds their logits up.

    Returns:
        The experts' folders, relative to the folder of the feature.
    """
    banks = plan.train.banks
    parts = split_head(fitted.head, [feature.dim for feature in fitted.features])
    names = _bank_names(banks) if len(banks) > 1 else [""]
    places = [str(Path(name) / "expert") for name in names]
    for bank, feature, head, place in zip(banks, fitted.features, parts, places, strict=True):
        card = {
            "recipe": _recipe(bank, feature, head),
            "data": {"train": bank.record["manifests"]},
            "probe": described,
            "metrics": described["parts"],
        }
        save_expert(make_expert(bank, feature, head), folder / place, card)
    if len(banks) > 1:
        # The mean of the logits, each divided by 1 / M, is their sum.
        fusion = Fusion("logit_mean", None, dict.fromkeys(names, 1 / len(banks)))
        content = {"version": FORMAT_VERSION, **fusion.describe(), "probe": described}
        atomic.write_json(folder / FUSION_FILE, content)
    return places


def split_head(head: Head, widths: Sequence[int]) -> list[Head]:
    """Split a head on features side by side into one for each, whose logits add up to its own."""
    if len(widths) == 1:
        return [head]
    ((weight, bias),) = head.layers
    ends = np.cumsum(widths)[:-1]
    return [
        Head(((part, bias / np.float32(len(widths))),), head.strength)
        for part in np.split(weight, ends, axis=1)
    ]


def make_expert(bank: Bank, feature: Feature, head: Head) -> Expert:
    """Return the expert of a bank's backbone, a feature and a head on it, in evaluation mode."""
    source = bank.backbone()
    spec = dataclasses.replace(bank.spec, feature=feature.text, positions=feature.positions)
    if spec.projects == bank.spec.projects:
        backbone = source
    else:
        # The bank's backbone may have a projection for other features.
        backbone = build(spec)
        state = source.state_dict()
        backbone.load_state_dict({name: state[name] for name in backbone.state_dict()})
    hidden = len(head.layers[0][1]) if len(head.layers) > 1 else 0
    fitted = bank.preprocessing
    expert = Expert(backbone, spec, hidden, 0.0, fitted.resize, fitted.max_side_px)
    layers = [layer for layer in expert.head if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for layer, (weight, bias) in zip(layers, head.layers, strict=True):
            layer.weight.copy_(torch.from_numpy(weight))
            layer.bias.copy_(torch.from_numpy(bias))
    return expert.eval()


def write_manifests(plan: Plan, out: Path) -> dict[tuple[str, str], Path]:
    """Write the rows of each part as they are in each scored view; return their paths by (part, view)."""
    paths = {}
    for number, view in enumerate(plan.scored_views):
        chains = np.array([json.dumps(chain) for chain in plan.scored.chains(view)], dtype=object)
        is_distorted = plan.scored.is_distorted([view])[:, 0] == 1
        for part, inside in plan.parts.items():
            rows = plan.scored.rows[inside].copy()
            if number:
                rows["is_distorted"], rows["distortions"] = is_distorted[inside].astype(int), chains[inside]
                rows[BANK_VIEW] = view
            paths[part, view] = out / "manifests" / f"{part}-{view}.csv"
            write_manifest(rows, paths[part, view])
    return paths


def write_scores(
    plan: Plan,
    fitted: "Fitted",
    folder: Path,
    described: dict[str, Any],
    manifests: dict[tuple[str, str], Path],
) -> None:
    """Write the held-out scores of each part and view as predictions with a sidecar."""
    names = plan.scored.rows["name"].to_numpy(object)
    for (part, view), manifest in manifests.items():
        inside = plan.parts[part]
        score = probabilities(fitted.logits[inside, plan.scored_views.index(view)])
        path = folder / f"{part}-{view}.csv"
        sidecar = {"probe": described, "view": view, "manifest": manifest_entry(manifest, path)}
        write_predictions(path, names[inside].tolist(), score, {}, sidecar)


def write_tables(out: Path, content: dict[str, Any]) -> None:
    """Write `probe.csv` and `probe.md`, and `probe.json` last."""
    rows = [row for result in content["results"] for row in _rows(result)]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    atomic.write_text(
        out / "probe.csv", atomic.csv_text(columns, [[row.get(c) for c in columns] for row in rows])
    )
    atomic.write_text(out / "probe.md", markdown(content))
    atomic.write_json(out / RECORD_FILE, content)


def markdown(content: dict[str, Any]) -> str:
    """Return the tables of a probe as Markdown."""
    settings, results = content["settings"], content["results"]
    lines = ["# Probe", "", f"Banks: {', '.join(bank['path'] for bank in settings['banks'])}."]
    if settings["score"]:
        lines.append(f"Scored: {', '.join(bank['path'] for bank in settings['score'])}.")
    if settings["train"]:
        lines.append(f"Trained on {' and '.join(settings['train'])}; the other images are the hold-out.")
    lines.append(f"Held out: {content['held_out']}; balance {settings['balance']}, seed {settings['seed']}.")
    parts = [part for each in results for part in each["parts"].values()]
    lines.append("AUC with 95 % intervals (DeLong). Robust: the mean over the distorted views.")
    if any("within_folds" in part["clean"] for part in parts):
        lines.append("Within folds: the mean over the folds, whose heads differ in scale.")
    if any("control" in part["clean"] for part in parts):
        lines.append("Control: the same on the content control, on the same images.")
    lines += ["", _table(results)]
    for each in results:
        if values := each.get("values"):
            lines += ["", f"## {each['feature']}, {content['held_out']}", "", _value_table(values)]
    return "\n".join(lines) + "\n"


def summary(result: dict[str, Any]) -> str:
    """Return the AUCs of a feature in one line."""
    shown = []
    for name, part in result["parts"].items():
        aucs = [f"{kind} {text_tables.number(part[kind]['auc'])}" for kind in _KINDS if part[kind]["auc"]]
        shown.append(f"{name} {', '.join(aucs) or 'n/a'}")
    return f"{'; '.join(shown)} ({result['dim']} values, regularization {result['strength']:.2g})"


def _rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of `probe.csv` of a feature: one for each part and value."""
    first = {"feature": result["feature"], "dim": result["dim"], "strength": result["strength"]}
    rows = []
    entries = [({"part": name, "value": ""}, part) for name, part in result["parts"].items()]
    entries += [({"part": "value", "value": each["value"]}, each) for each in result.get("values", ())]
    for named, part in entries:
        row = {**first, **named, "real": part["real"], "ai": part["ai"]}
        for kind in _KINDS:
            figures = part[kind]
            row |= {f"{kind}_{key}": figures[key] for key in ("auc", "low", "high")}
            for key in ("within_folds", "control", "exceeds"):
                inner = figures.get(key, {})
                row |= {f"{kind}_{key}_{name}".removesuffix("_auc"): value for name, value in inner.items()}
        rows.append(row)
    return rows


def _table(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for each in results:
        first = {"feature": each["feature"], "values": str(each["dim"])}
        first["C or alpha"] = f"{each['strength']:.2g}"
        rows += [first | {"part": name} | _cells(part) for name, part in each["parts"].items()]
    return _shown(rows)


def _value_table(values: Sequence[dict[str, Any]]) -> str:
    return _shown([{"value": each["value"], "against": each["against"]} | _cells(each) for each in values])


def _cells(part: dict[str, Any]) -> dict[str, str]:
    cells = {"real + AI": f"{part['real']} + {part['ai']}"}
    for title, key in (("", None), ("within folds, ", "within_folds"), ("control, ", "control")):
        for kind in _KINDS:
            cells[f"{title}{kind} AUC"] = _interval(part[kind] if key is None else part[kind].get(key, {}))
    return cells | {f"exceeds it, {kind}": _difference(part[kind].get("exceeds", {})) for kind in _KINDS}


def _shown(rows: Sequence[dict[str, str]]) -> str:
    """Return a table without the columns that hold no figure, such as those of a control."""
    columns = [column for column in rows[0] if any(row[column] != "n/a" for row in rows)] if rows else []
    return text_tables.table(columns, [[row[column] for column in columns] for row in rows])


def _interval(figures: dict[str, Any]) -> str:
    if figures.get("auc") is None:
        return "n/a"
    return text_tables.with_interval(figures["auc"], (figures["low"], figures["high"]))


def _difference(figures: dict[str, Any]) -> str:
    if figures.get("difference") is None:
        return "n/a"
    low, high = figures["low"], figures["high"]
    return f"{figures['difference']:+z.4f}" + ("" if low is None else f" [{low:+z.4f}, {high:+z.4f}]")


def _bank_names(banks: Sequence[Bank]) -> list[str]:
    """Name each bank after its folder; experts' names differ, and can be columns of predictions."""
    names: list[str] = []
    for bank in banks:
        name = bank.path.resolve().name
        name = f"{name}_bank" if name in ("name", "score") else name
        names.append(name if name not in names else f"{name}_{len(names) + 1}")
    return names


def _recipe(bank: Bank, feature: Feature, head: Head) -> dict[str, Any]:
    """Return what a recipe would say about the architecture, so that the expert can be a teacher."""
    hidden = len(head.layers[0][1]) if len(head.layers) > 1 else 0
    return {
        "name": "probe",
        "feature": feature.text,
        "input_size": bank.preprocessing.size,
        "resize": bank.preprocessing.resize,
        "head_hidden": hidden,
        "head_dropout": 0.0,
    }
