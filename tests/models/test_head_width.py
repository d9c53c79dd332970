"""Wider heads compute the same logits."""

import pytest
import torch

from featdistill.models.backbones import BackboneSpec, build
from featdistill.models.expert import Expert
from featdistill.models.head_width import with_head_width


@pytest.mark.parametrize("bias", [True, False])
def test_wider_heads_give_the_same_logits(bias):
    torch.manual_seed(0)
    options = {"embed_dim": 144, "depth": 2, "num_heads": 2, "qkv_bias": bias}
    spec = BackboneSpec("timm", "vit_so400m_patch14_siglip_384", options=options, input_size=56)
    expert = Expert(build(spec), spec, head_hidden=8).eval()
    for layer in expert.backbone.model.blocks:
        layer.attn.qkv.weight.data.normal_()
    images = torch.randint(0, 256, (3, 3, 56, 56), dtype=torch.uint8)
    for width in (80, 128):
        wide = with_head_width(expert, width)
        attention = wide.backbone.model.blocks[1].attn
        assert attention.qkv.weight.shape == (3 * 2 * width, 144) and attention.head_dim == width
        with torch.inference_mode():
            torch.testing.assert_close(wide(images), expert(images), rtol=1e-5, atol=1e-5)
    assert expert.backbone.model.blocks[1].attn.head_dim == 72
    assert with_head_width(expert, 72).backbone.model.blocks[0].attn.head_dim == 72
