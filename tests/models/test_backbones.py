import json
import re

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.swin_transformer import SwinTransformer
from torch.utils.flop_counter import FlopCounterMode

from featdistill.__main__ import main
from featdistill.command_line import UserError
from featdistill.models.backbones import BACKBONES, build, resolve_spec
from featdistill.models.encoders import BackboneSpec
from featdistill.models.expert import create_expert, load_expert, save_expert
from featdistill.models.timm_encoders import TimmBackbone


def encode(name: str, input_size: int | None = None):
    backbone = build(resolve_spec(name, input_size)).eval()
    with torch.no_grad():
        pooled, tokens = backbone(torch.rand(2, 3, backbone.input_size, backbone.input_size))
    return backbone, pooled, tokens


TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32}
POOLING = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
COCA_TEXT = {"embed_cls": True, "output_tokens": True}
OPEN_CLIP = {
    "tiny-test-clip": {"vision_cfg": VIT, "text_cfg": TEXT},
    "tiny-test-resnet": {
        "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": TEXT,
    },
    "tiny-test-coca": {
        "vision_cfg": VIT | POOLING,
        "text_cfg": TEXT | COCA_TEXT,
        "multimodal_cfg": TEXT | {"attn_pooler_heads": 2},
        "custom_text": True,
    },
    "tiny-test-timm": {
        "vision_cfg": {
            "timm_model_name": "test_vit",
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 160,
        },
        "text_cfg": TEXT,
    },
}


@pytest.fixture(scope="module", autouse=True)
def tiny_open_clips(tmp_path_factory) -> None:
    """Models of each kind of image tower, of a few thousand parameters, known to open_clip by name."""
    folder = tmp_path_factory.mktemp("open_clip")
    for name, config in OPEN_CLIP.items():
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 24} | config))
        open_clip.add_model_config(folder / f"{name}.json")


@pytest.fixture
def tiny_open_clip() -> str:
    return "tiny-test-clip"


@pytest.mark.parametrize(
    ("name", "input_size", "feature_dim", "tokens"),
    [
        ("tiny_clip", None, 64, (36, 96)),
        ("tiny_siglip", None, 96, (36, 96)),
        ("tiny_clip", 64, 64, (16, 96)),
        ("timm:test_vit", None, 64, (100, 64)),
        ("timm:test_vit3", 96, 96, (36, 96)),
        ("timm:test_convnext", 96, 64, (9, 64)),
        ("timm:test_efficientnet", 64, 256, (4, 256)),
    ],
)
def test_a_backbone_returns_a_pooled_feature_and_patch_tokens(name, input_size, feature_dim, tokens):
    backbone, pooled, found = encode(name, input_size)
    assert pooled.shape == (2, feature_dim) and backbone.feature_dim == feature_dim
    assert found.shape == (2, *tokens)


