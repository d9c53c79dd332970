"""Which feature of which frozen backbone, trained with which distortions: what logistic regressions find.

    python studies/features.py --images pool/manifest.csv --train split=train --folds fold --out study \\
        --backbones clip_b16 timm:tf_efficientnet_lite0 --weights-files clip_b16=clip.safetensors

The images that `--train` does not select are the hold-out. Each backbone is run once over every image as it
is scored (clean, under `--preset`, and as the content control), and once over the training images for each
library of distortions (see `python -m featdistill embed`). Heads are fitted for each feature, library and
seed (`python -m featdistill probe`); a seed is another draw of the training views.
Ensembles are fused from the scores of each backbone's best feature by the folds, by probability and by logit.

A table shows the mean over the seeds, the draws of `--preset` and the folds, with its 95 % interval (DeLong,
over images). The control is trained and scored on images reduced to 28 px, which show no traces of a
generator. The same command continues a study that was stopped.
"""

import contextlib
import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import expit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from featdistill import command_line, text_tables
from featdistill.atomic import write_text
from featdistill.bank import embed, probe_plan
from featdistill.bank.figures import MeanAuc, mean_auc
from featdistill.bank.probe import folder_name, probe
from featdistill.bank.store import open_bank
from featdistill.bank.views import CLEAN, CONTROL, ViewPlan
from featdistill.command_line import Parser, UserError, within
from featdistill.inference.processes import Processes
from featdistill.models.backbones import build, resolve_spec
from featdistill.models.encoders import Backbone as Encoder
from featdistill.models.features import parse
from featdistill.recipe_groups import Augmentation
from featdistill.records.logits import logits_of
from featdistill.records.manifest import read_manifest, write_manifest
from featdistill.records.predictions import read_predictions
from studies.backbones import weights_files
from studies.method import POLICIES, difference, shown

# What is kept and probed of transformers whose blocks all have the same tokens, and of other networks.
# L are four layers from the middle to the last, of a ViT-B's 12 blocks 6, 8, 10 and 12.
_PLAIN = ["pool", "projection", "class+mean", "layers:L", "mean+std:all"]
_PLAIN_PROBED = ["class", "projection", "mean", "top_tokens:10", "class+mean"]
_PLAIN_PROBED += ["class:L", "mean:L", "mean+std:L", "mean+std:all"]
_STAGED = ["pool", "mean+std:all"]
# The libraries that training views are drawn from; without distortions, the clean view alone is trained on.
_LIBRARIES = {"none": None, "official": POLICIES["official"], "both": POLICIES["official and extended"]}
_PARTS = {"folds": probe_plan.FOLDS_PART, "hold-out": probe_plan.HOLDOUT_PART}


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", required=True, metavar="MANIFEST", help="all images, labeled")
    parser.add_argument("--train", required=True, metavar="COLUMN=VALUE", help="those that are trained on")
    parser.add_argument("--folds", required=True, metavar="COLUMN", help="folds of the training images")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of banks, probes and tables")
    parser.add_argument("--backbones", nargs="+", required=True, metavar="NAME", help="as in recipes")
    parser.add_argument("--weights-files", nargs="+", default=[], metavar="NAME=FILE", help="default: hub")
    parser.add_argument("--seeds", type=within(2), default=3, metavar="N", help="draws of training views")
    parser.add_argument("--draws", type=within(1), default=3, metavar="N", help="draws of --preset")
    parser.add_argument("--preset", default="test_public", help="distortions of the scored images")
    parser.add_argument("--control-side", type=within(1), default=28, metavar="PX", help="of the control")
    parser.add_argument("--precision", default="bf16", help="of the backbone: fp32, bf16 or fp16")
    parser.add_argument("--workers", type=command_line.worker_count(), help="loader processes")
    return parser


