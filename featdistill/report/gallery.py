"""The surest mistakes of a split as small pictures that stand in the page itself."""

import base64
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd

from featdistill.command_line import UserError, progress
from featdistill.evaluation.metrics import THRESHOLD
from featdistill.images.reading import BrokenImage, encode_jpeg, limit_side, read_image
from featdistill.records.labels import Chain
from featdistill.records.manifest import read_manifest
from featdistill.records.predictions import manifest_of, match_names
from featdistill.report.markup import Content, Html, element, named, number

_SIDE_PX = 160
_QUALITY = 80


class ExpertMap(NamedTuple):
    """What an expert makes of the parts of an image.

    Attributes:
        picture: (S, S, 3) uint8 RGB, the map over the image as the expert sees it.
        expert: its name.
        kind: what the map shows.
        probability: P(AI) by this expert alone.
    """

    picture: np.ndarray
    expert: str
    kind: str
    probability: float


# Takes an image (H, W, 3) uint8 RGB.
Explainer = Callable[[np.ndarray], ExpertMap]


def gallery(
    frame: pd.DataFrame, most: int, explainer: Explainer | None = None
) -> tuple[list[Html], list[str]]:
    """Return the pictures that the ensemble got wrong most surely.

    Args:
        frame: as `labels.join` gives it, with scores in [0, 1].
        most: of each class.
        explainer: gives a map that is shown below each picture; None for no maps.

    Returns:
        Two lists of pictures with their headings, real images first, and a line for each picture that could
        not be shown. A picture is looked for at the labels' path, or where these have none, at that of the
        manifest that was predicted.
    """
    score = frame["score"].to_numpy()
    is_ai = frame["label"].to_numpy() == 1
    # Ties are broken by the name: the order of the rows must change nothing.
    names = frame["name"].to_numpy()
    sides = (
        ("Real images with the highest P(AI)", "Real", ~is_ai & (score > THRESHOLD), -score),
        ("AI-generated images with the lowest P(AI)", "AI-generated", is_ai & (score <= THRESHOLD), score),
    )
    locations = _locations(frame)
    parts, lost, maps = [], [], []
    for title, kind, wrong, surest in sides:
        rows = np.flatnonzero(wrong)
        rows = rows[np.lexsort((names[rows].astype(str), surest[rows]))][:most]
        pictures = []
        with progress(len(rows), f"explain, {kind}", show=explainer is not None) as bar:
            for row in rows:
                picture, reason, found = _picture(kind, frame.iloc[row], locations[row], explainer)
                pictures.append(picture)
                lost += [f"{names[row]}: {reason}"] if reason else []
                maps += [found] if found else []
                bar.update()
        counted = f"{len(rows)} of {int(wrong.sum()):,} mistakes at {THRESHOLD} are shown."
        parts.append(element("h4", title))
        parts.append(element("p", counted if len(rows) else f"None is wrong at {THRESHOLD}.", class_="note"))
        parts += [element("ul", pictures, class_="gallery")] if pictures else []
    # They are all of one expert, and of one kind.
    return [*map(_map_note, maps[:1]), *parts], lost


def _map_note(found: ExpertMap) -> Html:
    text = f": {found.kind}, over the image as it sees it. It shows where the expert looks, not why it errs."
    return element("p", "Below each picture, of expert ", named(found.expert), text, class_="note")


def _locations(frame: pd.DataFrame) -> list[str]:
    found = frame["image"].tolist()
    if any(found):
        return found
    try:
        manifest = manifest_of(frame.attrs["predictions"])
        if manifest is None:
            return found
        rows = read_manifest(manifest)
    except UserError:
        # The labels came from elsewhere, so scores do not hang on this manifest: only pictures are missing.
        return found
    images = rows["image"].tolist()
    places = match_names(frame["name"].tolist(), rows["name"].tolist())
    return [images[place] if place >= 0 else "" for place in places]


def _picture(
    kind: str, row: pd.Series, location: str, explainer: Explainer | None
) -> tuple[Html, str | None, ExpertMap | None]:
    text = f"{kind} image {row['name']}, P(AI) {number(row['score'], 3)}"
    caption: list[Content] = [
        element("strong", number(row["score"], 3)),
        *(element("span", named(line)) for line in (row["generator"], _chain_text(row["chain"])) if line),
        element("span", named(row["name"]), class_="name"),
    ]
    reason, found = None, None
    try:
        if not location:
            raise BrokenImage("the labels do not say where it is")
        image = read_image(location)
        shown = [_inlined(image, text)]
        if explainer:
            found = explainer(image)
            own = number(found.probability, 3)
            shown.append(_inlined(found.picture, f"Expert {found.expert}, {found.kind}, P(AI) {own}"))
            caption.append(element("span", named(found.expert), f": {own}"))
    except BrokenImage as error:
        reason = str(error)
        shown = [element("p", "not found or not readable", class_="missing")]
    return element("li", element("figure", shown, element("figcaption", caption))), reason, found


def _inlined(image: np.ndarray, text: str) -> Html:
    data = encode_jpeg(limit_side(image, _SIDE_PX), _QUALITY)
    source = f"data:image/jpeg;base64,{base64.b64encode(data).decode('ascii')}"
    return element("img", src=source, alt=text)


def _chain_text(chain: Chain) -> str:
    return ", ".join(name if scale is None else f"{name} {scale:g}" for name, scale in chain)