def test_the_list_shows_dimensions_and_licence_of_every_backbone(capsys):
    """Built on the meta device: shapes only."""
    main(["backbones", "--list"])
    lines = [line.strip("| ").split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert {name.strip(): " ".join(" ".join(cells).split()) for name, *cells in lines} == {
        "swin_t": "27.5 224 768 49 x 768 32 MIT",
        "clip_rn50x64": "420.4 448 1024 196 x 4096 32 MIT",
        "mocov3_b": "85.8 224 768 196 x 768 16 CC BY-NC 4.0",
        "convnext_b": "87.6 224 1024 49 x 1024 32 Apache-2.0",
        "beit_b": "85.8 224 768 196 x 768 16 Apache-2.0",
        "dinov2_b": "85.7 224 768 256 x 768 14 Apache-2.0",
        "dino_b": "85.8 224 768 196 x 768 16 Apache-2.0",
        "coca_l14": "306.7 224 768 256 x 1024 14 MIT",
        "clip_l14": "304.0 224 768 256 x 1024 14 MIT",
        "siglip_so400m": "428.2 384 1152 729 x 1152 14 Apache-2.0",
        "dinov3_s": "21.6 256 384 256 x 384 16 DINOv3 license",
        "dinov3_b": "85.6 256 768 256 x 768 16 DINOv3 license",
        "dinov3_l": "303.1 256 1024 256 x 1024 16 DINOv3 license",
        "dinov3_h_plus": "840.5 256 1280 256 x 1280 16 DINOv3 license",
        "dinov3_7b": "6716.0 256 4096 256 x 4096 16 DINOv3 license",
        "dinov2_reg_l": "303.2 224 1024 256 x 1024 14 Apache-2.0",
        "siglip2_giant": "1163.7 384 1536 576 x 1536 16 Apache-2.0",
        "metaclip2_giant": "1845.7 378 1280 729 x 1664 14 CC BY-NC 4.0",
        "eva02_l": "304.1 448 1024 1024 x 1024 14 MIT",
        "eva02_clip_l": "304.4 336 768 576 x 1024 14 MIT",
        "pe_core_l": "317.2 336 1024 576 x 1024 14 Apache-2.0",
        "clip_b16": "86.2 224 512 196 x 768 16 MIT",
        "tiny_clip": "0.3 96 64 36 x 96 16 no published weights",
        "tiny_siglip": "0.3 96 96 36 x 96 16 no published weights",
        "tiny_student": "0.1 96 64 36 x 64 16 no published weights",
    }


def test_one_backbone_of_a_library_can_be_shown(capsys):
    main(["backbones", "--show", "open_clip:tiny-test-resnet"])
    assert "|      24 | 4 x 256 |       32 |" in capsys.readouterr().out


def test_the_clip_of_the_paper_has_quick_gelu_and_a_class_token():
    with torch.device("meta"):
        backbone = build(BACKBONES["clip_l14"])
    activation = backbone.model.blocks[0].mlp.act
    values = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(activation(values), values * torch.sigmoid(1.702 * values))
    assert backbone.model.num_prefix_tokens == 1


def test_patch_tokens_exclude_the_class_token_and_the_pooled_feature_is_timms():
    backbone = build(resolve_spec("timm:test_vit")).eval()
    images = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        pooled, tokens = backbone(images)
        features = backbone.model.forward_features(images)
    torch.testing.assert_close(tokens, features[:, 1:])
    torch.testing.assert_close(pooled, backbone.model.forward_head(features, pre_logits=True))


def test_the_tiny_clip_projects_its_class_token_and_the_tiny_siglip_has_none():
    clip, siglip = build(BACKBONES["tiny_clip"]), build(BACKBONES["tiny_siglip"])
    assert clip.model.num_prefix_tokens == 1 and clip.model.head.out_features == 64
    assert siglip.model.num_prefix_tokens == 0 and siglip.model.attn_pool is not None


def test_a_channels_last_map_becomes_the_same_tokens_row_by_row():
    model = SwinTransformer(
        img_size=32, patch_size=4, embed_dim=12, depths=(1, 1), num_heads=(1, 2), window_size=4, num_classes=0
    ).eval()
    backbone = TimmBackbone(model, "pool", 32, (0.5,) * 3, (0.5,) * 3)
    with torch.no_grad():
        images = torch.rand(2, 3, 32, 32)
        tokens, features = backbone(images)[1], model.forward_features(images)
    assert tokens.shape == (2, 16, 24)
    torch.testing.assert_close(tokens[:, 5], features[:, 1, 1])


def test_open_clip_returns_its_embedding_and_the_tokens_after_the_final_norm(tiny_open_clip):
    backbone = build(resolve_spec(f"open_clip:{tiny_open_clip}")).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        pooled, tokens = backbone(images)
        expected = backbone.visual(images)
        backbone.visual.output_tokens = True
    assert pooled.shape == (2, 24) and backbone.feature_dim == 24 and tokens.shape == (2, 16, 64)
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)