class Backbone:
    """The banks and probes of one backbone.

    Attributes:
        kept, features: texts of what the banks hold, and of what is probed.
    """

    def __init__(self, name: str, weights: str, arguments) -> None:
        self.name, self.weights, self.arguments = name, weights, arguments
        self.folder = Path(arguments.out) / folder_name(name)
        backbone = _encoder(name)
        self.is_plain, self.depth = backbone.is_plain, backbone.depth
        self.kept = _known(_PLAIN if self.is_plain else _STAGED, backbone)
        self.features = _known(_PLAIN_PROBED, backbone) if self.is_plain else self.kept

    def embed(self, train: Path) -> None:
        """Make the banks; `train` is the manifest of the training images."""
        given = self.arguments
        scored = Augmentation(distortions=given.preset)
        self._embed(
            "scored", given.images, ViewPlan(given.draws, "evaluation", 0, scored, given.control_side)
        )
        for library, policy in _LIBRARIES.items():
            if policy:
                plan = ViewPlan(given.seeds, "training", 0, Augmentation(distortions=policy))
                self._embed(library, train, plan)

    def _embed(self, bank: str, manifest: str | Path, views: ViewPlan) -> None:
        settings = embed.Settings(
            backbone=self.name,
            weights=self.weights,
            features=self.kept,
            keep_tokens=self.is_plain,
            tokens_before_last=min(2, self.depth - 1) if self.is_plain else 0,
            views=views,
            precision=self.arguments.precision,
            workers=self.arguments.workers,
        )
        Processes().run(
            lambda processes: embed.embed(settings, [manifest], self.folder / "banks" / bank, processes)
        )

    def probe(self) -> None:
        """Fit the heads of all libraries and seeds, and of the content control."""
        self._probe(CONTROL, "scored", [CONTROL])
        for library in _LIBRARIES:
            for run, views in _runs(library, self.arguments.seeds).items():
                self._probe(run, library if _LIBRARIES[library] else "both", views)

    def _probe(self, name: str, bank: str, views: list[str]) -> None:
        banks, is_scored = self.folder / "banks", bank == "scored"
        settings = probe_plan.Settings(
            banks=[str(banks / bank)],
            score=[] if is_scored else [str(banks / "scored")],
            features=self.features,
            train=[self.arguments.train],
            views=views,
            folds=self.arguments.folds,
            control=False,
            write_experts=False,
        )
        probe(settings, self.folder / "probes" / name)

    def scores(self, run: str, feature: str, part: "Part", view: str) -> pd.Series:
        """Return the logits that a probe gives to the images of a part, by their names."""
        path = self.folder / "probes" / run / folder_name(feature) / f"{_PARTS[part.name]}-{view}.csv"
        table = read_predictions(path)
        return pd.Series(logits_of(table["score"].to_numpy()), table["name"])


class Part:
    """The folds, or the hold-out: images that every backbone could read.

    Args:
        name: of `_PARTS`.
        rows: labeled rows with the column of the folds.
    """

    def __init__(self, name: str, rows: pd.DataFrame, column: str) -> None:
        self.name, self.names, self.label = name, rows["name"], rows["label"].to_numpy(np.int8)
        fold = rows[column].astype(str) if name == "folds" else pd.Series("", rows.index)
        self.masks = [(fold == value).to_numpy() for value in fold.unique()]

    def auc(self, scores: Iterable[pd.Series]) -> MeanAuc:
        """Return the mean AUC over several scores and the folds."""
        arrays = [each.loc[self.names].to_numpy() for each in scores]
        return mean_auc(self.label, [(array, mask) for array in arrays for mask in self.masks])


