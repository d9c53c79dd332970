"""A copy of any manifest in which size, JPEG quality and container no longer tell the classes apart.

    python -m data_prep.equalise data/genimage.csv --out data/genimage_equal

Every image becomes a JPEG with 4:2:0 chroma, the encoder's own tables and no metadata. Its size and its
quality are drawn, as a function of (seed, name), from one distribution for all classes.

| `--size` | the sizes |
|---|---|
| `shorter` | those of the manifest's own images, as many of each class, reduced to what all classes have |
| `shorter PX` | the same aspect ratios with a shorter side of PX |
| `square`, `square PX` | squares: of the images' own shorter sides, reduced alike, or of PX |

Reduced to what all classes have: with its aspect ratio kept, until it can be cut without enlargement from 95
% of the images of every class, with 7 px of room. So images that are all of 256 x 256 px become 249 x 249.

| file | holds |
|---|---|
| `images.zip` | the images, below `images/` |
| `manifest.csv` | the rows with all their columns; `name` ends in .jpg |
| `errors.csv` | images that could not be read, where there are any; the status is then 1 |
| `equalise.json` | what the copy was made from and with; written last |

What is left, and can still tell the classes apart:

- What an image went through before. A JPEG is now one twice over, and the first time leaves traces in the
  second one's coefficients; a PNG is a JPEG for the first time. The sizes leave room for the part that is cut
  to begin anywhere in the former blocks, and reducing it blurs the traces; neither takes them away.
- By how much an image was reduced. A photograph of 12 megapixels loses more than an AI-generated image of
  one, and what is reduced far is sharp and has little noise. `--fit crop` does not reduce; then the classes
  differ in how much of a scene there is to see and in how sharp it is.
- An enlarged image (one that is smaller than what was drawn for it) has no fine detail. The share of them is
  printed for every class.
- Whatever else one class alone has: borders, watermarks, colour profiles, subjects.

A copy that was stopped is continued by the same command; a finished one is left as it is.
"""

import io
import os
from functools import partial

import numpy as np
import pandas as pd
from PIL import Image

from data_prep.writing import copies as image_copies
from featdistill import atomic, command_line
from featdistill.command_line import Parser, UserError
from featdistill.images.equalization import FITS, MIN_SIDE_PX, Equalization, common_sizes, equalized_jpeg
from featdistill.images.reading import BrokenImage, read_bytes, read_image
from featdistill.records.manifest import read_manifest
from featdistill.seeds import hash_ranks

SIZES = ("shorter", "square")
# So many images of a class show its sizes well: the quantile that counts, at 5 %, is then known to 1 %.
_SIZED_IMAGES = 512
_EXIF_ORIENTATION = 0x0112


