"""What names an expert.

Its folder; `hub:OWNER/NAME[@REVISION]`, its repository; and, only to score with, `onnx:DIR`, the folder of an
exported one, or `published:NAME[=FILE[,BACKBONE]]`.
"""

from pathlib import Path
from typing import Any, NamedTuple

from featdistill.command_line import UserError
from featdistill.hub import download as hub
from featdistill.models.expert import CARD_FILE, Expert, load_expert, read_card
from featdistill.published.entry import PublishedGraph
from featdistill.published.loading import DETECTORS, is_published, load_published
from featdistill.published.loading import name_of as published_name
from featdistill.runtimes import exported
from featdistill.runtimes.graph_expert import GraphExpert


class Opened(NamedTuple):
    """An expert that a reference names.

    Attributes:
        expert: in evaluation mode, on the CPU, in float32.
        weights_sha256: of its weights.
        card: the content of its `expert.json`; empty for an exported expert and one of others.
        origin: entries of a sidecar that say where it comes from, if not from a folder: title -> text.
    """

    expert: Expert | GraphExpert
    weights_sha256: str
    card: dict[str, Any]
    origin: dict[str, str]


def is_folder(reference: str | Path) -> bool:
    """Return whether this is the folder of an expert, not a repository, a graph or one of others."""
    return not hub.is_hub(reference) and _has_card(reference)


def is_graph(reference: str | Path) -> bool:
    """Return whether this is a graph, which runs on the CPU, as it was exported; see `name_of` for errors."""
    if is_published(reference):
        return isinstance(DETECTORS[published_name(reference)], PublishedGraph)
    return exported.is_exported(reference)


def _has_card(reference: str | Path) -> bool:
    return not is_published(reference) and not exported.is_exported(reference)


def name_of(reference: str | Path) -> str:
    """Return a name for an expert: that of its run, `clip_l14_a` of `runs/x/stage2/clip_l14_a/expert`.

    Raises:
        UserError: no published detector has the name, or the name of a repository has another form.
    """
    if is_published(reference):
        return published_name(reference)
    if exported.is_exported(reference):
        return exported.name_of(reference)
    if hub.is_hub(reference):
        return hub.parse(reference)[0].partition("/")[2]
    path = Path(reference).resolve()
    return path.parent.name if path.name in ("expert", "expert-last") else path.name


def located(reference: str | Path) -> tuple[Path, str]:
    """Return the folder of an expert, downloaded if it is on the Hub, and its name for a record.

    Returns:
        Of a folder, both are as given; of `hub:OWNER/NAME`, the name is `hub:OWNER/NAME@COMMIT`.

    Raises:
        UserError: it can only be scored with, or is an export named without `onnx:`; see also `hub.download`.
    """
    if not _has_card(reference):
        raise UserError(
            f"{reference} can only be scored with; name the folder of an expert or hub:OWNER/NAME"
        )
    if hub.is_hub(reference):
        folder, pinned = hub.download(reference)
        return folder, f"{hub.PREFIX}{pinned}"
    folder = Path(reference)
    if (folder / exported.CARD_FILE).is_file() and not (folder / CARD_FILE).exists():
        raise UserError(
            f"{reference} is an exported graph, not an expert; did you mean {exported.PREFIX}{reference}?"
        )
    return folder, str(reference)


def card_of(reference: str | Path) -> dict[str, Any]:
    """Return the content of an expert's `expert.json`; empty for an exported expert and one of others."""
    return read_card(located(reference)[0]) if _has_card(reference) else {}


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
    folder, name = located(reference)
    card = read_card(folder)
    origin = {} if is_folder(reference) else {"hub": name.removeprefix(hub.PREFIX)}
    return Opened(load_expert(folder), card["weights_sha256"], card, origin)