def test_open_clip_reads_a_local_file_and_names_one_that_does_not_fit(tiny_open_clip, tmp_path):
    whole = open_clip.create_model(tiny_open_clip, pretrained=None)
    torch.save(whole.state_dict(), tmp_path / "clip.pt")
    backbone = build(resolve_spec(f"open_clip:{tiny_open_clip}"), str(tmp_path / "clip.pt"))
    torch.testing.assert_close(backbone.visual.proj, whole.visual.proj)
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(UserError, match=r"text\.pt is not a readable weights file"):
        build(resolve_spec(f"open_clip:{tiny_open_clip}"), str(tmp_path / "text.pt"))
    torch.save({"visual.proj": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt does not fit"):
        build(resolve_spec(f"open_clip:{tiny_open_clip}"), str(tmp_path / "other.pt"))


def test_a_local_weights_file_is_loaded_strictly_without_its_classifier(tmp_path):
    torch.manual_seed(0)
    donor = timm.create_model("test_efficientnet")
    path = tmp_path / "donor.safetensors"
    save_file({key: value.half() for key, value in donor.state_dict().items()}, path)
    backbone = build(resolve_spec("timm:test_efficientnet", 64), str(path))
    own = backbone.model.state_dict()
    assert own and all(
        torch.equal(value, donor.state_dict()[key].half().to(value.dtype)) for key, value in own.items()
    )
    state = {key: value for key, value in donor.state_dict().items() if key != "conv_stem.weight"}
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"less\.safetensors does not fit .*conv_stem\.weight"):
        build(resolve_spec("timm:test_efficientnet", 64), str(tmp_path / "less.safetensors"))


def test_a_file_of_clip_may_leave_out_the_bias_of_the_projection(tmp_path):
    name, small = "vit_base_patch16_clip_quickgelu_224", {"embed_dim": 48, "depth": 1, "num_heads": 3}
    spec = BackboneSpec("timm", name, "openai", "projection", options=small)
    state = build(spec).model.state_dict()
    path = tmp_path / "clip.safetensors"
    save_file({key: value for key, value in state.items() if key != "head.bias"}, path)
    loaded = build(spec, str(path)).model
    assert torch.equal(loaded.head.weight, state["head.weight"]) and not loaded.head.bias.any()
    assert "head.weight" not in build(BackboneSpec("timm", name, options=small), str(path)).state_dict()


def test_positions_of_a_file_are_resized_to_the_input(tmp_path):
    torch.manual_seed(0)
    donor = timm.create_model("test_vit", num_classes=0)
    save_file(donor.state_dict(), tmp_path / "vit.safetensors")
    backbone = build(resolve_spec("timm:test_vit", 96), str(tmp_path / "vit.safetensors"))
    expected = resample_abs_pos_embed(donor.pos_embed, [6, 6], [10, 10], num_prefix_tokens=1)
    torch.testing.assert_close(backbone.model.pos_embed, expected)
    assert torch.equal(backbone.model.patch_embed.proj.weight, donor.patch_embed.proj.weight)


@pytest.mark.parametrize(
    ("name", "size", "table", "old", "new"),
    [
        ("tiny-test-clip", 48, "positional_embedding", 4, 6),
        ("tiny-test-resnet", 96, "attnpool.positional_embedding", 2, 3),
        ("tiny-test-coca", 48, "positional_embedding", 4, 6),
        ("tiny-test-timm", 96, "trunk.pos_embed", 10, 6),
    ],
)
def test_positions_of_an_open_clip_file_are_resized_to_the_input(tmp_path, name, size, table, old, new):
    whole = open_clip.create_model(name, pretrained=None)
    torch.save(whole.state_dict(), tmp_path / "whole.pt")
    backbone = build(resolve_spec(f"open_clip:{name}", size), str(tmp_path / "whole.pt")).eval()
    before, after = (
        dict(visual.named_parameters())[table].detach() for visual in (whole.visual, backbone.visual)
    )
    before = before if before.ndim == 3 else before[None]
    expected = resample_abs_pos_embed(before, [new, new], [old, old], num_prefix_tokens=1)
    torch.testing.assert_close(after.reshape(expected.shape), expected)
    with torch.no_grad():
        assert backbone(torch.rand(1, 3, size, size))[1].shape[1] == new * new


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (
            "dinov2_b",
            230,
            r"230 px does not fit timm:vit_base_patch14_dinov2: .* patch of 14 px; use 224 or 238",
        ),
        ("timm:test_vit", 8, "8 px does not fit timm:test_vit: .* patch of 16 px; use 16"),
        ("timm:test_maxvit", 100, "input size 100 px does not fit timm:test_maxvit: "),
        ("swin_t", 90, "patch of 4 px; use 88 or 92"),
        ("timm:test_convnext", 3, "input size 3 px does not fit timm:test_convnext: "),
        ("open_clip:tiny-test-clip", 36, "patch of 8 px; use 32 or 40"),
        ("open_clip:tiny-test-resnet", 80, "patch of 32 px; use 64 or 96"),
        ("open_clip:tiny-test-timm", 100, "100"),
        ("tiny_clip", 100, "input size 100 px of tiny_clip is not a multiple of 16 px"),
        ("tiny_clip", -16, "must be at least 1"),
    ],
)
def test_an_input_size_that_does_not_fit_is_named(name, size, message):
    with pytest.raises(UserError, match=message):
        build(resolve_spec(name, size))


