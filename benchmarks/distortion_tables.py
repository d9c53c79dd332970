"""The tables of docs/distortions.md: how strong every operation is, and how often a preset draws it.

python benchmarks/distortion_tables.py --images photos/
"""

import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.scenes import fitted, scenes
from featdistill import command_line
from featdistill.command_line import Parser, within
from featdistill.distortions.libraries import LIBRARIES
from featdistill.distortions.operation import LEVELS, Operation
from featdistill.distortions.policy import DistortionPolicy
from featdistill.distortions.presets import parse_policy
from featdistill.seeds import training_generator

SIDE_PX = 256
POLICIES = (
    "official",
    "official,draw_by=operation",
    "released_featdistill",
    "released_featdistill,draw_by=operation",
)


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", metavar="FOLDER", help="photographs to measure on; else synthetic scenes")
    parser.add_argument("--count", type=within(1), default=24, help="number of images")
    parser.add_argument("--plans", type=within(1), default=100_000, help="plans drawn from each policy")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    images = [fitted(scene, (SIDE_PX, SIDE_PX)) for scene in scenes(options.images, options.count)]
    print("| library | operation | " + " | ".join(f"level {level}" for level in LEVELS) + " |")
    print("|---|---|" + "---|" * len(LEVELS))
    for library in ("official", "extended"):
        for operation in LIBRARIES[library].values():
            figures = (severity(operation, level, images) for level in LEVELS)
            cells = " | ".join(f"{psnr:.1f}, {ssim:.2f}" for psnr, ssim in figures)
            print(f"| {library} | {operation.name}{'' if operation.keeps_layout else ' *'} | {cells} |")
    print("\n| library | group | operations | " + " | ".join(f"`{policy}`" for policy in POLICIES) + " |")
    print("|---|---|---|" + "---|" * len(POLICIES))
    shares = [shares_of_images(parse_policy(policy), options.plans) for policy in POLICIES]
    for library in ("official", "extended"):
        sizes = Counter(operation.category for operation in LIBRARIES[library].values())
        for group, size in sizes.items():
            names = [name for name, operation in LIBRARIES[library].items() if operation.category == group]
            cells = " | ".join(
                f"{100 * np.mean([share[library, name] for name in names]):.1f} %" for share in shares
            )
            print(f"| {library} | {group} | {size} | {cells} |")
    return 0


def severity(operation: Operation, level: int, images: list[np.ndarray]) -> tuple[float, float]:
    """Return the mean PSNR in dB and the mean SSIM of distorted images against the originals."""
    results = [operation(image, level, np.random.default_rng((i, level))) for i, image in enumerate(images)]
    psnr = [min(cv2.PSNR(image, result), 100.0) for image, result in zip(images, results, strict=True)]
    return float(np.mean(psnr)), float(np.mean(list(map(structural_similarity, images, results))))


def structural_similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Return the SSIM of the grays of two RGB images (Wang et al., 2004: 11 x 11 px, sigma 1.5)."""
    x, y = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float64) for image in (one, other))

    def mean(values: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(values, (11, 11), 1.5)[5:-5, 5:-5]

    mean_x, mean_y = mean(x), mean(y)
    covariance = mean(x * y) - mean_x * mean_y
    variances = mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2
    low, high = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + low) / (mean_x**2 + mean_y**2 + low)
    return float(np.mean(luminance * (2 * covariance + high) / (variances + high)))


def shares_of_images(policy: DistortionPolicy, plans: int) -> Counter:
    """Return the share of images that get each (library, operation), from drawn plans."""
    drawn = (policy.draw(training_generator(0, 1, 0, index)) for index in range(plans))
    counts = Counter((step.library, step.name) for plan in drawn for step in plan)
    return Counter({operation: count / plans for operation, count in counts.items()})


if __name__ == "__main__":
    command_line.run(main)
