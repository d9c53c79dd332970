"""Images a second, memory and share of the matrix rate of a training step, by expert, stage and option.

    python benchmarks/training.py                              the paper's two experts, on the GPU at hand
    python benchmarks/training.py --backbones tiny_clip --batch-size 32 --precision fp32         on a CPU
    python benchmarks/training.py --loader data/train.csv      the loader's share of the time as well

Weights are random and the images synthetic uint8 batches that lie on the device, so that the step alone is
measured: forward, backward, clipping, AdamW and what the task does after a step. Beside the options of the
recipes stands a plain step, in the same run: stage 1 as a first script would write it, with float32 images,
fp16 autocast (on a CPU none), AdamW without fused kernels and nothing compiled.

The share is of the matrix rate measured on the same device: the forward pass's floating-point operations
count three times for a trained network and once for a teacher; what checkpointing computes again does not
count.
"""

import copy
import gc
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from benchmarks.device import forget_peak, forward_flops, matrix_flops_per_s, peak_gib, step_s
from featdistill import command_line
from featdistill.atomic import write_json
from featdistill.command_line import Parser, UserError, one_of
from featdistill.inference.compute import PRECISIONS
from featdistill.models.expert import Expert, create_expert
from featdistill.training import optimizer as optimisation
from featdistill.training.recipe import DistillRecipe
from featdistill.training.tasks import ClassifyTask, DistillTask
from featdistill.training.teachers import FrozenTeacher, MomentumTeacher

STAGES = ("stage 1", "reading A", "reading B")
OPTIONS = ("eager", "compiled", "checkpointing")
PLAIN = "plain"
_NEVER = 10**9