class Tables:
    """The tables of finished probes."""

    def __init__(self, backbones: list[Backbone], parts: list[Part], arguments) -> None:
        self.backbones, self.parts = backbones, parts
        self.seeds = arguments.seeds
        self.views = {
            "clean": [CLEAN],
            "robust": [f"evaluation-{draw}" for draw in range(1, arguments.draws + 1)],
        }

    def features(self, backbone: Backbone, part: Part) -> str:
        """Return a table of each feature's control, and what its AUCs under each library exceed it by."""
        lines = []
        for feature in backbone.features:
            control = part.auc([backbone.scores(CONTROL, feature, part, CONTROL)])
            for number, library in enumerate(_LIBRARIES):
                cells = [feature, "" if number else shown(control), library]
                for kind in self.views:
                    auc = self._alone(backbone, feature, library, part, kind)
                    cells += [shown(auc), difference(auc, control)]
                lines.append(cells)
        header = ["feature", "control", "distortions", "clean", "- control", "robust", "- control"]
        return f"## {backbone.name}, {part.name}\n\n{text_tables.table(header, lines)}"

    def ensembles(self, part: Part) -> str:
        """Return a table of all sets of backbones, each with its best feature by the folds."""
        best, lines = {backbone: self._best(backbone) for backbone in self.backbones}, []
        for count in range(1, len(best) + 1):
            for chosen in itertools.combinations(best.items(), count):
                named = " + ".join(f"{backbone.name} ({feature})" for backbone, feature in chosen)
                first = part.auc(self._fused(chosen[:1], "", part, "robust"))
                for fusion in ("logit", "probability") if count > 1 else ("",):
                    clean, robust = (part.auc(self._fused(chosen, fusion, part, kind)) for kind in self.views)
                    cells = [shown(clean), shown(robust), difference(robust, first) if count > 1 else ""]
                    lines.append([named, fusion, *cells])
        header = ["backbones", "mean of", "clean", "robust", "robust - first"]
        return f"## Ensembles, {part.name}\n\n{text_tables.table(header, lines)}"

    def _alone(self, backbone: Backbone, feature: str, library: str, part: Part, kind: str) -> MeanAuc:
        return part.auc(
            backbone.scores(run, feature, part, view)
            for run in _runs(library, self.seeds)
            for view in self.views[kind]
        )

    def _best(self, backbone: Backbone) -> str:
        """Return the feature with the best robust AUC over the folds, under both libraries."""
        aucs = {
            feature: self._alone(backbone, feature, "both", self.parts[0], "robust").auc
            for feature in backbone.features
        }
        return max(aucs, key=aucs.get)

    def _fused(
        self, members: Sequence[tuple[Backbone, str]], fusion: str, part: Part, kind: str
    ) -> list[pd.Series]:
        """Return the fused scores of each seed and view, under both libraries."""
        fused = []
        for run in _runs("both", self.seeds):
            for view in self.views[kind]:
                logits = [each.scores(run, feature, part, view) for each, feature in members]
                logits = [expit(each) for each in logits] if fusion == "probability" else logits
                fused.append(sum(each.loc[part.names] for each in logits) / len(logits))
        return fused


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    files = weights_files(arguments.weights_files, arguments.backbones)
    rows = read_manifest(arguments.images)
    column, _, value = arguments.train.partition("=")
    for name in (column, arguments.folds):
        if name not in rows:
            raise UserError(f"{arguments.images} has no column {name}; it has {', '.join(rows.columns)}")
    is_train = rows[column].astype(str) == value
    if is_train.all() or not is_train.any():
        raise UserError(f"--train {arguments.train} selects {is_train.sum()} of {len(rows)} images")
    train = Path(arguments.out) / "train.csv"
    write_manifest(rows[is_train], train)
    backbones = [Backbone(name, files.get(name, "hub"), arguments) for name in arguments.backbones]
    good = rows["label"].notna()
    for backbone in backbones:
        backbone.embed(train)
        backbone.probe()
        scored = open_bank(backbone.folder / "banks" / "scored").rows
        good &= ~rows["name"].isin(scored["name"][scored["broken"]])
    parts = [
        Part("folds", rows[good & is_train], arguments.folds),
        Part("hold-out", rows[good & ~is_train], arguments.folds),
    ]
    tables = Tables(backbones, parts, arguments)
    texts = [tables.features(backbone, part) for backbone in backbones for part in parts]
    texts += map(tables.ensembles, parts)
    write_text(Path(arguments.out) / "features.md", "\n\n".join(texts) + "\n")
    print("\n\n".join(texts))
    return 0


def _runs(library: str, seeds: int) -> dict[str, list[str]]:
    """Return the probes of a library with the views they train on; without distortions there is only one."""
    if _LIBRARIES[library] is None:
        return {f"{library}-1": [CLEAN]}
    return {f"{library}-{seed}": [CLEAN, f"training-{seed}"] for seed in range(1, seeds + 1)}


def _encoder(name: str) -> Encoder:
    """Build a backbone without memory, with its projection to the space with text, if there is one."""
    with torch.device("meta"):
        try:
            return build(resolve_spec(name, feature="pool+projection"))
        except UserError:
            return build(resolve_spec(name, feature="pool"))


def _known(texts: list[str], backbone: Encoder) -> list[str]:
    """Return the features that a backbone has; it may lack a projection, or a class token."""
    numbers = {round(backbone.depth * part): None for part in (1 / 2, 2 / 3, 5 / 6, 1)}
    layers = ",".join(map(str, numbers))
    known = []
    for text in (text.replace("L", layers) for text in texts):
        with contextlib.suppress(UserError):
            parse(text, backbone)
            known.append(text)
    return known


if __name__ == "__main__":
    command_line.run(main)
