"""HTML from templates in which every value is escaped, and the filters that format numbers in them.

The name of an image, an expert or a generator may contain anything, markup too.
"""

import functools
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from featdistill.command_line import counted

TEMPLATES = Path(__file__).with_name("templates")
# Characters that HTML text must not contain (HTML standard, 13.2.3.5), surrogates of broken UTF-8 included.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")

# Titles of the two cells of `content_cells`.
CONTENT_COLUMNS = ["content control", "exceeds it by"]


def render(template: str, /, folder: str | Path = TEMPLATES, **values: Any) -> str:
    """Fill in a template, such as `page.html` or `audit.md`.

    Every value in an HTML template is escaped, unless it is `Markup`: the result of another template.

    Args:
        template: file name in `folder`. Templates of other folders can also use those of this package.
        values: what the template refers to; a name that is missing here is an error.
    """
    text = _environment(Path(folder)).get_template(template).render(values)
    return Markup(_FORBIDDEN.sub("\ufffd", text)) if template.endswith(".html") else text


@functools.cache
def _environment(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "share": share, "interval": interval, "integer": integer}
    environment.filters |= {"shorten": shorten, "units": units, "counted": counted}
    return environment


def number(value: float | None, digits: int = 4) -> str:
    """Format a number; n/a if it is not defined."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def share(value: float | None, digits: int = 1) -> str:
    """Format a share as a percentage; n/a if it is not defined."""
    return "n/a" if value is None else f"{100 * value:.{digits}f} %"


def integer(value: int) -> str:
    """Format a count with separators of thousands."""
    return f"{value:,}"


def interval(low: float | None, high: float | None) -> str:
    """Format an interval; empty if there is none."""
    return "" if low is None or high is None else f"{low:.4f} to {high:.4f}"


def with_interval(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """Format a number with its interval in small type below it, for a cell of a table."""
    text = interval(low, high)
    return Markup("{}<small>{}</small>").format(number(value), text) if text else number(value)


def difference(value: float | None, low: float | None, high: float | None) -> str:
    """Format a difference as `with_interval`, with its sign."""
    if value is None or low is None or high is None:
        return "n/a" if value is None else f"{value:+.4f}"
    return Markup("{}<small>{} to {}</small>").format(f"{value:+.4f}", f"{low:+.4f}", f"{high:+.4f}")


def content_cells(content: dict | None) -> list[str]:
    """Format the content control next to an AUC and what the AUC exceeds it by, as two cells of a table."""
    if content is None:
        return ["", ""]
    exceeds = (content[key] for key in ("exceeds", "exceeds_low", "exceeds_high"))
    return [with_interval(content["auc"], content["low"], content["high"]), difference(*exceeds)]


def shorten(name: str, length: int) -> str:
    """Cut a name off at `length` characters."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def units(value: float) -> str:
    """Format a coordinate of a chart to a tenth of a unit, less than which cannot be seen."""
    return f"{round(float(value), 1):g}"
