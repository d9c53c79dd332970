"""How fast is it, and with how much memory? What decides is measured first."""

import copy
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from benchmarks import inference, training
from benchmarks.device import forward_flops, step_s
from benchmarks.device_checks.fused_gelu import with_fused_gelu
from benchmarks.device_checks.runner import Bench, Part, Skip
from benchmarks.device_checks.scoring_checks import MOST, is_attention, logits_of, must_be_close
from benchmarks.device_checks.zoo import images_for, new_expert
from benchmarks.scenes import jpegs
from benchmarks.scoring_rates import from_files_per_s, model_only_per_s
from featdistill.data.gpu_decoding import JpegDataset
from featdistill.data.loading import ScoreDataset
from featdistill.inference import compute
from featdistill.inference.float8 import with_float8
from featdistill.inference.predictor import default_workers
from featdistill.models.backbones import resolve_spec
from featdistill.models.expert import Expert
from featdistill.models.head_width import with_head_width

_PAPER, _TINY = ("clip_l14", "siglip_so400m"), ("tiny_clip", "tiny_siglip")
_BATCH = 128
_MATRIX = ("gemm", "nvjet", "cutlass", "cublas", "xmma", "matmul", "addmm", "::mm", "scaled_mm")


def scoring(bench: Bench, precision: str, variants: list[bool]) -> dict[str, Any]:
    """Measure both experts and the ensemble of four, from files and of the models alone."""
    experts = _ensemble(bench)
    arguments = Namespace(
        precisions=[precision],
        variants=variants,
        batch_sizes=[4 if bench.tiny else _BATCH],
        workers=0 if bench.tiny else default_workers(bench.device),
        seconds=_seconds(bench),
    )
    rows = inference.measure_speed(experts, _files(bench), bench.device, arguments)
    bench.facts.setdefault("scoring", []).extend(rows)
    found = {}
    for row in rows:
        rates = f"{row['from_files_per_s']:.0f} images/s from files, {row['model_only_per_s']:.0f} alone"
        found[row["expert"] + " compiled" * row["compiled"]] = rates
    return found


def decoding(bench: Bench) -> dict[str, float]:
    """Measure the first expert, compiled, from files that the workers decode, then the device."""
    expert = compute.cast(new_expert(resolve_spec((_TINY if bench.tiny else _PAPER)[0]), bench), "bf16")
    batch, workers = (4, 0) if bench.tiny else (_BATCH, default_workers(bench.device))
    [model] = [expert] if bench.tiny else compute.compile_experts([expert], batch, bench.device)
    alone = model_only_per_s([model], batch, bench.device, _seconds(bench))
    found = {"alone": alone}
    for title, kind in (("decoded by workers", ScoreDataset), ("decoded on the device", JpegDataset)):
        settings = {"workers": workers, "max_per_s": alone, "kind": kind}
        found[title] = from_files_per_s(
            [model], _files(bench), batch, bench.device, _seconds(bench), **settings
        )
    return found


def experts_ahead(bench: Bench) -> dict[str, float]:
    """Compile the experts as they are measured later, which then find the code in the cache."""
    bench.need_gpu()
    start = time.perf_counter()
    for name in _PAPER:
        expert = compute.cast(new_expert(resolve_spec(name), bench), "bf16")
        for one in (expert, with_float8(expert)):
            torch._dynamo.reset()
            compute.compile_experts([one], _BATCH, bench.device)
    return {"s": time.perf_counter() - start}


def training_ahead(bench: Bench, number: int, kinds: list[tuple[str, str]]) -> dict[str, float]:
    """Compile training steps as they are measured later."""
    bench.need_gpu()
    start, name = time.perf_counter(), _PAPER[number]
    for stage, option in kinds:
        torch._dynamo.reset()
        if option == "compiled":
            try:
                training.measure_step(name, stage, option, bench.device, _step_arguments(bench, steps=1))
            except torch.OutOfMemoryError:
                raise Skip("the memory is full; it is compiled when it is measured") from None
    return {"s": time.perf_counter() - start}


