"""Labels of predictions, from a manifest or an official label file, and the two side by side.

`read_labels` reads either; `labelled` joins them to a predictions file for whoever needs scores and labels:
metrics, comparisons, the fit of a fusion.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from featdistill.command_line import UserError
from featdistill.records import label_files
from featdistill.records.manifest import parse_distortions, read_manifest
from featdistill.records.predictions import (
    manifest_of,
    match_names,
    name_list,
    read_errors,
    read_predictions,
    to_numbers,
)

# The distortions of an image in the order of application, each with its scale; None where that is no number.
Chain = tuple[tuple[str, float | None], ...]


def read_labels(path: str | Path) -> pd.DataFrame:
    """Read a manifest or an official label file (`image_name,label`, and for val and test the distortions).

    Returns:
        A frame with `name`; `label` (int8: 0, 1, -1 not known); `is_distorted` (likewise); `image`, `source`,
        `generator` and `group` (text, empty where not known); `chain` (a `Chain`); `width` and `height` in px
        (float64, NaN where the manifest has no such columns). `frame.attrs["path"]` is the file.

    Raises:
        UserError: the file is missing or neither of the two, a name appears twice, or a cell cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"labels {path} do not exist")
    header = _header(path)
    if "image" in header and "name" in header:
        frame = read_manifest(path)
    elif "image_name" in header and "label" in header:
        frame = label_files.read_labels(str(path)).rename(columns={"image_name": "name"})
    else:
        raise UserError(
            f"{path} is neither a manifest (image,name,label,...) nor an official label file "
            f"(image_name,label,...); its columns are {','.join(header)}"
        )
    frame = frame.reset_index(drop=True)
    found = pd.DataFrame({"name": frame["name"].astype("object")})
    for column in ("label", "is_distorted"):
        found[column] = frame[column].astype("Int8").fillna(-1).astype("int8")
    for column in ("image", "source", "generator", "group"):
        found[column] = frame[column].astype("object") if column in frame else ""
    found["chain"] = pd.Series(_chains(frame["distortions"], path), dtype="object")
    for column in ("width", "height"):
        found[column] = to_numbers(frame[column]) if column in frame else np.nan
    found.attrs["path"] = str(path)
    return found


def source_of(predictions: str | Path, labels: str | Path | None = None) -> Path:
    """Return where the labels of a predictions file are: `labels`, or the manifest that its sidecar names.

    Raises:
        UserError: neither is there.
    """
    source = Path(labels) if labels is not None else manifest_of(predictions)
    if source is None:
        raise UserError(
            f"{predictions} has no sidecar that names a manifest; say with --labels where its labels are"
        )
    return source


def label_rows(predictions: pd.DataFrame, labels: pd.DataFrame) -> np.ndarray:
    """Return for each row of `read_predictions` the number of its row in `read_labels`.

    Raises:
        UserError: a name is not among the labels, or two names mean one image.
    """
    path, source = predictions.attrs["path"], labels.attrs["path"]
    names = predictions["name"].to_numpy(dtype=object)
    rows = match_names(names.tolist(), labels["name"].tolist())
    unknown = names[rows < 0]
    if len(unknown):
        raise UserError(f"{path}: names that are not in {source} ({len(unknown)}): {name_list(unknown)}")
    twice = names[pd.Series(rows).duplicated().to_numpy()]
    if len(twice):
        raise UserError(f"{path}: names of images that have a row already ({len(twice)}): {name_list(twice)}")
    return rows


def count_unreadable(predictions: pd.DataFrame, labels: pd.DataFrame, covered: np.ndarray) -> int:
    """Return how many images have labels and no prediction because they could not be read.

    Args:
        covered: numbers of the rows of `labels` that have a prediction.

    Raises:
        UserError: an image has none, and the list of unreadable ones does not name it.
    """
    path = predictions.attrs["path"]
    absent = np.delete(labels["name"].to_numpy(dtype=object), covered)
    listed = match_names([name for name, _ in read_errors(path)], absent.tolist())
    lost = np.delete(absent, listed[listed >= 0])
    if len(lost):
        source = labels.attrs["path"]
        raise UserError(f"{path}: images of {source} without a prediction ({len(lost)}): {name_list(lost)}")
    return len(absent)


def join(predictions: pd.DataFrame, labels: pd.DataFrame, rows: np.ndarray) -> pd.DataFrame:
    """Return the labels of the predicted images, in the order of the predictions, with their scores.

    Returns:
        The columns of `labels`, `score`, and a column an expert, called `expert <name>`, so that none is
        taken for a column of the labels; `frame.attrs["experts"]` has the names.
    """
    frame = labels.iloc[rows].reset_index(drop=True)
    frame["score"] = predictions["score"].to_numpy()
    names = [name for name in predictions if name not in ("name", "score")]
    scores = {f"expert {name}": predictions[name].to_numpy() for name in names}
    frame = pd.concat([frame, pd.DataFrame(scores, index=frame.index)], axis=1)
    frame.attrs |= {"experts": names, "predictions": predictions.attrs["path"], "path": labels.attrs["path"]}
    return frame


def labelled(predictions: str | Path, labels: str | Path | None = None) -> pd.DataFrame:
    """Return what `join` does for the images of a predictions file whose label is known.

    Labels without a prediction are ignored.

    Raises:
        UserError: as `source_of`, `read_labels` and `label_rows`, or no image has a label.
    """
    truth, frame = read_labels(source_of(predictions, labels)), read_predictions(predictions)
    found = join(frame, truth, label_rows(frame, truth))
    found = found[found["label"] >= 0].reset_index(drop=True)
    if found.empty:
        raise UserError(f"{predictions}: no image has a label in {truth.attrs['path']}")
    return found


def _header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file, strict=True), None)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no readable CSV in UTF-8: {error}") from error
    if header is None:
        raise UserError(f"{path} is empty")
    return [column.strip() for column in header]


def _chains(cells: Sequence[str], path: Path) -> list[Chain]:
    """Parse the cells, those of equal text once."""
    chains: dict[str, Chain] = {}
    for cell in cells:
        if cell not in chains:
            try:
                chains[cell] = tuple((str(name), _scale(scale)) for name, scale in parse_distortions(cell))
            except (ValueError, TypeError) as error:
                raise UserError(f"{path}: distortions {cell!r} are no JSON list of [name, scale]") from error
    return [chains[cell] for cell in cells]


def _scale(scale: object) -> float | None:
    return scale if isinstance(scale, (int, float)) else None
