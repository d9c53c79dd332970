"""The fit of a fusion on labelled rows: a temperature for each expert and weights that are not negative.

    python -m featdistill fuse --predictions val.csv --out fusion.json --method logit_mean

It reads predictions with a column per expert and their labels, prints what each choice is worth on the fitted
and on held-out rows, and writes the fusion that it found, for `predict.py --fusion`.

The fit minimises the log loss, in two steps. Each expert alone gets the temperature that calibrates it; an
expert that is no better than a coin at any temperature gets the weight 0. The others get weights >= 0 under
`strength * sum((w - mean(w))^2)`, which draws them to equal ones; the strength is the one with the least loss
on held-out folds. For `logit_mean` the weights are fitted without a fixed sum, and what their sum is beyond 1
goes into the temperatures. No intercept is fitted, as a `Fusion` has none: an expert whose logits are
all shifted to one side is taken for a poor one, whatever its AUC. The optimiser is SciPy's.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import minimize

from featdistill import __version__, atomic, command_line
from featdistill.command_line import UserError
from featdistill.evaluation.metrics import roc_auc
from featdistill.inference.fusion import FORMAT_VERSION, METHODS, Fusion, logits_of, probabilities
from featdistill.records import labels
from featdistill.records.predictions import read_sidecar
from featdistill.seeds import hash_ranks

# Ours: from weights that are as good as free to weights that are as good as equal, for losses below log(2).
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class Labelled:
    """Labelled rows: `logits` (experts, N) float64, `label` (N,) 0 or 1, `group` (N,) of text."""

    names: list[str]
    logits: np.ndarray
    label: np.ndarray
    group: np.ndarray

    def rows(self, mask: np.ndarray) -> "Labelled":
        """Return the rows of a mask (N,)."""
        return Labelled(self.names, self.logits[:, mask], self.label[mask], self.group[mask])


@dataclass(frozen=True)
class Fitted:
    """What a fit found.

    Attributes:
        fusion: fitted on all rows.
        temperature_alone: what calibrates each expert alone; None for one that is no better than a coin.
        strength: of the pull to equal weights.
        losses: strength -> mean log loss of the held-out folds.
        held_out: (N,) P(AI) of each row by a fusion, its strength included, that was fitted without its fold.
        fold: (N,) the fold of each row.
    """

    fusion: Fusion
    temperature_alone: dict[str, float | None]
    strength: float
    losses: dict[float, float]
    held_out: np.ndarray
    fold: np.ndarray


def fit(rows: Labelled, method: str = "logit_mean", folds: int = 5, seed: int = 0) -> Fitted:
    """Fit temperatures and weights, and score each row with a fusion that has not seen its fold.

    The fold that a row is scored in has no say in the strength either: for each fold the strength is chosen
    among the others, with fits that leave out two folds.

    Raises:
        UserError: fewer than 3 folds, or too few groups of a label for them.
    """
    fold = assign_folds(rows, folds, seed)
    parts = [rows.rows(fold == number) for number in range(folds)]
    left_out = [(number,) for number in range(folds)] + list(combinations(range(folds), 2))
    fusions = {out: fit_strengths(rows.rows(~np.isin(fold, out)), method) for out in left_out}

    def score(out: tuple[int, ...], strength: float, part: int) -> np.ndarray:
        return fusions[out][strength].apply(parts[part].logits, rows.names)

    def choose(scored: list[tuple[tuple[int, ...], int]]) -> tuple[float, dict[float, float]]:
        losses = {}
        for strength in STRENGTHS:
            found = [log_loss(parts[part].label, score(out, strength, part)) for out, part in scored]
            losses[strength] = float(np.mean(found))
        # Of equals the stronger.
        return min(reversed(STRENGTHS), key=losses.__getitem__), losses

    held_out = np.empty(len(rows.label))
    for number in range(folds):
        others = [other for other in range(folds) if other != number]
        strength, _ = choose([(tuple(sorted((number, other))), other) for other in others])
        held_out[fold == number] = score((number,), strength, number)
    strength, losses = choose([((number,), number) for number in range(folds)])
    alone = [fit_temperature(logits, rows.label) for logits in rows.logits]
    return Fitted(
        fit_strengths(rows, method, (strength,))[strength],
        dict(zip(rows.names, alone, strict=True)),
        strength,
        losses,
        held_out,
        fold,
    )


def fit_strengths(rows: Labelled, method: str, strengths: Sequence[float] = STRENGTHS) -> dict[float, Fusion]:
    """Return the fusion that fits the rows best, for each strength of the pull to equal weights."""
    alone = [fit_temperature(logits, rows.label) for logits in rows.logits]
    useful = np.array([temperature is not None for temperature in alone])
    temperature = np.array([1.0 if value is None else value for value in alone])
    if not useful.any():
        return dict.fromkeys(strengths, Fusion(method))
    calibrated = (rows.logits / temperature[:, None])[useful]
    find = _logit_weights if method == "logit_mean" else _probability_weights
    found = {}
    for strength in strengths:
        weights = np.zeros(len(alone))
        weights[useful] = find(calibrated, rows.label, strength)
        scale = weights.sum()
        by_name = dict(zip(rows.names, (weights / scale).tolist(), strict=True))
        # The mean has weights of the sum 1: what the sum was beyond that goes into the temperatures.
        divisors = dict(zip(rows.names, (temperature / scale).tolist(), strict=True))
        found[strength] = Fusion(method, by_name, divisors)
    return found


def fit_temperature(logits: np.ndarray, label: np.ndarray) -> float | None:
    """Return the temperature at which an expert's log loss is least; None where it is no better than a coin.

    Better means by more than 0.5 log(N) in the likelihood of all N rows, the Bayesian information criterion's
    price of one parameter. Without that, an expert of noise would have a temperature without bound, at which
    its weight means nothing.

    Args:
        logits: (N,).
        label: (N,) 0 or 1.
    """
    size = float(np.abs(logits).mean())
    if size == 0:
        return None
    columns, target = logits[None] / size, _targets(label)
    inverse = _minimise(lambda v: _cross_entropy(v, columns, target), 1)
    gain = math.log(2) - _cross_entropy(inverse, columns, target)[0]
    return size / float(inverse[0]) if gain * len(label) > 0.5 * math.log(len(label)) else None


def _logit_weights(calibrated: np.ndarray, label: np.ndarray, strength: float) -> np.ndarray:
    """Return weights >= 0 with a sum of its own, for the cross-entropy of the weighted sum of logits."""
    target = _targets(label)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = _cross_entropy(weights, calibrated, target)
        away = weights - weights.mean()
        return value + strength * float(away @ away), slope + 2 * strength * away

    return _minimise(loss, len(calibrated))


def _probability_weights(calibrated: np.ndarray, label: np.ndarray, strength: float) -> np.ndarray:
    """Return weights >= 0 of the sum 1, for the log loss of the weighted mean of probabilities."""
    of_label = probabilities(np.where(label == 1, calibrated, -calibrated))

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        # The tiny number keeps a row finite on which all experts are certain and wrong.
        mixed = weights @ of_label + np.finfo(np.float64).tiny
        away = weights - weights.mean()
        slope = -(of_label / mixed).mean(axis=1) + 2 * strength * away
        return float(-np.log(mixed).mean() + strength * (away @ away)), slope

    sum_is_one = {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like}
    return _minimise(loss, len(calibrated), sum_is_one)


def _minimise(
    loss: Callable[[np.ndarray], tuple[float, np.ndarray]], count: int, constraints: dict | tuple = ()
) -> np.ndarray:
    """Return the point >= 0 at which a convex loss, given with its slope, is least."""
    start, bounds = np.full(count, 1 / count), [(0, None)] * count
    options = {"ftol": 1e-12, "maxiter": 1000}
    found = minimize(
        loss, start, jac=True, method="SLSQP", bounds=bounds, constraints=constraints, options=options
    )
    return np.maximum(found.x, 0)


def _cross_entropy(weights: np.ndarray, columns: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean cross-entropy of sigmoid(weights @ columns) against `target`, and its slope."""
    logit = weights @ columns
    value = np.logaddexp(0, logit) - target * logit
    return float(value.mean()), columns @ (probabilities(logit) - target) / len(target)


