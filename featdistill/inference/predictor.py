"""An ensemble ready to score: experts on a device, how they compute, and how their logits are fused.

Two settings may stay open until an output is started: the batch size (`auto` on a GPU), and whether fp8 is
close enough to bfloat16. `decide` measures them; what it decides is recorded with the output, and a continued
run follows it (`settle`).
"""

import dataclasses
import itertools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import Dataset

from featdistill.command_line import MAX_WORKERS, UserError, one_of
from featdistill.data.gpu_decoding import CPU, GPU, JpegDataset, check_input, require_decoder
from featdistill.data.loading import ScoreDataset
from featdistill.data.views import PLAIN, View, parse_tta
from featdistill.inference import compute
from featdistill.inference.float8 import require_float8, with_float8
from featdistill.inference.fusion import Fusion, parse_fusion, parse_weights
from featdistill.inference.profile import Profile
from featdistill.inference.references import Opened, card_of, is_graph, name_of, open_expert
from featdistill.inference.scoring import score_all
from featdistill.models.expert import Expert
from featdistill.models.features import POOLED
from featdistill.models.released import read_released, released_hashes
from featdistill.process_setup import keep_freed_memory
from featdistill.records.provenance import as_json

_log = logging.getLogger(__name__)

# How far fp8 may move a fused score away from bfloat16's; beyond that, ranks would change.
_MAX_FLOAT8_SHIFT = 0.005
# Images on which fp8 is tried.
_FLOAT8_TRIAL = 32


