"""Run a frozen backbone over the views of images, once, and keep what it returns in a bank.

A batch is `batch_size` rows, and each forward pass is one view of them, so the values of a view do not depend
on how many others there are. As in `featdistill.inference.scoring`, the place of a broken image is filled
with another one of its batch.
"""

import dataclasses
import logging
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from featdistill.bank.store import FORMAT, build_always_alike, state_hash
from featdistill.bank.views import CLEAN_ONLY, ViewDataset, ViewPlan
from featdistill.bank.writing import BankWriter, claim_bank
from featdistill.command_line import UserError, counted, progress
from featdistill.data.loading import make_loader
from featdistill.data.preprocessing import Preprocessing
from featdistill.distortions.presets import parse_policy
from featdistill.inference.compute import (
    PRECISIONS,
    attention_kernels,
    choose_device,
    choose_precision,
    full_memory_is_an_error,
)
from featdistill.inference.predictor import default_workers
from featdistill.inference.processes import Processes
from featdistill.inference.references import is_folder, located
from featdistill.inference.scoring import in_slots, on_device
from featdistill.models.backbones import resolve_spec
from featdistill.models.encoders import Backbone, BackboneSpec
from featdistill.models.expert import load_expert, versions
from featdistill.models.features import POOLED, Atom, parse, read_atoms
from featdistill.models.frozen import layer_hashes
from featdistill.process_setup import keep_freed_memory
from featdistill.recipe_groups import Augmentation
from featdistill.records import predictions
from featdistill.records.manifest import fingerprint, read_manifest, read_manifests
from featdistill.records.provenance import Claim, as_json

_log = logging.getLogger(__name__)
_MAX_SHOWN = 10


@dataclass(frozen=True)
class Settings:
    """What to keep of which backbone; the flags of `python -m featdistill embed`.

    Attributes:
        backbone, weights: a name and a source as in recipes; `backbone` is None if `expert` is given.
        expert: a trained expert (see `references.located`), whose backbone and preprocessing are taken.
        features: their texts, see `featdistill.models.features`.
        tokens_before_last: keep what the last n blocks receive; 0: do not.
        keep_tokens: keep the patch tokens of the last layer.
        views: which views of an image.
        dtype: `float16` or `float32`, of the files.
        precision: `fp32`, `bf16` or `fp16`, of the arithmetic; None: as `predict.py` chooses.
    """

    backbone: str | None = None
    weights: str = "hub"
    expert: str | None = None
    input_size: int | None = None
    resize: str | None = None
    features: Sequence[str] = ("pool",)
    tokens_before_last: int = 0
    keep_tokens: bool = False
    views: ViewPlan = CLEAN_ONLY
    dtype: str = "float16"
    precision: str | None = None
    batch_size: int = 32
    workers: int | None = None
    device: str | None = None


def settings_of(args: Namespace) -> Settings:
    """Return the settings of a command line, see `embed_flags`."""
    drawn = {"distortions": args.distortions or "none", "crop": args.crop, "flip": args.flip}
    augmentation = Augmentation(**{name: value for name, value in drawn.items() if value is not None})
    views = ViewPlan(args.views - 1, args.draw, args.seed, augmentation, args.control_side, args.stage)
    names = ("backbone", "expert", "input_size", "resize", "features", "tokens_before_last", "keep_tokens")
    names += ("dtype", "precision", "batch_size", "workers", "device")
    values = {name: getattr(args, name) for name in names}
    return Settings(**values, weights=args.weights or "hub", views=views)


