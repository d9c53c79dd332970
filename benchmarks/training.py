"""Images per second, memory and share of the matrix rate of a training step, by expert, stage and option.

    python benchmarks/training.py                              the paper's two experts, on the GPU at hand
    python benchmarks/training.py --backbones tiny_clip --batch-size 32 --precision fp32         on a CPU

Weights are random and images are synthetic uint8 batches on the device, so that only the step is measured:
forward, backward, clipping, AdamW and what the task does after a step. The same run also measures a plain
step: stage 1 as a first script would write it, with float32 images, fp16 autocast (none on a CPU), AdamW
without fused kernels and nothing compiled.

The share is of the matrix rate measured on the same device: the floating-point operations of the forward pass
count three times for a trained network and once for a teacher; what checkpointing recomputes is not counted.
"""

import gc
import itertools
import math
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.device import find_device, forward_flops, matrix_flops_per_s, peak_gib, reset_peak, step_s
from featdistill import command_line
from featdistill.atomic import write_json
from featdistill.command_line import Parser, within
from featdistill.inference.compute import PRECISIONS, attention_kernels, autocast, set_up_compiler
from featdistill.models.backbones import resolve_spec
from featdistill.models.expert import Expert, create_expert
from featdistill.recipe_groups import Distillation, Objective, Optimization
from featdistill.training.optimizer import make_optimizer, set_learning_rates
from featdistill.training.tasks import ClassifyTask, DistillTask
from featdistill.training.teachers import cast_frozen

STAGES = ("stage 1", "reading A", "reading B")
OPTIONS = ("eager", "compiled", "checkpointing", "selective")
PLAIN = "plain"
# So many that schedules stay at their start.
_TOTAL_STEPS = 10**9


def build_parser() -> Parser:
    parser = Parser(description="Speed and memory of training steps, on random weights.")
    parser.add_argument("--backbones", nargs="+", default=["clip_l14", "siglip_so400m"], metavar="NAME")
    for flag, names in (("--stages", STAGES), ("--options", OPTIONS)):
        parser.add_argument(flag, nargs="+", default=list(names), choices=names)
    parser.add_argument("--batch-size", type=within(1), default=64, help="images per step")
    parser.add_argument("--input-size", type=int, help="side of the input in px; default: the backbone's own")
    parser.add_argument("--precision", default="bf16", choices=tuple(PRECISIONS))
    parser.add_argument("--steps", type=within(1), default=20, help="steps measured, after half as many")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--out", metavar="FILE", help="save the table as JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    device, title = find_device(arguments.device)
    rate = matrix_flops_per_s(device, PRECISIONS[arguments.precision])
    print(f"{title}, torch {torch.__version__}: {rate / 1e12:.3g} TFLOP/s of {arguments.precision} products")
    rows = []
    for backbone in arguments.backbones:
        flops = forward_flops(resolve_spec(backbone, arguments.input_size))
        kinds = [("stage 1", PLAIN), *itertools.product(arguments.stages, arguments.options)]
        for stage, option in kinds:
            row = {"backbone": backbone, "stage": stage, "option": option}
            row |= measure_step(backbone, stage, option, device, arguments)
            passes = 3 if stage == "stage 1" else 4
            row["share_of_matrix_rate"] = row["images_per_s"] * passes * flops / rate
            plain = next((other for other in rows if other["backbone"] == backbone), row)
            row["against_plain"] = row["images_per_s"] / plain["images_per_s"]
            rows.append(row)
            print(_line(row), flush=True)
    if arguments.out:
        write_json(arguments.out, {"device": title, "torch": torch.__version__, "rate": rate, "rows": rows})
    return 0


def synthetic_batch(size: int, images: int, device: torch.device) -> dict[str, Tensor]:
    """Return a batch with all the views that a task may request."""
    views = {
        key: torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, device=device)
        for key in ("images", "images_clean", "images_other")
    }
    label = (torch.arange(images, device=device) % 2).float()
    return views | {"label": label, "index": torch.arange(images, device=device)}


def training_step(
    task: nn.Module, batch: dict[str, Tensor], device: torch.device, precision: str
) -> Callable[[], None]:
    """Return a function that does one optimizer step, as the trainer does."""
    options = Optimization()
    optimizer = make_optimizer(task, options, device)
    set_learning_rates(optimizer, 1.0)
    parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    done = itertools.count()

    def step() -> None:
        with attention_kernels(device):
            with autocast(device, precision):
                loss = task(batch)["loss"]
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, options.clip_norm)
        if math.isfinite(float(norm)):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        task.after_step(next(done), _TOTAL_STEPS)

    return step


def measure_step(
    backbone: str, stage: str, option: str, device: torch.device, arguments: Namespace
) -> dict[str, float | None]:
    """Return `images_per_s` and `peak_gib` of one kind of step.

    Args:
        arguments: `input_size`, `batch_size`, `precision` and `steps`.
    """
    torch.manual_seed(0)
    gc.collect()
    reset_peak(device)
    # Initializing a large network takes long on a CPU.
    with device:
        expert = create_expert(backbone, "random", input_size=arguments.input_size).to(device)
    batch = synthetic_batch(expert.preprocessing.size, arguments.batch_size, device)
    if option == PLAIN:
        step = _plain_step(expert, batch, device)
    else:
        checkpoints = option in ("checkpointing", "selective")
        expert.backbone.set_gradient_checkpointing(checkpoints, option == "selective")
        task = _task(expert, stage).to(device).train()
        cast_frozen(task, arguments.precision)
        if option == "compiled":
            set_up_compiler(device)
            task.compile()
        step = training_step(task, batch, device, arguments.precision)
    seconds = step_s(step, device, steps=arguments.steps, warmup=max(2, arguments.steps // 2))
    return {"images_per_s": arguments.batch_size / seconds, "peak_gib": peak_gib(device)}


def _task(expert: Expert, stage: str) -> nn.Module:
    if stage == "stage 1":
        return ClassifyTask(expert, Objective())
    if stage == "reading A":
        return DistillTask(expert, Distillation())
    return DistillTask(expert, Distillation(objective="crd", teacher_kind="momentum", teacher_view="other"))


def _plain_step(expert: Expert, batch: dict[str, Tensor], device: torch.device) -> Callable[[], None]:
    """Return a step of stage 1 as a first script would write it."""
    is_gpu = device.type == "cuda"
    images, expert = batch["images"].float() / 255, expert.train()
    optimizer = torch.optim.AdamW(expert.parameters(), lr=1e-5, weight_decay=0.05, foreach=False)
    scaler = torch.amp.GradScaler(device.type, enabled=is_gpu)

    def step() -> None:
        with torch.autocast(device.type, torch.float16, enabled=is_gpu):
            loss = binary_cross_entropy_with_logits(expert(images), batch["label"])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        loss.item()

    return step


def _line(row: dict) -> str:
    peak = "" if row["peak_gib"] is None else f", {row['peak_gib']:.1f} GiB"
    return (
        f"{row['backbone']}, {row['stage']}, {row['option']}: {row['images_per_s']:.1f} images/s "
        f"({row['against_plain']:.2f} x plain), {row['share_of_matrix_rate']:.1%} of the matrix rate{peak}"
    )


if __name__ == "__main__":
    command_line.run(main)
