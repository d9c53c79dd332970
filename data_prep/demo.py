"""A synthetic miniature of the challenge: official files and formats, made locally without a download.

Real images are generated scenes taken by a simulated camera; AI images are scenes of the same kind put
through simulated generators. The data are there to run the whole pipeline in minutes; scores on them say
nothing about detectors of real generated images.

    python -m data_prep.demo --out data/demo

Every image is a function of (seed, split, index) alone: neither the number of workers nor a second run
changes a byte.
"""

import functools
import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_prep.synthetic.camera import develop, draw_look, encode_jpeg, expose, photograph
from data_prep.synthetic.generators import Codebooks, fit_codebooks, generate
from data_prep.synthetic.scenes import KINDS, draw_scene
from data_prep.writing.flags import add_flags
from data_prep.writing.parallel import map_in_order
from featdistill import atomic, command_line
from featdistill.command_line import UserError
from featdistill.distortions.plan import apply_plan, describe
from featdistill.distortions.policy import DistortionPolicy
from featdistill.distortions.presets import PRESETS
from featdistill.images import reading as image_io
from featdistill.records import provenance
from featdistill.records.label_files import format_labels
from featdistill.records.provenance import Claim
from featdistill.seeds import evaluation_generator

_log = logging.getLogger(__name__)
# Increased whenever the bytes of the data change, so that an old folder is not mistaken for a new one.
VERSION = 2
RECORD = "demo.json"
SHARDS = 6
# Multiples of 16, so that every decoder's blocks fit; for both classes.
SIDES_PX = (112, 128, 144, 160, 176)
# The evaluation splits are stored again after the distortions, clean images too.
STORAGE_QUALITY = 95
_SEEN = ("nearest", "bilinear", "transposed_conv", "patch_autoencoder", "vector_quantised", "denoiser")


@dataclass(frozen=True)
class Split:
    """One split of the miniature."""

    archive: str  # training has one per shard
    folder: str  # of the images in the archive
    labels: str | None  # label file; None if the archives hold the labels, or if there are none
    counts: dict[str, int]  # number of images by --size
    generators: tuple[str, ...]  # of the AI half of the images
    policy: DistortionPolicy | None = None  # distorts every second image
    stored_twice: bool = False  # decoded and stored again, as in the evaluation splits


def _scored(
    archive: str, folder: str, labels: str, small: int, tiny: int, policy: DistortionPolicy, *generators: str
) -> Split:
    return Split(archive, folder, labels, {"small": small, "tiny": tiny}, generators, policy, True)


_CHAINS_OF_5 = replace(PRESETS["official"], max_operations=5)
# The challenge's evaluation splits mix the generators of the training data with more and more new ones. The
# new ones come first, so that even the smallest split has them.
_VAL = ("pixel_shuffle", "bicubic_sharpen", *_SEEN)
_HARD = ("spectral_peaks", "pixel_shuffle", "bicubic_sharpen", "bilinear", "patch_autoencoder", "denoiser")
_PUBLIC = ("renoised", "token_blocks", "spectral_peaks", "pixel_shuffle", "bicubic_sharpen", *_SEEN[:5])
_NEWEST = ("wavelet_shrunk", "cascade", "renoised", "token_blocks", "spectral_peaks", "bicubic_sharpen")
_PRIVATE = (*_NEWEST, *_SEEN[2:5])
_PRIVATE_LABELS = "organisers/private_test_labels.csv"
SPLITS: dict[str, Split] = {
    "train": Split("shard_{}.zip", "shard_{}/images", None, {"small": 2400, "tiny": 48}, _SEEN),
    "val": _scored("val_images.zip", "val_images", "val_labels.csv", 400, 24, PRESETS["official"], *_VAL),
    "val_hard": _scored(
        "val_images_hard.zip", "val_images_hard", "val_hard_labels.csv", 160, 12, PRESETS["heavy"], *_HARD
    ),
    "public_test": _scored(
        "test_images.zip", "test_images", "test_labels.csv", 200, 12, _CHAINS_OF_5, *_PUBLIC
    ),
    "private_test": _scored(
        "private_test_images.zip", "private_test", _PRIVATE_LABELS, 200, 12, _CHAINS_OF_5, *_PRIVATE
    ),
    "toy": Split("toy.zip", "images", None, {"small": 40, "tiny": 12}, (*_SEEN, "pixel_shuffle")),
}
_ORGANIZERS_ONLY = ("private_test", "toy")


@dataclass(frozen=True)
class DemoImage:
    """One finished image: file name, what is known of it, and the file's bytes."""

    name: str
    label: int
    generator: str
    scene: str
    distortions: list[list]
    is_distorted: int
    data: bytes


