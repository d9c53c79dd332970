"""Folders with an exported graph: `onnx:DIR` among the experts."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from featdistill import atomic
from featdistill.command_line import UserError
from featdistill.data.preprocessing import Preprocessing
from featdistill.records.provenance import read_record
from featdistill.runtimes.graph import Graph, openvino_settings
from featdistill.runtimes.graph_expert import GraphExpert

PREFIX = "onnx:"
CARD_FILE, FORMAT = "export.json", "featdistill-export-1"
# By the format of the files: the runtime, and the file that is loaded.
GRAPH_FILES = {"onnx": ("onnxruntime", "model.onnx"), "openvino": ("openvino", "model.xml")}


class Loaded(NamedTuple):
    """An exported graph as an expert.

    Attributes:
        expert: in evaluation mode.
        weights_sha256: of the files of the graph and how its input is made.
        origin: what was exported, for the record.
    """

    expert: GraphExpert
    weights_sha256: str
    origin: str


def is_exported(reference: str | Path) -> bool:
    """Return whether this names an exported graph."""
    return str(reference).startswith(PREFIX)


def name_of(reference: str | Path) -> str:
    """Return the name of the folder, or raise a `UserError` if none is named."""
    folder = str(reference).removeprefix(PREFIX)
    if not folder:
        raise UserError(
            f"{reference} names no folder; write {PREFIX}DIR, the --out of python -m featdistill export"
        )
    return Path(folder).resolve().name


def load_exported(reference: str | Path) -> Loaded:
    """Load the graph in the folder that `onnx:DIR` names.

    Raises:
        UserError: it is not such a folder, a file is missing or not the one that was written, export.json was
            changed, or the package that runs it is not installed.
    """
    folder = Path(str(reference).removeprefix(PREFIX))
    card = read_export_card(folder)
    try:
        for name, sha256 in card["files"].items():
            if Path(name).name != name or not (folder / name).is_file():
                raise UserError(f"export {folder} has no {name}; export it again, or copy it again")
            if atomic.sha256_of(folder / name) != sha256:
                raise UserError(
                    f"{folder / name} is not the file that {CARD_FILE} describes (its SHA-256 differs)"
                )
        runtime, file = GRAPH_FILES[card["graph_format"]]
        if file not in card["files"]:
            raise UserError(f"{folder / CARD_FILE} does not give the SHA-256 of {file}; export it again")
        fitted = card["preprocessing"]
        preprocessing = Preprocessing(**fitted | {"mean": tuple(fitted["mean"]), "std": tuple(fitted["std"])})
        experts, precision = card["experts"], card["precision"]
        settings = openvino_settings(group=int(card.get("int8_group", 0)))
        origin = f"{card['graph_format']} {precision} of " + ", ".join(
            f"{name} (SHA-256 {one['weights_sha256']})" for name, one in experts.items()
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{folder / CARD_FILE} is incomplete ({error!r}); export it again") from error
    expert = GraphExpert(
        Graph(folder / file, runtime, settings=settings), preprocessing, f"{'+'.join(experts)} in {precision}"
    )
    decisive = {key: card.get(key) for key in ("files", "preprocessing", "int8_group")}
    return Loaded(expert, _sha256_of(decisive), origin)


def read_export_card(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's `export.json`, or raise a `UserError` if it is not as written."""
    card = read_record(folder / CARD_FILE, "export it again", format=FORMAT)
    if card is None:
        raise UserError(f"{folder} is not an export: it has no {CARD_FILE}")
    if card.pop("sha256", None) != _sha256_of(card):
        raise UserError(
            f"{folder / CARD_FILE} was changed after the export (its SHA-256 differs); export it again, or "
            "copy it again"
        )
    return card


def write_export_card(folder: Path, card: dict[str, Any]) -> None:
    """Write a folder's `export.json`, with the SHA-256 of its content under `sha256`."""
    atomic.write_json(folder / CARD_FILE, card | {"sha256": _sha256_of(card)})


def _sha256_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