def _targets(label: np.ndarray) -> np.ndarray:
    """Return Platt's targets (1999, section 2.2), which keep an expert without an error at a finite scale."""
    ai = int((label == 1).sum())
    return np.where(label == 1, (ai + 1) / (ai + 2), 1 / (len(label) - ai + 2))


def log_loss(label: np.ndarray, score: np.ndarray) -> float:
    """Return the mean negative log probability of the labels."""
    # As far from 0 and 1 as float64 can tell, as scikit-learn does.
    margin = np.finfo(np.float64).eps
    score = np.clip(score, margin, 1 - margin)
    return float(-np.log(np.where(label == 1, score, 1 - score)).mean())


def assign_folds(rows: Labelled, folds: int, seed: int) -> np.ndarray:
    """Return the fold of each row, (N,): groups whole, labels spread evenly.

    Groups are dealt to the folds in turn: those with real images only, those with both labels, those with
    AI images only, so that a label held by as many groups as there are folds is in each of them. Within these
    the largest come first, and those of one size in the order of a hash of (seed, group), so that the order
    of the rows does not matter.

    Raises:
        UserError: fewer than 3 folds, or a label in fewer groups than there are folds.
    """
    if folds < 3:
        raise UserError(f"--folds must be 3 or more, not {folds}")
    groups = pd.DataFrame({"group": rows.group, "label": rows.label}).groupby("group", sort=True)["label"]
    table = pd.DataFrame({"ai_share": groups.mean(), "rows": groups.size()})
    for label, held in ((0, table["ai_share"] < 1), (1, table["ai_share"] > 0)):
        if held.sum() < folds:
            raise UserError(
                f"label {label} is in {held.sum()} groups of the labelled rows, too few for --folds {folds}; "
                "give more rows, or fewer folds (at least 3)"
            )
    # 0 real only, 0.5 both, 1 AI only.
    table["kind"] = np.select([table["ai_share"] == 0, table["ai_share"] == 1], [0.0, 1.0], 0.5)
    table["larger"], table["rank"] = -table["rows"], hash_ranks(table.index, seed)
    dealt = table.sort_values(["kind", "larger", "rank"]).index
    return pd.Series(np.arange(len(dealt)) % folds, index=dealt).loc[rows.group].to_numpy()


