"""What names an expert wherever one is scored with.

Its folder; `onnx:DIR`, the folder of an exported one; or `published:NAME[=FILE[,BACKBONE]]`.
"""

from pathlib import Path
from typing import Any, NamedTuple

from featdistill.models.expert import Expert, load_expert, read_card
from featdistill.published.loading import is_published, load_published
from featdistill.published.loading import name_of as published_name
from featdistill.runtimes import exported
from featdistill.runtimes.graph_expert import GraphExpert


class Opened(NamedTuple):
    """An expert that a reference names.

    Attributes:
        expert: in evaluation mode, on the CPU, in float32.
        weights_sha256: of its weights.
        card: the content of its `expert.json`; empty for an exported expert and one of others.
        origin: entries of a sidecar that say where such an expert comes from: title -> text.
    """

    expert: Expert | GraphExpert
    weights_sha256: str
    card: dict[str, Any]
    origin: dict[str, str]


def is_folder(reference: str | Path) -> bool:
    """Return whether this is the folder of an expert, not the name of a graph or of one of others."""
    return not is_published(reference) and not exported.is_exported(reference)


def name_of(reference: str | Path) -> str:
    """Return a name for an expert: that of its run, `clip_l14_a` of `runs/x/stage2/clip_l14_a/expert`.

    Raises:
        UserError: no published detector has the name.
    """
    if is_published(reference):
        return published_name(reference)
    if exported.is_exported(reference):
        return exported.name_of(reference)
    path = Path(reference).resolve()
    return path.parent.name if path.name in ("expert", "expert-last") else path.name


def card_of(reference: str | Path) -> dict[str, Any]:
    """Return the content of an expert's `expert.json`; empty for an exported expert and one of others."""
    return read_card(reference) if is_folder(reference) else {}


def open_expert(reference: str | Path) -> Opened:
    """Load the expert that a reference names.

    Raises:
        UserError: it does not exist, cannot be downloaded or loaded, or its weights are not those described.
    """
    if is_published(reference):
        expert, sha256, origin = load_published(reference)
        return Opened(expert, sha256, {}, {"published": origin})
    if exported.is_exported(reference):
        expert, sha256, origin = exported.load_exported(reference)
        return Opened(expert, sha256, {}, {"exported": origin})
    card = card_of(reference)
    return Opened(load_expert(reference), card["weights_sha256"], card, {})