def build_parser() -> Parser:
    parser = Parser(description="Speed and memory of training steps, on random weights.")
    parser.add_argument("--backbones", nargs="+", default=["clip_l14", "siglip_so400m"], metavar="NAME")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), metavar="NAME", help=", ".join(STAGES))
    parser.add_argument(
        "--options", nargs="+", default=list(OPTIONS), metavar="NAME", help=", ".join(OPTIONS)
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images a step")
    parser.add_argument("--input-size", type=int, help="side of the input in px; default: the backbone's own")
    parser.add_argument("--precision", default="bf16", choices=tuple(PRECISIONS))
    parser.add_argument("--steps", type=int, default=20, help="steps measured, after half as many unmeasured")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--loader", metavar="MANIFEST", help="also train on these rows, with the real loader")
    parser.add_argument("--workers", type=int, default=8, help="loader processes of --loader")
    parser.add_argument("--out", metavar="FILE", help="the table as JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    for name in arguments.stages:
        one_of("stage", name, STAGES)
    for name in arguments.options:
        one_of("option", name, OPTIONS)
    if arguments.steps < 1 or arguments.batch_size < 1:
        raise UserError("--steps and --batch-size must be at least 1")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rate = matrix_flops_per_s(device, PRECISIONS[arguments.precision])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}: {rate / 1e12:.3g} TFLOP/s of {arguments.precision} products")
    rows = []
    for backbone in arguments.backbones:
        flops = forward_flops(backbone, arguments.input_size)
        wanted = [("stage 1", PLAIN)]
        wanted += [(stage, option) for stage in arguments.stages for option in arguments.options]
        for stage, option in wanted:
            row = {"backbone": backbone, "stage": stage, "option": option}
            row |= _measure(backbone, stage, option, device, arguments)
            passes = 3 if stage == "stage 1" else 4
            row["share_of_matrix_rate"] = row["images_per_s"] * passes * flops / rate
            plain = next((other for other in rows if other["backbone"] == backbone), row)
            row["against_plain"] = row["images_per_s"] / plain["images_per_s"]
            rows.append(row)
            print(_line(row), flush=True)
    if arguments.loader:
        rows += [_with_loader(backbone, device, arguments) for backbone in arguments.backbones]
    if arguments.out:
        write_json(arguments.out, {"device": name, "torch": torch.__version__, "rate": rate, "rows": rows})
    return 0


def _measure(
    backbone: str, stage: str, option: str, device: torch.device, arguments
) -> dict[str, float | None]:
    """Return `images_per_s` and `peak_gib` of one kind of step."""
    torch.manual_seed(0)
    gc.collect()
    forget_peak(device)
    expert = create_expert(backbone, "random", input_size=arguments.input_size).to(device)
    batch = _batch(expert.preprocessing.size, arguments.batch_size, device)
    if option == PLAIN:
        step = _plain_step(expert, batch, device)
    else:
        step = _recipe_step(expert, stage, option, batch, device, arguments.precision)
    took = step_s(step, device, steps=arguments.steps, warmup=max(2, arguments.steps // 2))
    return {"images_per_s": arguments.batch_size / took, "peak_gib": peak_gib(device)}


def _batch(size: int, images: int, device: torch.device) -> dict[str, Tensor]:
    """Return a batch with all the views that a task may ask for."""
    views = {
        key: torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, device=device)
        for key in ("images", "images_clean", "images_other")
    }
    label = (torch.arange(images, device=device) % 2).float()
    return views | {"label": label, "index": torch.arange(images, device=device)}


def _recipe_step(
    expert: Expert, stage: str, option: str, batch: dict[str, Tensor], device: torch.device, precision: str
) -> Callable[[], None]:
    """Return one optimiser step as the engine takes it."""
    recipe = DistillRecipe(precision=precision)
    expert.backbone.set_gradient_checkpointing(option == "checkpointing")
    task = _task(expert, stage).to(device).train()
    optimizer = optimisation.make_optimizer(task, recipe, device)
    optimisation.set_learning_rates(optimizer, 1.0)
    if option == "compiled":
        task.compile()
    parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    done = 0

    def step() -> None:
        nonlocal done
        with torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32"):
            loss = task(batch)["loss"]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
        if math.isfinite(float(norm)):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        task.after_step(done, _NEVER)
        done += 1

    return step


def _task(expert: Expert, stage: str) -> nn.Module:
    if stage == "stage 1":
        return ClassifyTask(expert)
    teacher = copy.deepcopy(expert)
    if stage == "reading A":
        return DistillTask(expert, FrozenTeacher(teacher), objective="dense", teacher_view="clean")
    return DistillTask(expert, MomentumTeacher(teacher), objective="crd", teacher_view="other")


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


def _with_loader(backbone: str, device: torch.device, arguments) -> dict[str, float | str]:
    """Train an epoch of stage 1 with `train.py`; return its speed and the share of waiting for images."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--recipe", "featdistill", "--backbone", backbone, "--weights", "random", "--epochs", "1"]
        flags += ["--precision", arguments.precision, "--batch-size", str(arguments.batch_size)]
        flags += ["--workers", str(arguments.workers), "--log-every", "10"]
        flags += ["--input-size", str(arguments.input_size or "none")]
        flags += ["--train", arguments.loader, "--val", arguments.loader, "--out", f"{folder}/run"]
        train.main(flags)
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    # The first line's time holds the start of the workers.
    steady = [line for line in lines if "data_wait" in line][1:]
    if not steady:
        raise UserError(f"{arguments.loader} has fewer than 20 batches of {arguments.batch_size}; too few")
    middle = {key: statistics.median(line[key] for line in steady) for key in ("images_per_s", "data_wait")}
    print(
        f"{backbone}, stage 1 with the loader, {arguments.workers} workers: {middle['images_per_s']:.1f} "
        f"images/s, {middle['data_wait']:.1%} of the time waiting for images"
    )
    return {"backbone": backbone, "stage": "stage 1", "option": "with the loader"} | middle


def _line(row: dict) -> str:
    peak = "" if row["peak_gib"] is None else f", {row['peak_gib']:.1f} GiB"
    return (
        f"{row['backbone']}, {row['stage']}, {row['option']}: {row['images_per_s']:.1f} images/s "
        f"({row['against_plain']:.2f} x plain), {row['share_of_matrix_rate']:.1%} of the matrix rate{peak}"
    )


if __name__ == "__main__":
    command_line.run(main)
