"""DiffFace: faces edited or made by diffusion models. Two sets have this name; `--preset` says which one.

    python -m data_prep.diffface --preset diffface-edit --root data/diffface --reals data/CelebAMask-HQ \\
        --map InstructPix2Pix=ai --out data/manifests/diffface.csv
    python -m data_prep.diffface --preset diffusionface --root data/diffusionface --out data/diffusionface.csv

Layout: one folder per method. Releases differ in the names: beyond `LABELS` and the names of DiffusionFace's
methods, `--map FOLDER=real|ai|skip` says what a folder holds, by its whole name, in any case, anywhere below
`--root`. An image below no such folder, or below two that disagree, is an error that names the folder. Below
a folder whose label is clear, there may be others.

Pitfalls: the photographs of DiffFace-Edit are distributed separately, as CelebAMask-HQ. `--reals` accepts its
folder or archive; the masks in it are left out. Without it, the manifest may hold AI images only, and a
warning says so.

Terms: DiffusionFace for academic use only, CelebAMask-HQ for non-commercial research only; those of
DiffFace-Edit are unknown.

| column | holds |
|---|---|
| `generator` | AI images: the folder that is a method or named by `--map`, or the one below `fake` |
| `group` | the face of CelebAMask-HQ, by the number that is the folder's name, or that begins or ends the \
file's name; without a number, the file's stem |
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import replace

from data_prep.reading.files import ImageFile, find_images, one_on_path, read_rows
from data_prep.writing import source as sources
from data_prep.writing.flags import existing
from featdistill import command_line
from featdistill.command_line import UserError

_log = logging.getLogger(__name__)
SKIP = -1
ANSWERS = {"real": 0, "0": 0, "ai": 1, "1": 1, "skip": SKIP}
REAL_FOLDER = "celebamask-hq"
CELEBA_LICENCE = "non-commercial research use only"
LABELS = {
    **dict.fromkeys(("real", "reals", "0_real", REAL_FOLDER, "celeba-hq", "celeba-hq-img"), 0),
    **dict.fromkeys(("fake", "fakes", "1_fake"), 1),
    **dict.fromkeys(("mask", "masks", "celebamask-hq-mask-anno"), SKIP),
}
# The models and methods of DiffusionFace (arXiv 2403.18471).
METHODS = (
    *("adm", "ddpm", "ddim", "pndm", "p2", "ldm", "inpaint", "diffswap"),
    *("sdv15", "sdv21", "sdv15_t2i", "sdv21_t2i", "sdv15_i2i", "sdv21_i2i"),
)


def parse_map(texts: list[str]) -> dict[str, int]:
    """Return labels, or `SKIP`, by case-folded folder name, from texts `FOLDER=real|ai|skip`."""
    mapped: dict[str, int] = {}
    for text in texts:
        folder, _, answer = text.rpartition("=")
        if not folder or "/" in folder or answer.casefold() not in ANSWERS:
            raise UserError(f"--map accepts FOLDER=real, FOLDER=ai or FOLDER=skip, not {text}")
        value = ANSWERS[answer.casefold()]
        if mapped.setdefault(folder.casefold(), value) != value:
            raise UserError(f"--map contradicts itself about {folder}")
    return mapped


def row(file: ImageFile, methods: Mapping[str, int]) -> sources.Cells:
    """Return the cells of an image; `methods` of the preset and of `--map` take precedence over `LABELS`."""
    try:
        position, label = one_on_path(file, {**LABELS, **methods}, "a label or a method")
    except UserError as error:
        raise UserError(f"{error}; use --map FOLDER=real, FOLDER=ai or FOLDER=skip") from error
    named = [name for name in file.folders if name.casefold() in methods]
    below = [name for name in file.folders[position:] if name.casefold() not in LABELS]
    folder = file.folders[-1]
    number = re.search(r"^\d+|\d+$", folder if folder.isdecimal() else file.stem)
    group = f"face {int(number[0])}" if number else file.stem
    return {"label": label, "generator": next(iter(named + below), ""), "group": group}


DIFFFACE_EDIT = sources.Source(
    name="diffface-edit",
    title="DiffFace-Edit",
    origin="the release of arXiv 2601.13551, on a net disk, and its photographs from CelebAMask-HQ",
    licence="unknown",
    row=row,
    keep_once=True,
)
DIFFUSIONFACE = sources.Source(
    name="diffusionface",
    title="DiffusionFace",
    origin="Rapisurazurite/DiffFace on GitHub, Zenodo 10865300 and 10865065",
    licence="academic use only",
    row=row,
    keep_once=True,
)


def build_parser() -> command_line.Parser:
    parser = sources.build_parser("diffface", DIFFFACE_EDIT, DIFFUSIONFACE)
    parser.set_defaults(preset=None)
    parser.add_argument("--reals", type=existing, metavar="PATH", help="folder or archive of CelebAMask-HQ")
    parser.add_argument(
        "--map",
        nargs="+",
        default=[],
        metavar="FOLDER=real|ai|skip",
        help=f"what folders hold, beyond {', '.join(LABELS)} and the methods of DiffusionFace",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.preset is None:
        raise UserError("--preset diffface-edit or diffusionface is required: both are called DiffFace")
    source = sources.chosen(args, DIFFFACE_EDIT, DIFFUSIONFACE)
    methods = {**dict.fromkeys(METHODS if source is DIFFUSIONFACE else (), 1), **parse_map(args.map)}
    files = find_images(args.root)
    photographs = find_images(args.reals) if args.reals else []
    files += [replace(file, path=f"{REAL_FOLDER}/{file.path}") for file in photographs]
    known = {**LABELS, **methods}
    files = [file for file in files if SKIP not in (known.get(name.casefold()) for name in file.folders)]
    if not files:
        raise UserError("all images are in folders that are skipped")
    rows = read_rows(files, lambda file: row(file, methods))
    apart = {file.location for file in photographs}
    rows["source"] = [REAL_FOLDER if image in apart else "" for image in rows["image"]]
    rows["licence"] = [CELEBA_LICENCE if image in apart else "" for image in rows["image"]]
    if 0 not in rows["label"]:
        _log.warning("there are no real images; add CelebAMask-HQ with --reals")
    return sources.finish(rows, source, args)


if __name__ == "__main__":
    command_line.run(main)
