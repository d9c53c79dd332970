"""DiffFace: faces edited or made by diffusion models. Two sets go by the name; the user says which is meant.

    python -m data_prep.diffface --preset diffface-edit --root data/diffface --reals data/CelebAMask-HQ \\
        --map InstructPix2Pix=ai --out data/manifests/diffface.csv
    python -m data_prep.diffface --preset diffusionface --root data/diffusionface --out data/diffusionface.csv

Layout: one folder a method. Releases differ in the names: beyond `LABELS` and, for DiffusionFace, the names
of its methods, `--map FOLDER=real|ai|skip` says what a folder holds, by its whole name, in any case, anywhere
below `--root`. An image that lies below no such folder, or below two that disagree, is an error that names
the folder. Below a folder whose label is clear, others may follow.

Traps: the photographs of DiffFace-Edit come apart, as CelebAMask-HQ. `--reals` takes its folder or archive;
the masks in it are left out. Without it the manifest may hold AI images alone, which is said.

Terms: DiffusionFace for academic use only, CelebAMask-HQ for non-commercial research only; those of
DiffFace-Edit are unknown.

| column | holds |
|---|---|
| `generator` | AI images: the folder that is a method or given by `--map`, or the one below `fake` |
| `group` | the face of CelebAMask-HQ, by the number of which the folder's name consists, or with which the \
file's name begins or else ends; where there is none, the file's stem |
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from data_prep.reading.files import ImageFile, columns_of, find_images, one_on_path
from data_prep.writing import source as sources
from featdistill import command_line
from featdistill.command_line import Parser, UserError

SKIP = -1
ANSWERS = {"real": 0, "0": 0, "ai": 1, "1": 1, "skip": SKIP}
REAL_FOLDER = "celebamask-hq"
CELEBA_LICENCE = "non-commercial research use only"
LABELS = {
    **dict.fromkeys(("real", "reals", "0_real", REAL_FOLDER, "celeba-hq", "celeba-hq-img"), 0),
    **dict.fromkeys(("fake", "fakes", "1_fake"), 1),
    **dict.fromkeys(("mask", "masks", "celebamask-hq-mask-anno"), SKIP),
}
DIFFFACE_EDIT = sources.Source(
    name="diffface-edit",
    title="DiffFace-Edit",
    origin="the release of arXiv 2601.13551, on a net disk, and its photographs from CelebAMask-HQ",
    licence="unknown",
    keep_once=True,
)
DIFFUSIONFACE = sources.Source(
    name="diffusionface",
    title="DiffusionFace",
    origin="Rapisurazurite/DiffFace on GitHub, Zenodo 10865300 and 10865065",
    licence="academic use only",
    keep_once=True,
)
# The models and methods of DiffusionFace (arXiv 2403.18471).
METHODS = {
    DIFFFACE_EDIT.name: (),
    DIFFUSIONFACE.name: (
        *("adm", "ddpm", "ddim", "pndm", "p2", "ldm", "inpaint", "diffswap"),
        *("sdv15", "sdv21", "sdv15_t2i", "sdv21_t2i", "sdv15_i2i", "sdv21_i2i"),
    ),
}


def parse_map(texts: list[str]) -> dict[str, int]:
    """Return labels, or `SKIP`, by case-folded folder names, from texts `FOLDER=real|ai|skip`.

    Raises:
        UserError: a text is no such pair, or contradicts another one.
    """
    mapped: dict[str, int] = {}
    for text in texts:
        folder, _, answer = text.rpartition("=")
        if not folder or "/" in folder or answer.casefold() not in ANSWERS:
            raise UserError(f"--map takes FOLDER=real, FOLDER=ai or FOLDER=skip, not {text}")
        value = ANSWERS[answer.casefold()]
        if mapped.setdefault(folder.casefold(), value) != value:
            raise UserError(f"--map gives {folder} twice, and differently")
    return mapped


def columns(files: list[ImageFile], methods: Mapping[str, int]) -> dict[str, list]:
    """Return the columns of the manifest, without the images that are skipped.

    Args:
        methods: labels of the preset's methods and of `--map`; they go before `LABELS`.

    Raises:
        UserError: no folder of an image is known, or two disagree, or all images are skipped.
    """
    known = {**LABELS, **methods}
    kept, labels, generators = [], [], []
    for file in files:
        if any(known.get(name.casefold()) == SKIP for name in file.folders):
            continue
        try:
            place, label = one_on_path(file, known, "a label or a method")
        except UserError as error:
            raise UserError(f"{error}; say it by --map FOLDER=real, FOLDER=ai or FOLDER=skip") from error
        kept.append(file)
        labels.append(label)
        below = [name for name in file.folders[place:] if name.casefold() not in LABELS]
        named = [name for name in file.folders if name.casefold() in methods]
        generators.append(next(iter(named + below), "") if label else "")
    if not kept:
        raise UserError("there are no images but those in folders that are skipped")
    groups = [_group(file) for file in kept]
    return {**columns_of(kept), "label": labels, "generator": generators, "group": groups}


def _group(file: ImageFile) -> str:
    folder = file.folders[-1]
    number = re.search(r"^\d+|\d+$", folder if folder.isdecimal() else file.stem)
    return f"face {int(number[0])}" if number else file.stem


def build_parser() -> Parser:
    parser = sources.build_parser("diffface", DIFFFACE_EDIT, DIFFUSIONFACE)
    parser.set_defaults(preset=None)
    parser.add_argument("--reals", metavar="PATH", help="CelebAMask-HQ, a folder or an archive")
    parser.add_argument(
        "--map",
        nargs="+",
        default=[],
        metavar="FOLDER=real|ai|skip",
        help=f"what folders hold, beyond {', '.join(LABELS)} and the methods of DiffusionFace",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = sources.parse(build_parser(), argv)
    if args.preset is None:
        raise UserError("--preset diffface-edit or diffusionface is needed: DiffFace is the name of both")
    source = sources.chosen(args, DIFFFACE_EDIT, DIFFUSIONFACE)
    methods = {**dict.fromkeys(METHODS[source.name], 1), **parse_map(args.map)}
    files = find_images(args.root)
    photographs = find_images(args.reals) if args.reals else []
    files += [replace(file, path=f"{REAL_FOLDER}/{file.path}") for file in photographs]
    rows = columns(files, methods)
    apart = {file.location for file in photographs}
    rows["source"] = [REAL_FOLDER if image in apart else source.name for image in rows["image"]]
    rows["licence"] = [CELEBA_LICENCE if image in apart else source.licence for image in rows["image"]]
    if 0 not in rows["label"]:
        print("warning: there are no real images; give CelebAMask-HQ by --reals")
    return sources.finish(rows, source, args)


if __name__ == "__main__":
    command_line.run(main)
