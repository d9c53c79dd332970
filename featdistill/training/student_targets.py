"""The teachers of a student: experts that run along, or their scores, from banks or from prediction files.

Banks and files are computed once, for any number of students.
"""

import itertools
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from featdistill import atomic
from featdistill.command_line import UserError
from featdistill.inference.fusion import Fusion, parse_fusion, parse_weights
from featdistill.inference.predictor import load_ensemble
from featdistill.records.logits import logits_of
from featdistill.records.manifest import read_manifest
from featdistill.records.predictions import (
    match_names,
    name_list,
    read_errors,
    read_predictions,
    read_sidecar,
)
from featdistill.training import student_banks
from featdistill.training.recipe import StudentRecipe
from featdistill.training.stages import Targets
from featdistill.training.student import Teachers

# Logits that differ in size have different weights in a mean of probabilities, which saturates: ours.
DEFAULT_FUSION = "logit_mean"


def find(
    arguments: Namespace, recipe: StudentRecipe
) -> tuple[Teachers | None, Targets | None, dict[str, Any]]:
    """Return the teachers that the flags of `distill.py` name, or their stored logits, and a description.

    Raises:
        UserError: an expert cannot be loaded, or is named twice; or see `StoredTargets` and `BankTargets`.
    """
    fusion, weights = arguments.fusion, arguments.fusion_weights
    if arguments.predictions:
        manifests = [*(arguments.train or ()), *(arguments.unlabeled or ())]
        stored = StoredTargets(arguments.predictions, manifests, fusion, weights)
        return None, stored, stored.description
    ensemble = load_ensemble(arguments.teachers, device="cpu", precision="fp32", workers=0)
    for name, other in itertools.combinations(ensemble.names, 2):
        if ensemble.hashes[name] == ensemble.hashes[other]:
            folders = [ensemble.sources[each]["folder"] for each in (name, other)]
            raise UserError(
                f"--teachers: {' and '.join(folders)} have the same weights; name each teacher once, with "
                "more weight through --fusion-weights"
            )
    fused = make_fusion(fusion, weights, ensemble.names)
    experts = {
        name: {"path": ensemble.sources[name]["folder"], "sha256": ensemble.hashes[name]}
        for name in ensemble.names
    }
    description = {"experts": experts, "fusion": fused.describe()}
    if not arguments.banks:
        return Teachers(ensemble.experts, fused), None, description
    targets = student_banks.BankTargets(ensemble.experts, arguments.banks, fused, recipe)
    return None, targets, description | {"banks": student_banks.describe(arguments.banks)}


def make_fusion(how: str | None, weights: str | None, names: Sequence[str]) -> Fusion:
    """Return the fusion of teachers with these names.

    Args:
        how: see `parse_fusion`; None: the default.
        weights: see `parse_weights`; None: those of the fusion.

    Raises:
        UserError: it is not a fusion of exactly these teachers.
    """
    fusion = parse_fusion(how or DEFAULT_FUSION)
    if weights:
        if fusion.weights is not None:
            raise UserError("the file of --fusion has weights already; leave out --fusion-weights")
        fusion = Fusion(fusion.method, parse_weights(weights, names, "--fusion-weights"), fusion.temperature)
    fusion.check(names)
    return fusion


class StoredTargets:
    """The fused logit of every image of some manifests, see `Targets`.

    Args:
        predictions: a predictions file for each manifest, in their order, with the same experts in all.
        manifests: of the training images.
        fusion, weights: see `make_fusion`.

    Raises:
        UserError: files and manifests do not match, or an image has no score and no reason for that.
    """

    drawn = 0

    def __init__(
        self, predictions: Sequence[str], manifests: Sequence[str], fusion: str | None, weights: str | None
    ) -> None:
        if len(predictions) != len(manifests):
            raise UserError(
                f"--predictions: {len(predictions)} files for {len(manifests)} manifests; name one for each "
                "manifest of --train and then --unlabeled, in their order"
            )
        tables = [read_predictions(path) for path in predictions]
        made_by = [(read_sidecar(path) or {}).get("experts") for path in predictions]
        names = [[column for column in table if column not in ("name", "score")] for table in tables]
        for path, own, experts in zip(predictions, names, made_by, strict=True):
            if own != names[0] or experts != made_by[0]:
                raise UserError(f"--predictions: {path} is not from the same experts as {predictions[0]}")
        # The score of a file without experts is all that is known.
        self.names = names[0] or ["score"]
        self.fusion = make_fusion(fusion, weights, self.names)
        self._logit: dict[str, float] = {}
        for path, table, manifest in zip(predictions, tables, manifests, strict=True):
            if not table[self.names].stack().between(0, 1).all():
                raise UserError(f"{path}: scores must be probabilities in [0, 1]")
            rows = read_manifest(manifest)
            positions = match_names(rows["name"], table["name"])
            broken = [name for name, _ in read_errors(path)]
            missing = rows["name"][(positions < 0) & (match_names(rows["name"], broken) < 0)]
            if len(missing):
                raise UserError(
                    f"{path} has no score for {len(missing)} of {len(rows)} images of {manifest}: "
                    f"{name_list(missing)}"
                )
            logits = logits_of(table[self.names].to_numpy(np.float64).T)
            fused = logits_of(self.fusion.apply(logits, self.names))
            self._logit |= {
                image: float(fused[position])
                for image, position in zip(rows["image"], positions, strict=True)
                if position >= 0
            }
        self.description: dict[str, Any] = {
            "experts": made_by[0],
            "fusion": self.fusion.describe(),
            "predictions": [{"path": path, "sha256": atomic.sha256_of(path)} for path in predictions],
        }

    def __call__(self, rows: pd.DataFrame) -> np.ndarray:
        """Return the fused logit of rows of the manifests, (rows,) float32; NaN if it cannot be read."""
        return np.array([self._logit.get(image, np.nan) for image in rows["image"]], dtype=np.float32)
