"""Export experts to a folder, or leave nothing there if the graph differs from them."""

import importlib.metadata
import logging
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from featdistill import atomic
from featdistill.command_line import UserError, counted
from featdistill.export import formats, gate, tracing
from featdistill.export.description import describe_input
from featdistill.inference.flags import load_settings
from featdistill.inference.jobs import images_of_folder
from featdistill.inference.predictor import Predictor, load_ensemble
from featdistill.models.backbones import license_of
from featdistill.models.expert import versions
from featdistill.records.manifest import read_manifest
from featdistill.records.provenance import claim, read_record
from featdistill.runtimes.exported import CARD_FILE, FORMAT, GRAPH_FILES, load_exported, write_export_card
from featdistill.runtimes.graph import openvino_settings, require
from featdistill.runtimes.graph_expert import require_trained

_log = logging.getLogger(__name__)
EXAMPLE = "example.py"
_TRACED = "traced.onnx"


def export(args: Namespace) -> str:
    """Do what the command line requests, and return the figures of the comparison.

    Raises:
        UserError: an expert cannot be exported, a package is missing, or the graph is refused.
    """
    out = Path(args.out)
    is_ours = (read_record(out / CARD_FILE) or {}).get("format") == FORMAT
    claim(out, None, {}, occupied=out.exists() and not is_ours)
    for package in _packages(args):
        require(package)
    rows = _images(args)
    # --precision is that of the graph.
    settings = load_settings(args) | {"device": "cpu", "precision": "fp32"}
    predictor = load_ensemble(args.experts, **settings)
    _check_experts(predictor)
    with atomic.replace_folder(out) as folder:
        _log.info("tracing %s", ", ".join(predictor.names))
        tracing.write_onnx(predictor.experts, predictor.fusion, folder / _TRACED)
        _log.info("scoring %s with PyTorch and with the graph", counted(len(rows), "image"))
        expected = gate.reference(predictor, rows)
        try:
            card = _accepted(args, predictor, folder, args.precision, expected)
        except UserError as refusal:
            if args.precision != "int8":
                raise
            _log.info("%s; trying with 8-bit weights alone", str(refusal).partition(";")[0])
            card = _accepted(args, predictor, folder, "int8_weights", expected)
        for file in folder.glob(f"{_TRACED}*"):
            file.unlink()
        shutil.copyfile(Path(__file__).with_name(EXAMPLE), folder / EXAMPLE)
    size = sum((out / name).stat().st_size for name in card["files"]) / 1e6
    figures = gate.Parity(**card["parity"]["figures"]).as_text()
    return f"{out}: {args.format} {card['stored']}, {size:.1f} MB; {figures}"


def _accepted(
    args: Namespace, predictor: Predictor, folder: Path, stored: str, expected: gate.Reference
) -> dict[str, Any]:
    """Write files and card of a graph; return the card.

    Args:
        stored: see `formats.write_files`.

    Raises:
        UserError: the graph is refused.
    """
    for file in folder.glob("model.*"):
        file.unlink()
    formats.write_files(
        folder / _TRACED, folder, args.format, stored, tracing.block_modules(predictor.experts)
    )
    card = _card(args, predictor, folder, stored)
    write_export_card(folder, card)
    parity = gate.compare(predictor, expected, load_exported(folder).expert)
    gate.require_parity(parity, args.precision)
    card["parity"] = {
        "figures": parity.__dict__,
        "max_difference_allowed": gate.MAX_DIFFERENCE[args.precision],
        "max_auc_loss_allowed": gate.MAX_AUC_LOSS,
    }
    write_export_card(folder, card)
    return card


def _packages(args: Namespace) -> list[str]:
    """Return what the command line needs of the extra `export`."""
    return ["onnx", "onnxscript", GRAPH_FILES[args.format][0]]


def _check_experts(predictor: Predictor) -> None:
    keys = {}
    for name, expert in predictor.experts.items():
        require_trained(expert, "an export")
        expert.preprocessing.require_one_size("an export")
        keys.setdefault(expert.preprocessing.key, name)
    if len(keys) > 1:
        (one, first), (other, second) = list(keys.items())[:2]
        raise UserError(
            f"experts {first} ({one[0]} px, {one[1]}) and {second} ({other[0]} px, {other[1]}) see different "
            "inputs, and a graph has one; export them one by one, and name both with --experts onnx:DIR"
        )


def _images(args: Namespace) -> pd.DataFrame:
    """Return the rows to compare on."""
    if args.images:
        rows = images_of_folder(args.images)
    else:
        rows = pd.concat([read_manifest(path) for path in args.manifest], ignore_index=True)
    if args.precision == "int8" and set(rows["label"].dropna()) != {0, 1}:
        raise UserError("--precision int8 is checked by the AUC, and needs images with both labels")
    if rows.empty:
        raise UserError(f"{', '.join(args.manifest)}: there are no images to compare on")
    if len(rows) > args.limit:
        rows = rows.iloc[np.linspace(0, len(rows) - 1, args.limit).round().astype(int)]
    return rows.reset_index(drop=True)


def _card(args: Namespace, predictor: Predictor, folder: Path, stored: str) -> dict[str, Any]:
    """Return the content of `export.json`, without the figures of the comparison."""
    preprocessing = next(iter(predictor.experts.values())).preprocessing
    files = {path.name: atomic.sha256_of(path) for path in sorted(folder.glob("model.*"))}
    experts = {
        name: {
            "backbone": predictor.sources[name]["backbone"],
            "backbone_license": license_of(expert.spec),
            "weights_sha256": predictor.hashes[name],
            **{title: texts[name] for title, texts in predictor.training.items() if name in texts},
        }
        for name, expert in predictor.experts.items()
    }
    size, group = preprocessing.size, formats.GROUP if stored == "int8" else 0
    return {
        "format": FORMAT,
        "graph_format": args.format,
        "runtime": GRAPH_FILES[args.format][0],
        "settings": openvino_settings(group=group) if args.format == "openvino" else {},
        "precision": args.precision,
        "stored": stored,
        "int8_group": group,
        "opset": tracing.OPSET,
        "files": files,
        "input": {
            "name": tracing.INPUT,
            "type": "uint8",
            "shape": ["N", 3, size, size],
            "is": describe_input(preprocessing),
        },
        "output": {
            "name": tracing.OUTPUT,
            "shape": ["N"],
            "is": "logit; P(AI) is its sigmoid",
            "threshold": 0.0,
        },
        "preprocessing": preprocessing.describe(),
        "experts": experts,
        "fusion": predictor.fusion.describe(),
        "versions": versions() | {name: importlib.metadata.version(name) for name in _packages(args)},
    }
