"""Score a manifest in parts with Ray Data: read_parquet, actors with a `Detector` each, write_parquet.

For a cluster that has Ray, which schedules the actors and starts them again; without one, workers of
`predict.py` do the same. The output is a folder of parquet files with the columns of scores in parts (see
`featdistill.inference.parts`), as many as Ray decides, and `ray_predictions.json`.
"""

import json
import os
from argparse import Namespace
from typing import Any

import numpy as np
import pandas as pd

from featdistill.command_line import UserError
from featdistill.data.views import parse_tta
from featdistill.inference.detector import Detector
from featdistill.inference.flags import load_settings
from featdistill.inference.fusion import parse_fusion
from featdistill.inference.parts import VERDICTS
from featdistill.inference.references import card_of, is_folder
from featdistill.records.manifest import checked
from featdistill.records.parts import SUFFIX, Parts
from featdistill.storage import Folder

# Not that of scores in parts, so that no worker of predict.py goes on here.
RECORD = "ray_predictions.json"
_TEXT = ("name", "error", "verdict")


class Scorer:
    """An actor: scores rows of a manifest with one `Detector`; the first one writes the record."""

    def __init__(self, manifest: str, out: str, experts: list[str], settings: dict[str, Any]) -> None:
        self.manifest, self.detector = manifest, Detector.load(*experts, **settings)
        made_from = {**self.detector.predictor.sidecar(), "batch_size": self.detector.batch_size}
        if self.detector.calibrator:
            made_from[VERDICTS] = self.detector.calibrator.settings()
        content = {"manifest": manifest, "made_from": made_from}
        Folder(out).create(RECORD, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())

    def __call__(self, cells: pd.DataFrame) -> pd.DataFrame:
        """Return a row of scores for each row of cells."""
        rows = checked(cells.reset_index(drop=True), self.manifest, self.manifest)
        found = self.detector.rows(rows["image"].tolist(), rows["name"].tolist())
        verdicts = ("verdict", "probability") if self.detector.calibrator else ()
        columns = {key: [getattr(one, key) for one in found] for key in ("name", "score", "error", *verdicts)}
        for expert in self.detector.predictor.names:
            columns[expert] = [one.experts.get(expert, np.nan) for one in found]
        return pd.DataFrame(columns).astype({key: "string" if key in _TEXT else "float64" for key in columns})


def run(args: Namespace) -> int:
    """Do what `python -m featdistill ray` requests; return 1 if images could not be read, else 0.

    Raises:
        UserError: Ray is missing, or the output exists.
    """
    try:
        import ray.data
    except ImportError as error:
        message = 'Ray is not installed; run pip install ".[ray]" in a checkout, or use predict.py instead'
        raise UserError(message) from error
    parts, folder = Parts(args.manifest), Folder(args.out)
    if existing := [*folder.names(SUFFIX), *folder.names(RECORD)]:
        raise UserError(f"{args.out} already holds {existing[0]}; choose another --out")
    experts = [os.path.abspath(name) if is_folder(name) else name for name in args.experts]
    # Here, since the error of an actor comes with pages of Ray's own.
    for name in experts:
        card_of(name)
    parse_fusion(args.fusion)
    parse_tta(args.tta)
    if not ray.is_initialized():
        ray.init(address=args.address, log_to_driver=False)
    _check_resources(ray.cluster_resources(), args)
    settings = load_settings(args) | {"calibrator": args.calibrator}
    rows = ray.data.read_parquet([parts.where(name) for name in parts.names])
    scores = rows.map_batches(
        Scorer,
        fn_constructor_args=(parts.folder.address, args.out, experts, settings),
        batch_format="pandas",
        batch_size=args.rows_per_call,
        compute=ray.data.ActorPoolStrategy(size=args.actors),
        **({"num_gpus": args.gpus_per_actor} if args.gpus_per_actor else {"num_cpus": args.cpus_per_actor}),
    )
    scores.write_parquet(args.out)
    return int(any(errors["error"].notna().any() for errors in Parts(args.out).columns(["error"])))


def _check_resources(available: dict[str, float], args: Namespace) -> None:
    """Raise a `UserError` where the actors would wait for ever, or leave no core for reading and writing."""
    what, each = ("GPU", args.gpus_per_actor) if args.gpus_per_actor else ("CPU", args.cpus_per_actor)
    needed, found = args.actors * each + (what == "CPU"), available.get(what, 0)
    if needed > found:
        rest = ", one for reading" if what == "CPU" else ""
        raise UserError(f"{what}s needed: {needed:g}{rest}; Ray has {found:g}; use fewer --actors")
