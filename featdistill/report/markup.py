"""HTML and SVG as text in which everything is escaped that was not made here.

A name of an image, an expert or a generator may hold anything, markup too. So text becomes part of a page by
`element` only, which escapes whatever is not already `Html`.
"""

import functools
import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

TEMPLATES = Path(__file__).with_name("templates")

Content = str | Iterable["Content"] | None

_VOID = ("img", "input", "link", "meta")
# Characters that no HTML text may hold (HTML standard, 13.2.3.5), among them what is left of broken UTF-8.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def render(template: str, /, folder: str | Path = TEMPLATES, **values: Any) -> str:
    """Fill in a template, such as `page.html` or `audit.md`.

    Every value in an HTML template is escaped, unless it is `Markup`: the result of another template.

    Args:
        template: file name in `folder`. Templates of other folders can also use those of this package.
        values: what the template refers to; a name that it does not find is an error.
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
    environment.filters |= {"number": number, "share": share}
    return environment


class Html(str):
    """Markup that is finished and is put into a page as it is; all other text is escaped."""

    __slots__ = ()


def escape(content: Content) -> Html:
    """Return text, or any nesting of texts and finished markup, as markup; None is nothing."""
    if content is None:
        return Html()
    if isinstance(content, Html):
        return content
    if isinstance(content, str):
        return Html(html.escape(_FORBIDDEN.sub("\ufffd", content)))
    return Html("".join(escape(part) for part in content))


def element(name: str, /, *content: Content, **attributes: str | int | float | bool | None) -> Html:
    """Return an element with its content.

    Args:
        attributes: `class_` is `class`, and `aria_label` is `aria-label`; None and False leave one out, True
            gives it no value.
    """
    head = name
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            head += f" {key}"
        elif value is not None and value is not False:
            head += f' {key}="{escape(str(value))}"'
    return Html(f"<{head}>" if name in _VOID else f"<{head}>{escape(content)}</{name}>")


def table(
    caption: str, header: Sequence[str], rows: Iterable[Sequence[Content]], *, text: Sequence[int] = ()
) -> Html:
    """Return a table in a region of its own that scrolls.

    Args:
        rows: the first cell of each names the row.
        text: numbers of further columns that hold text, set to the left; numbers are set to the right.
    """
    left = (0, *text)
    head = [
        element("th", title, scope="col", class_="text" if column in left else None)
        for column, title in enumerate(header)
    ]
    lines = []
    for row in rows:
        cells = [
            element("td", cell, class_="text" if column in left else None)
            for column, cell in enumerate(row[1:], start=1)
        ]
        lines.append(element("tr", element("th", named(row[0]), scope="row", class_="text"), cells))
    body = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", head)),
        element("tbody", lines),
    )
    return scrolling(caption, body)


def scrolling(name: str, content: Content) -> Html:
    """Return a region that scrolls, by the keyboard too, where its content is too wide."""
    return element("div", content, class_="scroll", tabindex=0, role="region", aria_label=name)


def named(name: Content) -> Html:
    """Return a name set apart, so that right-to-left characters in it do not turn what stands about it."""
    return element("bdi", name)


def data_table(caption: str, header: Sequence[str], rows: Iterable[Sequence[Content]]) -> Html:
    """Return the data of a chart as a table that is closed at first."""
    return element("details", element("summary", "Data as a table"), table(caption, header, rows))


def number(value: float | None, digits: int = 4) -> str:
    """Return a number, or n/a where it is not defined."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def share(value: float | None) -> str:
    """Return a share as a percentage, or n/a where it is not defined."""
    return "n/a" if value is None else f"{100 * value:.1f} %"


def measured(value: float | None, low: float | None = None, high: float | None = None) -> Content:
    """Return a number with its interval below it, where one was drawn."""
    interval = bounds(low, high)
    return (number(value), element("small", interval)) if interval else number(value)


def interval_note(splits: Iterable[dict]) -> Html | None:
    """Return what `measured` shows, where an interval of one of the splits was drawn."""
    drawn = any(low is not None for split in splits for low, _ in split["intervals"].values())
    return element("p", "Below an AUC stands its 95 % interval.", class_="note") if drawn else None


def bounds(low: float | None, high: float | None) -> str:
    """Return an interval, or nothing where none was drawn."""
    return "" if low is None or high is None else f"{low:.4f} to {high:.4f}"
