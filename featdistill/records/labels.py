"""The labels that predictions are measured against: read from a manifest or a label file, joined by name."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from featdistill import remote_files
from featdistill.command_line import UserError
from featdistill.records import label_files
from featdistill.records.manifest import parse_distortions, read_manifest
from featdistill.records.parts import has_parts
from featdistill.records.predictions import (
    manifest_of,
    match_names,
    name_list,
    read_errors,
    read_predictions,
    to_numbers,
)
from featdistill.records.strata import require_column

# The distortions of an image in order of application, each with its scale (None if that is not a number).
Chain = tuple[tuple[str, float | None], ...]


def read_labels(path: str | Path, columns: Iterable[str] = ()) -> pd.DataFrame:
    """Read a manifest or an official label file (`image_name,label`, perhaps distortions).

    Args:
        columns: further columns of the file to read.

    Returns:
        A frame with `name`; `label` and `is_distorted` (int8: 0, 1, -1 unknown); `image`, `source`,
        `generator` and `group` (text, empty if unknown); `chain` (a `Chain`); `width` and `height` in px
        (float64, NaN if unknown); and each of `columns` as `column NAME`, as in the file, so as not to clash
        with the others. `frame.attrs["path"]` is the file.

    Raises:
        UserError: the file is missing or neither of the two, a name appears twice, a cell cannot be read, or
            one of `columns` is missing.
    """
    path = remote_files.located(path)
    header = [] if has_parts(path) else _header(path)
    if has_parts(path) or ("image" in header and "name" in header):
        frame = read_manifest(path)
    elif "image_name" in header and "label" in header and isinstance(path, Path):
        frame = label_files.read_labels(str(path)).rename(columns={"image_name": "name"})
    else:
        raise UserError(
            f"{path} is neither a manifest (image,name,label,...) nor an official label file "
            f"(image_name,label,...); its columns are {','.join(header)}"
        )
    frame = frame.reset_index(drop=True)
    labels = pd.DataFrame({"name": frame["name"].astype("object")})
    for column in ("label", "is_distorted"):
        labels[column] = frame[column].astype("Int8").fillna(-1).astype("int8")
    for column in ("image", "source", "generator", "group"):
        labels[column] = frame[column].astype("object") if column in frame else ""
    labels["chain"] = pd.Series(_chains(frame["distortions"], path), dtype="object")
    for column in ("width", "height"):
        labels[column] = to_numbers(frame[column]) if column in frame else np.nan
    for column in columns:
        labels[f"column {column}"] = require_column(frame, column, str(path))
    labels.attrs["path"] = str(path)
    return labels


def _header(path: str | Path) -> Sequence[str]:
    source = io.BytesIO(remote_files.read(path)) if isinstance(path, str) else path
    if source is path and not path.is_file():
        raise UserError(f"labels {path} do not exist")
    try:
        return pd.read_csv(source, nrows=0, dtype=str, encoding="utf-8-sig").columns.str.strip()
    except ValueError as error:
        raise UserError(f"{path} is not a readable CSV in UTF-8: {error}") from error


def source_of(predictions: str | Path, labels: str | Path | None = None) -> str | Path:
    """Return where the labels of a predictions file are: `labels`, or the manifest named in its sidecar.

    Raises:
        UserError: there is neither, or no such predictions file.
    """
    source = labels if labels is not None else manifest_of(predictions)
    if source is None and not Path(predictions).exists():
        raise UserError(f"predictions {predictions} do not exist")
    if source is None:
        raise UserError(f"{predictions} has no sidecar naming its manifest; use --labels")
    return remote_files.located(source)


def label_rows(predictions: pd.DataFrame, labels: pd.DataFrame) -> np.ndarray:
    """Return the row in `read_labels` of each row of `read_predictions`.

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
        raise UserError(f"{path}: names of images that already have a row ({len(twice)}): {name_list(twice)}")
    return rows


def count_unreadable(predictions: pd.DataFrame, labels: pd.DataFrame, covered: np.ndarray) -> int:
    """Return how many labeled images lack a prediction because they could not be read.

    Args:
        covered: the rows of `labels` that have a prediction.

    Raises:
        UserError: an image without a prediction is not in the list of unreadable ones.
    """
    path = predictions.attrs["path"]
    absent = np.delete(labels["name"].to_numpy(dtype=object), covered)
    listed = match_names([name for name, _ in read_errors(path)], absent.tolist())
    lost = np.delete(absent, listed[listed >= 0])
    if len(lost):
        images = f"images of {labels.attrs['path']} without a prediction"
        raise UserError(f"{path}: {images} ({len(lost)}): {name_list(lost)}")
    return len(absent)


def join(predictions: pd.DataFrame, labels: pd.DataFrame, rows: np.ndarray) -> pd.DataFrame:
    """Return the labels of the predicted images, in the order of the predictions, with their scores.

    Returns:
        The columns of `labels`, `score`, and one column per expert, called `expert <name>` so as not to clash
        with the labels; `frame.attrs["experts"]` has the names.
    """
    frame = labels.iloc[rows].reset_index(drop=True)
    frame["score"] = predictions["score"].to_numpy()
    names = [name for name in predictions if name not in ("name", "score")]
    scores = {f"expert {name}": predictions[name].to_numpy() for name in names}
    frame = pd.concat([frame, pd.DataFrame(scores, index=frame.index)], axis=1)
    frame.attrs |= {"experts": names, "predictions": predictions.attrs["path"], "path": labels.attrs["path"]}
    return frame


def labeled(predictions: str | Path, labels: str | Path | None = None) -> pd.DataFrame:
    """Join a predictions file and its labels, see `join`, for the images whose label is known.

    Raises:
        UserError: as `source_of`, `read_labels` and `label_rows`, or no image has a label.
    """
    truth, scores = read_labels(source_of(predictions, labels)), read_predictions(predictions)
    frame = join(scores, truth, label_rows(scores, truth))
    frame = frame[frame["label"] >= 0].reset_index(drop=True)
    if frame.empty:
        raise UserError(f"{predictions}: no image has a label in {truth.attrs['path']}")
    return frame


def _chains(cells: Sequence[str], path: Path) -> list[Chain]:
    """Parse cells, each distinct text once."""
    chains: dict[str, Chain] = {}
    for cell in cells:
        if cell not in chains:
            try:
                chains[cell] = tuple((str(name), _scale(scale)) for name, scale in parse_distortions(cell))
            except (ValueError, TypeError) as error:
                raise UserError(f"{path}: {cell!r} is not a JSON list of [distortion, scale]") from error
    return [chains[cell] for cell in cells]


def _scale(scale: object) -> float | None:
    return scale if isinstance(scale, (int, float)) else None