def test_an_open_clip_expert_keeps_its_normalization_and_activation_when_it_is_loaded():
    """They are facts of the weights' tag, and must not depend on the weights being downloaded."""
    with torch.device("meta"):
        plain = build(resolve_spec("open_clip:ViT-B-32"))
        openai = build(resolve_spec("open_clip:ViT-B-32/openai"))
        siglip = build(resolve_spec("open_clip:ViT-B-16-SigLIP/webli"))
    activations = [type(one.visual.transformer.resblocks[0].mlp.gelu).__name__ for one in (plain, openai)]
    assert activations == ["GELU", "QuickGELU"]
    assert siglip.mean == (0.5, 0.5, 0.5) and openai.mean == (0.48145466, 0.4578275, 0.40821073)


def test_a_resized_resnet_survives_saving(tmp_path):
    expert = create_expert("open_clip:tiny-test-resnet", "random", input_size=96, head_hidden=4).eval()
    save_expert(expert, tmp_path / "expert")
    images = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(load_expert(tmp_path / "expert")(images), expert(images))


ALL_KINDS = ("tiny_clip", "tiny_siglip", "timm:test_vit", "timm:test_convnext", "timm:test_efficientnet")
ALL_KINDS += tuple(f"open_clip:{name}" for name in OPEN_CLIP)
SMALL = {"timm:test_vit": 64, "timm:test_convnext": 64, "timm:test_efficientnet": 64}


@pytest.mark.parametrize("name", ALL_KINDS)
def test_the_last_of_several_layers_equals_the_forward_pass(name):
    torch.manual_seed(0)
    backbone = build(resolve_spec(name, SMALL.get(name))).eval()
    images = torch.rand(2, 3, backbone.input_size, backbone.input_size)
    with torch.no_grad():
        pooled, last = backbone(images)
        again, tokens = backbone.intermediates(images, 2)
        single = backbone.intermediates(images, 1)[1]
    assert torch.equal(pooled, again) and torch.equal(last, tokens[1]) and torch.equal(last, single[0])
    assert len(tokens) == 2 and tokens[0].ndim == 3 and tokens[0].shape[1] >= last.shape[1]
    assert not torch.equal(tokens[0], tokens[1])
    for layers in (0, 99):
        with pytest.raises(UserError, match=f"layers; cannot compare the last {layers}"):
            backbone.intermediates(images, layers)


def test_earlier_tokens_are_as_the_blocks_leave_them_without_the_class_token():
    backbone = build(resolve_spec("timm:test_vit", 64)).eval()
    kept = []
    for block in backbone.model.blocks[-3:]:
        block.register_forward_hook(lambda *call: kept.append(call[2]))
    with torch.no_grad():
        tokens = backbone.intermediates(torch.rand(2, 3, 64, 64), 3)[1]
    for found, block in zip(tokens[:2], kept[:2], strict=True):
        assert torch.equal(found, block[:, 1:])
    torch.testing.assert_close(tokens[2], backbone.model.norm(kept[2])[:, 1:])


def test_earlier_stages_of_a_convolutional_network_are_read_row_by_row():
    backbone = build(resolve_spec("timm:test_convnext", 64)).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        tokens = backbone.intermediates(images, 2)[1]
        stages = backbone.model.forward_intermediates(images, indices=2, intermediates_only=True)
    assert tokens[0].shape == (1, 16, 48) and tokens[1].shape == (1, 4, 64)
    torch.testing.assert_close(tokens[0][:, 6], stages[0][:, :, 1, 2])


def test_coca_returns_the_embedding_of_its_image_tower_and_the_patch_tokens_before_pooling():
    backbone = build(resolve_spec("open_clip:tiny-test-coca")).eval()
    kept = []
    backbone.visual.transformer.register_forward_hook(lambda *call: kept.append(call[2]))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        pooled, tokens = backbone(images)
        embedding = backbone.visual(images)[0]
    assert pooled.shape == (2, 24) and tokens.shape == (2, 16, 64)
    torch.testing.assert_close(pooled, embedding)
    torch.testing.assert_close(tokens, kept[0][:, 1:])


