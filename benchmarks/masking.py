"""Images per second of a training step with masked pixels, with tokens left out, and without masking.

    python benchmarks/masking.py                                   a ViT-Ti/16 with 196 tokens, on the CPU
    python benchmarks/masking.py --backbone clip_l14 --device cuda --batch-size 64 --precision bf16

Stage 1, random weights, synthetic uint8 batches on the device; the time includes scoring texture and choosing
patches. The kinds take turns, and the fastest turn of each counts, so that other work on the machine matters
little.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.device import find_device, step_s
from benchmarks.training import synthetic_batch, training_step
from featdistill import command_line
from featdistill.command_line import Parser, within
from featdistill.inference.compute import PRECISIONS
from featdistill.models.expert import create_expert
from featdistill.models.masking import make_masking
from featdistill.recipe_groups import Masking, Objective
from featdistill.training.tasks import ClassifyTask

KINDS = (("none", "pixel"), ("texture", "pixel"), ("texture", "token"))


def build_parser() -> Parser:
    parser = Parser(description="Speed of training steps with and without masking, on random weights.")
    parser.add_argument("--backbone", default="timm:vit_tiny_patch16_224", metavar="NAME")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the patches that is masked")
    parser.add_argument("--batch-size", type=within(1), default=16, help="images per step")
    parser.add_argument("--turns", type=within(1), default=5, help="steps measured of each kind")
    parser.add_argument("--precision", default="fp32", choices=tuple(PRECISIONS))
    parser.add_argument("--device", default="cpu")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    device, _ = find_device(arguments.device)
    steps = []
    for kind, level in KINDS:
        torch.manual_seed(0)
        expert = create_expert(arguments.backbone, "random").to(device)
        options = Masking(mask=kind, mask_ratio=arguments.ratio, mask_level=level)
        masking = make_masking(expert, options, seed=0)
        task = ClassifyTask(expert, Objective(), masking).to(device).train()
        batch = synthetic_batch(expert.preprocessing.size, arguments.batch_size, device)
        steps.append(training_step(task, batch, device, arguments.precision))
        steps[-1]()
    turns = [[step_s(step, device, steps=1, warmup=0) for step in steps] for _ in range(arguments.turns)]
    fastest = [min(times) for times in zip(*turns, strict=True)]
    for (kind, level), seconds in zip(KINDS, fastest, strict=True):
        name = "no masking" if kind == "none" else f"mask {kind} {arguments.ratio}, level {level}"
        rate, ratio = arguments.batch_size / seconds, fastest[0] / seconds
        print(f"{arguments.backbone}, {name}: {rate:.1f} images/s, {ratio:.2f} x no masking")
    return 0


if __name__ == "__main__":
    command_line.run(main)