@dataclass
class Predictor:
    """Scores images with an ensemble.

    Attributes:
        experts: by name, in evaluation mode, in float32; they are cast and moved to the device here.
        hashes: name -> SHA-256 of the expert's weights.
        precision: one of `compute.PRECISIONS`.
        batch_size: images per batch, or None while it is open.
        tta, views: see `featdistill.data.views`.
        decode: `cpu`, or `gpu` for `featdistill.data.gpu_decoding`.
        training: further entries of the sidecar: title -> expert's name -> text.
        profile: where the time of its runs goes.
        sources: name -> `folder` (or file) and `backbone` of the expert, for people to read.
    """

    experts: dict[str, Expert]
    hashes: dict[str, str]
    fusion: Fusion
    device: torch.device
    precision: str
    batch_size: int | None
    workers: int
    compiled: bool = False
    tta: str = "none"
    views: Sequence[View] = PLAIN
    training: dict[str, dict[str, str]] = field(default_factory=dict)
    sources: dict[str, dict[str, str]] = field(default_factory=dict)
    profile: Profile = field(default_factory=Profile)
    decode: str = CPU
    _ready: dict[Any, list[nn.Module]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.precision == "fp8":
            require_float8(self.device)
        self.fusion.check(self.names)
        self.experts = {
            name: compute.cast(expert, self.precision).to(self.device)
            for name, expert in self.experts.items()
        }

    @property
    def names(self) -> list[str]:
        return list(self.experts)

    def sidecar(self) -> dict[str, Any]:
        """Return what decides the scores, as plain JSON; an open `batch_size` is None."""
        fusion = self.fusion.describe()
        is_plain = fusion["weights"] is None and fusion["temperature"] is None
        sidecar = {
            "experts": self.hashes,
            **self.training,
            "preprocessing": {name: expert.preprocessing.describe() for name, expert in self.experts.items()},
            "fusion": fusion["method"] if is_plain else fusion,
            "tta": self.tta,
            "precision": self.precision,
            "compile": self.compiled,
            "batch_size": self.batch_size,
            **({"decode": GPU} if self.decode == GPU else {}),
        }
        return as_json(sidecar)

    def settle(self, requested: dict[str, Any], recorded: dict[str, Any] | None) -> dict[str, Any]:
        """Return a sidecar whose open settings are those recorded by an earlier run."""
        settled, recorded = dict(requested), recorded or {}
        if self.batch_size is None and isinstance(recorded.get("batch_size"), int):
            settled["batch_size"] = recorded["batch_size"]
        if self.precision == "fp8" and recorded.get("precision") == "bf16":
            settled["precision"] = "bf16"
        return settled

    def decide(self, rows: pd.DataFrame) -> dict[str, Any]:
        """Return `precision` and `batch_size`, measured if they are open; fp8 is tried on the first rows."""
        precision, batch_size = self.precision, self.batch_size
        # NaN is too far as well.
        if precision == "fp8" and not (shift := self.float8_shift(rows)) <= _MAX_FLOAT8_SHIFT:
            _log.warning("fp8 moves a score by %.4f (at most %s); scoring in bf16", shift, _MAX_FLOAT8_SHIFT)
            precision = "bf16"
        if batch_size is None:
            batch_size = compute.automatic_batch_size(self._experts_in(precision), self.device)
        return {"precision": precision, "batch_size": batch_size}

    def dataset(self, rows: pd.DataFrame) -> Dataset:
        """Return the rows' images as the experts and the views need them."""
        keys = [expert.preprocessing.key for expert in self.experts.values()]
        return (JpegDataset if self.decode == GPU else ScoreDataset)(rows, keys, views=self.views)

    def models(self, precision: str, batch_size: int) -> list[nn.Module]:
        """Return the experts as they score, compiled if that is requested."""
        experts, key = self._experts_in(precision), (precision, batch_size)
        if precision == "fp8":
            # Those in bfloat16 are needed again only to try fp8 on other images.
            for expert in self.experts.values():
                expert.to("cpu")
        if self.compiled and key not in self._ready:
            self._ready[key] = compute.compile_experts(experts, batch_size, self.device)
        return self._ready[key] if self.compiled else experts

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `score_dataset` that do not depend on what is scored."""
        return {
            "device": self.device,
            "workers": self.workers,
            "views": self.views,
            "full_batches": self.compiled,
            "profile": self.profile,
        }

    def float8_shift(self, rows: pd.DataFrame) -> float:
        """Return by how much fp8 changes a fused score of the first rows, at most."""
        settings = self.settings() | {"batch_size": _FLOAT8_TRIAL, "full_batches": False}
        dataset, fused = self.dataset(rows[:_FLOAT8_TRIAL]), []
        for precision in ("bf16", "fp8"):
            logits, broken = score_all(self._experts_in(precision), dataset, **settings)
            fused.append(self.fusion.apply(np.delete(logits, list(broken), axis=1), self.names))
        return float(np.abs(fused[0] - fused[1]).max(initial=0))

    def _experts_in(self, precision: str) -> list[nn.Module]:
        if precision == "fp8" and precision in self._ready:
            return self._ready[precision]
        experts = [expert.to(self.device) for expert in self.experts.values()]
        if precision == "fp8":
            experts = self._ready[precision] = [with_float8(expert) for expert in experts]
        return experts


def load_ensemble(
    experts: Sequence[str | Path] = (),
    released: str | Path | None = None,
    *,
    resize: str | None = None,
    fusion: str = "probability_mean",
    weights: str | None = None,
    tta: str = "none",
    device: str | None = None,
    precision: str | None = None,
    batch_size: int | str = "auto",
    workers: int | None = None,
    compiled: bool = False,
    decode: str = CPU,
) -> Predictor:
    """Load an ensemble; the settings are the flags of `predict.py`.

    Args:
        experts: what names each of them, see `featdistill.inference.references`.
        released: folder of the authors' released experts.

    Raises:
        UserError: there is no expert, one cannot be loaded, or a value is out of range.
    """
    if not experts and not released:
        raise UserError("no experts are given; name their folders with --experts, or use --released DIR")
    if workers is not None and not 0 <= workers <= MAX_WORKERS:
        raise UserError(f"--workers must be from 0 to {MAX_WORKERS}, not {workers}")
    folders = _by_name(experts)
    if graph := next((name for name, folder in folders.items() if is_graph(folder)), None):
        if device not in (None, "cpu") or precision not in (None, "fp32") or compiled:
            raise UserError(
                f"expert {graph} is a graph: it runs on the CPU, as it was exported; leave out --device, "
                "--precision and --compile"
            )
        device, precision = "cpu", "fp32"
    chosen = compute.choose_device(device)
    # Here, so that a precision that does not exist is reported before anything is loaded.
    computed_in = compute.choose_precision(precision, chosen)
    if one_of("--decode", decode, (CPU, GPU)) == GPU:
        require_decoder(chosen)
    images_per_batch = _batch_size(str(batch_size), chosen)
    tta, views = parse_tta(tta)
    fused = parse_fusion(fusion)
    if chosen.type == "cpu":
        # Activations of one batch are the memory of the next.
        keep_freed_memory()
    # Before any weights: a missing expert is reported at once.
    for folder in folders.values():
        card_of(folder)
    opened = {name: open_expert(folder) for name, folder in folders.items()}
    loaded = {name: one.expert for name, one in opened.items()}
    hashes = {name: one.weights_sha256 for name, one in opened.items()}
    if released:
        their_hashes = released_hashes(released)
        for stem, expert in read_released(released).items():
            name = _unused_name(stem, loaded)
            loaded[name], hashes[name] = expert, their_hashes[stem]
            folders[name] = Path(released) / f"{stem}.pth"
    for name, other in itertools.combinations(hashes, 2):
        if hashes[name] == hashes[other]:
            _log.warning("experts %s and %s have the same weights: they count twice", name, other)
    if precision is None:
        computed_in = compute.choose_precision(None, chosen, loaded.values())
    sources = {}
    for name, expert in loaded.items():
        if resize:
            expert.preprocessing = dataclasses.replace(expert.preprocessing, resize=resize)
        spec, fitted = expert.spec, expert.preprocessing
        backbone = f"{spec.library}:{spec.name} at {fitted.span}, {fitted.resize}"
        if spec.feature not in POOLED:
            backbone += f", {spec.feature}"
        if compiled:
            fitted.require_one_size("--compile")
        if decode == GPU:
            check_input(name, fitted, views)
        sources[name] = {"folder": str(folders[name]), "backbone": backbone}
    if weights:
        if fused.weights is not None:
            raise UserError("the file of --fusion has weights already; leave out --weights, or name a method")
        fused = Fusion(fused.method, parse_weights(weights, list(loaded)), fused.temperature)
    return Predictor(
        loaded,
        hashes,
        fused,
        chosen,
        computed_in,
        images_per_batch,
        default_workers(chosen) if workers is None else workers,
        compiled,
        tta,
        views,
        _history(opened),
        sources,
        decode=decode,
    )


def _history(opened: dict[str, Opened]) -> dict[str, dict[str, str]]:
    """Return the recipes of our experts, the versions they were trained with, and where others come from."""
    recipes = {name: one.card["recipe"]["name"] for name, one in opened.items() if "recipe" in one.card}
    versions = {
        name: ", ".join(f"{package} {version}" for package, version in one.card["versions"].items())
        for name, one in opened.items()
        if "versions" in one.card
    }
    history: dict[str, dict[str, str]] = {"recipe": recipes, "trained_with": versions}
    for name, one in opened.items():
        for title, text in one.origin.items():
            history.setdefault(title, {})[name] = text
    return history


def _batch_size(requested: str, device: torch.device) -> int | None:
    if requested == "auto":
        return None if device.type == "cuda" else compute.DEFAULT_BATCH_SIZE
    if not requested.isascii() or not requested.isdigit() or int(requested) < 1:
        raise UserError(f"--batch-size must be a number above 0 or auto, not {requested}")
    return int(requested)


def default_workers(device: torch.device) -> int:
    """Return the cores of each process on this machine: at most 32 with a GPU, at most 8 without."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Measured: 8 workers on 16 cores prepared half of the images that an H200 could score with one ViT-L/14.
    most = 32 if device.type == "cuda" else 8
    return min(most, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _by_name(folders: Sequence[str | Path]) -> dict[str, Path]:
    """Return what names each expert by a name of its own."""
    names: dict[str, Path] = {}
    for folder in map(Path, folders):
        names[_unused_name(name_of(folder), names)] = folder
    return names


def _unused_name(name: str, used: dict[str, Any]) -> str:
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return next(unused for unused in itertools.chain([name], numbered) if unused not in used)
