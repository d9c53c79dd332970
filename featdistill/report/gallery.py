"""The most confident errors of a split as small pictures that are part of the page itself."""

import base64
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd

from featdistill.command_line import UserError, progress
from featdistill.evaluation.metrics import THRESHOLD
from featdistill.images.reading import BrokenImage, encode_jpeg, limit_side, read_image
from featdistill.records.manifest import read_manifest
from featdistill.records.predictions import manifest_of, match_names
from featdistill.report.markup import number

_SIDE_PX = 160
_QUALITY = 80


class ExpertMap(NamedTuple):
    """What parts of an image an expert looks at.

    Attributes:
        picture: (S, S, 3) uint8 RGB, the map over the image as the expert sees it.
        expert: its name.
        kind: what the map shows.
        probability: P(AI) according to this expert alone.
    """

    picture: np.ndarray
    expert: str
    kind: str
    probability: float


# Called with an image, (H, W, 3) uint8 RGB.
Explainer = Callable[[np.ndarray], ExpertMap]


def gallery(frame: pd.DataFrame, count: int, explainer: Explainer | None = None) -> tuple[dict, list[str]]:
    """Return the values of `gallery.html`: the errors of which the ensemble was most confident.

    Pictures are read from the path in the labels, or if the labels have none, from the path in the manifest
    that was predicted.

    Args:
        frame: as returned by `labels.join`, with scores in [0, 1].
        count: number of pictures per class.
        explainer: returns a map to be shown below each picture; None for no maps.

    Returns:
        `map`, one of the maps or None, and `sides`, real images first; and a line for each picture that could
        not be shown.
    """
    score, names = frame["score"].to_numpy(), frame["name"].to_numpy()
    is_ai = frame["label"].to_numpy() == 1
    locations = _locations(frame)
    sides, lost, maps = [], [], []
    for kind, title, is_wrong, order in (
        ("Real", "Real images with the highest P(AI)", ~is_ai & (score > THRESHOLD), -score),
        ("AI-generated", "AI-generated images with the lowest P(AI)", is_ai & (score <= THRESHOLD), score),
    ):
        rows = np.flatnonzero(is_wrong)
        # Ties are broken by name, so that the order of the rows does not matter.
        rows = rows[np.lexsort((names[rows].astype(str), order[rows]))][:count]
        pictures = []
        with progress(len(rows), f"explain, {kind}", show=explainer is not None) as bar:
            for row in rows:
                picture, reason = _picture(kind, frame.iloc[row], locations[row], explainer)
                pictures.append(picture)
                maps += [picture["map"]] if picture["map"] else []
                lost += [f"{names[row]}: {reason}"] if reason else []
                bar.update()
        sides.append({"title": title, "pictures": pictures, "errors": int(is_wrong.sum())})
    # All maps are of one expert and of one kind.
    return {"map": maps[0] if maps else None, "sides": sides, "threshold": THRESHOLD}, lost


def _locations(frame: pd.DataFrame) -> list[str]:
    locations = frame["image"].tolist()
    if any(locations):
        return locations
    try:
        manifest = manifest_of(frame.attrs["predictions"])
        rows = None if manifest is None else read_manifest(manifest)
    except UserError:
        # The labels came from elsewhere, so no figure depends on this manifest: only pictures are missing.
        rows = None
    if rows is None:
        return locations
    images = rows["image"].tolist()
    positions = match_names(frame["name"].tolist(), rows["name"].tolist())
    return [images[position] if position >= 0 else "" for position in positions]


def _picture(
    kind: str, row: pd.Series, location: str, explainer: Explainer | None
) -> tuple[dict, str | None]:
    """Return a picture and its caption, and why it could not be read, if so."""
    chain = ", ".join(name if scale is None else f"{name} {scale:g}" for name, scale in row["chain"])
    score = number(row["score"], 3)
    picture = {
        "name": row["name"],
        "score": score,
        "lines": [line for line in (row["generator"], chain) if line],
        "text": f"{kind} image {row['name']}, P(AI) {score}",
        "source": None,
        "map": None,
    }
    try:
        if not location:
            raise BrokenImage("the labels do not say where it is")
        image = read_image(location)
        picture["source"] = _data_url(image)
        if explainer:
            shown = explainer(image)
            picture["map"] = {**shown._asdict(), "source": _data_url(shown.picture)}
    except BrokenImage as error:
        return picture, str(error)
    return picture, None


def _data_url(image: np.ndarray) -> str:
    data = encode_jpeg(limit_side(image, _SIDE_PX), _QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode('ascii')}"
