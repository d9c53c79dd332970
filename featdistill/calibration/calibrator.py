"""A calibrator: from logits to P(AI) and to `real`, `unsure` or `AI`, with the promise that verdicts keep.

An image is called AI if its logit is above `ai_threshold`, real if it is below `real_threshold`, and unsure
in between and on a threshold. The file is JSON that a person can read.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from featdistill import atomic
from featdistill.command_line import UserError
from featdistill.records.provenance import differences, read_record

REAL, UNSURE, AI = "real", "unsure", "AI"
PLATT, ISOTONIC = "platt", "isotonic"
FORMAT = "featdistill calibrator"
FORMAT_VERSION = 1
# What decides the scores, of the sidecar of predictions and of `Predictor.sidecar`. Precision, batch size and
# compilation change the last digits only.
MADE_FOR = ("experts", "preprocessing", "fusion", "tta")
_REMEDY = "fit one with python -m featdistill calibrate"


@dataclass(frozen=True)
class Calibrator:
    """Thresholds, and a map from logits to probabilities, for the scores of one ensemble.

    Attributes:
        made_for: `MADE_FOR` -> their values, of the scores it was fitted on; None if those had no record.
        ai_threshold: logit above which an image is called AI.
        real_threshold: logit below which an image is called real, at most `ai_threshold`. None if it was
            fitted without AI-generated images: then nothing is called real.
        fpr: the largest share of real images called AI that is promised, in (0, 1).
        fnr: the same for AI-generated images called real; None without `real_threshold`.
        method: `platt`, `isotonic`, or None if it was fitted without AI-generated images.
        parameters: of platt `slope` and `intercept`; of isotonic `logits`, rising, and `probabilities` there.
        real, ai: numbers of images the thresholds were fitted on.
        by: columns of the manifest whose groups keep the promise each; the worst decides.
        data: what it was fitted on: names and hashes of files.
        facts: what else was found when it was fitted, for people to read.

    Raises:
        ValueError: a value is out of range.
    """

    made_for: dict[str, Any] | None
    ai_threshold: float
    real_threshold: float | None
    fpr: float
    fnr: float | None
    method: str | None
    parameters: dict[str, Any]
    real: int
    ai: int
    by: list[str] = field(default_factory=list)
    data: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        thresholds = [self.ai_threshold, *([] if self.real_threshold is None else [self.real_threshold])]
        if not np.isfinite(np.array(thresholds, np.float64)).all() or thresholds[-1] > thresholds[0]:
            raise ValueError("the thresholds must be numbers, that for real not above that for AI")
        if (self.real_threshold is None) != (self.fnr is None):
            raise ValueError("fnr and real_threshold belong together")
        for name, rate in (("fpr", self.fpr), ("fnr", self.fnr)):
            if rate is not None and not 0 < rate < 1:
                raise ValueError(f"{name} is {rate}, not between 0 and 1")
        if self.method == PLATT:
            slope, intercept = self.parameters["slope"], self.parameters["intercept"]
            if not (0 < slope < math.inf and math.isfinite(intercept)):
                raise ValueError("platt needs a slope above 0 and an intercept")
        elif self.method == ISOTONIC:
            logits, heights = (
                np.array(self.parameters[name], np.float64) for name in ("logits", "probabilities")
            )
            within = np.isfinite(logits).all() and ((heights >= 0) & (heights <= 1)).all()
            if not (within and logits.ndim == 1 and logits.shape == heights.shape and logits.size):
                raise ValueError("isotonic needs as many logits as probabilities")
            if (np.diff(logits) <= 0).any() or (np.diff(heights) < 0).any():
                raise ValueError("logits and probabilities of isotonic must rise")
        elif self.method is not None:
            raise ValueError(f"unknown method {self.method}")

    @classmethod
    def load(cls, path: str | Path) -> "Calibrator":
        """Read a file that `save` wrote.

        Raises:
            UserError: it is missing, of another kind or version, or damaged.
        """
        record = read_record(path, _REMEDY, format=FORMAT, version=FORMAT_VERSION)
        if record is None:
            raise UserError(f"calibrator {path} does not exist; {_REMEDY}")
        try:
            return cls(**{one.name: record[one.name] for one in fields(cls)})
        except (ValueError, KeyError, TypeError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else error
            raise UserError(f"calibrator {path} is damaged: {what}; {_REMEDY}") from error

    def save(self, path: str | Path) -> None:
        """Write a JSON file, completely or not at all."""
        atomic.write_json(path, {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)})

    def check(self, made_from: Mapping[str, Any] | None, where: str) -> None:
        """Raise a `UserError` unless scores come from the ensemble that this was fitted for.

        The name of a single expert does not count: it is that of a folder or repository.

        Args:
            made_from: the sidecar of predictions or `Predictor.sidecar()`; None if it is not known, which is
                accepted.
            where: what has the scores, for the message.
        """
        requested = made_for(made_from)
        if self.made_for is None or requested is None:
            return
        if changes := differences(_with_name_of(requested, self.made_for), requested):
            raise UserError(
                f"the calibrator was fitted for other scores than those of {where}: {changes[0]}; {_REMEDY}"
            )

    def settings(self) -> dict[str, Any]:
        """Return what decides verdicts and probabilities, as plain JSON."""
        return {
            "thresholds": {"real": self.real_threshold, "AI": self.ai_threshold},
            "promise": self.promise(),
            "calibrator": {"method": self.method, "parameters": self.parameters},
        }

    def probability(self, logits: np.ndarray) -> np.ndarray:
        """Return P(AI), (N,) float64 in [0, 1], for (N,) logits; the plain sigmoid if `method` is None.

        It is calibrated for images of which as many are AI-generated as were when it was fitted.
        """
        return mapped(self.method, self.parameters, logits)

    def verdicts(self, logits: np.ndarray) -> np.ndarray:
        """Return `real`, `unsure` or `AI`, (N,) text, for (N,) logits.

        Raises:
            ValueError: a logit is NaN.
        """
        return verdicts_of(logits, self.ai_threshold, self.real_threshold)

    def promise(self) -> str:
        """Return the promise as one sentence."""
        rest = "" if self.fnr is None else f", and at most {share(self.fnr)} of such AI-generated images real"
        groups = f", in each group by {' and '.join(self.by)}" if self.by else ""
        return (
            f"At most {share(self.fpr)} of real images like those it was calibrated on are called AI{rest}"
            f"{groups}."
        )


def _with_name_of(requested: Mapping[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return `MADE_FOR` of one expert under the requested name; of several experts, as it is."""
    if not len(own["experts"]) == len(requested["experts"]) == 1:
        return own
    (name,) = requested["experts"]
    return own | {
        key: dict(zip([name], own[key].values(), strict=False)) for key in ("experts", "preprocessing")
    }


