"""How the logits of many experts become one score.

The paper takes the plain mean of the probabilities (section 4.4, eq. 3). The mean of logits, weights and
temperatures are options beside it; `fusion_fit` finds weights and temperatures on labelled rows.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featdistill.command_line import UserError, nearest, one_of
from featdistill.records.predictions import name_list

METHODS = ("probability_mean", "logit_mean")
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Fusion:
    """How experts' logits become one score.

    Attributes:
        method: `probability_mean` or `logit_mean` (the sigmoid of the mean of the logits).
        weights: by the expert's name, >= 0; they are scaled to the sum 1. None: all equal.
        temperature: by the expert's name, > 0, divides its logit. None: 1 for all.

    Raises:
        UserError: the method is unknown, or a weight or a temperature is out of range.
    """

    method: str = "probability_mean"
    weights: dict[str, float] | None = None
    temperature: dict[str, float] | None = None

    def __post_init__(self) -> None:
        one_of("fusion", self.method, METHODS)
        for name, value in (self.temperature or {}).items():
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"the temperature of expert {name} is {value}; it must be above 0")
        if self.weights is not None:
            object.__setattr__(self, "weights", _normalised(self.weights))

    def check(self, names: Sequence[str]) -> None:
        """Raise a `UserError` unless the weights and the temperatures are those of exactly these experts."""
        for what, values in (("weight", self.weights), ("temperature", self.temperature)):
            if values is None:
                continue
            unknown = [name for name in values if name not in names]
            missing = [name for name in names if name not in values]
            if missing or unknown:
                extra = f" and has one for {name_list(unknown)}, which is not there" if unknown else ""
                lacking = f"no {what} for expert {name_list(missing)}" if missing else f"all {what}s"
                raise UserError(f"the fusion has {lacking}{extra}; the experts are {', '.join(names)}")

    def apply(self, logits: np.ndarray, names: Sequence[str]) -> np.ndarray:
        """Return P(AI) of each image.

        Args:
            logits: (experts, N) float.
            names: of the experts, in the order of `logits`.

        Returns:
            (N,) float64 in [0, 1]. A fused logit above 36.7 gives 1, the nearest that float64 has.

        Raises:
            UserError: see `check`.
            ValueError: `logits` has another shape.
        """
        self.check(names)
        if logits.ndim != 2 or len(logits) != len(names):
            raise ValueError(f"logits have shape {logits.shape} for {len(names)} experts")
        if self.temperature is not None:
            logits = logits / np.array([[self.temperature[name]] for name in names], dtype=np.float64)
        if self.method == "logit_mean":
            return probabilities(self._mean(logits.astype(np.float64), names))
        # Rounded weights can bring a sum of ones above 1.
        return np.minimum(self._mean(probabilities(logits), names), 1)

    def describe(self) -> dict[str, Any]:
        """Return the fusion as plain JSON, for the sidecar of the predictions."""
        found: dict[str, Any] = {"method": self.method}
        for key, values in (("weights", self.weights), ("temperature", self.temperature)):
            found[key] = None if values is None else {name: float(values[name]) for name in sorted(values)}
        return found

    def _mean(self, values: np.ndarray, names: Sequence[str]) -> np.ndarray:
        if self.weights is None:
            return values.mean(axis=0)
        return (np.array([[self.weights[name]] for name in names]) * values).sum(axis=0)


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Return P(AI) of logits in float64: in float32 every logit above 17 gives 1, and they all tie."""
    positive = np.exp(-np.abs(logits.astype(np.float64)))
    return np.where(logits >= 0, 1, positive) / (1 + positive)


def logits_of(probability: np.ndarray) -> np.ndarray:
    """Return the logits of P(AI), float64.

    A probability of exactly 0 or 1 counts as its neighbour in float64, so that logits lie in [-744.5, 36.8].
    """
    inside = np.clip(probability, np.nextafter(0.0, 1.0), np.nextafter(1.0, 0.0))
    return np.log(inside) - np.log1p(-inside)


def parse_fusion(text: str) -> Fusion:
    """Return the fusion that a command line names: a method, or the path of a JSON file made by the fit."""
    if text in METHODS:
        return Fusion(text)
    if Path(text).is_file():
        return read_fusion(text)
    raise UserError(
        f"unknown fusion '{text}'{nearest(text, METHODS)}; known: {', '.join(METHODS)}, or the path of a "
        "JSON file that python -m featdistill fuse wrote"
    )


def parse_weights(text: str, names: Sequence[str]) -> dict[str, float]:
    """Return the weights of `clip_l14_a=2,siglip_a=1` by the expert's name, scaled to the sum 1.

    Raises:
        UserError: an expert is unknown, missing or given twice, a weight is no number >= 0, or all are 0.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, sign, value = (piece.strip() for piece in part.rpartition("="))
        if not sign:
            raise UserError(f"--weights: '{part}' is not EXPERT=WEIGHT, as in {names[0]}=2")
        one_of("expert in --weights", name, names)
        if name in weights:
            raise UserError(f"--weights names expert {name} twice")
        try:
            weights[name] = float(value)
        except ValueError as error:
            raise UserError(f"--weights: the weight of expert {name} is '{value}', no number") from error
    missing = [name for name in names if name not in weights]
    if missing:
        raise UserError(f"--weights has no weight for expert {name_list(missing)}; 0 leaves an expert out")
    return _normalised(weights)


def read_fusion(path: str | Path) -> Fusion:
    """Read a fusion that `python -m featdistill fuse` wrote.

    Raises:
        UserError: the file is none of ours, or a value in it is out of range.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["version"] != FORMAT_VERSION:
            raise UserError(f"it has version {content['version']}, and this program reads {FORMAT_VERSION}")
        tables = [content.get(key) for key in ("weights", "temperature")]
        numbers = [table and {name: float(value) for name, value in table.items()} for table in tables]
        return Fusion(str(content["method"]), *numbers)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no fusion that python -m featdistill fuse wrote: {error!r}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _normalised(weights: dict[str, float]) -> dict[str, float]:
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"the weight of expert {name} is {weight}; it must be 0 or more")
    total = math.fsum(weights.values())
    if total <= 0:
        raise UserError("all weights are 0; give at least one expert a weight above 0")
    # Weights that were scaled before stay the same to the last bit when they come back from a file.
    return dict(weights) if abs(total - 1) < 1e-12 else {name: w / total for name, w in weights.items()}
