"""Combine the logits of several experts into one score.

The paper uses the plain mean of the probabilities (section 4.4, eq. 3). The mean of the logits, weights and
temperatures are further options; `fusion_fit` fits weights and temperatures on labeled rows.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featdistill.command_line import UserError, nearest, one_of
from featdistill.records.logits import probabilities
from featdistill.records.predictions import name_list

METHODS = ("probability_mean", "logit_mean")
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Fusion:
    """A way to combine experts' logits into one score.

    Attributes:
        method: `probability_mean` or `logit_mean` (the sigmoid of the mean of the logits).
        weights: by expert, >= 0, scaled to the sum 1. None: all equal.
        temperature: by expert, > 0, divides its logit. None: 1 for all.

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
            object.__setattr__(self, "weights", _normalized(self.weights))

    def check(self, names: Sequence[str]) -> None:
        """Raise a `UserError` unless weights and temperatures are for exactly these experts."""
        for what, values in (("weight", self.weights), ("temperature", self.temperature)):
            if values is None or set(values) == set(names):
                continue
            if missing := [name for name in names if name not in values]:
                difference = f"no {what} for expert {name_list(missing)}"
            else:
                difference = f"a {what} for unknown experts: {name_list(set(values) - set(names))}"
            raise UserError(f"the fusion has {difference}; the experts are {', '.join(names)}")

    def apply(self, logits: np.ndarray, names: Sequence[str]) -> np.ndarray:
        """Return P(AI) of each image, from logits (experts, N) of experts in the order of `names`.

        Returns:
            (N,) float64 in [0, 1]; exactly 1 for fused logits above 36.7, the limit of float64.

        Raises:
            UserError: see `check`.
            ValueError: the number of rows of `logits` is not that of the names.
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
        description: dict[str, Any] = {"method": self.method}
        for key, values in (("weights", self.weights), ("temperature", self.temperature)):
            description[key] = values and {name: float(values[name]) for name in sorted(values)}
        return description

    def _mean(self, values: np.ndarray, names: Sequence[str]) -> np.ndarray:
        if self.weights is None:
            return values.mean(axis=0)
        return (np.array([[self.weights[name]] for name in names]) * values).sum(axis=0)


def parse_fusion(text: str) -> Fusion:
    """Return the fusion that `--fusion` names: a method, or a JSON file written by the fit."""
    if text in METHODS:
        return Fusion(text)
    if Path(text).is_file():
        return read_fusion(text)
    if "." in text or "/" in text:
        raise UserError(f"--fusion {text} does not exist")
    raise UserError(
        f"unknown fusion '{text}'{nearest(text, METHODS)}; known: {', '.join(METHODS)}, or a file written by "
        "python -m featdistill fuse"
    )


def parse_weights(text: str, names: Sequence[str], flag: str = "--weights") -> dict[str, float]:
    """Parse weights such as `clip_l14_a=2,siglip_a=1` and scale them to the sum 1.

    Raises:
        UserError: an expert is unknown, missing or named twice, a weight is not a number >= 0, or all are 0.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, sign, value = (piece.strip() for piece in part.rpartition("="))
        if not sign:
            raise UserError(f"{flag}: '{part}' is not EXPERT=WEIGHT, as in {names[0]}=2")
        one_of(f"expert in {flag}", name, names)
        if name in weights:
            raise UserError(f"{flag} names expert {name} twice")
        try:
            weights[name] = float(value)
        except ValueError as error:
            raise UserError(f"{flag}: the weight of expert {name} is '{value}', not a number") from error
    missing = [name for name in names if name not in weights]
    if missing:
        raise UserError(f"{flag} has no weight for expert {name_list(missing)}; 0 leaves an expert out")
    return _normalized(weights)


def read_fusion(path: str | Path) -> Fusion:
    """Read a file that `python -m featdistill fuse` wrote.

    Raises:
        UserError: the file has another format, or a value in it is out of range.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["version"] != FORMAT_VERSION:
            raise UserError(f"it has version {content['version']}; this program reads {FORMAT_VERSION}")
        tables = [content.get(key) for key in ("weights", "temperature")]
        numbers = [table and {name: float(value) for name, value in table.items()} for table in tables]
        return Fusion(str(content["method"]), *numbers)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} was not written by python -m featdistill fuse ({error!r})") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _normalized(weights: dict[str, float]) -> dict[str, float]:
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"the weight of expert {name} is {weight}; it must be 0 or more, and finite")
    total = math.fsum(weights.values())
    if total <= 0:
        raise UserError("all weights are 0; give at least one expert a weight above 0")
    # Weights that were read from a file are scaled already, and must not change in the last bit.
    return dict(weights) if abs(total - 1) < 1e-12 else {name: w / total for name, w in weights.items()}
