"""An ensemble ready to score: its experts on a device, how they compute, and how their logits are fused.

Two things a run may leave open, and they are settled once for each predictions file, by the main process: the
number of images a batch (`--batch-size auto`), and whether fp8 is near enough to bfloat16. What was settled
stands in the sidecar and in the journals, where a continued run and the other processes find it.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import Dataset

from featdistill.data.views import PLAIN, View, make_dataset
from featdistill.inference.compute import automatic_batch_size, compile_experts
from featdistill.inference.float8 import require_float8, with_float8
from featdistill.inference.fusion import Fusion
from featdistill.inference.precision import cast
from featdistill.inference.scoring import score_dataset
from featdistill.models.expert import Expert

# How far fp8 may move a fused score away from bfloat16's; beyond, ranks would change.
_FLOAT8_MOST = 0.005
# Images on which fp8 is tried.
_FLOAT8_TRIAL = 32


@dataclass
class Predictor:
    """Scores images with an ensemble.

    Attributes:
        experts: by name, in evaluation mode, in float32; they are cast and moved to the device here.
        hashes: name -> SHA-256 of the expert's weights.
        fusion: of their logits.
        precision: one of `PRECISIONS`.
        batch_size: images a batch, or None where it is to be found.
        tta, views: see `featdistill.data.views`.
        known: what else is known of some experts, for the sidecar: a title -> name -> text.
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
    known: dict[str, dict[str, str]] = field(default_factory=dict)
    _ready: dict[Any, list[nn.Module]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.precision == "fp8":
            require_float8(self.device)
        self.fusion.check(self.names)
        self.experts = {
            name: cast(expert, self.precision).to(self.device) for name, expert in self.experts.items()
        }

    @property
    def names(self) -> list[str]:
        return list(self.experts)

    def sidecar(self) -> dict[str, Any]:
        """Return what decides the scores, as plain JSON; `batch_size` is None as long as it is open."""
        fusion = self.fusion.describe()
        is_plain = fusion["weights"] is None and fusion["temperature"] is None
        found = {
            "experts": dict(self.hashes),
            **self.known,
            "preprocessing": {
                name: dataclasses.asdict(expert.preprocessing) for name, expert in self.experts.items()
            },
            "fusion": fusion["method"] if is_plain else fusion,
            "tta": self.tta,
            "precision": self.precision,
            "compile": self.compiled,
            "batch_size": self.batch_size,
        }
        return json.loads(json.dumps(found))

    def settle(self, sidecar: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
        """Return a sidecar in which what this run leaves open is as another sidecar says."""
        found = dict(sidecar)
        if self.batch_size is None and isinstance(known.get("batch_size"), int):
            found["batch_size"] = known["batch_size"]
        if self.precision == "fp8" and known.get("precision") == "bf16":
            found["precision"] = "bf16"
        return found

    def decide(self, rows: pd.DataFrame) -> dict[str, Any]:
        """Return `precision` and `batch_size`, found out where the run leaves them open.

        Args:
            rows: what will be scored; fp8 is tried on the first of them.
        """
        precision = self.precision
        if precision == "fp8":
            moved = self._float8_moves(rows)
            if moved > _FLOAT8_MOST:
                line = f"fp8 moves a score by {moved:.4f} (at most {_FLOAT8_MOST}); scoring in bf16"
                print(line, file=sys.stderr)
                precision = "bf16"
        batch_size = self.batch_size
        if batch_size is None:
            batch_size = automatic_batch_size(self._experts_in(precision), self.device)
        return {"precision": precision, "batch_size": batch_size}

    def dataset(self, rows: pd.DataFrame) -> Dataset:
        """Return what gives the rows' images as the experts and the views need them."""
        keys = [expert.preprocessing.key for expert in self.experts.values()]
        return make_dataset(rows, keys, self.views)

    def models(self, precision: str, batch_size: int) -> list[nn.Module]:
        """Return the experts as they score, compiled where that is asked for."""
        experts = self._experts_in(precision)
        if not self.compiled:
            return experts
        key = precision, batch_size
        if key not in self._ready:
            self._ready[key] = compile_experts(experts, batch_size, self.device)
        return self._ready[key]

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `score_dataset` that do not depend on what is scored."""
        settings = {"device": self.device, "workers": self.workers, "views": self.views}
        return settings | {"full_batches": self.compiled}

    def _experts_in(self, precision: str) -> list[nn.Module]:
        if precision != "fp8":
            return list(self.experts.values())
        if precision not in self._ready:
            self._ready[precision] = [with_float8(expert) for expert in self.experts.values()]
        return self._ready[precision]

    def _float8_moves(self, rows: pd.DataFrame) -> float:
        """Return the largest difference of a fused score that fp8 makes on the first images."""
        fused = []
        for precision in ("bf16", "fp8"):
            batches = score_dataset(
                self._experts_in(precision),
                self.dataset(rows[:_FLOAT8_TRIAL]),
                batch_size=_FLOAT8_TRIAL,
                **self.settings() | {"full_batches": False},
            )
            logits = np.concatenate([batch.logits for batch in batches], axis=1)
            fused.append(self.fusion.apply(logits, self.names))
        return float(np.abs(fused[0] - fused[1]).max(initial=0))