def make_image(index: int, split_name: str, seed: int, codebooks: Codebooks) -> DemoImage:
    """Make one image of a split; a function of its arguments alone.

    Odd indices are AI-generated; in each class every second image is distorted if the split has distortions.
    Scene, look, size and JPEG quality are drawn independently of the label.
    """
    split = SPLITS[split_name]
    name = _digest(seed, split_name, index).hex()[:20] + ".jpg"
    label, turn = index % 2, index // 2
    scene_rng, maker_rng = (_generator(seed, split_name, index, part) for part in ("scene", "maker"))
    kind = list(KINDS)[scene_rng.integers(len(KINDS))]
    height_px, width_px = (int(side) for side in scene_rng.choice(SIDES_PX, 2))
    look = draw_look(scene_rng)
    light = expose(draw_scene(scene_rng, kind, height_px, width_px), look)

    picture, generator = photograph(light, look, maker_rng), ""
    if label:
        # The same generator twice in a row, so that it makes both clean and distorted images.
        generator = split.generators[turn // 2 % len(split.generators)]
        picture = generate(generator, light, look, picture, maker_rng, codebooks)
    data = encode_jpeg(picture, look.quality_0_100)

    is_distorted, distortions = int(split.policy is not None and turn % 2 == 1), []
    if split.stored_twice:
        image = image_io.decode(data)
        if is_distorted:
            plan = split.policy.draw(evaluation_generator(seed, name))
            image, distortions = apply_plan(image, plan), describe(plan)
        data = encode_jpeg(image, STORAGE_QUALITY)
    return DemoImage(name, label, generator, kind, distortions, is_distorted, data)


def build(folder: Path, seed: int, size: str, workers: int) -> dict[str, int]:
    """Write all files of the miniature into an empty folder; return the number of images by split."""
    make = functools.partial(_make_task, seed=seed, codebooks=_fit_on_scenes(seed))
    tasks = [(split, index) for split in SPLITS for index in range(SPLITS[split].counts[size])]
    made: dict[str, list[DemoImage]] = {split: [] for split in SPLITS}
    images = map_in_order(make, tasks, workers, "making images")
    for (split, _), image in zip(tasks, images, strict=True):
        made[split].append(image)
    makers: dict[str, list[tuple[str, str, str]]] = {"generators.csv": [], "organisers/generators.csv": []}
    for name, images in made.items():
        # File names are hashes, so their order does not depend on the label.
        images.sort(key=lambda image: image.name)
        _write_split(folder, SPLITS[name], images)
        path = "organisers/generators.csv" if name in _ORGANIZERS_ONLY else "generators.csv"
        makers[path] += [(image.name, image.generator, image.scene) for image in images]
    for path, rows in makers.items():
        atomic.write_text(folder / path, atomic.csv_text(("image_name", "generator", "scene"), rows))
    readme = (Path(__file__).parent / "synthetic" / "README.txt").read_text(encoding="utf-8")
    atomic.write_text(folder / "README.txt", readme.format(seed=seed, size=size, version=VERSION))
    counts = {name: len(images) for name, images in made.items()}
    atomic.write_json(folder / RECORD, {**_settings(seed, size), "counts": counts})
    return counts


def build_parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="python -m data_prep.demo",
        description="Make a synthetic miniature of the challenge: a simulated camera against simulated "
        "generators, in the official files and formats. It is there to run the whole pipeline; scores on it "
        "say nothing about detectors of real generated images.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument("--size", choices=("small", "tiny"), default="small", help="3,400 or 120 images")
    add_flags(parser, "seed", "workers")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    folder = args.out.resolve()
    recorded = provenance.read_record(folder / RECORD)
    if recorded is not None:
        recorded.pop("counts", None)
    occupied = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    requested = _settings(args.seed, args.size)
    if provenance.claim(args.out, recorded, requested, occupied=occupied) is Claim.FINISHED:
        _log.info(f"{args.out} already holds this demo data (seed {args.seed}, size {args.size})")
        return 0
    try:
        with atomic.replace_folder(folder) as temporary:
            counts = build(temporary, args.seed, args.size, args.workers)
    except OSError as error:
        raise UserError(f"cannot write {args.out}: {error}; choose another --out") from error
    _log.info(f"{args.out}: " + ", ".join(f"{name} {count}" for name, count in counts.items()) + " images")
    _log.info("synthetic, to run the whole pipeline; scores on it say nothing about real detectors")
    return 0


def _fit_on_scenes(seed: int) -> Codebooks:
    """Train the two learned generators on separate scenes."""
    pictures = []
    for index in range(24):
        rng = _generator(seed, "codebooks", index, "scene")
        look = draw_look(rng)
        scene = draw_scene(rng, list(KINDS)[index % len(KINDS)], 128, 128)
        pictures.append(develop(expose(scene, look), look))
    return fit_codebooks(pictures, _generator(seed, "codebooks", 0, "draw"))


def _make_task(task: tuple[str, int], seed: int, codebooks: Codebooks) -> DemoImage:
    split, index = task
    return make_image(index, split, seed, codebooks)


def _write_split(folder: Path, split: Split, images: list[DemoImage]) -> None:
    if "{}" in split.archive:
        for shard in range(SHARDS):
            # Dealt class by class, so that every shard is balanced.
            by_label = ([image for image in images if image.label == label] for label in (0, 1))
            dealt = [image for same_label in by_label for image in same_label[shard::SHARDS]]
            dealt.sort(key=lambda image: image.name)
            rows = [(row, image.name, image.label) for row, image in enumerate(dealt)]
            labels = atomic.csv_text(("", "image_name", "label"), rows).encode()
            members = _members(split.folder.format(shard), dealt) | {f"shard_{shard}/labels.csv": labels}
            atomic.write_zip(folder / split.archive.format(shard), members.items())
        return
    atomic.write_zip(folder / split.archive, _members(split.folder, images).items())
    if split.labels:
        rows = [(image.name, image.label, image.distortions, image.is_distorted) for image in images]
        atomic.write_text(folder / split.labels, format_labels(rows))


def _members(folder: str, images: list[DemoImage]) -> dict[str, bytes]:
    return {f"{folder}/{image.name}": image.data for image in images}


def _settings(seed: int, size: str) -> dict:
    return {"made_by": "data_prep.demo", "version": VERSION, "seed": seed, "size": size}


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(":".join(map(str, parts)).encode()).digest()


def _generator(*parts: object) -> np.random.Generator:
    return np.random.default_rng(np.frombuffer(_digest(*parts), dtype=np.uint32))


if __name__ == "__main__":
    command_line.run(main)