def test_a_clip_resnet_returns_its_embedding_and_the_map_before_attention_pooling():
    backbone = build(resolve_spec("open_clip:tiny-test-resnet")).eval()
    images = torch.rand(2, 3, 64, 64)
    visual = backbone.visual
    with torch.no_grad():
        pooled, tokens = backbone(images)
        features = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images)))))
        torch.testing.assert_close(pooled, visual(images))
    assert tokens.shape == (2, 4, 256)
    torch.testing.assert_close(tokens[:, 1], features[:, :, 0, 1])


@pytest.mark.parametrize(
    ("name", "count", "first", "behind"),
    [
        ("tiny_clip", 4, "model.pos_embed", "model.head.weight"),
        ("timm:test_vit", 8, "model.cls_token", "model.norm.bias"),
        ("timm:test_vit3", 11, "model.reg_token", "model.attn_pool.latent"),
        ("timm:test_convnext", 11, "model.stem.0.weight", "model.head.norm.weight"),
        ("timm:test_efficientnet", 7, "model.conv_stem.weight", "model.bn2.weight"),
        ("timm:test_resnet", 6, "model.conv1.0.weight", None),
        ("timm:caformer_s18", 7, "model.stem.conv.weight", None),
        ("swin_t", 14, "model.patch_embed.proj.weight", "model.norm.weight"),
        ("open_clip:tiny-test-clip", 4, "visual.class_embedding", "visual.ln_post.weight"),
        ("open_clip:tiny-test-coca", 4, "visual.ln_pre.weight", "visual.attn_pool.query"),
        ("open_clip:tiny-test-resnet", 7, "visual.conv3.weight", "visual.attnpool.c_proj.weight"),
        ("open_clip:tiny-test-timm", 8, "visual.trunk.pos_embed", "visual.head.proj.weight"),
    ],
)
def test_every_parameter_is_in_exactly_one_layer_from_the_stem_to_the_projection(name, count, first, behind):
    with torch.device("meta"):
        backbone = build(resolve_spec(name))
    layers = backbone.layers()
    found = sorted(name for names in layers for name in names)
    assert found == sorted(name for name, _ in backbone.named_parameters())
    assert len(layers) == count and first in layers[0]
    assert layers[-1] == [] if behind is None else behind in layers[-1]
    assert all(layers[:-1])


