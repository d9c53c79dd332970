"""Scores of a manifest in parts, as a folder of parts: any number of workers, on any machine, at any time.

For `photos/part-000007.parquet`, the folder of the output gets `part-000007.parquet`, whole or not at all:

| column | holds |
|---|---|
| `name` | as in the manifest |
| `score` | P(AI-generated) of all experts together; null if the image could not be read |
| the experts' names | P(AI-generated) by this expert alone |
| `error` | why the image could not be read, or null |
| `verdict`, `probability` | with a calibrator only |

The folder is the result and the journal: a worker takes a part that has no scores yet (see `leases`), scores
it and writes it. `predictions.json` says what the scores are made from, and each part which file of the
manifest. Scores depend on the place of an image in its part only, not on the worker.
"""

import json
import logging
import os
import random
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from featdistill.calibration import Calibrator
from featdistill.command_line import UserError, counted, progress
from featdistill.images.reading import check_access
from featdistill.inference.compute import full_memory_is_an_error
from featdistill.inference.leases import Leases
from featdistill.inference.predictor import Predictor
from featdistill.inference.scoring import score_dataset
from featdistill.records.logits import logits_of, probabilities
from featdistill.records.manifest import read_part
from featdistill.records.parts import RECORD, SUFFIX, Parts, table_bytes
from featdistill.records.provenance import as_json, claim
from featdistill.storage import Folder, is_remote

_log = logging.getLogger(__name__)
LEASES, VERDICTS = "leases", "verdicts"
LEASE_S = 60.0
_METADATA = b"featdistill"
_TEXT = ("name", "error", "verdict")
_MAX_WAIT_S = 5.0
# Parts that are compared with the manifest before any work; all of them are in the end.
_CHECKED_AT_START, _READERS = 32, 16
_REMOVE = "remove it and run the same command again"


def score_parts(
    predictor: Predictor,
    manifest: str,
    out: str,
    *,
    calibrator: Calibrator | None = None,
    lease_s: float = LEASE_S,
    show: bool = True,
) -> int:
    """Score parts until all are done, by this worker or by others; those of a killed one are taken over.

    Args:
        manifest, out: folders, or addresses of object storage.
        lease_s: seconds after which the part of a silent worker is taken over.
        show: whether to show a progress bar.

    Returns:
        1 if some images could not be read, else 0.

    Raises:
        UserError: the output was produced with different settings, or a part cannot be read.
    """
    parts, folder, leases = Parts(manifest), Folder(out), Leases(f"{out}/{LEASES}", lease_s)
    # Told to stop, as by a cluster that wants the machine back, a worker returns its part.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sidecar = _claim(predictor, parts, folder, calibrator)
    _check_marks(parts, folder, _sample(sorted(set(parts.names) - set(_missing(parts, folder)))))
    while missing := _missing(parts, folder):
        # Each worker in its own order, so that few try the same part.
        random.Random(leases.worker).shuffle(missing)
        held, took = leases.held(), False
        for name in missing:
            if lease := leases.take(name, held.get(name)):
                with leases.kept(lease):
                    _score_part(predictor, parts, name, folder, sidecar, calibrator, show)
                took = True
                break
        if not took:
            time.sleep(min(lease_s / 4, _MAX_WAIT_S))
    counts = _check_marks(parts, folder, parts.names)
    if others := sorted(set(folder.names(SUFFIX)) - set(parts.names)):
        _log.warning("%s also has scores that the manifest has no part for, such as %s", out, others[0])
    rows, broken = (sum(count[key] for count in counts) for key in ("rows", "errors"))
    _log.info("%s: finished; %s, %d of them could not be read", out, counted(rows, "image"), broken)
    return int(broken > 0)


def metadata(folder: Folder, name: str) -> dict[str, Any]:
    """Return what a part of the output says of itself: `rows`, `errors`, and of the manifest's part
    `manifest_sha256` and `manifest_mark` (see `Parts.mark`).

    Raises:
        UserError: it is not a part of an output.
    """
    try:
        with folder.open(name) as file:
            return json.loads(pq.read_metadata(file).metadata[_METADATA])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder.address}/{name} is not a part of predictions; {_REMOVE}") from error