class Encoder:
    """A backbone ready to embed: from uint8 images to atoms.

    Attributes:
        backbone: in evaluation mode, on `device`, in the precision's type.
        atoms: what it returns for an image.
        shapes: of each atom, for one image.
        weights: their source and hash, for the record.
    """

    def __init__(self, settings: Settings) -> None:
        self.device = choose_device(settings.device)
        self.precision = choose_precision(settings.precision, self.device)
        if self.precision == "fp8":
            raise UserError("--precision fp8 is for experts; a bank needs fp32, bf16 or fp16")
        policy = parse_policy(settings.views.augmentation.distortions)
        if settings.expert:
            folder, name = located(settings.expert)
            expert = load_expert(folder)
            self.backbone, self.spec, self.preprocessing = expert.backbone, expert.spec, expert.preprocessing
            self.preprocessing.require_one_size("a bank")
            self.weights: dict[str, Any] = {
                "kind": "expert",
                "path": os.path.abspath(name) if is_folder(name) else name,
            }
        else:
            spec = _with_outputs(resolve_spec(settings.backbone, settings.input_size), settings.features)
            self.backbone = build_always_alike(spec, settings.weights)
            self.spec = dataclasses.replace(spec, input_size=self.backbone.input_size)
            self.preprocessing = Preprocessing(
                self.backbone.input_size,
                settings.resize or "shorter",
                tuple(self.backbone.mean),
                tuple(self.backbone.std),
                policy.max_side_px,
            )
            is_file = settings.weights not in ("hub", "random")
            path = os.path.abspath(settings.weights) if is_file else settings.weights
            self.weights = {"kind": "backbone", "path": path}
        self.weights["sha256"] = state_hash(self.backbone)
        if settings.tokens_before_last:
            # Whoever trains from the tokens must have the same frozen layers.
            self.weights["layers"] = layer_hashes(self.backbone)
        self.atoms = _atoms(self.backbone, settings)
        self.backbone.requires_grad_(False).eval()
        self.backbone.to(self.device, PRECISIONS[self.precision], memory_format=torch.channels_last)
        self._mean, self._std = (
            torch.tensor(values, device=self.device).view(3, 1, 1)
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        size = self.preprocessing.size
        example = self(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=self.device))
        self.shapes = {atom: values.shape[1:] for atom, values in example.items()}

    def __call__(self, images: Tensor) -> dict[Atom, np.ndarray]:
        """Return atoms (B, ...) float32 of images (B, 3, S, S) uint8, normalized as `Expert` does it."""
        with torch.inference_mode(), attention_kernels(self.device), full_memory_is_an_error():
            pixels = (images / 255 - self._mean) / self._std
            pixels = pixels.contiguous(memory_format=torch.channels_last).to(PRECISIONS[self.precision])
            values = read_atoms(self.backbone, pixels, self.atoms)
            return {atom: values[atom].float().cpu().numpy() for atom in self.atoms}


def embed(settings: Settings, manifests: Sequence[str | Path], out: str | Path, processes: Processes) -> int:
    """Make a bank, together with the other processes, continuing what is there.

    Returns:
        1 if some images could not be read, else 0.

    Raises:
        UserError: a setting is wrong, `out` holds something else, or the disk is full.
    """
    rows = processes.together(lambda: _read_rows(manifests))
    sources = processes.together(lambda: [source(path, read_manifest(path)) for path in manifests])
    return embed_rows(settings, rows, sources, Path(out), processes)


def source(path: str | Path, rows: pd.DataFrame) -> dict[str, str]:
    """Return the entry of a record for rows of the manifest at `path`.

    Only names and sizes of the images count: other columns do not change the features, and may change.
    """
    return {"path": str(path), "sha256": fingerprint(rows, ["name"])}


def embed_rows(
    settings: Settings, rows: pd.DataFrame, sources: Sequence[dict[str, str]], out: Path, processes: Processes
) -> int:
    """Make a bank of rows whose names differ; see `embed`.

    Args:
        sources: see `source`.
    """
    encoder = processes.together(lambda: Encoder(settings))
    record = describe(encoder, settings, sources, len(rows))
    if processes.on_main(lambda: claim_bank(out, record, rows)) is Claim.FINISHED:
        return processes.on_main(lambda: _report(out, "finished; nothing to do"))
    writer = BankWriter(out, record, processes.rank, processes.world)
    processes.on_main(writer.prepare)
    processes.together(writer.open)
    share = processes.on_main(writer.missing)[processes.rank :: processes.world]
    if processes.is_main:
        names = ", ".join(atom.name for atom in encoder.atoms)
        work = f"{counted(len(rows), 'image')} x {counted(len(settings.views.names), 'view')}"
        _log.info("%s: %s on %s in %s: %s", out, work, encoder.device, encoder.precision, names)
    dataset = ViewDataset(rows, encoder.preprocessing, settings.views)
    processes.together(lambda: fill(writer, encoder, dataset, share, settings, show=processes.is_main))
    processes.on_main(lambda: writer.finish(rows, versions()))
    return processes.on_main(lambda: _report(out, "embedded", len(rows)))