def sizes_by_class(frame: pd.DataFrame, seed: int = 0) -> dict[str, np.ndarray]:
    """Read the sizes of some hundred images of every class, those with the smallest hash of (seed, name).

    Images without a label are a class of their own, and images that cannot be read are passed over.

    Returns:
        Class -> (N, 2) heights and widths in px, upright.

    Raises:
        UserError: no image of a class can be read.
    """
    rank = pd.Series(hash_ranks(frame["name"], seed), index=frame.index)
    classes = frame["label"].astype("string").fillna("none")
    found = {}
    for label, rows in frame.assign(rank=rank).sort_values("rank", kind="stable").groupby(classes):
        sizes: list[tuple[int, int]] = []
        for location in rows["image"]:
            try:
                sizes.append(_upright_size(read_bytes(location)))
            except BrokenImage:
                continue
            if len(sizes) == _SIZED_IMAGES:
                break
        if not sizes:
            raise UserError(f"none of the {len(rows)} images with label {label} can be read")
        found[str(label)] = np.array(sizes)
    return found


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
    """Return an image's copy as a JPEG file's bytes."""
    return equalized_jpeg(read_image(location), name, settings)


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m data_prep.equalise",
        description="Copy a manifest's images so that size, quality and container do not tell the classes "
        "apart.",
    )
    parser.add_argument("manifest", metavar="MANIFEST")
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder for the copy")
    parser.add_argument(
        "--size",
        nargs="+",
        metavar=("shorter|square", "PX"),
        help="what sizes are drawn; PX sets the shorter side (default: shorter)",
    )
    parser.add_argument("--fit", choices=FITS, default="resize", help="how an image comes to its size")
    parser.add_argument(
        "--quality-range",
        nargs=2,
        type=int,
        default=[75, 95],
        metavar=("LOW", "HIGH"),
        help="JPEG qualities that are drawn",
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other sizes and qualities")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    size, side_px = _size(arguments.size or ["shorter"])
    low, high = arguments.quality_range
    if not 1 <= low <= high <= 100:
        raise UserError(f"--quality-range must be from 1 to 100, the lower one first, not {low} {high}")
    if arguments.seed < 0 or arguments.workers < 1:
        raise UserError("--seed must be 0 or more and --workers 1 or more")
    frame = read_manifest(arguments.manifest)
    if frame.empty:
        raise UserError(f"manifest {arguments.manifest} has no rows")
    made_with = {"manifest_sha256": atomic.sha256_of(arguments.manifest), "size": [size, side_px]}
    flags = ("fit", "quality_range", "seed")
    made_with |= {flag: getattr(arguments, flag) for flag in flags}
    copy = image_copies.ImageCopy(arguments.out, "equalise.json", made_with)
    status = copy.finished_status()
    if status is not None:
        return status
    names = image_copies.file_names(frame["name"], ".jpg")
    by_class = sizes_by_class(frame, arguments.seed)
    settings = Equalization(
        choose_sizes(by_class, size, side_px),
        tuple(arguments.quality_range),
        arguments.fit,
        arguments.seed,
    )
    _describe(settings, by_class)
    # The sizes are part of it: with another list of them, images that are there already would not fit.
    copy.made_with["settings"] = settings.as_json()
    copy.work.mkdir(parents=True, exist_ok=True)
    paths = [copy.work / f"{row}.jpg" for row in range(len(frame))]
    tasks = list(zip(frame["name"], frame["image"], strict=True))
    make = partial(make_image, settings=settings)
    errors = image_copies.make_files(tasks, paths, make, arguments.workers, "equalising")
    good = [row for row in range(len(frame)) if row not in errors]
    rows = frame.assign(name=names).iloc[good]
    broken = [(frame["name"][row], errors[row]) for row in sorted(errors)]
    status = copy.finish(rows, [paths[row] for row in good], broken)
    print(f"{arguments.out}: {len(good)} images")
    return status


def _size(values: list[str]) -> tuple[str, int | None]:
    kind = command_line.one_of("--size", values[0], SIZES)
    if len(values) == 1:
        return kind, None
    if len(values) > 2 or not values[1].isdecimal() or int(values[1]) < MIN_SIDE_PX:
        raise UserError(f"--size takes {kind}, or {kind} and a side of {MIN_SIDE_PX} px or more")
    return kind, int(values[1])


def _describe(settings: Equalization, by_class: dict[str, np.ndarray]) -> None:
    sizes = np.array(settings.sizes)
    shorter = sizes.min(axis=1)
    print(f"{len(np.unique(sizes, axis=0))} sizes, shorter side {shorter.min()} to {shorter.max()} px")
    for label, own in by_class.items():
        fits = (own[:, None, :] >= sizes[None, :, :]).all(axis=2)
        print(f"label {label}: {1 - fits.mean():.1%} of the images are enlarged")


def _upright_size(data: bytes) -> tuple[int, int]:
    """Return (height, width) as the image will be decoded, from the file's header alone."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            turned = "exif" in image.info and image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception as error:  # damaged bytes make Pillow raise nearly anything
        raise BrokenImage(str(error)) from error


if __name__ == "__main__":
    command_line.run(main)
