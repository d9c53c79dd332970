"""A copy of a manifest in which size, JPEG quality and container do not tell the classes apart.

    python -m data_prep.equalize data/genimage.csv --out data/genimage_equal

Every image becomes a JPEG with 4:2:0 chroma, the encoder's default tables and no metadata. Its size and its
quality are drawn, as a function of (seed, name), from one distribution for all classes.

| `--size` | the sizes |
|---|---|
| `shorter` | those of the manifest's images, equally many per class, reduced to what all classes have |
| `shorter PX` | the same aspect ratios with a shorter side of PX |
| `square`, `square PX` | squares: with the images' own shorter sides, reduced likewise, or of PX |

Reduced to what all classes have: keeping its aspect ratio, until it can be cut without enlargement from 95 %
of the images of every class, with 7 px to spare. So images that are all 256 x 256 px become 249 x 249.

| file | holds |
|---|---|
| `images.zip` | the images, in `images/` |
| `manifest.csv` | the rows with all their columns; `name` ends in .jpg |
| `errors.csv` | images that could not be read, if any; the exit status is then 1 |
| `equalise.json` | settings of the copy; written last |

Traces of earlier processing remain in the pixels and can still tell the classes apart; see docs/data.md.

A stopped run is continued by the same command; a finished copy is left as it is.
"""

import logging
from functools import partial

import numpy as np
import pandas as pd

from data_prep.writing.copies import ImageCopy, file_names
from data_prep.writing.flags import add_flags, copy_parser
from featdistill import command_line
from featdistill.command_line import Parser, UserError, counted, within
from featdistill.images.equalization import FITS, MIN_SIDE_PX, Equalization, common_sizes, equalized_jpeg
from featdistill.images.reading import BrokenImage, read_bytes, read_image, upright_size
from featdistill.records.manifest import read_manifest
from featdistill.records.parts import content_sha256
from featdistill.seeds import hash_ranks

_log = logging.getLogger(__name__)
SIZES = ("shorter", "square")
# Enough images to know the sizes of a class: the quantile that matters, at 5 %, is accurate to 1 %.
_MEASURED_IMAGES = 512


def sizes_by_class(frame: pd.DataFrame, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the sizes of some hundred images per class, those with the smallest hashes of (seed, name).

    Images without a label are a class of their own; images that cannot be read are skipped.

    Returns:
        (N, 2) heights and widths in px, upright, by class.
    """
    classes = frame["label"].astype("string").fillna("none")
    order = frame.assign(hash=hash_ranks(frame["name"], seed)).sort_values("hash", kind="stable")
    by_class = {}
    for label, rows in order.groupby(classes):
        sizes: list[tuple[int, int]] = []
        for location in rows["image"]:
            try:
                sizes.append(upright_size(read_bytes(location)))
            except BrokenImage:
                continue
            if len(sizes) == _MEASURED_IMAGES:
                break
        if not sizes:
            raise UserError(f"none of the {len(rows)} images with label {label} can be read")
        by_class[str(label)] = np.array(sizes)
    return by_class


def choose_sizes(by_class: dict[str, np.ndarray], size: str, side_px: int | None) -> tuple:
    """Return the sizes that images are drawn from; see the table above for `size` and `side_px`."""
    sizes = list(by_class.values())
    if size == "square":
        sizes = [np.repeat(values.min(axis=1, keepdims=True), 2, axis=1) for values in sizes]
    common = common_sizes(sizes)
    if side_px is None:
        return common
    return tuple(tuple(round(side * side_px / min(pair)) for side in pair) for pair in common)


def make_image(name: str, location: str, settings: Equalization) -> bytes:
    """Return the bytes of an image's copy as a JPEG file."""
    return equalized_jpeg(read_image(location), name, settings)


def build_parser() -> Parser:
    parser = copy_parser("equalize", "Copy images so that their files do not tell the classes apart.")
    parser.add_argument(
        "--size",
        nargs="+",
        metavar=("shorter|square", "PX"),
        help="which sizes are drawn; PX sets the shorter side (default: shorter)",
    )
    parser.add_argument("--fit", choices=FITS, default="resize", help="how an image gets its size")
    parser.add_argument(
        "--quality-range",
        nargs=2,
        type=within(1, 100),
        default=[75, 95],
        metavar=("LOW", "HIGH"),
        help="range of JPEG qualities",
    )
    add_flags(parser, "seed", "workers")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    size, side_px = _size(arguments.size or ["shorter"])
    low, high = arguments.quality_range
    if low > high:
        raise UserError(f"--quality-range needs the lower quality first, not {low} {high}")
    frame = read_manifest(arguments.manifest)
    if frame.empty:
        raise UserError(f"manifest {arguments.manifest} has no rows")
    made_with = {"manifest_sha256": content_sha256(arguments.manifest), "size": [size, side_px]}
    made_with |= {flag: getattr(arguments, flag) for flag in ("fit", "quality_range", "seed")}
    copy = ImageCopy(arguments.out, "equalise.json", made_with, ".jpg")
    if (status := copy.finished_status()) is not None:
        return status
    renamed = frame.assign(name=file_names(frame["name"], ".jpg"))
    by_class = sizes_by_class(frame, arguments.seed)
    sizes = choose_sizes(by_class, size, side_px)
    settings = Equalization(sizes, tuple(arguments.quality_range), arguments.fit, arguments.seed)
    _show_sizes(settings, by_class)
    # Existing images would not fit other sizes, so these determine the folder of unfinished work too.
    copy.start(settings=settings.as_json())
    tasks = list(zip(frame["name"], frame["image"], strict=True))
    errors = copy.make(tasks, partial(make_image, settings=settings), arguments.workers, "equalizing")
    status = copy.finish(renamed.drop(index=list(errors)), frame, errors)
    _log.info(f"{arguments.out}: {counted(len(frame) - len(errors), 'image')}")
    return status


def _size(values: list[str]) -> tuple[str, int | None]:
    kind = command_line.one_of("--size", values[0], SIZES)
    if len(values) == 1:
        return kind, None
    if len(values) > 2 or not values[1].isdecimal() or int(values[1]) < MIN_SIDE_PX:
        raise UserError(f"--size accepts {kind}, or {kind} and a side of {MIN_SIDE_PX} px or more")
    return kind, int(values[1])


def _show_sizes(settings: Equalization, by_class: dict[str, np.ndarray]) -> None:
    sizes = np.array(settings.sizes)
    shorter = sizes.min(axis=1)
    _log.info(f"{len(np.unique(sizes, axis=0))} sizes, shorter side {shorter.min()} to {shorter.max()} px")
    for label, measured in by_class.items():
        fits = (measured[:, None, :] >= sizes[None, :, :]).all(axis=2)
        _log.info(f"label {label}: {1 - fits.mean():.1%} of the images are enlarged")


if __name__ == "__main__":
    command_line.run(main)
