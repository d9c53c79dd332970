"""A miniature of the challenge, made on the spot: official files, official formats, no download.

Real images are made-up scenes taken by a simulated camera, AI images are the same kind of scenes put
through simulated generators. The data are synthetic. They are there to run the way end to end in minutes; a
score on them says nothing about a detector of real generated images.

    python -m data_prep.demo --out data/demo

Every image is a function of (seed, split, index) alone: neither the number of workers nor a second run
changes a byte.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from data_prep.synthetic.camera import develop, draw_look, encode_jpeg, expose, photograph
from data_prep.synthetic.generators import Codebooks, fit_codebooks, generate
from data_prep.synthetic.scenes import KINDS, draw_scene
from featdistill import atomic, command_line
from featdistill.command_line import UserError
from featdistill.distortions.plan import apply_plan, describe
from featdistill.distortions.policy import DistortionPolicy
from featdistill.distortions.presets import PRESETS
from featdistill.images import reading as image_io
from featdistill.records.label_files import format_labels
from featdistill.seeds import evaluation_generator

# Raised whenever the bytes of the data change, so that an old folder is not taken for a new one.
VERSION = 2
MARK = "demo.json"
SHARDS = 6
# Multiples of 16, so that every decoder's blocks fit; both classes draw from them.
SIDES_PX = (112, 128, 144, 160, 176)
# The evaluation splits are stored a second time after the distortions, clean images too.
STORAGE_QUALITY = 95
_SEEN = ("nearest", "bilinear", "transposed_conv", "patch_autoencoder", "vector_quantised", "denoiser")


@dataclass(frozen=True)
class Split:
    """One split of the miniature.

    Attributes:
        archive: the official archive; training has one a shard.
        folder: the folder of the images within it.
        labels: the label file, relative to the output folder; None where the archives hold the labels, or
            where there are none.
        counts: number of images for each `--size`.
        generators: what makes the AI half of the images.
        policy: distorts every second image; None leaves all of them clean.
        stored_twice: the files are decoded and stored again, as those of the evaluation splits are.
    """

    archive: str
    folder: str
    labels: str | None
    counts: dict[str, int]
    generators: tuple[str, ...]
    policy: DistortionPolicy | None
    stored_twice: bool


_CHAINS_OF_5 = replace(PRESETS["official"], max_operations=5)
# The challenge's evaluation splits mix generators of the training data with ever more that are new. The new
# ones come first, so that they are there even in the smallest split.
SPLITS: dict[str, Split] = {
    "train": Split("shard_{}.zip", "shard_{}/images", None, {"small": 2400, "tiny": 48}, _SEEN, None, False),
    "val": Split(
        "val_images.zip",
        "val_images",
        "val_labels.csv",
        {"small": 400, "tiny": 24},
        ("pixel_shuffle", "bicubic_sharpen", *_SEEN),
        PRESETS["official"],
        True,
    ),
    "val_hard": Split(
        "val_images_hard.zip",
        "val_images_hard",
        "val_hard_labels.csv",
        {"small": 160, "tiny": 12},
        ("spectral_peaks", "pixel_shuffle", "bicubic_sharpen", "bilinear", "patch_autoencoder", "denoiser"),
        PRESETS["heavy"],
        True,
    ),
    "public_test": Split(
        "test_images.zip",
        "test_images",
        "test_labels.csv",
        {"small": 200, "tiny": 12},
        ("renoised", "token_blocks", "spectral_peaks", "pixel_shuffle", "bicubic_sharpen", *_SEEN[:5]),
        _CHAINS_OF_5,
        True,
    ),
    "private_test": Split(
        "private_test_images.zip",
        "private_test",
        "organisers/private_test_labels.csv",
        {"small": 200, "tiny": 12},
        (
            "wavelet_shrunk",
            "cascade",
            "renoised",
            "token_blocks",
            "spectral_peaks",
            "bicubic_sharpen",
            *_SEEN[2:5],
        ),
        _CHAINS_OF_5,
        True,
    ),
    "toy": Split(
        "toy.zip", "images", None, {"small": 40, "tiny": 12}, (*_SEEN, "pixel_shuffle"), None, False
    ),
}
_ORGANISERS_ONLY = ("private_test", "toy")

README = """This folder holds a synthetic miniature of the NTIRE 2026 challenge on robust detection of
AI-generated images, made by `python -m data_prep.demo` (seed {seed}, size {size}, version {version}).