def _sample(names: Sequence[str]) -> Sequence[str]:
    return names[:: -(-len(names) // _CHECKED_AT_START) or 1]


def _check_marks(parts: Parts, folder: Folder, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the metadata of parts, unless one has the scores of other rows than the manifest has now."""

    def checked(name: str) -> dict[str, Any]:
        found = metadata(folder, name)
        if found["manifest_mark"] != parts.mark(name):
            raise UserError(
                f"{folder.address}/{name} has the scores of other rows than {parts.where(name)}; "
                f"choose another --out, or {_REMOVE}"
            )
        return found

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(checked, names))


def _missing(parts: Parts, folder: Folder) -> list[str]:
    done = set(folder.names(SUFFIX))
    return [name for name in parts.names if name not in done]


def _claim(
    predictor: Predictor, parts: Parts, folder: Folder, calibrator: Calibrator | None
) -> dict[str, Any]:
    """Return what the output is made from, with no setting left open; the first worker decides."""
    if clash := sorted({*_TEXT, "score", "probability"} & set(predictor.names)):
        raise UserError(f"an expert must not be called {clash[0]}, which is a column of the predictions")
    requested = predictor.sidecar()
    if calibrator:
        requested[VERDICTS] = as_json(calibrator.settings())
    recorded = record_of(folder)
    if recorded is None:
        if existing := folder.names(SUFFIX):
            raise UserError(
                f"{folder.address} already holds {existing[0]}, but no {RECORD}; choose another --out"
            )
        settled = predictor.settle(requested, None)
        with full_memory_is_an_error():
            settled |= predictor.decide(read_part(parts, parts.names[0])[0])
        address = parts.folder.address
        content = {
            "manifest": address if is_remote(address) else os.path.abspath(address),
            "made_from": settled,
        }
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        folder.create(RECORD, text.encode())
        recorded = record_of(folder)
    settled = predictor.settle(requested, recorded["made_from"])
    claim(folder.address, recorded["made_from"], settled)
    return settled


def record_of(folder: Folder) -> dict[str, Any] | None:
    """Return the `manifest` of an output and what it is `made_from`; None if there is no record.

    Raises:
        UserError: the record is damaged.
    """
    try:
        record = json.loads(folder.read(RECORD))
        if isinstance(record["made_from"], dict) and isinstance(record["manifest"], str):
            return record
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{folder.address}/{RECORD} is not the record of predictions; choose another --out")


def _score_part(
    predictor: Predictor,
    parts: Parts,
    name: str,
    folder: Folder,
    sidecar: dict[str, Any],
    calibrator: Calibrator | None,
    show: bool,
) -> None:
    """Score one part and write it, unless another worker has done so meanwhile."""
    rows, stamp = read_part(parts, name)
    check_access(rows["image"])
    logits, reasons = _logits(predictor, rows, sidecar, Path(name).stem, show)
    columns: dict[str, Any] = {"name": rows["name"].tolist()}
    good = [index for index in range(len(rows)) if index not in reasons]
    fused = predictor.fusion.apply(logits[:, good], predictor.names)
    single = probabilities(logits[:, good])
    for title, values in {"score": fused, **dict(zip(predictor.names, single, strict=True))}.items():
        if not np.isfinite(values).all():
            where = columns["name"][good[int(np.argmin(np.isfinite(values)))]]
            raise UserError(f"{title} is not a finite number for {where}; check the expert's weights")
        columns[title] = _spread(values, good, len(rows))
    columns["error"] = [reasons.get(index) for index in range(len(rows))]
    if calibrator:
        fused_logits = logits_of(fused)
        columns["verdict"] = _spread(calibrator.verdicts(fused_logits), good, len(rows))
        columns["probability"] = _spread(calibrator.probability(fused_logits), good, len(rows))
    facts = {"rows": len(rows), "errors": len(reasons)}
    facts |= {"manifest_sha256": stamp.sha256, "manifest_mark": stamp.mark}
    # A column of nulls alone has the type of the others.
    types = {title: pa.string() if title in _TEXT else pa.float64() for title in columns}
    arrays = {title: pa.array(values, types[title]) for title, values in columns.items()}
    data = table_bytes(arrays, {_METADATA.decode(): json.dumps(facts)})
    if not folder.create(name, data):
        _log.info("%s was finished by another worker meanwhile", name)


def _logits(
    predictor: Predictor, rows: pd.DataFrame, sidecar: dict[str, Any], title: str, show: bool
) -> tuple[np.ndarray, dict[int, str]]:
    """Return logits (experts, N), NaN for an image that cannot be read, and why."""
    logits = np.full((len(predictor.names), len(rows)), np.nan, np.float32)
    reasons: dict[int, str] = {}
    batch_size = sidecar["batch_size"]
    with full_memory_is_an_error(), progress(len(rows), title, show=show) as bar:
        models = predictor.models(sidecar["precision"], batch_size)
        settings = predictor.settings() | {"batch_size": batch_size}
        for batch in score_dataset(models, predictor.dataset(rows), **settings):
            logits[:, batch.rows] = batch.logits
            reasons |= dict(batch.broken)
            bar.update(len(batch.rows) + len(batch.broken))
    return logits, reasons


def _spread(values: np.ndarray, rows: list[int], count: int) -> list[Any]:
    """Return a list of `count` values: those given at their rows, else None."""
    spread: list[Any] = [None] * count
    for row, value in zip(rows, values.tolist(), strict=True):
        spread[row] = value
    return spread
