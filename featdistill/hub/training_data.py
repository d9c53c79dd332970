"""What an expert was trained on, read from the manifests that its card names, as far as they still exist."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from featdistill.command_line import UserError, counted
from featdistill.records.manifest import DECISIVE_COLUMNS, fingerprint, read_manifest
from featdistill.text_tables import table

PARTS = {"train": "training", "unlabeled": "training without labels", "val": "hold-out"}
# Of a text about a license: whoever has such images may not do everything with them.
_RESTRICTED = re.compile(r"\bnc\b|non-?commercial|\bresearch\b|\bacademic\b", re.IGNORECASE)
_MAX_ROWS = 40


class Part(NamedTuple):
    """A manifest that a card names.

    Attributes:
        title: what it was for, one of the values of `PARTS`.
        file: its name without a folder.
        sha256: of its rows, as the card records it.
        rows: its rows; None if it is gone or has changed since.
        note: why there are no rows, or nothing.
    """

    title: str
    file: str
    sha256: str
    rows: pd.DataFrame | None
    note: str


def read_parts(card: dict[str, Any]) -> list[Part]:
    """Return the manifests named in the content of an `expert.json`."""
    # A bank's features depend on the images alone.
    columns = ["name"] if "probe" in card else DECISIVE_COLUMNS
    parts = []
    for key, title in PARTS.items():
        for entry in card.get("data", {}).get(key, []):
            rows, note = None, ""
            try:
                rows = read_manifest(entry["path"])
            except UserError:
                note = "not at hand when this page was written"
            if rows is not None and fingerprint(rows, columns) != entry["sha256"]:
                rows, note = None, "not the same now as in training"
            parts.append(Part(title, Path(entry["path"]).name, entry["sha256"], rows, note))
    return parts


def trained_rows(parts: list[Part]) -> pd.DataFrame | None:
    """Return all rows that were trained on, or None if some are not known."""
    frames = [part.rows for part in parts if part.title != PARTS["val"]]
    if not frames or any(frame is None for frame in frames):
        return None
    return pd.concat(frames, ignore_index=True)


def restricted(rows: pd.DataFrame) -> dict[str, int]:
    """Return the licenses that exclude commercial or other use, with the number of rows under each."""
    licenses = rows["licence"][rows["licence"].str.contains(_RESTRICTED)]
    return {str(text): int(count) for text, count in licenses.value_counts().items()}


def is_restricted(license_id: str) -> bool:
    """Return whether a license excludes commercial use, or says nothing that could contradict other terms."""
    return license_id in ("unknown", "other") or bool(_RESTRICTED.search(license_id))


def described(parts: list[Part]) -> str:
    """Return tables of the images by source and license, one per manifest."""
    texts = []
    for title, file, sha256, rows, note in parts:
        if rows is None:
            texts.append(
                f"**{file}** ({title}, SHA-256 {sha256[:12]}...): {note}, so it is not described here."
            )
            continue
        groups = rows.fillna({"label": -1}).groupby(["source", "licence"], sort=True)
        lines = []
        for (source, licence), group in groups:
            counts = [int((group["label"] == label).sum()) for label in (0, 1, -1)]
            counts.append(int((group["is_distorted"] == 1).fillna(False).sum()))
            lines.append([source or "not named", licence or "not recorded", *(f"{n:,}" for n in counts)])
        more = f"\n\n... and {counted(len(lines) - _MAX_ROWS, 'row')} more." if len(lines) > _MAX_ROWS else ""
        header = ("source", "license of the images", "real", "AI", "no label", "stored distorted")
        listed = table(header, lines[:_MAX_ROWS])
        texts.append(f"**{file}** ({title}): {counted(len(rows), 'image')}.\n\n{listed}{more}")
    return "\n\n".join(texts) or "The expert's card names no training data."
