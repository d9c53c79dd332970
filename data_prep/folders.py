"""Any tree of folders that holds real images in some and AI-generated ones in others, to one manifest.

    python -m data_prep.folders --root data/genimage --out data/manifests/genimage.csv

A folder whose whole name, in any case, is one of a fixed list (`FOLDER_LABELS`: 0_real, real, nature;
1_fake, fake, ai and others) gives its images their label. Nothing else does: not the folders above `--root`,
not the order of the folders, not a file's name. An image under no such folder, or under two that disagree, is
an error.

| column | holds |
|---|---|
| `name` | the file's name where no other file of the tree has it, else the path below `--root` |
| `source` | the folders below the label folder; if there are none, those above it; else the root's name |
| `generator` | AI images only: the first folder above the label folder, if there is none the first below it |
| `group` | the file's name without extension: often the real image and what was made from it share it |

Folders called train, val or test, with or without a number, are passed over for `generator`. So the
generator is told by `<Generator>/{0_real,1_fake}`, `<Generator>/<set>/{train,val}/{ai,nature}` and
`ai/<Generator>`, if `--root` is the folder above these. Files whose bytes are equal are kept once, the first
by path; equal files with two labels are an error.
"""

import argparse
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from data_prep.reading import archives
from data_prep.writing import source as sources
from featdistill import command_line
from featdistill.command_line import UserError
from featdistill.images import reading as image_io
from featdistill.records import manifest

# Names of folders that hold one class, in lower case, as the field's benchmarks use them: 0_real and 1_fake
# (ForenSynths, UniversalFakeDetect, AIGCDetectBenchmark, Chameleon, DiTFake), nature and ai (GenImage), Real
# and Fake (Deepfake-60K), and plain synonyms. Numbers alone are not among them, since sets disagree on which
# class 0 is, and neither is deepfake, the name of a ForenSynths set that holds both classes.
FOLDER_LABELS = {
    **dict.fromkeys(("0_real", "real", "reals", "real_images", "nature", "natural", "authentic"), 0),
    **dict.fromkeys(("1_fake", "fake", "fakes", "fake_images", "ai", "ai_images", "ai_generated"), 1),
    **dict.fromkeys(("ai-generated", "generated", "generated_images", "synthetic", "synthetic_images"), 1),
}
# Folders that name a part of a data set (test, val2, ..), not what made its images.
_PART = re.compile(r"(train|training|val|valid|validation|test|testing)\d*", re.IGNORECASE)


def folder_label(name: str) -> int | None:
    """Return the label of the images in a folder of this name, or None where the name says nothing."""
    return FOLDER_LABELS.get(name.casefold())


@dataclass(frozen=True)
class Place:
    """What the folders of an image say.

    Attributes:
        label: 0 real, 1 AI-generated.
        above: names of the folders above the label folder, from the root down.
        below: names of the folders below it.
    """

    label: int
    above: tuple[str, ...]
    below: tuple[str, ...]

    def source(self, fallback: str) -> str:
        return "/".join(self.below or self.above) or fallback

    def generator(self) -> str:
        if self.label == 0:
            return ""
        return next((name for name in (*self.above, *self.below) if not _PART.fullmatch(name)), "")


def place_of(folder: str) -> Place:
    """Return what a folder says of the images in it.

    Of several label folders on the path that agree, the first one counts, and the others are left out.

    Args:
        folder: path relative to the root, parts joined by `/`; empty for the root itself.

    Raises:
        UserError: no part of the path is the name of a label folder, or two of them disagree.
    """
    parts = folder.split("/") if folder else []
    given = [folder_label(part) for part in parts]
    found = [part for part, label in zip(parts, given, strict=True) if label is not None]
    if not found:
        known = ", ".join(FOLDER_LABELS)
        raise UserError(f"folder '{folder or '.'}' has images, but no folder on its path is one of: {known}")
    first = parts.index(found[0])
    for part, label in zip(parts, given, strict=True):
        if label is not None and label != given[first]:
            raise UserError(f"folder '{folder}' lies under '{found[0]}' and under '{part}', which disagree")
    below = [part for part, label in zip(parts, given, strict=True) if label is None][first:]
    return Place(given[first], tuple(parts[:first]), tuple(below))


def build_manifest(root: str | Path, source: str = "") -> pd.DataFrame:
    """Build the manifest of a tree, ordered by path.

    Args:
        source: the source of every image; by default the folders' names tell it.

    Raises:
        UserError: there are no images, a folder is not clear about its label, or equal files have two labels.
    """
    tree = archives.open_folder(root)
    files = tree.images()
    if not files:
        raise UserError(f"{root} holds no images")
    rows = pd.DataFrame({"file": files, "image": [tree.location(file) for file in files]}, dtype="object")
    rows["folder"] = [file.rpartition("/")[0] for file in files]
    places = {folder: place_of(folder) for folder in rows["folder"].unique()}
    rows["label"] = [places[folder].label for folder in rows["folder"]]
    names = pd.Series([file.rpartition("/")[2] for file in files], dtype="object")
    rows["name"] = names.where(~names.duplicated(keep=False), rows["file"])
    rows["group"] = [image_io.without_extension(name) for name in names]
    fallback = os.path.basename(tree.path)
    columns = {column: rows[column].tolist() for column in ("image", "name", "label", "group")}
    columns["source"] = [source or places[folder].source(fallback) for folder in rows["folder"]]
    columns["generator"] = [places[folder].generator() for folder in rows["folder"]]
    return sources.keep_once(manifest.make_manifest(columns), must_read=True)


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.Parser(
        prog="python -m data_prep.folders",
        description="Write the manifest of a tree of folders with real and AI-generated images. Folders of "
        f"these names give the label: {', '.join(FOLDER_LABELS)}.",
    )
    parser.add_argument("--root", required=True, help="top of the tree")
    parser.add_argument("--out", required=True, metavar="FILE.csv", help="the manifest")
    parser.add_argument("--source", default="", help="source of all images; default: their folders' names")
    parser.add_argument(
        "--holdout", type=float, help="share of the images to write to FILE.holdout.csv instead"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed holds out other images")
    parser.add_argument("--verify", action="store_true", help="decode every image and leave broken ones out")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that verify")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    out = Path(args.out)
    if not Path(args.root).is_dir():
        raise UserError(f"--root {args.root} is no folder")
    if out.suffix != ".csv":
        raise UserError(f"--out {out} must be the name of a .csv file")
    return sources.write_manifests(build_manifest(args.root, args.source), args)


if __name__ == "__main__":
    command_line.run(main)
