"""Fit heads on the features of banks, and say how well they do on images that were held out.

Each feature gets a folder with an expert, its held-out scores, and `result.json`, which is written last: the
same command continues a probe that was killed, and adds features to one that is finished.
"""

import dataclasses
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featdistill import atomic
from featdistill.bank import heads, probe_files
from featdistill.bank.figures import view_figures
from featdistill.bank.heads import Head
from featdistill.bank.joined import SEPARATOR, ChosenTokens
from featdistill.bank.probe_plan import FOLDS_PART, Plan, Settings, make_plan
from featdistill.command_line import progress
from featdistill.data.sampling import balance_weights
from featdistill.models.features import Feature
from featdistill.records.provenance import claim, read_record

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fitted:
    """A head, and the scores of images that were held out.

    Attributes:
        features: of each bank, with chosen tokens.
        head: trained on all training images.
        logits: (S, W) float64 of the scored images and views.
    """

    features: list[Feature]
    head: Head
    logits: np.ndarray


def probe(settings: Settings, out: str | Path) -> dict[str, Any]:
    """Probe features, continuing what is there; return the content of `probe.json`.

    Raises:
        UserError: a setting is wrong, or `out` was made with other settings.
    """
    out, plan = Path(out), make_plan(settings)
    texts = list(dict.fromkeys(settings.features or default_features(plan)))
    for text in texts:
        plan.train.features(text)
        plan.scored.features(text)
    record = _record(settings)
    previous = read_record(out / probe_files.RECORD_FILE)
    occupied = out.is_file() or (out.is_dir() and any(out.iterdir()))
    claim(out, previous and previous.get("settings"), record, occupied=occupied)
    results = {each["feature"]: each for each in (previous or {}).get("results", ())}
    out.mkdir(parents=True, exist_ok=True)
    content = {"settings": record, "held_out": plan.how, "results": list(results.values())}
    atomic.write_json(out / probe_files.RECORD_FILE, content)
    manifests = probe_files.write_manifests(plan, out)
    control = plan.control() if settings.control else None
    paths = (len(plan.fold_names) + 1) * (1 if control is None else 2)
    with progress(len(texts) * paths, "fitting", unit="path") as bar:
        for number, text in enumerate(texts, start=1):
            folder = out / folder_name(text)
            result = read_record(folder / probe_files.RESULT_FILE)
            if result is None:
                result = _probe_feature(plan, control, text, settings, folder, manifests, bar.update)
            results[text] = result
            bar.update(number * paths - bar.n)
    content["results"] = list(results.values())
    probe_files.write_tables(out, content)
    return content


def default_features(plan: Plan) -> list[str]:
    """Return the features that the first bank was made for, as far as the others have them."""
    return list(plan.train.banks[0].record["features"])


def folder_name(text: str) -> str:
    """Return the name of a feature's folder, which is also that of its expert."""
    return re.sub(r"[^\w.+-]", "_", text.replace(SEPARATOR, "__"))