def fill(
    writer: BankWriter,
    encoder: Encoder,
    dataset: ViewDataset,
    numbers: Sequence[int],
    settings: Settings,
    *,
    show: bool,
) -> None:
    """Write the batches with these numbers."""
    if not numbers:
        return
    if encoder.device.type == "cpu":
        # Activations of one batch are the memory of the next.
        keep_freed_memory()
    workers = default_workers(encoder.device) if settings.workers is None else settings.workers
    parts = [writer.batch_rows(number) for number in numbers]
    todo, done = sum(map(len, parts)), sum(len(writer.batch_rows(n)) for n in np.flatnonzero(writer.done))
    batches = on_device(make_loader(dataset, parts, workers), encoder.device)
    with progress(done + todo, writer.path.name, initial=done, show=show) as bar:
        for number, part, batch in zip(numbers, parts, batches, strict=True):
            kept = batch["index"].tolist() if "images" in batch else []
            views = dataset.plan.names
            values = {
                atom: np.full((len(part), len(views), *shape), np.nan, np.float32)
                for atom, shape in encoder.shapes.items()
            }
            if kept:
                images = in_slots(batch["images"], [row - part.start for row in kept], len(part))
                for column, view in enumerate(views):
                    for atom, array in encoder(images[view]).items():
                        values[atom][:, column] = array
            drawn = dict(zip(kept, batch.get("drawn", ()), strict=True))
            writer.write(number, values, drawn, [(row, reason) for row, reason in batch["broken"]])
            bar.update(len(part))


def describe(
    encoder: Encoder, settings: Settings, sources: Sequence[dict[str, str]], rows: int
) -> dict[str, Any]:
    """Return what decides the content of a bank."""
    shapes = encoder.shapes.items()
    record = {
        "format": FORMAT,
        "rows": rows,
        "backbone": dataclasses.asdict(encoder.spec),
        "weights": encoder.weights,
        "preprocessing": encoder.preprocessing.describe(),
        "features": list(settings.features),
        "atoms": [{"kind": atom.kind, "layer": atom.layer, "shape": list(shape)} for atom, shape in shapes],
        "dtype": settings.dtype,
        "precision": encoder.precision,
        "batch_size": settings.batch_size,
        "views": settings.views.describe(),
        "manifests": list(sources),
    }
    return as_json(record)


def _read_rows(manifests: Sequence[str | Path]) -> pd.DataFrame:
    rows = read_manifests(list(manifests))
    if rows.empty:
        raise UserError(f"{', '.join(map(str, manifests))}: there are no rows to embed")
    repeated = rows["name"][rows["name"].duplicated()]
    if len(repeated):
        raise UserError(
            f"the name {repeated.iloc[0]} appears in two manifests ({len(repeated)} repeated names), and a "
            "bank finds images by name; make one manifest of them with data_prep.combine"
        )
    return rows


def _with_outputs(spec: BackboneSpec, features: Sequence[str]) -> BackboneSpec:
    """Return the specification of a backbone that has the outputs which the features are made of."""
    named = {part for text in features for part in text.partition(":")[0].split("+")}
    outputs = [output for output in POOLED if output in named]
    return dataclasses.replace(spec, feature="+".join(outputs) or "pool")


def _atoms(backbone: Backbone, settings: Settings) -> list[Atom]:
    atoms = [atom for text in settings.features for atom in parse(text, backbone).atoms]
    last = backbone.depth
    if settings.keep_tokens:
        atoms.append(Atom("tokens", last))
    if settings.tokens_before_last:
        if not backbone.is_plain:
            raise UserError(
                "--tokens-before-last is for transformers whose blocks all have the same tokens, which this "
                "backbone is not"
            )
        if not 0 < settings.tokens_before_last < last:
            raise UserError(
                f"--tokens-before-last must be between 1 and {last - 1} for a backbone of {last} layers, not "
                f"{settings.tokens_before_last}"
            )
        atoms.append(Atom("hidden", last - settings.tokens_before_last))
    if not atoms:
        raise UserError("nothing to keep; name --features, --keep-tokens or --tokens-before-last")
    return list(dict.fromkeys(atoms))


def _report(out: Path, what: str, images: int | None = None) -> int:
    """Log what was done, to how many images, and which could not be read; return the exit status."""
    errors = predictions.parse_csv((out / "errors.csv").read_bytes(), str(out / "errors.csv"))[1]
    if images is not None:
        what = f"{counted(images - len(errors), 'image')} embedded"
    _log.info("%s: %s", out, what)
    for name, reason in errors[:_MAX_SHOWN]:
        _log.info("could not be read: %s: %s", name, reason)
    if errors:
        _log.info("%s could not be read, listed in %s", counted(len(errors), "image"), out / "errors.csv")
    return 1 if errors else 0
