import json

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer

from featdistill.backbones import BACKBONES, TimmBackbone, build, resolve_spec
from featdistill.command_line import UserError


def encode(name: str, input_size: int | None = None):
    backbone = build(resolve_spec(name, input_size)).eval()
    with torch.no_grad():
        pooled, tokens = backbone(torch.rand(2, 3, backbone.input_size, backbone.input_size))
    return backbone, pooled, tokens


@pytest.fixture
def tiny_open_clip(tmp_path) -> str:
    """A CLIP of a few thousand parameters, known to open_clip by name."""
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-test-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-test-clip.json")
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
def test_a_backbone_gives_a_pooled_feature_and_patch_tokens(name, input_size, feature_dim, tokens):
    backbone, pooled, found = encode(name, input_size)
    assert pooled.shape == (2, feature_dim) and backbone.feature_dim == feature_dim
    assert found.shape == (2, *tokens)


@pytest.mark.parametrize(
    ("name", "size", "feature_dim", "tokens"),
    [("clip_l14", 224, 768, (256, 1024)), ("siglip_so400m", 384, 1152, (729, 1152))],
)
def test_the_experts_of_the_paper_have_its_dimensions(name, size, feature_dim, tokens):
    with torch.device("meta"):
        backbone = build(BACKBONES[name])
        pooled, found = backbone(torch.rand(1, 3, size, size))
    assert (backbone.input_size, backbone.feature_dim) == (size, feature_dim)
    assert pooled.shape == (1, feature_dim) and found.shape == (1, *tokens)


def test_the_clip_of_the_paper_has_quick_gelu_and_a_class_token():
    with torch.device("meta"):
        backbone = build(BACKBONES["clip_l14"])
    activation = backbone.model.blocks[0].mlp.act
    values = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(activation(values), values * torch.sigmoid(1.702 * values))
    assert backbone.model.num_prefix_tokens == 1


def test_a_class_token_is_no_patch_token_and_the_pooled_feature_is_timms_own():
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


def test_open_clip_gives_its_own_embedding_and_the_tokens_after_the_final_norm(tiny_open_clip):
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


class Payload:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_a_pickle_with_code_is_refused(tmp_path, capsys):
    torch.save({"state_dict": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth is no readable weights file"):
        build(resolve_spec("timm:test_vit"), str(tmp_path / "evil.pth"))
    assert "never run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clip_l41", "did you mean clip_l14"),
        ("timm:tset_vit", "did you mean test_vit"),
        ("open_clip:ViT-B-33", "did you mean ViT-B-32"),
        ("hub:x", "unknown library 'hub'"),
    ],
)
def test_an_unknown_backbone_names_the_nearest(name, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        resolve_spec(name)


def test_weights_that_are_not_there_are_said():
    with pytest.raises(UserError, match=r"weights file nowhere\.safetensors does not exist"):
        build(BACKBONES["tiny_clip"], "nowhere.safetensors")
    with pytest.raises(UserError, match="has no published weights"):
        build(BACKBONES["tiny_clip"], "hub")
    with pytest.raises(UserError, match=r"needs the name of its weights, /TAG; it has: .*openai"):
        build(resolve_spec("open_clip:RN50"), "hub")
