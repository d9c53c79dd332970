"""A tree of folders with real images in some and AI-generated ones in others, to one manifest.

    python -m data_prep.folders --root data/genimage --out data/manifests/genimage.csv

A folder whose whole name, in any case, is in a fixed list (`FOLDER_LABELS`: 0_real, real, nature; 1_fake,
fake, ai and others) labels its images. Nothing else does: not the folders above `--root`, the order of the
folders or the name of a file. An image below no such folder, or below two that disagree, is an error.

| column | holds |
|---|---|
| `name` | the file's name if it is unique in the tree, else the path below `--root` |
| `source` | the folders below the label folder; if there are none, those above it; else the root's name |
| `generator` | AI images only: the first folder above the label folder, or else the first below it |
| `group` | the file's name without extension, which a real image and the images made from it often share |

For `generator`, folders called train, val or test, with or without a number, are skipped. So the generator is
found in `<Generator>/{0_real,1_fake}`, `<Generator>/<set>/{train,val}/{ai,nature}` and `ai/<Generator>`, if
`--root` is the folder above these. Files with equal bytes are kept once, the first by path; equal files with
two labels are an error.
"""

import os
import re
from pathlib import Path

import pandas as pd

from data_prep.reading.archives import note_archives, note_ignored, open_folder
from data_prep.reading.files import ImageFile, folder_images, one_on_path, read_rows
from data_prep.writing import source as sources
from data_prep.writing.flags import add_flags, csv_file, folder_or_address
from data_prep.writing.manifests import check_out, take_left_out, write_manifests
from featdistill import command_line
from featdistill.command_line import UserError
from featdistill.records import manifest

# Names of folders with one class, in lower case, as in common benchmarks: 0_real and 1_fake (ForenSynths,
# UniversalFakeDetect, AIGCDetectBenchmark, Chameleon, DiTFake), nature and ai (GenImage), Real and Fake
# (Deepfake-60K), and synonyms. Not among them: bare numbers, since sets disagree on which class 0 is, and
# deepfake, a set of ForenSynths with both classes.
FOLDER_LABELS = {
    **dict.fromkeys(("0_real", "real", "reals", "real_images", "nature", "natural", "authentic"), 0),
    **dict.fromkeys(("1_fake", "fake", "fakes", "fake_images", "ai", "ai_images", "ai_generated"), 1),
    **dict.fromkeys(("ai-generated", "generated", "generated_images", "synthetic", "synthetic_images"), 1),
}
# Folders named after a part of a data set (test, val2, ..), not after a generator.
_PART = re.compile(r"(train|training|val|valid|validation|test|testing)\d*", re.IGNORECASE)


def row(file: ImageFile, fallback_source: str) -> sources.Cells:
    """Return the cells of an image; a `UserError` names a folder without a clear label."""
    position, label = one_on_path(file, FOLDER_LABELS, "a label")
    above = list(file.folders[:position])
    below = [name for name in file.folders[position:] if name.casefold() not in FOLDER_LABELS]
    generator = next((name for name in above + below if not _PART.fullmatch(name)), "")
    source = "/".join(below or above) or fallback_source
    return {"label": label, "source": source, "generator": generator if label else ""}


def build_manifest(root: str | Path, source: str = "") -> pd.DataFrame:
    """Build the manifest of a tree, ordered by path.

    `source` is that of all images, or "" to take it from folder names. If some images cannot be used, a
    column `fault` says why; see `manifests.take_left_out`.
    """
    tree = open_folder(root)
    note_ignored([tree])
    note_archives(tree.files, "unpack them")
    files = list(folder_images(tree).values())
    if not files:
        raise UserError(f"{root} holds no images")
    columns = read_rows(files, lambda file: row(file, os.path.basename(tree.path.rstrip("/"))))
    if source:
        columns["source"] = [source] * len(files)
    return sources.keep_once(manifest.make_manifest(columns))


def build_parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="python -m data_prep.folders",
        description="Write the manifest of a tree of folders with real and AI-generated images. Folders with "
        f"these names label their images: {', '.join(FOLDER_LABELS)}.",
    )
    parser.add_argument(
        "--root",
        type=folder_or_address,
        required=True,
        help="top of the tree, or its address such as s3://bucket/folder",
    )
    parser.add_argument("--out", type=csv_file, required=True, metavar="FILE.csv", help="the manifest")
    parser.add_argument("--source", default="", help="source of all images; by default from folder names")
    add_flags(parser, "holdout", "seed", "verify", "workers")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_out(args.out)
    frame, left_out = take_left_out(build_manifest(args.root, args.source))
    return write_manifests(frame, args, left_out)


if __name__ == "__main__":
    command_line.run(main)
