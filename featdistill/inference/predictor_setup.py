"""From what a command line says of an ensemble to a `Predictor`: which experts, where, how they compute."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from featdistill.command_line import UserError, one_of
from featdistill.data.views import parse_tta
from featdistill.inference.compute import DEFAULT_BATCH_SIZE
from featdistill.inference.fusion import Fusion, parse_fusion, parse_weights
from featdistill.inference.precision import PRECISIONS
from featdistill.inference.predictor import Predictor
from featdistill.inference.processes import Process
from featdistill.models.expert import Expert, load_expert, read_card
from featdistill.models.released import read_released, released_hashes
from featdistill.process_setup import keep_freed_memory

# By the expert's name, its `folder` (or file) and its `backbone`, in words.
Sources = dict[str, dict[str, str]]


def build_predictor(
    experts: Sequence[str | Path],
    released: str | None = None,
    *,
    resize: str | None = None,
    fusion: str = "probability_mean",
    weights: str | None = None,
    tta: str = "none",
    device: str | None = None,
    precision: str | None = None,
    batch_size: str = "auto",
    workers: int | None = None,
    compiled: bool = False,
    process: Process | None = None,
) -> tuple[Predictor, Sources]:
    """Load an ensemble; the arguments are the flags of `predict.py`.

    Args:
        experts: experts' folders.
        released: folder of the authors' released experts.
        process: which of several processes asks; they share the machine's GPUs and cores.

    Raises:
        UserError: there is no expert, one cannot be loaded, or a value is out of range.
    """
    process = process or Process()
    if not experts and not released:
        raise UserError("no experts are given; name their folders with --experts, or --released DIR")
    place = _device(device, process)
    precision = one_of("precision", precision or ("bf16" if place.type == "cuda" else "fp32"), PRECISIONS)
    if precision == "fp16" and place.type == "cpu":
        raise UserError("precision fp16 needs a GPU; give --precision bf16 or fp32")
    if place.type == "cpu":
        # Activations of one batch are the memory of the next.
        keep_freed_memory()
    size = _batch_size(batch_size, place)
    name, views = parse_tta(tta)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(8, max(1, cores // process.local_world)) if workers is None else workers
    if workers < 0:
        raise UserError("--workers must be at least 0")
    fused = parse_fusion(fusion)
    named = _names([Path(folder) for folder in experts])
    cards = {expert: read_card(folder) for expert, folder in named.items()}
    loaded, hashes, sources = _load(named, cards, released, resize)
    if weights:
        fused = Fusion(fused.method, parse_weights(weights, list(loaded)), fused.temperature)
    predictor = Predictor(
        loaded,
        hashes,
        fused,
        place,
        precision,
        size,
        workers,
        compiled,
        tta=name,
        views=views,
        known=_known(cards),
    )
    return predictor, sources


def _load(
    named: dict[str, Path], cards: dict[str, dict], released: str | None, resize: str | None
) -> tuple[dict[str, Expert], dict[str, str], Sources]:
    """Return experts, the hashes of their weights, and what each is and where it lies, all by name."""
    experts = {name: load_expert(folder) for name, folder in named.items()}
    hashes = {name: card["weights_sha256"] for name, card in cards.items()}
    places = {name: str(folder) for name, folder in named.items()}
    if released:
        theirs, their_hashes = read_released(released), released_hashes(released)
        for own, expert in theirs.items():
            name = _free_name(own, experts)
            experts[name], hashes[name] = expert, their_hashes[own]
            places[name] = f"{Path(released) / own}.pth"
    sources = {}
    for name, expert in experts.items():
        if resize:
            expert.preprocessing = dataclasses.replace(expert.preprocessing, resize=resize)
        fitted, spec = expert.preprocessing, expert.spec
        backbone = f"{spec.library}:{spec.name} at {fitted.size} px, {fitted.resize}"
        sources[name] = {"folder": places[name], "backbone": backbone}
    return experts, hashes, sources


def _known(cards: dict[str, dict]) -> dict[str, dict[str, str]]:
    """Return the recipes that experts of ours were trained by, and the versions they were trained with."""
    recipes = {name: card["recipe"]["name"] for name, card in cards.items() if "recipe" in card}
    versions = {
        name: ", ".join(f"{package} {version}" for package, version in card["versions"].items())
        for name, card in cards.items()
        if "versions" in card
    }
    return {"recipe": recipes, "trained_with": versions}


def _device(asked: str | None, process: Process) -> torch.device:
    """Return the device; of several processes on a machine, each takes its own GPU."""
    try:
        device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {asked} is no device; give cuda, cuda:1 or cpu") from error
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if device.index is None:
        device = torch.device("cuda", process.local_rank % max(1, count))
    if device.index >= count:
        raise UserError(f"there is no GPU {device}: {count} are to be seen; give another --device")
    # The thread that page-locks batches goes by the current device.
    torch.cuda.set_device(device)
    return device


def _batch_size(asked: str, device: torch.device) -> int | None:
    if asked == "auto":
        return None if device.type == "cuda" else DEFAULT_BATCH_SIZE
    if not asked.isascii() or not asked.isdigit() or int(asked) < 1:
        raise UserError(f"--batch-size must be a number above 0 or auto, not {asked}")
    return int(asked)


def _names(folders: list[Path]) -> dict[str, Path]:
    """Name each expert after its run: `runs/x/stage2/clip_l14_a/expert` is `clip_l14_a`."""
    names: dict[str, Path] = {}
    for folder in folders:
        absolute = folder.resolve()
        name = absolute.parent.name if absolute.name in ("expert", "expert-last") else absolute.name
        names[_free_name(name, names)] = folder
    return names


def _free_name(name: str, taken: dict[str, object]) -> str:
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free
