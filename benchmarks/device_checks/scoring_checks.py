"""Does scoring compute the right thing on this device, in every precision and compiled?"""

import copy
import gc
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.device import GIB, find_device, matrix_flops_per_s
from benchmarks.device_checks.runner import Bench, Part, Skip
from benchmarks.device_checks.zoo import FAMILIES, OPEN_CLIP, family, images_for, new_expert, on_cpu
from benchmarks.scenes import fitted, synthetic_scene
from data_prep.attacks.adversarial import Attack, attack, score
from featdistill.data.gpu_decoding import JpegDataset, decode, repeats_chroma
from featdistill.data.loading import ScoreDataset, collate, to_device
from featdistill.data.views import parse_tta
from featdistill.inference import compute
from featdistill.inference.float8 import Float8Linear, with_float8
from featdistill.inference.fusion import Fusion
from featdistill.inference.predictor import Predictor
from featdistill.inference.scoring import _mean_logits
from featdistill.models.expert import Expert
from featdistill.models.head_width import with_head_width

# By how much logits of these experts may move, which spread over about one unit.
MOST = {"fp32": 2e-3, "fp16": 0.02, "bf16": 0.1, "fp8": 1.0}
_PAPER = ("clip_l14", "siglip_so400m")


def logits_of(expert: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """Return logits (N,) on the CPU."""
    with torch.inference_mode(), compute.attention_kernels(device):
        return expert(images).float().cpu()


def must_be_close(found: Tensor, expected: Tensor, most: float, what: str) -> float:
    """Return the largest difference; raise an error if it is above `most`, or not a number."""
    difference = float((found - expected).abs().max())
    if not difference <= most:
        raise AssertionError(f"{what}: logits differ by {difference:.3g}, at most {most} are expected")
    return difference


def the_device(bench: Bench) -> dict[str, Any]:
    """Find the device and measure its rate of matrix products."""
    _, title = find_device(str(bench.device))
    rate = matrix_flops_per_s(bench.device, torch.bfloat16 if bench.is_gpu else torch.float32)
    bench.facts |= {"device": title, "matrix_flops_per_s": rate}
    if bench.is_gpu:
        bench.facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {"device": title, "TFLOP/s": rate / 1e12}


def precisions(bench: Bench) -> dict[str, float]:
    """Compare with float32 on the CPU."""
    found = {}
    for name in _PAPER:
        expert = family(name, bench)
        images = images_for(expert, 8, bench.device)
        expected = logits_of(on_cpu(expert), images.cpu(), torch.device("cpu"))
        for precision in ("fp32", "bf16", *(["fp16"] if bench.is_gpu else [])):
            model = compute.cast(copy.deepcopy(expert), precision)
            logits = logits_of(model, images, bench.device)
            what = f"{name} {precision}"
            found[what] = must_be_close(logits, expected, MOST[precision], what)
    return found


def compiled(bench: Bench) -> dict[str, float]:
    """Compare compiled experts with the same ones eager, also with wider heads and with CUDA graphs."""
    found = {}
    for name in _PAPER:
        expert = family(name, bench)
        images = images_for(expert, 8, bench.device)
        graphs = {"mode": "reduce-overhead"} if bench.is_gpu else bench.compiler
        for title, plain, options in (
            (name, expert, bench.compiler),
            (f"{name}, heads 128", with_head_width(expert, 128), bench.compiler),
            (f"{name}, CUDA graphs", expert, graphs),
        ):
            torch._dynamo.reset()
            model = compute.cast(copy.deepcopy(plain), "bf16" if bench.is_gpu else "fp32")
            [model] = compute.compile_experts([model], 8, bench.device, **options)
            most = MOST["bf16" if bench.is_gpu else "fp32"]
            # A graph computes other images than those that it was recorded with.
            for order in (images, images.flip(0)):
                logits = logits_of(model, order, bench.device)
                expected = logits_of(expert, order, bench.device)
                found[title] = must_be_close(logits, expected, most, title)
    return found


def kernel_names(model: nn.Module, images: Tensor, device: torch.device) -> list[str]:
    """Return the names of the GPU's kernels in a forward pass."""
    logits_of(model, images, device)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        logits_of(model, images, device)
        torch.cuda.synchronize(device)
    return [event.key for event in trace.key_averages()]


def attention(bench: Bench) -> dict[str, str]:
    """Is cuDNN's attention used at head width 72, eager and compiled, where we prefer it?"""
    bench.need_gpu()
    if torch.cuda.get_device_capability(bench.device) < (9, 0):
        raise Skip("PyTorch's own order is used before Hopper")
    expert = compute.cast(family("siglip_so400m", bench), "bf16")
    images = images_for(expert, 8, bench.device)
    found = {}
    for title, model in (
        ("eager", expert),
        ("compiled", compute.compile_experts([expert], 8, bench.device, **bench.compiler)[0]),
    ):
        names = kernel_names(model, images, bench.device)
        found[title] = next((name for name in names if is_attention(name)), "none")
    wrong = [title for title, name in found.items() if "cudnn" not in name.lower()]
    if wrong:
        raise AssertionError(f"attention is not cuDNN's: {found}")
    return found


def is_attention(kernel: str) -> bool:
    """Whether a kernel of this name computes attention."""
    return any(part in kernel.lower() for part in ("sdpa", "flash", "fmha", "attention"))


def computes_float8() -> bool:
    """Return whether this PyTorch multiplies 8-bit floats with a scale per row on a CPU; 2.8 does not."""
    try:
        Float8Linear(nn.Linear(16, 16))(torch.zeros(1, 16))
    except (RuntimeError, NotImplementedError):
        return False
    return True


def float8(bench: Bench) -> dict[str, float]:
    """Score with 8-bit layers of every family; on an error, name the family."""
    if not (bench.is_gpu or computes_float8()):
        raise Skip("this PyTorch has no such products on a CPU")
    found, failed = {}, []
    for name in (*FAMILIES, "open_clip"):
        if name == "open_clip" and bench.tiny:
            continue
        expert = new_expert(OPEN_CLIP, bench) if name == "open_clip" else family(name, bench)
        images = images_for(expert, 16, bench.device)
        expert = compute.cast(expert, "bf16")
        try:
            logits = logits_of(with_float8(expert), images, bench.device)
            expected = logits_of(expert, images, bench.device)
            found[name] = must_be_close(logits, expected, MOST["fp8"], name)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            failed.append(f"{name}: {str(error).splitlines()[0][:120]}")
    if failed:
        raise AssertionError("; ".join(failed))
    return found


def float8_compiled(bench: Bench) -> dict[str, float]:
    bench.need_gpu()
    found = {}
    for name in (*_PAPER, "beit_b"):
        expert = compute.cast(family(name, bench), "bf16")
        images = images_for(expert, 16, bench.device)
        [model] = compute.compile_experts([with_float8(expert)], 16, bench.device, **bench.compiler)
        expected = logits_of(expert, images, bench.device)
        found[name] = must_be_close(logits_of(model, images, bench.device), expected, MOST["fp8"], name)
    return found


def float8_memory(bench: Bench) -> dict[str, float]:
    """An ensemble that scores in fp8 must not keep its weights in bfloat16 on the GPU."""
    bench.need_gpu()
    experts = {"one": family("siglip_so400m", bench)}
    predictor = Predictor(experts, {"one": ""}, Fusion(), bench.device, "fp8", 8, 0)
    [model] = predictor.models("fp8", 8)
    weights = sum(value.nbytes for value in model.state_dict().values())
    gc.collect()
    kept = torch.cuda.memory_allocated(bench.device)
    if kept > 1.1 * weights:
        raise AssertionError(f"{kept / GIB:.2f} GiB are in use for {weights / GIB:.2f} GiB of weights")
    return {"GiB": kept / GIB}


def batch_size(bench: Bench) -> dict[str, int]:
    bench.need_gpu()
    expert = compute.cast(family("siglip_so400m", bench), "bf16")
    size = compute.automatic_batch_size([expert], bench.device)
    if size != compute.LARGEST_BATCH:
        raise AssertionError(f"the automatic batch size of a shallow expert is {size}, not the largest")
    return {"images": size}


def views(bench: Bench) -> dict[str, float]:
    """Average over test-time views, compiled and eager."""
    expert = family("clip_l14", bench)
    images = images_for(expert, 8, bench.device)
    _, eight = parse_tta("hflip")
    stacks = {view.key(expert.preprocessing.key): images for view in eight}
    [model] = compute.compile_experts([expert], 8, bench.device, **bench.compiler)
    with compute.attention_kernels(bench.device):
        found, expected = (_mean_logits(one, stacks, eight, 8).float().cpu() for one in (model, expert))
    if torch.allclose(found, logits_of(expert, images, bench.device), atol=1e-6):
        raise AssertionError("the mirrored view changes nothing")
    return {"difference": must_be_close(found, expected, MOST["fp32"], "views")}


def pgd(bench: Bench) -> dict[str, float]:
    """An attack must move scores as it is told."""
    expert: Expert = family("clip_l14", bench)
    pictures = [
        np.ascontiguousarray(image)
        for image in images_for(expert, 4, bench.device).permute(0, 2, 3, 1).cpu().numpy()
    ]
    generators = [np.random.default_rng(row) for row in range(4)]
    settings = Attack(steps=3 if bench.tiny else 10)
    rising = [True, False, True, False]
    changed = attack(expert, pictures, rising, settings, generators)
    before, after = score(expert, pictures), score(expert, changed)
    moved = np.where(rising, after - before, before - after)
    if not (moved > 0).all():
        raise AssertionError(f"PGD moved scores by {moved.round(4).tolist()}, not all as it was told")
    return {"scores moved by": float(moved.mean())}


def decoding(bench: Bench) -> dict[str, Any]:
    """Decode JPEGs on the device: pixels and logits against those of the CPU, alone and among others."""
    expert = family("clip_l14", bench)
    key = expert.preprocessing.key
    keys, kinds = [key, (key[0], "crop")], {"420": {}, "422": {"subsampling": 1}, "444": {"subsampling": 0}}
    kinds |= {"progressive": {"progressive": True}, "gray": {}}
    paths = [bench.folder / f"{number} {kind}.jpg" for kind in kinds for number in range(3)]
    for number, path in enumerate(paths):
        kind = path.stem.partition(" ")[2]
        scene = Image.fromarray(fitted(synthetic_scene(number % 3), (600 + 10 * (number % 3), 450)))
        scene.convert("L" if kind == "gray" else "RGB").save(path, quality=90, **kinds[kind])
    names = [str(path) for path in paths]
    rows = pd.DataFrame({"image": names, "name": names})
    normal, ours = ScoreDataset(rows, keys), JpegDataset(rows, keys)
    items, jpegs = ([dataset[row] for row in range(len(rows))] for dataset in (normal, ours))
    expected = to_device(collate(items), bench.device)["images"]
    found = ours.to_device(ours.collate(jpegs), bench.device)["images"]
    if None in decode([torch.from_numpy(jpeg.data.copy()) for jpeg in jpegs], bench.device):
        raise AssertionError("a plain JPEG is refused")
    for row, jpeg in enumerate(jpegs):
        alone = ours.to_device(ours.collate([jpeg]), bench.device)["images"]
        if not all(torch.equal(alone[key][0], found[key][row]) for key in keys):
            raise AssertionError(f"{paths[row].stem} has other pixels alone than among others")
    figures: dict[str, Any] = {"repeats chroma": repeats_chroma(bench.device)}
    for number, kind in enumerate(kinds):
        part = slice(3 * number, 3 * number + 3)
        levels = (found[keys[1]][part].int() - expected[keys[1]][part].int()).abs().float()
        figures[f"{kind} levels"] = f"{levels.mean():.3f} at most {levels.max():.0f}"
        if not levels.mean() <= 1.5:
            raise AssertionError(f"pixels of {kind} differ by {levels.mean():.3g} levels on average")
    logits = [logits_of(expert, images[key], bench.device) for images in (found, expected)]
    return figures | {"logits": must_be_close(*logits, MOST["bf16"], "decoding on the device")}


FIRST = Part("device and rate of matrix products", 10, the_device)
PARTS = [
    Part("precisions against float32 on the CPU", 20, precisions, shares=True),
    Part("cuDNN attention at head width 72", 25, attention, shares=True),
    Part("compiled experts", 45, compiled, shares=True),
    Part("fp8 of every family", 30, float8, shares=True),
    Part("fp8 compiled", 40, float8_compiled, shares=True),
    Part("memory in fp8", 10, float8_memory, shares=True),
    Part("automatic batch size", 10, batch_size),
    Part("test-time views, compiled", 15, views, shares=True),
    Part("JPEGs decoded on the device", 10, decoding, shares=True),
    Part("PGD", 10, pgd, shares=True),
]
