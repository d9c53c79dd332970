"""A bank: what a frozen backbone returns for the views of images, in memory-mapped files.

| file | holds |
|---|---|
| `bank.json` | how it was made (backbone, weights, preprocessing, views, manifests); hashes of the files |
| `manifest.csv` | the rows, with absolute paths of the images |
| `ATOM.npy` | one array per atom, such as `class-12.npy`: (rows, views, ...), float16 or float32 |
| `drawn.jsonl` | one line per row: for each view, the [name, scale] pairs of its distortions |
| `errors.csv` | `name,reason` of the images that could not be read; their rows are NaN |

An atom is one array that a backbone returns for an image; features are made of atoms, see
`featdistill.models.features`.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from featdistill import atomic
from featdistill.command_line import UserError
from featdistill.data.preprocessing import Preprocessing
from featdistill.inference.references import located
from featdistill.models.backbones import build
from featdistill.models.encoders import Backbone, BackboneSpec
from featdistill.models.expert import load_expert
from featdistill.models.features import Atom, Feature, Layout, layout, parse
from featdistill.records import predictions
from featdistill.records.manifest import read_manifest
from featdistill.records.provenance import read_record

FORMAT = 1
RECORD_FILE, MANIFEST_FILE, DRAWN_FILE, ERRORS_FILE = "bank.json", "manifest.csv", "drawn.jsonl", "errors.csv"
_REMEDY = "remove the bank and embed again"
# Rows that are converted to float32 at once.
_ROWS_AT_ONCE = 1024


class Bank:
    """A finished bank; see the top of this module.

    Args:
        path: its folder.
        record: the content of `bank.json`.

    Attributes:
        spec: how to build the backbone.
        preprocessing: of the images, also of those that are not distorted.
        views: names of the views; the first is `clean`, and `control` is the last if there is one.
        atoms: what is kept of each view.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path, self.record = path, record
        try:
            self.spec = BackboneSpec(**record["backbone"])
            values = dict(record["preprocessing"])
            values |= {name: tuple(values[name]) for name in ("mean", "std")}
            self.preprocessing = Preprocessing(**values)
            self.views: list[str] = record["views"]["names"]
            self.atoms = [Atom(atom["kind"], atom["layer"]) for atom in record["atoms"]]
        except (KeyError, TypeError) as error:
            raise UserError(f"{path / RECORD_FILE} is damaged ({error}); {_REMEDY}") from error

    @cached_property
    def rows(self) -> pd.DataFrame:
        """The rows of the manifest, and `broken`: whether an image could not be read."""
        rows, errors = read_manifest(self.file(MANIFEST_FILE)), self.file(ERRORS_FILE)
        names = [line[0] for line in predictions.parse_csv(errors.read_bytes(), str(errors))[1]]
        return rows.assign(broken=rows["name"].isin(names))

    def file(self, name: str) -> Path:
        """Return the path of a file of the bank, whose bytes are checked when this process first asks.

        Raises:
            UserError: it is missing, or not what was written.
        """
        path, remedy = self.path / name, _REMEDY
        if name == MANIFEST_FILE:
            remedy = "run its embed command again, which writes this file anew"
        recorded = self.record.get("files", {}).get(name)
        if recorded is None:
            raise UserError(f"{self.path / RECORD_FILE} is damaged: it has no hash for {name}; {_REMEDY}")
        try:
            status = path.stat()
            found = _sha256(path.absolute(), status.st_size, status.st_mtime_ns)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error}); {remedy}") from error
        if found != recorded:
            raise UserError(f"{path} has changed since it was written ({RECORD_FILE} has its hash); {remedy}")
        return path

    @property
    def fingerprint(self) -> str:
        """A hash of which images the rows are; banks of the same images in the same order share it."""
        parts = [part["sha256"] for part in self.record["manifests"]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def array(self, atom: Atom) -> np.memmap:
        """Return the values of an atom, (rows, views, ...), read-only.

        Raises:
            UserError: the bank does not hold the atom, or its file has changed.
        """
        if atom not in self.atoms:
            held = ", ".join(each.name for each in self.atoms)
            raise UserError(f"bank {self.path} does not hold {atom.name}, only {held}; embed with it")
        return np.load(self.file(f"{atom.name}.npy"), mmap_mode="r", allow_pickle=False)

    def drawn(self) -> Iterator[list[list]]:
        """Yield, for each row, the [name, scale] pairs of each view's distortions."""
        with self.file(DRAWN_FILE).open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)

    @cached_property
    def backbone_facts(self) -> Layout:
        """The layers and widths of the backbone, which `parse` needs; no weights are read."""
        with torch.device("meta"):
            return layout(build(self.spec).eval())

    def feature(self, text: str) -> Feature:
        """Return the feature of a text, or raise a `UserError` if the bank lacks what it is made of."""
        feature = parse(text, self.backbone_facts)
        for atom in feature.atoms:
            self.array(atom)
        return feature

    def values(self, feature: Feature, view: str = "clean") -> np.ndarray:
        """Return a feature of all rows in one view, (rows, D) float32; NaN where an image is broken."""
        if view not in self.views:
            raise UserError(f"bank {self.path} has no view {view}, only {', '.join(self.views)}")
        column, arrays = self.views.index(view), {atom: self.array(atom) for atom in feature.atoms}
        values = np.empty((self.record["rows"], feature.dim), np.float32)
        for first in range(0, len(values), _ROWS_AT_ONCE):
            part = slice(first, first + _ROWS_AT_ONCE)
            atoms = {atom: array[part, column].astype(np.float32) for atom, array in arrays.items()}
            values[part] = feature.combine(atoms)
        return values

    def backbone(self) -> Backbone:
        """Build the backbone with the weights that made the bank, in evaluation mode.

        Raises:
            UserError: the weights are gone, or are not the same.
        """
        weights = self.record["weights"]
        source = weights["path"]
        if weights["kind"] == "expert":
            backbone = load_expert(located(source)[0]).backbone
        else:
            backbone = build_always_alike(self.spec, source)
        if state_hash(backbone) != weights["sha256"]:
            raise UserError(f"the weights {source} are not those of the bank {self.path}; {_REMEDY}")
        return backbone.eval()


def open_bank(path: str | Path) -> Bank:
    """Open a finished bank.

    Raises:
        UserError: it is not a bank, it is not finished, or this version cannot read it.
    """
    path = Path(path)
    record = read_record(path / RECORD_FILE, _REMEDY, format=FORMAT)
    if record is None:
        raise UserError(f"{path} is not a bank: it has no {RECORD_FILE}; make one with embed")
    if not record.get("finished"):
        raise UserError(f"the bank {path} is not finished; run its embed command again to continue")
    bank = Bank(path, record)
    for name in (MANIFEST_FILE, DRAWN_FILE, ERRORS_FILE):
        bank.file(name)
    return bank


@cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Return the hash of a file, computed once while its size and time stay the same."""
    return atomic.sha256_of(path)


def build_always_alike(spec: BackboneSpec, weights: str) -> Backbone:
    """Build a backbone; random weights are the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(spec, weights)


def state_hash(backbone: Backbone) -> str:
    """Return the SHA-256 of a backbone's weights, whatever file they come from."""
    hashed = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        hashed.update(f"{name}:{value.dtype}:{tuple(value.shape)}\n".encode())
        hashed.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()
