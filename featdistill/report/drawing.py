"""What all drawings of the report are made of: an SVG with a name and a description, axes, lines and texts.

Colours are classes of `report.css`, so that a drawing follows the page from light to dark. What a drawing
shows stands in a table beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from featdistill.report.markup import Content, Html, element

# Units of a drawing's width, which a phone shows at about that many pixels.
WIDTH = 340
# A curve is drawn to half a unit: less cannot be seen, and 12,500 images would fill the page with numbers.
_GRAIN = 0.5

Ticks = Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Axes:
    """Where data lie in a drawing: the ranges of both axes, and the rectangle that they fill."""

    x: tuple[float, float]
    y: tuple[float, float]
    is_log: bool = False
    left: float = 52
    top: float = 28
    width: float = WIDTH - 52 - 12
    height: float = 210

    def across(self, x: np.ndarray | float) -> np.ndarray:
        """Return where values of the horizontal axis lie; what lies below its range is set on its end."""
        values, (first, last) = np.maximum(np.asarray(x, dtype=np.float64), self.x[0]), self.x
        if self.is_log:
            values, first, last = np.log10(values), math.log10(first), math.log10(last)
        return self.left + self.width * (values - first) / (last - first)

    def down(self, y: np.ndarray | float) -> np.ndarray:
        """Return where values of the vertical axis lie."""
        share = (np.asarray(y, dtype=np.float64) - self.y[0]) / (self.y[1] - self.y[0])
        return self.top + self.height * (1 - share)

    def size(self) -> tuple[float, float]:
        """Return width and height of a drawing that holds the axes, their ticks and titles."""
        return WIDTH, self.top + self.height + 44


def drawing(
    identity: str, title: str, description: str, size: tuple[float, float], *content: Content
) -> Html:
    """Return an SVG that screen readers take for one picture with a name and a description.

    One of `WIDTH` fills the place that it is given.
    """
    names = {part: f"{identity}-{part}" for part in ("title", "desc")}
    return element(
        "svg",
        element("title", title, id=names["title"]),
        element("desc", description, id=names["desc"]),
        content,
        id=identity,
        role="img",
        aria_labelledby=f"{names['title']} {names['desc']}",
        viewBox=f"0 0 {units(size[0])} {units(size[1])}",
        width=units(size[0]),
        height=units(size[1]),
        class_="fluid" if size[0] == WIDTH else None,
    )


def legend(rows: Sequence[tuple[str, Content]]) -> Html:
    """Return what the colours mean: (class of the colour, what it stands for)."""
    lines = [
        element("li", element("span", class_=f"key {name}", aria_hidden="true"), text) for name, text in rows
    ]
    return element("ul", lines, class_="legend")


def frame(
    axes: Axes, x_ticks: Ticks, y_ticks: Ticks, x_title: str, y_title: str, *, title_below: float = 0
) -> list[Html]:
    """Return the rectangle of the axes with grid lines, the texts of the ticks and the axes' titles."""
    right, bottom = axes.left + axes.width, axes.top + axes.height
    parts = [label(y_title, 4, 14, "start", "axis")]
    for tick, text in y_ticks:
        top = axes.down(tick)
        parts.append(path("grid", f"M{units(axes.left)},{units(top)}H{units(right)}"))
        parts.append(label(text, axes.left - 6, top + 4, "end"))
    for tick, text in x_ticks:
        left = axes.across(tick)
        parts.append(path("grid", f"M{units(left)},{units(bottom)}v4"))
        is_last = left > right - 10 and len(text) > 3
        parts.append(
            label(text, right + 10 if is_last else left, bottom + 18, "end" if is_last else "middle")
        )
    box = {"x": axes.left, "y": axes.top, "width": axes.width, "height": axes.height}
    parts.append(element("rect", **box, class_="frame"))
    parts.append(label(x_title, right, bottom + 37 + title_below, "end", "axis"))
    return parts


def line(name: str, axes: Axes, x: np.ndarray, y: np.ndarray) -> Html:
    """Return a line through points, without those that cannot be told from their neighbours."""
    points = np.stack([axes.across(x), axes.down(y)], axis=1)
    points = np.round(points / _GRAIN) * _GRAIN
    points = points[np.r_[True, (np.diff(points, axis=0) != 0).any(axis=1)]]
    if len(points) > 2:
        stays = np.diff(points, axis=0) == 0
        between = (stays[1:] & stays[:-1]).any(axis=1)
        points = points[np.r_[True, ~between, True]]
    return path(name, "M" + "L".join(f"{left:g},{top:g}" for left, top in points))


def path(name: str, commands: str) -> Html:
    """Return a path of a class."""
    return element("path", d=commands, class_=name)


def label(text: str, x: float, y: float, anchor: str, name: str | None = None) -> Html:
    """Return a line of text that starts, ends or has its middle at a place; `name` is its class."""
    return element("text", text, x=units(x), y=units(y), text_anchor=anchor, class_=name)


def short(name: str, most: int) -> str:
    """Return a name of so many characters at most."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def units(value: float) -> str:
    """Return a number as it is written into a drawing: less than a tenth of a unit cannot be seen."""
    return f"{round(float(value), 1):g}"


def round_ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers within a range."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Rounded, so that 3 * 0.1 is 0.3.
    return [round(count * step, 12) for count in range(first, last + 1)]
