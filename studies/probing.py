"""A row of the backbone study by embedding and probing: the backbone stays as it is, and takes minutes."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featdistill import atomic
from featdistill.bank import probe_plan
from featdistill.bank.embed import Settings, embed
from featdistill.bank.heads import HeadOptions
from featdistill.bank.probe import probe
from featdistill.bank.views import ViewPlan
from featdistill.distortions.presets import parse_policy
from featdistill.inference.processes import Processes
from featdistill.recipe_groups import Augmentation, values_of
from featdistill.records.manifest import read_manifests
from featdistill.records.provenance import read_record
from featdistill.training.recipe import Recipe

# As `featdistill.training.holdout` scores a hold-out without distorted images.
_HOLDOUT_POLICY, _HOLDOUT_SEED = "official", 0
_TIMES_FILE = "times.json"


def probe_backbone(
    recipe: Recipe, arguments: argparse.Namespace, features: Sequence[str], views: int
) -> list[dict[str, Any]]:
    """Embed the training and the hold-out images of a backbone, and probe its features.

    Args:
        recipe: names the backbone; its distortions, crops and mirroring make the training views.
        arguments: `train`, `val` (manifests), and `out`, the folder for the banks and the probe.
        views: number of views of each training image, with the clean one.

    Returns:
        For each feature, its columns of the table.
    """
    folder = Path(arguments.out)
    augmentation = Augmentation(**values_of(Augmentation, recipe))
    train = ViewPlan(views - 1, "training", recipe.seed, augmentation)
    holdout = _holdout_views(recipe, arguments.val)
    for bank, plan, manifests in (("train", train, arguments.train), ("holdout", holdout, arguments.val)):
        settings = Settings(
            backbone=recipe.backbone,
            weights=recipe.weights,
            input_size=recipe.input_size,
            resize=recipe.resize,
            features=features,
            views=plan,
            workers=recipe.workers,
        )
        _embed(settings, manifests, folder / bank)
    asked = probe_plan.Settings(
        banks=[str(folder / "train")],
        score=[str(folder / "holdout")],
        features=features,
        balance=recipe.balance,
        head=HeadOptions(seed=recipe.seed),
        seed=recipe.seed,
        write_experts=False,
    )
    content = probe(asked, folder / "probe")
    results = {result["feature"]: result for result in content["results"]}
    rates = read_record(folder / _TIMES_FILE) or {}
    return [
        {
            "feature": feature,
            **{
                f"{kind}_auc": results[feature]["parts"]["holdout"][kind]["auc"]
                for kind in ("clean", "robust")
            },
            "images_per_s": rates.get("views_per_s"),
        }
        for feature in features
    ]


def _embed(settings: Settings, manifests: Sequence[str], bank: Path) -> None:
    """Make a bank, and note how many views per second that of the training images took, start included."""
    is_new = bank.name == "train" and not bank.exists()
    start = time.perf_counter()
    Processes().run(lambda processes: embed(settings, manifests, bank, processes))
    if is_new:
        views = len(read_manifests(list(manifests))) * len(settings.views.names)
        rate = round(views / (time.perf_counter() - start), 1)
        atomic.write_json(bank.parent / _TIMES_FILE, {"views_per_s": rate})


def _holdout_views(recipe: Recipe, manifests: Sequence[str]) -> ViewPlan:
    """Return one distorted view of a hold-out that has no distorted images."""
    is_distorted = (read_manifests(list(manifests))["is_distorted"] == 1).fillna(False).any()
    limit = parse_policy(recipe.distortions).max_side_px
    policy = _HOLDOUT_POLICY + (f",max_side_px={limit}" if limit else "")
    return ViewPlan(0 if is_distorted else 1, "evaluation", _HOLDOUT_SEED, Augmentation(distortions=policy))