def read_labelled(
    predictions: Sequence[str], label_files: Sequence[str] | None
) -> tuple[Labelled, list[dict[str, Any]]]:
    """Read predictions of ours and the labels that belong to them, by name.

    Args:
        label_files: one for each of `predictions`, one for all, or None: the manifests in the sidecars.

    Returns:
        The labelled rows, and for each file of predictions what it was: names of files and hashes.

    Raises:
        UserError: the number of label files fits neither, the files have other experts, a column holds no
            probabilities, or a name has no label row.
    """
    if label_files and len(label_files) not in (1, len(predictions)):
        raise UserError(
            f"{len(label_files)} label files for {len(predictions)} predictions; give one for each or one "
            "for all"
        )
    parts, files = [], []
    for place, path in enumerate(predictions):
        source = labels.source_of(path, label_files[place % len(label_files)] if label_files else None)
        part = labels.labelled(path, source)
        if parts and set(part.attrs["experts"]) != set(parts[0].attrs["experts"]):
            raise UserError(
                f"{path} has the experts {', '.join(part.attrs['experts'])}, {predictions[0]} has "
                f"{', '.join(parts[0].attrs['experts'])}"
            )
        for name in part.attrs["experts"]:
            if not part[f"expert {name}"].between(0, 1).all():
                raise UserError(f"{path}: column {name} holds numbers outside [0, 1], so no probabilities")
        parts.append(part)
        files.append(
            {
                "predictions": Path(path).name,
                "predictions_sha256": atomic.sha256_of(path),
                "labels": source.name,
                "labels_sha256": atomic.sha256_of(source),
                "experts": (read_sidecar(path) or {}).get("experts"),
            }
        )
    names = parts[0].attrs["experts"]
    if len(names) < 2:
        raise UserError(f"{predictions[0]} has columns of {len(names)} experts; a fit needs two")
    columns = ["name", "label", "group", *(f"expert {name}" for name in names)]
    rows = pd.concat([part[columns] for part in parts], ignore_index=True)
    # A row without a group is one of its own, as in a hold-out.
    group = rows["group"].where(rows["group"] != "", "name:" + rows["name"])
    logits = logits_of(rows[columns[3:]].to_numpy(dtype=np.float64).T)
    return Labelled(names, logits, rows["label"].to_numpy(np.int64), group.to_numpy(dtype=object)), files