No picture here was taken by a camera or made by a generative model. "Real" images (label 0) are made-up
scenes taken by a simulated camera; "AI" images (label 1) are the same kind of scenes rebuilt by simulated
generators. The data are there to run every step of the way, from the archives to a checked submission,
in minutes. Scores on them say nothing about how well a detector does on real generated images.

Files in the official layout: shard_0.zip .. shard_5.zip (training), val_images.zip with val_labels.csv,
val_images_hard.zip with val_hard_labels.csv, test_images.zip with test_labels.csv, private_test_images.zip
and toy.zip (both without labels).

Not part of the official layout: this file; demo.json (settings and counts; written last); generators.csv
(what made each labelled image, and the kind of its scene); organisers/ (labels of the private test, and what
made the images without published labels).
"""


@dataclass(frozen=True)
class DemoImage:
    """One finished image: file name, the file's bytes, and what is known of it."""

    name: str
    label: int
    generator: str
    scene: str
    distortions: list[list]
    is_distorted: int
    data: bytes


def make_image(index: int, split_name: str, seed: int, codebooks: Codebooks) -> DemoImage:
    """Make one image of a split; a function of its arguments alone.

    Odd indices are AI-generated; of each class every second image is distorted, where the split has
    distortions. What the scene, the look, the size and the JPEG quality are drawn from does not know the
    label.
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
        # By turns of two, so that a generator's images are clean and distorted alike.
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
    """Write all files of the miniature into an existing, empty folder.

    Returns:
        The number of images of each split.
    """
    codebooks = _fit_on_scenes(seed)
    tasks = [(split, index) for split in SPLITS for index in range(SPLITS[split].counts[size])]
    made: dict[str, list[DemoImage]] = {split: [] for split in SPLITS}
    make = functools.partial(_make_task, seed=seed, codebooks=codebooks)
    with command_line.progress(len(tasks), "making images") as bar:
        for (split, _), image in zip(tasks, _in_order(make, tasks, workers), strict=True):
            made[split].append(image)
            bar.update()
    for name, images in made.items():
        # File names are hashes: their order tells nothing of the label.
        images.sort(key=lambda image: image.name)
        _write_split(folder, SPLITS[name], images)
    published = [image for name, images in made.items() if name not in _ORGANISERS_ONLY for image in images]
    kept_back = [image for name in _ORGANISERS_ONLY for image in made[name]]
    for path, images in (
        (folder / "generators.csv", published),
        (folder / "organisers/generators.csv", kept_back),
    ):
        rows = [(image.name, image.generator, image.scene) for image in images]
        atomic.write_text(path, atomic.csv_text(("image_name", "generator", "scene"), rows))
    atomic.write_text(folder / "README.txt", README.format(seed=seed, size=size, version=VERSION))
    counts = {name: len(images) for name, images in made.items()}
    atomic.write_json(folder / MARK, {**_settings(seed, size), "counts": counts})
    return counts


def is_finished(folder: Path, seed: int, size: str) -> bool:
    """Return whether the folder holds the finished miniature with these settings, or nothing yet.

    Raises:
        UserError: the folder holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = dict(json.loads((folder / MARK).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"{folder} is not empty and was not made by this command; choose another --out"
        ) from None
    wanted = _settings(seed, size)
    different = [
        f"{key} {found.get(key)} (asked for: {value})"
        for key, value in wanted.items()
        if found.get(key) != value
    ]
    if different:
        raise UserError(f"{folder} was made with {', '.join(different)}; delete it or choose another --out")
    return True


def build_parser() -> command_line.Parser:
    """Return the command line."""
    parser = command_line.Parser(
        prog="python -m data_prep.demo",
        description="Make a synthetic miniature of the challenge: a simulated camera against simulated "
        "generators, in the official files and formats. It is there to run the way end to end; scores on it "
        "say nothing about detectors of real generated images.",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="new or empty folder for the files"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other images")
    parser.add_argument("--size", choices=("small", "tiny"), default="small", help="3,400 or 120 images")
    parser.add_argument(
        "--workers", type=int, default=min(os.cpu_count() or 1, 8), help="processes; no effect on bytes"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    if args.seed < 0 or args.workers < 1:
        raise UserError("--seed must be 0 or more and --workers 1 or more")
    folder = args.out.resolve()
    if is_finished(folder, args.seed, args.size):
        print(f"{args.out} already holds this demo data (seed {args.seed}, size {args.size}); nothing to do")
        return 0
    try:
        with atomic.replace_folder(folder) as beside:
            counts = build(beside, args.seed, args.size, args.workers)
    except OSError as error:
        raise UserError(f"cannot write {args.out}: {error}; choose another --out") from error
    print(f"{args.out}: " + ", ".join(f"{name} {count}" for name, count in counts.items()) + " images")
    print("synthetic, to run the way end to end; scores say nothing about real detectors")
    return 0


def _fit_on_scenes(seed: int) -> Codebooks:
    """Train the two learned generators on scenes of their own."""
    pictures = []
    for index in range(24):
        rng = _generator(seed, "codebooks", index, "scene")
        look = draw_look(rng)
        scene = draw_scene(rng, list(KINDS)[index % len(KINDS)], 128, 128)
        pictures.append(develop(expose(scene, look), look))
    return fit_codebooks(pictures, _generator(seed, "codebooks", 0, "draw"))


def _in_order(make: functools.partial, tasks: list[tuple[str, int]], workers: int) -> Iterable[DemoImage]:
    """Make the images, in this process or in several, and yield them in the order of the tasks."""
    if workers == 1:
        yield from map(make, tasks)
        return
    # Fresh processes: a fork would inherit OpenCV's threads in an unknown state.
    with multiprocessing.get_context("spawn").Pool(workers, initializer=_start_worker) as pool:
        yield from pool.imap(make, tasks, chunksize=8)


def _start_worker() -> None:
    cv2.setNumThreads(0)
    # The parent ends the pool on Ctrl-C; the workers need not report it too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _make_task(task: tuple[str, int], seed: int, codebooks: Codebooks) -> DemoImage:
    split, index = task
    return make_image(index, split, seed, codebooks)


def _write_split(folder: Path, split: Split, images: list[DemoImage]) -> None:
    if "{}" in split.archive:
        for shard in range(SHARDS):
            # Dealt out class by class, so that every shard is balanced.
            dealt = [
                image for label in (0, 1) for image in [i for i in images if i.label == label][shard::SHARDS]
            ]
            dealt.sort(key=lambda image: image.name)
            rows = [(row, image.name, image.label) for row, image in enumerate(dealt)]
            labels = {
                f"shard_{shard}/labels.csv": atomic.csv_text(("", "image_name", "label"), rows).encode()
            }
            _write_zip(folder / split.archive.format(shard), split.folder.format(shard), dealt, labels)
        return
    _write_zip(folder / split.archive, split.folder, images, {})
    if split.labels:
        rows = [(image.name, image.label, image.distortions, image.is_distorted) for image in images]
        atomic.write_text(folder / split.labels, format_labels(rows))


def _write_zip(path: Path, folder: str, images: list[DemoImage], more: dict[str, bytes]) -> None:
    members = {f"{folder}/{image.name}": image.data for image in images} | more
    atomic.write_zip(path, members.items())


def _settings(seed: int, size: str) -> dict:
    return {"made_by": "data_prep.demo", "version": VERSION, "seed": seed, "size": size}


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(":".join(map(str, parts)).encode()).digest()


def _generator(*parts: object) -> np.random.Generator:
    return np.random.default_rng(np.frombuffer(_digest(*parts), dtype=np.uint32))


if __name__ == "__main__":
    command_line.run(main)