@pytest.mark.parametrize(
    "name",
    [
        "tiny_siglip",
        "timm:test_vit",
        "timm:test_convnext",
        "open_clip:tiny-test-coca",
        "open_clip:tiny-test-timm",
    ],
)
def test_gradient_checkpointing_recomputes_and_keeps_gradients_equal(name):
    torch.manual_seed(0)
    backbone = build(resolve_spec(name, SMALL.get(name))).train()
    images = torch.rand(2, 3, backbone.input_size, backbone.input_size)
    names = [key for key, _ in backbone.named_modules() if key.endswith(("mlp.fc1", "mlp.c_fc"))]
    calls = []
    backbone.get_submodule(names[0]).register_forward_hook(lambda *call: calls.append(1))

    def gradients() -> list[torch.Tensor]:
        backbone.zero_grad()
        calls.clear()
        pooled, tokens = backbone(images)
        (pooled.square().sum() + tokens.square().mean()).backward()
        return [parameter.grad for parameter in backbone.parameters() if parameter.grad is not None]

    plain = gradients()
    assert len(calls) == 1
    backbone.set_gradient_checkpointing(True)
    checkpointed = gradients()
    assert len(calls) == 2 and len(plain) == len(checkpointed)
    for one, other in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(one, other)
    backbone.set_gradient_checkpointing(False)
    gradients()
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["tiny_clip", "tiny_siglip", "timm:test_vit", "open_clip:tiny-test-coca"])
def test_selective_checkpointing_recomputes_no_matrix_product_and_keeps_gradients_equal(name):
    torch.manual_seed(0)
    backbone = build(resolve_spec(name, SMALL.get(name))).train()
    images = torch.rand(2, 3, backbone.input_size, backbone.input_size)

    def gradients() -> tuple[list[torch.Tensor], float]:
        backbone.zero_grad()
        pooled, tokens = backbone(images)
        with FlopCounterMode(display=False) as counter:
            (pooled.square().sum() + tokens.square().mean()).backward()
        parameters = backbone.parameters()
        found = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return found, counter.get_total_flops()

    plain, flops = gradients()
    for selective, is_more in ((True, False), (False, True), (True, False)):
        backbone.set_gradient_checkpointing(True, selective)
        checkpointed, others = gradients()
        assert (others > flops) == is_more
        assert len(plain) == len(checkpointed)
        for one, other in zip(plain, checkpointed, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    backbone.set_gradient_checkpointing(False)
    assert gradients()[1] == flops and not any("forward" in vars(part) for part in backbone.modules())


def test_a_backbone_without_gradient_checkpointing_says_so():
    with torch.device("meta"):
        backbones = [
            build(resolve_spec(name)) for name in ("timm:hrnet_w18_small", "open_clip:tiny-test-resnet")
        ]
    for backbone in backbones:
        backbone.set_gradient_checkpointing(False)
        with pytest.raises(UserError, match="does not support gradient checkpointing"):
            backbone.set_gradient_checkpointing(True)
        with pytest.raises(UserError, match="not a plain transformer"):
            backbone.set_gradient_checkpointing(True, selective=True)


def test_moco_v3_is_read_from_its_authors_file_without_projector_predictor_and_momentum_encoder(tmp_path):
    torch.manual_seed(0)
    donor = timm.create_model("test_vit", num_classes=0).state_dict()
    state = {f"module.base_encoder.{key}": value for key, value in donor.items()}
    state |= {f"module.momentum_encoder.{key}": torch.zeros_like(value) for key, value in donor.items()}
    state |= {
        "module.base_encoder.head.0.weight": torch.zeros(4, 64),
        "module.predictor.0.weight": torch.zeros(4),
    }
    torch.save({"epoch": 300, "state_dict": state}, tmp_path / "moco.pth.tar")
    spec = BackboneSpec("timm", "test_vit", "mocov3")
    backbone = build(spec, str(tmp_path / "moco.pth.tar"))
    own = backbone.model.state_dict()
    assert own.keys() == donor.keys() and all(torch.equal(own[key], donor[key]) for key in donor)
    assert backbone.mean == (0.485, 0.456, 0.406)
    del state["module.base_encoder.norm.weight"]
    torch.save({"state_dict": state}, tmp_path / "less.pth.tar")
    with pytest.raises(UserError, match=r"less\.pth\.tar does not fit .*norm\.weight"):
        build(spec, str(tmp_path / "less.pth.tar"))
    with pytest.raises(UserError, match=r"get vit-b-300ep\.pth\.tar .*CC BY-NC 4\.0.* --weights FILE"):
        build(BACKBONES["mocov3_b"], "hub")


class Payload:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_a_pickle_with_code_is_refused(tmp_path, capsys):
    torch.save({"state_dict": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth is not a readable weights file"):
        build(resolve_spec("timm:test_vit"), str(tmp_path / "evil.pth"))
    assert "never run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clip_l41", "did you mean clip_l14"),
        ("timm:tset_vit", "did you mean test_vit"),
        ("open_clip:ViT-B-33", "did you mean ViT-B-32"),
        ("hub:x", "unknown library 'hub'"),
        (
            "timm:vit_base_patch16_224.dion",
            "timm:vit_base_patch16_224 has no weights 'dion' (did you mean dino?)",
        ),
        ("open_clip:ViT-B-32/openia", "has no weights 'openia' (did you mean openai?)"),
    ],
)
def test_an_unknown_backbone_names_the_nearest(name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        resolve_spec(name)


def test_missing_weights_are_one_clear_error():
    with pytest.raises(UserError, match=r"weights file nowhere\.safetensors does not exist"):
        build(BACKBONES["tiny_clip"], "nowhere.safetensors")
    with pytest.raises(UserError, match="has no published weights"):
        build(BACKBONES["tiny_clip"], "hub")
    with pytest.raises(UserError, match=r"needs the name of its weights, /TAG; it has: .*openai"):
        build(resolve_spec("open_clip:RN50"), "hub")
