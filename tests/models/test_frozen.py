import torch

from featdistill.models.backbones import build, resolve_spec
from featdistill.models.frozen import layer_hashes


def test_a_change_shows_in_the_hash_of_its_layer_alone():
    torch.manual_seed(0)
    backbone = build(resolve_spec("tiny_clip"))
    before = layer_hashes(backbone)
    assert len(set(before)) == len(before) == 4 and layer_hashes(backbone) == before
    norm = next(m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))
    for layer, value in ((0, norm.running_mean), (2, backbone.model.blocks[1].norm1.bias)):
        with torch.no_grad():
            value += 1
        changed = layer_hashes(backbone)
        assert [number for number in range(4) if changed[number] != before[number]] == [layer]
        before = changed


def test_a_projection_is_in_the_last_hash_alone():
    hashes = []
    for feature in ("pool", "projection"):
        torch.manual_seed(0)
        hashes.append(layer_hashes(build(resolve_spec("tiny_clip", feature=feature))))
    assert hashes[0] == hashes[1]  # the tiny transformer always has one
    for feature in ("pool", "projection"):
        with torch.device("meta"):
            backbone = build(resolve_spec("timm:vit_base_patch16_clip_quickgelu_224.openai", feature=feature))
        assert ("model.head.weight" in backbone.layers()[-1]) == (feature == "projection")
