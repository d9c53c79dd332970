"""From `published:NAME[=FILE[,BACKBONE]]` to an expert; `python -m featdistill published --list` names them.

FILE is the detector's file; by default, it is downloaded from where its authors put it, at a fixed commit.
BACKBONE is a file with the weights of its backbone, if FILE does not hold them; by default, timm or
open_clip downloads them. FILE may be left empty, as in `published:ufd=,clip.safetensors`.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch

from featdistill.command_line import UserError, one_of
from featdistill.models.backbones import build
from featdistill.models.expert import Expert
from featdistill.models.frozen import layer_hashes
from featdistill.published import (
    clipdet,
    community_forensics,
    files,
    graphs,
    rine,
    safe,
    universal_fake_detect,
)
from featdistill.published.entry import Published, PublishedGraph
from featdistill.runtimes.graph_expert import GraphExpert
from featdistill.text_tables import table

PREFIX = "published:"
DETECTORS: dict[str, Published | PublishedGraph] = {
    **community_forensics.DETECTORS,
    **universal_fake_detect.DETECTORS,
    **rine.DETECTORS,
    **clipdet.DETECTORS,
    **safe.DETECTORS,
    **graphs.DETECTORS,
}
# Logits of a head in float32 differ by less on other machines.
_GOLDEN_TOLERANCE = 1e-4


class Loaded(NamedTuple):
    """A published detector as an expert.

    Attributes:
        expert: in evaluation mode, on the CPU, in float32.
        weights_sha256: of the file; of file and backbone if the file does not hold the backbone.
        origin: what it is and the SHA-256 of its file, for the record.
    """

    expert: Expert | GraphExpert
    weights_sha256: str
    origin: str


def is_published(reference: str | Path) -> bool:
    """Return whether this names a published detector, not the folder of an expert."""
    return str(reference).startswith(PREFIX)


def name_of(reference: str | Path) -> str:
    """Return the NAME of a reference, or raise a `UserError` if there is none of that name."""
    name = str(reference).removeprefix(PREFIX).partition("=")[0]
    return one_of("published detector", name, DETECTORS)


def load_published(reference: str | Path) -> Loaded:
    """Load a published detector.

    Raises:
        UserError: a file is missing, cannot be downloaded, or is not the one that was published.
    """
    name = name_of(reference)
    entry = DETECTORS[name]
    file, _, backbone = str(reference).partition("=")[2].partition(",")
    if backbone and entry.has_backbone:
        raise UserError(f"the file of {name} holds its backbone; write {PREFIX}{name}={file or 'FILE'}")
    path = Path(file) if file else files.fetch(name, entry.source)
    expert, sha256 = _filled(name, path, None if entry.has_backbone else backbone or "hub")
    origin, weights_sha256 = f"{entry.title}; {entry.source.page}; SHA-256 {sha256}", sha256
    if not entry.has_backbone:
        layers = "".join(layer_hashes(expert.backbone))
        weights_sha256 = hashlib.sha256(f"{sha256}{layers}".encode()).hexdigest()
    return Loaded(expert, weights_sha256, origin)


def _filled(name: str, path: Path, backbone_weights: str | None) -> tuple[Expert | GraphExpert, str]:
    """Return an expert with the weights of a file, and the SHA-256 of the file.

    Args:
        backbone_weights: see `build`; None for a backbone without memory, unless the file holds it.
    """
    entry = DETECTORS[name]
    sha256 = files.verify(path, name, entry)
    if isinstance(entry, PublishedGraph):
        return graphs.load(path, entry), sha256
    with torch.device("meta" if backbone_weights is None else "cpu"):
        backbone = build(entry.spec, backbone_weights or "random")
    expert = entry.make(backbone, entry.spec, entry.resize)
    state = expert.state_dict()
    names = {ours: theirs for ours in state if (theirs := entry.name_in_file(ours))}
    tensors = files.read(path, {theirs: state[ours] for ours, theirs in names.items()})
    state |= {ours: tensors[theirs] for ours, theirs in names.items()}
    expert.load_state_dict(state, strict=True, assign=True)
    return expert.to(memory_format=torch.channels_last).eval(), sha256


def check(name: str, file: str | None = None) -> list[str]:
    """Return what was found right about the file of a detector, one line each; its backbone is not needed.

    Raises:
        UserError: something is wrong with it.
    """
    entry = DETECTORS[one_of("published detector", name, DETECTORS)]
    path = Path(file) if file else files.fetch(name, entry.source)
    expert, sha256 = _filled(name, path, None)
    known = "SHA-256" if entry.sha256 else "git blob" if entry.git_blob else ""
    lines = [f"SHA-256 {sha256}" + (f"; its {known} is that of the published file" if known else "")]
    if isinstance(entry, PublishedGraph):
        expert(torch.zeros(1, 3, entry.size, entry.size, dtype=torch.uint8))
        return [*lines, f"the graph takes images of {entry.size} px and returns one number each"]
    lines.append(f"keys and shapes are those of {entry.title}: {entry.parameters:,} parameters")
    if entry.golden_logit is not None:
        feature = torch.sin(0.37 * torch.arange(expert.feature_dim, dtype=torch.float64))
        with torch.inference_mode():
            logit = expert.head(feature.float()[None]).item()
        if not abs(logit - entry.golden_logit) < _GOLDEN_TOLERANCE:
            raise UserError(f"{path}: the head gives {logit:.7f} where {entry.golden_logit:.7f} is expected")
        lines.append(f"the head gives {logit:.7f} for a test feature, as expected")
    return lines


def detector_table() -> str:
    """Return all published detectors as a table."""
    header = ("name", "detector", "license", "parameters in the file", "input", "source")
    rows = [
        (
            name,
            entry.title,
            entry.license,
            f"{entry.parameters:,}" + ("" if entry.has_backbone else ", and the backbone"),
            _input(entry),
            f"{entry.source.host}/{entry.source.repository}",
        )
        for name, entry in DETECTORS.items()
    ]
    return table(header, rows)


def _input(entry: Published | PublishedGraph) -> str:
    how = "not resized" if entry.resize == "pad" else f"shorter side to {entry.resize.partition(':')[2]} px"
    return f"{how}, center {entry.size} px"
