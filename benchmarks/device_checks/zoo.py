"""Small experts with the layers of each family of the zoo."""

import copy
import dataclasses

import torch

from benchmarks.device_checks.runner import Bench
from featdistill.models.backbones import BACKBONES, BackboneSpec, build
from featdistill.models.expert import Expert

# The options that make a backbone small: its depth; on a CPU also its width.
_SHALLOW = {"depth": 2}
_NARROW = {"embed_dim": 144, "num_heads": 2}
_NETS = {"depths": (1, 1, 1, 1)}
FAMILIES: dict[str, tuple[dict, dict]] = {
    "clip_l14": (_SHALLOW, _NARROW),
    "siglip_so400m": (_SHALLOW, _NARROW),
    "beit_b": (_SHALLOW, _NARROW),
    "dinov2_reg_l": (_SHALLOW, _NARROW),
    "dinov3_l": (_SHALLOW, {"embed_dim": 128, "num_heads": 2}),
    "eva02_clip_l": (_SHALLOW, {"embed_dim": 128, "num_heads": 2}),
    "pe_core_l": (_SHALLOW, {"embed_dim": 128, "num_heads": 2}),
    "mocov3_b": (_SHALLOW, _NARROW),
    "swin_t": (_NETS, {"embed_dim": 32, "num_heads": (1, 2, 4, 8)}),
    "convnext_b": (_NETS, {"dims": (16, 32, 48, 64)}),
}
# The library's own transformer; its smallest model has a text tower beside it.
OPEN_CLIP = BackboneSpec("open_clip", "ViT-B-32", feature="projection")
_CPU_PX = {"siglip_so400m": 56, "dinov2_reg_l": 56, "eva02_clip_l": 56, "pe_core_l": 56, "clip_l14": 56}


def family(name: str, bench: Bench) -> Expert:
    """Build a shallow expert of a family with random weights, in evaluation mode, on the device."""
    shallow, narrow = FAMILIES[name]
    spec = BACKBONES[name]
    size = _CPU_PX.get(name, spec.input_size) if bench.tiny else spec.input_size
    options = spec.options | shallow | (narrow if bench.tiny else {})
    return new_expert(dataclasses.replace(spec, options=options, input_size=size), bench)


def new_expert(spec: BackboneSpec, bench: Bench) -> Expert:
    """Build an expert with random weights, in evaluation mode; initialized on the device, which is quick."""
    torch.manual_seed(0)
    with bench.device:
        expert = Expert(build(spec), spec).eval()
    for parameter_name, parameter in expert.backbone.named_parameters():
        # Some families start with blocks that contribute next to nothing.
        if parameter_name.rpartition(".")[2].startswith("gamma"):
            parameter.data.fill_(0.5)
    # Logits of an untrained head hardly differ between images.
    expert.head[-1].weight.data.mul_(10)
    return expert


def images_for(expert: Expert, count: int, device: torch.device) -> torch.Tensor:
    """Return (N, 3, S, S) uint8 that differ in their statistics as pictures do."""
    size = expert.preprocessing.size
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 3, 7, 7, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    grain = 0.1 * torch.randn(count, 3, size, size, generator=generator)
    return ((smooth + grain).clamp(0, 1) * 255).to(torch.uint8).to(device)


def on_cpu(expert: Expert) -> Expert:
    """Return a copy on the CPU."""
    return copy.deepcopy(expert).to("cpu")
