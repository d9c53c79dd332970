"""Where data are drawn in a chart: axes, lines and ticks."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# Width of a chart in units; a phone shows it at about that many pixels.
WIDTH = 340
# Lines are drawn to half a unit: less cannot be seen, and 12,500 images would fill the page with numbers.
_RESOLUTION = 0.5


class Axis(NamedTuple):
    """An axis with its title, range and ticks, each (value, text)."""

    title: str
    low: float
    high: float
    ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class Axes:
    """Both axes, and the rectangle of the chart that they fill."""

    x: Axis
    y: Axis
    is_log: bool = False
    left: float = 52
    top: float = 28
    width: float = WIDTH - 52 - 12
    height: float = 210

    def across(self, x: np.ndarray | float) -> np.ndarray:
        """Return horizontal positions of values; those below the axis' range are at its start."""
        values, low, high = np.maximum(np.asarray(x, dtype=np.float64), self.x.low), self.x.low, self.x.high
        if self.is_log:
            values, low, high = np.log10(values), math.log10(low), math.log10(high)
        return self.left + self.width * (values - low) / (high - low)

    def down(self, y: np.ndarray | float) -> np.ndarray:
        """Return vertical positions of values."""
        share = (np.asarray(y, dtype=np.float64) - self.y.low) / (self.y.high - self.y.low)
        return self.top + self.height * (1 - share)

    def line(self, x: np.ndarray, y: np.ndarray) -> str:
        """Return the commands of an SVG path through points, without points that make no visible difference.

        On a logarithmic axis, points are added where a line that is straight in the data is bent.
        """
        if self.is_log:
            grid = np.geomspace(self.x.low, self.x.high, 100)
            x, y = np.concatenate([x, grid]), np.concatenate([y, np.interp(grid, x, y)])
            order = np.lexsort((y, x))
            x, y = x[order], y[order]
        points = np.stack([self.across(x), self.down(y)], axis=1)
        points = np.round(points / _RESOLUTION) * _RESOLUTION
        points = points[np.r_[True, (np.diff(points, axis=0) != 0).any(axis=1)]]
        if len(points) > 2:
            unchanged = np.diff(points, axis=0) == 0
            is_between = (unchanged[1:] & unchanged[:-1]).any(axis=1)
            points = points[np.r_[True, ~is_between, True]]
        return "M" + "L".join(f"{left:g},{top:g}" for left, top in points)


def round_axis(title: str, low: float = 0.0, high: float = 1.0, *, is_share: bool = False) -> Axis:
    """Return an axis with ticks at round numbers, printed as percentages if it shows shares."""
    texts = (f"{100 * tick:g} %" if is_share else f"{tick:g}" for tick in round_ticks(low, high))
    return Axis(title, low, high, list(zip(round_ticks(low, high), texts, strict=True)))


def round_ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers within a range."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Rounded, so that 3 * 0.1 is 0.3.
    return [round(count * step, 12) for count in range(first, last + 1)]