def verdicts_of(logits: np.ndarray, ai_threshold: float, real_threshold: float | None) -> np.ndarray:
    """Return the verdicts by two thresholds; see `Calibrator.verdicts`."""
    logits = np.asarray(logits, np.float64)
    if np.isnan(logits).any():
        raise ValueError("a logit is NaN")
    low = -math.inf if real_threshold is None else real_threshold
    return np.select([logits > ai_threshold, logits < low], [AI, REAL], UNSURE)


def mapped(method: str | None, parameters: Mapping[str, Any], logits: np.ndarray) -> np.ndarray:
    """Return P(AI) of (N,) logits by a method with these parameters; the plain sigmoid without a method."""
    logits = np.asarray(logits, np.float64)
    if method == ISOTONIC:
        return np.interp(logits, parameters["logits"], parameters["probabilities"])
    return expit(parameters["slope"] * logits + parameters["intercept"] if method == PLATT else logits)


def made_for(sidecar: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return `MADE_FOR` of a sidecar, or None without one; earlier versions did not record `tta`."""
    if not sidecar or not sidecar.get("experts"):
        return None
    return {name: sidecar.get(name, "none" if name == "tta" else None) for name in MADE_FOR}


def share(rate: float) -> str:
    """Return `5 %` for 0.05."""
    return f"{100 * rate:.4g} %"