def training_steps(bench: Bench, number: int, kinds: list[tuple[str, str]]) -> dict[str, Any]:
    """Measure steps of (stage, option), in images/s, with 64 images in bf16."""
    name = (_TINY if bench.tiny else _PAPER)[number]
    arguments = _step_arguments(bench, steps=1 if bench.tiny else 10)
    flops, found = forward_flops(resolve_spec(name)), {}
    for stage, option in kinds:
        torch._dynamo.reset()
        row = {"backbone": name, "stage": stage, "option": option}
        row |= training.measure_step(name, stage, option, bench.device, arguments)
        done_per_s = row["images_per_s"] * (3 if stage == "stage 1" else 4) * flops
        row["share_of_matrix_rate"] = done_per_s / bench.facts.get("matrix_flops_per_s", torch.nan)
        bench.facts.setdefault("training", []).append(row)
        peak = "" if row["peak_gib"] is None else f", {row['peak_gib']:.1f} GiB"
        found[f"{stage} {option}"] = f"{row['images_per_s']:.0f} images/s{peak}"
        print(f"  {name}, {stage} {option}: {found[f'{stage} {option}']}", flush=True)
    return found


def release(bench: Bench) -> dict[str, Any]:
    """Measure the ensemble as the authors' release runs it."""
    rows = inference.measure_release(_ensemble(bench), _files(bench), bench.device, _seconds(bench))
    bench.facts["release"] = rows
    return {
        f"batch {row['batch_size']}": f"{row['from_files_per_s']:.1f} images/s from files" for row in rows
    }


def attention_kernels(bench: Bench) -> dict[str, float]:
    """Time attention by kernel and head width, forward and with backward, in ms for 729 tokens x 16 heads."""
    found = {}
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    images, tokens = (1, 49) if bench.tiny else (32, 729)
    for width in (72, 80, 96, 128):
        inputs = torch.randn(3, images, 16, tokens, width, device=bench.device, dtype=torch.bfloat16)
        inputs.requires_grad_()
        for backend in backends if bench.is_gpu else [SDPBackend.MATH]:
            # cuDNN's plans and the passes of a first call are not counted.
            with sdpa_kernel(backend):
                for title, step in (("", _forward(inputs)), (" with backward", _backward(inputs))):
                    ms = 1000 * step_s(step, bench.device, steps=1 if bench.tiny else 20, warmup=1)
                    found[f"{backend.name.split('_')[0].lower()} {width}{title}"] = ms
    return found


def kernels(bench: Bench) -> dict[str, str]:
    """Where does the second expert's time go, eager and compiled? In ms per image."""
    expert = _second(bench)
    images = images_for(expert, 4 if bench.tiny else _BATCH, bench.device)
    found = {"eager": _breakdown(expert, images, bench)}
    if bench.is_gpu:
        for title, one in (("compiled", expert), ("compiled fp8", with_float8(expert))):
            torch._dynamo.reset()
            [compiled] = compute.compile_experts([one], len(images), bench.device)
            found[title] = _breakdown(compiled, images, bench)
    return found


def candidates(bench: Bench) -> dict[str, float]:
    """Other ways to compile and to compute the second expert, in images/s; the best is the last figure."""
    plain, batch = _second(bench, "fp32"), 4 if bench.tiny else _BATCH
    images = images_for(plain, batch, bench.device)
    expected = logits_of(compute.cast(copy.deepcopy(plain), "bf16"), images[:1], bench.device)
    found: dict[str, float] = {}

    def measure(title: str, expert: Expert, count: int = batch, **options: Any) -> None:
        model: nn.Module = compute.cast(copy.deepcopy(expert), "bf16")
        if not title.startswith("eager"):
            torch._dynamo.reset()
            [model] = compute.compile_experts([model], count, bench.device, **options)
        must_be_close(logits_of(model, images[:count], bench.device)[:1], expected, MOST["bf16"], title)
        found[title] = model_only_per_s([model], count, bench.device, _seconds(bench))
        print(f"  {title}: {found[title]:.1f} images/s", flush=True)

    gelu, wide = with_fused_gelu(plain), {width: with_head_width(plain, width) for width in (80, 128)}
    measure("eager", plain)
    measure("eager, GELU in the product", gelu)
    for width, expert in wide.items():
        measure(f"eager, heads {width}", expert)
    if not bench.tiny:
        measure("compiled", plain)
        measure("compiled, GELU in the product", gelu)
        # So400M's width of 1,152 is too much for LayerNorm in one pass, by the compiler's own rule.
        measure("compiled, LayerNorm in one or two passes", plain, options={"triton.multi_kernel": 1})
        measure("compiled, no padded strides", plain, options={"comprehensive_padding": False})
        best = max(wide, key=lambda width: found[f"eager, heads {width}"])
        measure(f"compiled, heads {best}", wide[best])
        measure("eager, batch 1", plain, 1)
        measure("CUDA graphs, batch 1", plain, 1, mode="reduce-overhead")
    best = max((title for title in found if "batch 1" not in title), key=found.__getitem__)
    return found | {f"best: {best}": found[best]}


