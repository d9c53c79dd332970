"""How much a score and its verdict change when a picture is delivered again: thumbnails, codecs, messengers.

Copies of a picture are drawn from the preset `redelivery` (`featdistill.distortions`), as a function of the
seed and the picture's name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from featdistill.calibration.calibrator import AI, REAL, UNSURE, Calibrator
from featdistill.command_line import UserError, counted
from featdistill.records.logits import logits_of

PRESET, SEED = "redelivery", 0
# Ours: enough to see a share of 1 in 4 with a standard error of 0.1.
DEFAULT_COPIES = 20
MAX_COPIES = 1000
# Ours: a score whose logit is closer to a threshold than this is near it.
NEAR_LOGITS = 2.0
_OPPOSITE = {REAL: AI, AI: REAL}


class Request(NamedTuple):
    """What `--stability` asks for: the number of copies of an image, and whether only of near scores."""

    copies: int
    near: bool = False


@dataclass(frozen=True)
class Stability:
    """What became of a score in the copies of its picture.

    Attributes:
        copies: how many there are.
        mean: of their scores P(AI).
        spread: standard deviation of their scores.
        flips: share of the copies that get another verdict than the picture; None without a calibrator.
        reversals: share of the copies that get the opposite verdict, AI for real or real for AI.
    """

    copies: int
    mean: float
    spread: float
    flips: float | None = None
    reversals: float | None = None

    def sentence(self) -> str:
        """Return what became of the score, in plain words."""
        average = f"{self.mean:.2f} on average, give or take {self.spread:.2f}"
        text = f"In {self.copies} re-delivered copies, P(AI) is {average}."
        if self.flips is None:
            return text
        changed = round(self.flips * self.copies)
        if not changed:
            return f"{text} The verdict stays the same in all of them."
        opposite = round(self.reversals * self.copies)
        return f"{text} The verdict changes in {changed} of them, to the opposite in {opposite or 'none'}."


def parse_request(text: str) -> Request:
    """Read `N`, `near` or `near:N`.

    Raises:
        UserError: it is none of them, or N is not from 2 to 1000.
    """
    kind, separator, number = text.partition(":")
    near = kind == "near"
    number = number if separator else str(DEFAULT_COPIES) if near else text
    valid = number.isascii() and number.isdigit() and 2 <= int(number) <= MAX_COPIES
    if not valid or (separator and not near):
        raise UserError(
            f"--stability must be a number of copies from 2 to {MAX_COPIES}, near, or near:N, not {text}"
        )
    return Request(int(number), near)


def check_request(request: Request | None, calibrator: Calibrator | None) -> None:
    """Raise a `UserError` if near scores are requested without thresholds."""
    if request and request.near and not calibrator:
        raise UserError("--stability near needs --calibrator, whose thresholds scores can be near to")


def copy_names(name: str, copies: int) -> list[str]:
    """Return the names of an image's copies, from which they are drawn."""
    return [f"{name}#{number}" for number in range(1, copies + 1)]


def is_near(logits: np.ndarray, calibrator: Calibrator) -> np.ndarray:
    """Tell which of (N,) logits are within `NEAR_LOGITS` of a threshold, (N,) bool."""
    thresholds = [calibrator.ai_threshold]
    if calibrator.real_threshold is not None:
        thresholds.append(calibrator.real_threshold)
    distances = np.abs(np.subtract.outer(np.asarray(thresholds, np.float64), logits))
    return distances.min(axis=0) <= NEAR_LOGITS


def stability_of(score: float, copies: np.ndarray, calibrator: Calibrator | None = None) -> Stability:
    """Compare the scores of an image's copies, (N,) P(AI), with that of the image."""
    shares: list[float | None] = [None, None]
    if calibrator:
        own = calibrator.verdicts(logits_of(np.array([score])))[0]
        verdicts = calibrator.verdicts(logits_of(copies))
        shares = [float((verdicts != own).mean()), float((verdicts == _OPPOSITE.get(own)).mean())]
    return Stability(len(copies), float(copies.mean()), float(copies.std()), *shares)


def flip_rates(scores: np.ndarray, copies: Sequence[np.ndarray], calibrator: Calibrator) -> dict[str, Any]:
    """Return how often copies of decided images, those called real or AI, get another verdict.

    Args:
        scores: (N,) P(AI) of images.
        copies: of each, P(AI) of its copies.

    Returns:
        `flips` and `reversals` (to the opposite verdict), each a dict with `rate`, its 95 % interval `low` to
        `high` (normal, over images, whose copies are not independent), and `n`, the decided images; all but
        `n` are None if there are none.
    """
    verdicts = calibrator.verdicts(logits_of(scores))
    found = [
        stability_of(score, own, calibrator)
        for score, own, verdict in zip(scores, copies, verdicts, strict=True)
        if verdict != UNSURE
    ]
    shares = {"flips": [one.flips for one in found], "reversals": [one.reversals for one in found]}
    return {name: _mean_with_interval(np.array(values)) for name, values in shares.items()}


def flip_sentence(rates: dict[str, Any], near: bool) -> str:
    """Return the result of `flip_rates` in words; `near` tells whether only near scores have copies."""
    flips, reversals = rates["flips"], rates["reversals"]
    if not flips["n"]:
        return "No image with re-delivered copies is decided, so no verdict can flip."
    where = " near a threshold" if near else ""
    interval = f"[{100 * flips['low']:.1f}, {100 * flips['high']:.1f}]"
    return (
        f"Of the re-delivered copies of {counted(flips['n'], 'decided image')}{where}, "
        f"{100 * flips['rate']:.1f} % {interval} get another verdict, "
        f"{100 * reversals['rate']:.1f} % the opposite one."
    )


def _mean_with_interval(values: np.ndarray) -> dict[str, Any]:
    if not len(values):
        return {"rate": None, "low": None, "high": None, "n": 0}
    mean, error = values.mean(), values.std() / np.sqrt(len(values))
    low, high = np.clip([mean - 1.96 * error, mean + 1.96 * error], 0, 1).tolist()
    return {"rate": float(mean), "low": low, "high": high, "n": len(values)}
