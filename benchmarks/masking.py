"""Images a second of a training step with masked pixels and with tokens left out, beside one without masking.

    python benchmarks/masking.py                                   a ViT-Ti/16 with 196 tokens, on the CPU
    python benchmarks/masking.py --backbone clip_l14 --device cuda --batch-size 64 --precision bf16

Stage 1, random weights, synthetic uint8 batches that lie on the device; texture is scored and patches are
chosen within the time. The kinds take turns, and the fastest turn of each counts, so that other work on the
machine weighs little.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.device import synchronise
from featdistill import command_line
from featdistill.command_line import Parser, UserError
from featdistill.inference.compute import PRECISIONS
from featdistill.models.expert import create_expert
from featdistill.models.masking import make_masking
from featdistill.training import optimizer as optimisation
from featdistill.training.recipe import Recipe
from featdistill.training.tasks import ClassifyTask

KINDS = (("none", "pixel"), ("texture", "pixel"), ("texture", "token"))


def build_parser() -> Parser:
    parser = Parser(description="Speed of training steps with and without masking, on random weights.")
    parser.add_argument("--backbone", default="timm:vit_tiny_patch16_224", metavar="NAME")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the patches that is masked")
    parser.add_argument("--batch-size", type=int, default=16, help="images a step")
    parser.add_argument("--turns", type=int, default=5, help="steps measured of each kind")
    parser.add_argument("--precision", default="fp32", choices=tuple(PRECISIONS))
    parser.add_argument("--device", default="cpu")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.turns < 1 or arguments.batch_size < 1:
        raise UserError("--turns and --batch-size must be at least 1")
    device = torch.device(arguments.device)
    steps = [_make_step(kind, level, device, arguments) for kind, level in KINDS]
    for step in steps:
        step()
    turns = [[step() for step in steps] for _ in range(arguments.turns)]
    fastest = [min(times) for times in zip(*turns, strict=True)]
    for (kind, level), took in zip(KINDS, fastest, strict=True):
        name = "no masking" if kind == "none" else f"mask {kind} {arguments.ratio}, level {level}"
        rate, ratio = arguments.batch_size / took, fastest[0] / took
        print(f"{arguments.backbone}, {name}: {rate:.1f} images/s, {ratio:.2f} x no masking")
    return 0


def _make_step(
    kind: str, level: str, device: torch.device, arguments: argparse.Namespace
) -> Callable[[], float]:
    """Return a function that takes one optimiser step and says how many seconds it took."""
    torch.manual_seed(0)
    expert = create_expert(arguments.backbone, "random").to(device)
    task = ClassifyTask(expert, masking=make_masking(expert, kind, ratio=arguments.ratio, level=level))
    task = task.to(device).train()
    optimizer = optimisation.make_optimizer(task, Recipe(), device)
    optimisation.set_learning_rates(optimizer, 1.0)
    size, images = expert.preprocessing.size, arguments.batch_size
    batch = {
        "images": torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, device=device),
        "label": (torch.arange(images, device=device) % 2).float(),
    }

    def step() -> float:
        synchronise(device)
        started = time.perf_counter()
        dtype = PRECISIONS[arguments.precision]
        with torch.autocast(device.type, dtype, enabled=arguments.precision != "fp32"):
            loss = task(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronise(device)
        return time.perf_counter() - started

    return step


if __name__ == "__main__":
    command_line.run(main)