def fit_and_score(
    plan: Plan, features: list[Feature], settings: Settings, done: Callable[[], object]
) -> Fitted:
    """Fit heads without each part and on all training images, and score what they have not seen.

    Args:
        done: called after each path of heads.
    """
    tokens = ChosenTokens(plan.train, features, plan.views)
    cache: dict[str, Any] = {}

    def values(seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chosen = tokens.of(seen)
        if cache.get("features") != chosen:
            cache.clear()
            x = plan.train.values(chosen, plan.views)
            scored = x if plan.is_shared else plan.scored.values(chosen, plan.scored_views)
            cache.update(features=chosen, values=(x, scored))
        return cache["values"]

    def weights(seen: np.ndarray) -> np.ndarray | None:
        return balance_weights(plan.train.rows[seen].reset_index(drop=True), settings.balance)

    labels, options = plan.train.labels, settings.head
    held = plan.scored_fold >= 0
    # Without training images among the scored ones, the views that are trained on choose the regularization.
    only_new = not held.any()
    by_strength = heads.cross_fit(
        (lambda seen: (values(seen)[0],) * 2) if only_new else values,
        labels,
        plan.fold,
        scored_fold=None if only_new else plan.scored_fold,
        weights=weights,
        excluded=plan.groups_of,
        options=options,
        progress=done,
    )
    logits = np.empty((len(held), len(plan.scored_views)))
    if only_new:
        number = heads.best(by_strength, labels, plan.fold)
    else:
        known = by_strength[:, held], plan.scored.labels[held], plan.scored_fold[held]
        number = heads.best(*known)
        logits[held] = heads.chosen_logits(*known)
        del known
    del by_strength
    everything = np.ones(len(labels), bool)
    x, scored = values(everything)
    # Each head of a path starts from the one before it, not from those after it.
    path = dataclasses.replace(options, path=options.strengths[: number + 1])
    head = heads.fit_heads(x, labels, weights=weights(everything), options=path)[-1]
    done()
    logits[~held] = head.logits(scored[~held])
    return Fitted(cache["features"], head, logits)


def _probe_feature(
    plan: Plan,
    control: Plan | None,
    text: str,
    settings: Settings,
    folder: Path,
    manifests: dict[tuple[str, str], Path],
    done: Callable[[], object],
) -> dict[str, Any]:
    """Fit, score and write one feature; return its result."""
    fitted = fit_and_score(plan, plan.train.features(text), settings, done)
    control_logits = None
    if control is not None:
        of_control = fit_and_score(control, control.train.features(text), settings, done)
        control_logits = of_control.logits[:, 0]
    figures = _figures(plan, fitted.logits, control_logits)
    result = {
        "feature": text,
        "dim": sum(feature.dim for feature in fitted.features),
        "head": settings.head.kind,
        "strength": fitted.head.strength,
        "positions": [list(feature.positions) for feature in fitted.features if feature.top_count],
        **figures,
    }
    strengths = settings.head.strengths
    if fitted.head.strength in (strengths[0], strengths[-1]) and len(strengths) > 1:
        _log.info("%s: the best regularization, %g, is at the end of the path", text, fitted.head.strength)
    described = {"settings": _record(settings), "held_out": plan.how, **result}
    if settings.write_experts:
        result["experts"] = probe_files.write_experts(plan, fitted, folder, described)
    probe_files.write_scores(plan, fitted, folder, described, manifests)
    atomic.write_json(folder / probe_files.RESULT_FILE, result)
    _log.info("%s: %s", text, probe_files.summary(result))
    return result


def _figures(plan: Plan, logits: np.ndarray, control: np.ndarray | None) -> dict[str, Any]:
    """Return the figures of each part, and of each value that was left out."""
    label, is_distorted = plan.scored.labels, plan.scored.is_distorted(plan.scored_views)
    parts = {}
    for name, inside in plan.parts.items():
        counts = {
            "images": inside.sum(),
            "real": (label[inside] == 0).sum(),
            "ai": (label[inside] == 1).sum(),
        }
        arrays = [label[inside], logits[inside], is_distorted[inside]]
        more = {
            "control": None if control is None else control[inside],
            "fold": plan.scored_fold[inside] if name == FOLDS_PART else None,
        }
        parts[name] = {key: int(count) for key, count in counts.items()} | view_figures(*arrays, **more)
    result: dict[str, Any] = {"parts": parts}
    held = plan.scored_fold >= 0
    if plan.column and held.any():
        column = plan.scored.rows[plan.column].astype("object")
        values = column.where(column.notna(), "").astype(str).to_numpy(object)
        result["values"] = []
        for value in plan.fold_names:
            own = held & (values == value)
            labels = np.unique(label[own])
            against = "itself" if len(labels) != 1 else "all real" if labels[0] else "all AI"
            inside = own if len(labels) != 1 else own | (held & (label != labels[0]))
            counts = {"real": int((label[own] == 0).sum()), "ai": int((label[own] == 1).sum())}
            figures = view_figures(label, logits, is_distorted, inside, control)
            result["values"].append({"value": value, **counts, "against": against, **figures})
    return result


def _record(settings: Settings) -> dict[str, Any]:
    """Return what decides the results, apart from the features."""
    values = dataclasses.asdict(settings)
    del values["features"]
    for key in ("banks", "score"):
        values[key] = [{"path": str(path), "sha256": bank_hash(path)} for path in values[key]]
    values["head"]["path"] = list(settings.head.strengths)
    return values


def bank_hash(path: str | Path) -> str:
    """Return a hash of what a bank holds."""
    return atomic.sha256_of(Path(path) / "bank.json")
