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
from featdistill.data.loading import Broken
from featdistill.export import formats, gate, tracing
from featdistill.export.description import describe_input
from featdistill.inference.jobs import images_of_folder
from featdistill.inference.predictor import Predictor, load_ensemble
from featdistill.models.backbones import license_of
from featdistill.models.expert import versions
from featdistill.records.manifest import read_manifest
from featdistill.records.provenance import claim, read_record
from featdistill.runtimes.exported import CARD_FILE, FORMAT, GRAPH_FILES, files_sha256, load_exported
from featdistill.runtimes.graph import require
from featdistill.runtimes.graph_expert import require_trained

_log = logging.getLogger(__name__)
EXAMPLE = "example.py"
_MAX_CALIBRATION = 128
# Packages that a format and a precision need, by what writes and what runs the graph.
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}


def export(args: Namespace) -> str:
    """Do what the command line requests, and return the figures of the comparison.

    Raises:
        UserError: an expert cannot be exported, a package is missing, or the graph is refused.
    """
    out = Path(args.out)
    is_ours = (read_record(out / CARD_FILE) or {}).get("format") == FORMAT
    claim(out, None, {}, occupied=out.exists() and not is_ours)
    packages = [*_PACKAGES[args.format], *(["nncf"] if args.precision == "int8" else [])]
    for package in packages:
        require(package)
    rows, calibration = _images(args)
    settings = {"fusion": args.fusion, "weights": args.weights, "workers": args.workers}
    predictor = load_ensemble(args.experts, device="cpu", precision="fp32", **settings)
    _check_experts(predictor)
    inputs = _inputs(predictor, calibration)
    with atomic.replace_folder(out) as folder:
        traced = folder / "traced.onnx"
        _log.info("tracing %s", ", ".join(predictor.names))
        tracing.write_onnx(predictor.experts, predictor.fusion, traced)
        formats.write_files(traced, folder, args.format, args.precision, inputs)
        for file in folder.glob(f"{traced.name}*"):
            file.unlink()
        card = _card(args, predictor, folder, packages)
        atomic.write_json(folder / CARD_FILE, card)
        _log.info("comparing the graph with PyTorch on %s", counted(len(rows), "image"))
        parity = gate.compare(predictor, load_exported(folder).expert, rows)
        gate.require_parity(parity, args.precision)
        card["parity"] = {
            "figures": parity.__dict__,
            "max_difference_allowed": gate.MAX_DIFFERENCE[args.precision],
            "max_auc_loss_allowed": gate.MAX_AUC_LOSS,
            "calibration_images": len(inputs),
        }
        atomic.write_json(folder / CARD_FILE, card)
        shutil.copyfile(Path(__file__).with_name(EXAMPLE), folder / EXAMPLE)
    size = sum((out / name).stat().st_size for name in card["files"]) / 1e6
    return f"{out}: {args.format} {args.precision}, {size:.1f} MB; {parity.as_text()}"


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


def _images(args: Namespace) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows to compare and those that set the scales of int8."""
    if args.images:
        rows = images_of_folder(args.images)
    else:
        rows = pd.concat([read_manifest(path) for path in args.manifest], ignore_index=True)
    if rows.empty:
        raise UserError(f"{', '.join(args.manifest)}: there are no images to compare on")
    if len(rows) > args.limit:
        rows = rows.iloc[np.linspace(0, len(rows) - 1, args.limit).round().astype(int)]
    is_scale = np.zeros(len(rows), bool)
    if args.precision == "int8":
        if len(rows) < 8 or set(rows["label"].dropna()) != {0, 1}:
            raise UserError("--precision int8 needs 8 images or more, with both labels")
        is_scale[: 4 * _MAX_CALIBRATION : 4] = True
    return rows[~is_scale].reset_index(drop=True), rows[is_scale].reset_index(drop=True)


def _inputs(predictor: Predictor, rows: pd.DataFrame) -> list[np.ndarray]:
    """Return images as the experts see them, (3, S, S) uint8."""
    dataset = predictor.dataset(rows)
    items = [dataset[index] for index in range(len(rows))]
    return [next(iter(item["images"].values())).numpy() for item in items if not isinstance(item, Broken)]


def _card(args: Namespace, predictor: Predictor, folder: Path, packages: list[str]) -> dict[str, Any]:
    """Return the content of `export.json`, without the figures of the comparison."""
    preprocessing = next(iter(predictor.experts.values())).preprocessing
    files = {path.name: atomic.sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file()}
    experts = {
        name: {
            "backbone": predictor.sources[name]["backbone"],
            "backbone_license": license_of(expert.spec),
            "weights_sha256": predictor.hashes[name],
            **{title: texts[name] for title, texts in predictor.training.items() if name in texts},
        }
        for name, expert in predictor.experts.items()
    }
    size = preprocessing.size
    return {
        "format": FORMAT,
        "graph_format": args.format,
        "runtime": GRAPH_FILES[args.format][0],
        "precision": args.precision,
        "opset": tracing.OPSET,
        "files": files,
        "sha256": files_sha256(files),
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
        "versions": versions() | {name: importlib.metadata.version(name) for name in packages},
    }