def scores(rows: Labelled, fitted: Fitted) -> dict[str, dict[str, float | None]]:
    """Return AUC and log loss of each expert, both equal means, and the fit on its own and held-out rows."""
    method = fitted.fusion.method
    score = {name: probabilities(logits) for name, logits in zip(rows.names, rows.logits, strict=True)}
    score |= {f"{name}, equal weights": Fusion(name).apply(rows.logits, rows.names) for name in METHODS}
    score[f"{method}, fitted, the same rows"] = fitted.fusion.apply(rows.logits, rows.names)
    score[f"{method}, fitted, held-out rows"] = fitted.held_out
    return {
        name: {"auc": roc_auc(rows.label, value), "log_loss": log_loss(rows.label, value)}
        for name, value in score.items()
    }


def fold_scores(rows: Labelled, fitted: Fitted) -> list[dict[str, Any]]:
    """Return for each fold its rows and the AUC of the fit without it, beside those of both equal means."""
    found = []
    for number in range(int(fitted.fold.max()) + 1):
        mask = fitted.fold == number
        part = rows.rows(mask)
        aucs = {name: roc_auc(part.label, Fusion(name).apply(part.logits, part.names)) for name in METHODS}
        aucs["fitted"] = roc_auc(part.label, fitted.held_out[mask])
        found.append({"rows": int(mask.sum()), **{f"{name}_auc": auc for name, auc in aucs.items()}})
    return found


def build_parser() -> command_line.Parser:
    parser = command_line.Parser(
        description="Fit the weights and temperatures of an ensemble on labelled predictions.",
    )
    parser.add_argument(
        "--predictions", nargs="+", required=True, metavar="FILE.csv", help="files that predict.py wrote"
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="FILE",
        help="manifests or official label files: one for each predictions file in the same order, or one "
        "for all; where none is given, the manifest in each sidecar",
    )
    parser.add_argument("--out", required=True, metavar="FILE.json", help="the fusion, for predict.py")
    parser.add_argument("--method", default="logit_mean", choices=METHODS, help="what is averaged")
    parser.add_argument("--folds", type=int, default=5, help="folds of the cross-validation, 3 or more")
    parser.add_argument("--seed", type=int, default=0, help="which groups share a fold")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    rows, files = read_labelled(args.predictions, args.labels)
    fitted = fit(rows, args.method, args.folds, args.seed)
    table, folds = scores(rows, fitted), fold_scores(rows, fitted)
    rival = max(METHODS, key=lambda method: np.mean([fold[f"{method}_auc"] for fold in folds]))
    gains = [fold["fitted_auc"] - fold[f"{rival}_auc"] for fold in folds]
    gain, spread = float(np.mean(gains)), float(np.std(gains, ddof=1) / math.sqrt(len(gains)))
    content = {
        "version": FORMAT_VERSION,
        **fitted.fusion.describe(),
        "temperature_alone": fitted.temperature_alone,
        "fitted_on": {"rows": len(rows.label), "ai": int(rows.label.sum()), "files": files},
        "strength": fitted.strength,
        "held_out_log_loss": [{"strength": key, "loss": loss} for key, loss in fitted.losses.items()],
        "seed": args.seed,
        "folds": folds,
        "held_out_gain": {"over": rival, "auc": gain, "standard_error": spread},
        "scores": table,
        "featdistill": __version__,
    }
    atomic.write_json(args.out, content)
    print("\n".join(_lines(table, fitted)))
    print(
        f"gain over {rival} with equal weights, mean of the held-out folds: {gain:+.5f} AUC, "
        f"standard error {spread:.5f}"
    )
    if gain <= 0:
        print(
            "warning: the fitted weights are no better than equal ones on held-out folds; use "
            "probability_mean or logit_mean"
        )
    print(f"{args.out}: fitted on {len(rows.label):,} rows, pull to equal weights {fitted.strength:g}")
    return 0


def _lines(table: dict[str, dict[str, float | None]], fitted: Fitted) -> list[str]:
    """Return the table for a terminal; `alone` is the temperature that calibrates the expert alone."""
    width = max(map(len, table))
    lines = [f"{'':{width}}      AUC  log loss  weight  temperature  alone"]
    described = fitted.fusion.describe()
    for name, score in table.items():
        line = f"{name:{width}}  {score['auc']:7.5f}  {score['log_loss']:8.4f}"
        if name in fitted.temperature_alone:
            weight = (described["weights"] or {}).get(name, 1 / len(fitted.temperature_alone))
            divisor = (described["temperature"] or {}).get(name, 1.0)
            alone = fitted.temperature_alone[name]
            line += f"  {weight:6.3f}  {divisor:11.4g}  {'none' if alone is None else f'{alone:.4g}':>5}"
        lines.append(line)
    return lines