def _breakdown(model: nn.Module, images: torch.Tensor, bench: Bench) -> str:
    """Return the time of attention, matrix products and the rest, and the three longest of the rest."""
    logits_of(model, images, bench.device)
    activity = ProfilerActivity.CUDA if bench.is_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as trace:
        logits_of(model, images, bench.device)
    times: dict[str, float] = {"attention": 0.0, "matrix products": 0.0}
    rest: dict[str, float] = {}
    for event in trace.key_averages():
        spent = event.self_device_time_total if bench.is_gpu else event.self_cpu_time_total
        ms = spent / 1000 / len(images)
        if is_attention(event.key):
            times["attention"] += ms
        elif any(part in event.key.lower() for part in _MATRIX):
            times["matrix products"] += ms
        else:
            rest[event.key] = rest.get(event.key, 0) + ms
    times["rest"] = sum(rest.values())
    longest = sorted(rest, key=rest.__getitem__, reverse=True)[:3]
    return "; ".join(
        [
            *(f"{key} {ms:.3f}" for key, ms in times.items()),
            *(f"{key[:50]} {rest[key]:.3f}" for key in longest),
        ]
    )


def _forward(inputs: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        with torch.no_grad():
            scaled_dot_product_attention(*inputs)

    return step


def _backward(inputs: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        inputs.grad = None
        scaled_dot_product_attention(*inputs).sum().backward()

    return step


def _second(bench: Bench, precision: str = "bf16") -> Expert:
    """Return the second of the paper's experts, SigLIP So400M, alone."""
    return compute.cast(new_expert(resolve_spec((_TINY if bench.tiny else _PAPER)[1]), bench), precision)


def _ensemble(bench: Bench) -> list[tuple[str, Expert]]:
    names = _TINY if bench.tiny else _PAPER
    made = {name: new_expert(resolve_spec(name), bench).cpu() for name in names}
    return [(name, copy.deepcopy(made[name])) for name in names for _ in range(2)]


def _step_arguments(bench: Bench, steps: int) -> Namespace:
    return Namespace(input_size=None, batch_size=4 if bench.tiny else 64, precision="bf16", steps=steps)


def _files(bench: Bench) -> list[str]:
    folder = bench.folder / "scenes"
    folder.mkdir(exist_ok=True)
    return jpegs(None, 4 if bench.tiny else 64, str(folder))


def _seconds(bench: Bench) -> float:
    return 0.1 if bench.tiny else 2


_CLIP = [
    ("stage 1", "compiled"),
    ("stage 1", "eager"),
    ("reading A", "compiled"),
    ("stage 1", training.PLAIN),
]
_SO400M = [
    ("stage 1", "eager"),
    ("stage 1", "compiled"),
    ("reading A", "compiled"),
    ("stage 1", "selective"),
    ("reading A", "eager"),
]

AHEAD = [
    Part("compiling experts ahead", 90, experts_ahead, shares=True),
    Part(
        "compiling the training of So400M ahead", 110, lambda bench: training_ahead(bench, 1, _SO400M), True
    ),
    Part("compiling the training of CLIP ahead", 90, lambda bench: training_ahead(bench, 0, _CLIP), True),
]
PARTS = [
    Part(
        "scoring speed in bf16",
        80,
        lambda bench: scoring(bench, "bf16", [False] if bench.tiny else [True, False]),
    ),
    Part("training speed of CLIP", 40, lambda bench: training_steps(bench, 0, _eager_if_tiny(bench, _CLIP))),
    Part(
        "training speed of So400M",
        70,
        lambda bench: training_steps(bench, 1, _eager_if_tiny(bench, _SO400M)),
    ),
    Part("speed of attention by kernel and head width", 10, attention_kernels),
    Part("time of So400M by kind of kernel", 25, kernels),
    Part("scoring speed in fp8", 40, lambda bench: _float8(bench)),
    Part("speed of the authors' release", 45, release),
    Part("scoring speed by where JPEGs are decoded", 20, decoding),
    Part("scoring speed of other ways", 200, candidates),
]


def _eager_if_tiny(bench: Bench, kinds: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [kind for kind in kinds if kind[1] != "compiled"] if bench.tiny else kinds


def _float8(bench: Bench) -> dict[str, Any]:
    bench.need_gpu()
    return scoring(bench, "fp8", [True])
