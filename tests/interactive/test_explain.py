import os

import numpy as np
import open_clip.transformer
import pytest
import torch
from conftest import smooth_picture
from PIL import Image
from torch.nn import functional

from featdistill.__main__ import main
from featdistill.command_line import UserError
from featdistill.data.preprocessing import prepare
from featdistill.interactive.explain import explain, overlay
from featdistill.models.backbones import resolve_spec
from featdistill.models.expert import Expert, create_expert, save_expert
from featdistill.models.masking import PatchMasking, texture_scores
from featdistill.models.open_clip_encoders import OpenClipTransformer
from featdistill.models.token_maps import CLASS_TOKEN, LOGIT, NORM, POOLING, token_map
from featdistill.recipe_groups import Masking


def expert_of(name: str) -> Expert:
    torch.manual_seed(0)
    if name != "open_clip":
        return create_expert(name, "random", input_size=96 if "convnext" not in name else None).eval()
    visual = open_clip.transformer.VisionTransformer(32, 8, 32, 2, 2, 4.0, output_dim=24)
    backbone = OpenClipTransformer(visual, 24, 32, (0.5,) * 3, (0.5,) * 3)
    return Expert(backbone, resolve_spec("open_clip:ViT-B-32")).eval()


def pixels_of(expert: Expert) -> torch.Tensor:
    return prepare(smooth_picture(3), *expert.preprocessing.key)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("timm:test_vit", CLASS_TOKEN), ("tiny_siglip", POOLING), ("timm:test_vit3", POOLING)],
)
def test_the_map_is_the_attention_that_the_last_query_pays(name, kind, monkeypatch):
    expert, weights = expert_of(name), []

    def recorded(query, key, value, **_):
        weights.append((query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1))
        return weights[-1] @ value

    monkeypatch.setattr(functional, "scaled_dot_product_attention", recorded)
    found = token_map(expert, pixels_of(expert))
    expected = weights[-1][0, :, 0].mean(0)[-36:]
    assert found.kind == kind and found.values.shape == (6, 6)
    torch.testing.assert_close(found.values.flatten(), expected, rtol=1e-4, atol=1e-6)


def test_open_clips_class_token_pays_all_of_its_attention():
    expert = expert_of("open_clip")
    found, shares = token_map(expert, pixels_of(expert)), []
    last = expert.backbone.visual.transformer.resblocks[-1]
    last.ln_1.register_forward_hook(lambda _, inputs, output: shares.append(last.attn(*[output] * 3)[1]))
    expert(pixels_of(expert)[None])
    assert found.kind == CLASS_TOKEN and found.values.shape == (4, 4)
    torch.testing.assert_close(found.values.flatten(), shares[0][0, 0, 1:])


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("timm:test_vit", "mean_tokens"),
        ("timm:test_vit", "class+mean:3,6"),
        ("tiny_siglip", "pool+mean"),
        ("timm:test_convnext", "mean+std:all"),
    ],
)
def test_with_a_linear_head_the_map_of_a_mean_averages_to_the_logit(name, feature):
    torch.manual_seed(0)
    size = {"timm:test_convnext": 64, "timm:test_vit": 64}.get(name)
    expert = create_expert(name, "random", feature=feature, input_size=size, head_hidden=0).eval()
    found = token_map(expert, pixels_of(expert))
    tokens = expert.encode(pixels_of(expert)[None]).tokens[0]
    assert found.kind == LOGIT and found.values.numel() == tokens.shape[1]
    assert found.values.mean().item() == pytest.approx(found.logit, abs=1e-5)
    assert found.values.std() > 0 and found.logit == pytest.approx(expert(pixels_of(expert)[None]).item())


def test_of_several_class_tokens_the_last_block_that_is_read_shows_its_attention():
    torch.manual_seed(0)
    expert = create_expert("timm:test_vit", "random", feature="layers:2,4", input_size=64).eval()
    pooled = create_expert("timm:test_vit", "random", input_size=64).eval()
    pooled.backbone.load_state_dict(expert.backbone.state_dict())
    pooled.backbone.model.blocks = pooled.backbone.model.blocks[:4]
    found, expected = (token_map(one, pixels_of(expert)) for one in (expert, pooled))
    assert found.kind == expected.kind == CLASS_TOKEN
    torch.testing.assert_close(found.values, expected.values)


@pytest.mark.parametrize(
    ("name", "feature"), [("timm:test_vit3", "registers"), ("timm:test_convnext", "pool+std:2")]
)
def test_features_without_mean_and_class_token_show_the_norm_of_tokens(name, feature):
    expert = create_expert(name, "random", feature=feature, input_size=64).eval()
    assert token_map(expert, pixels_of(expert)).kind == NORM


@pytest.mark.parametrize(
    "name", ["timm:test_convnext", "timm:test_efficientnet", "timm:test_vit2", "timm:test_resnet"]
)
def test_an_image_of_one_token_throughout_has_that_logit(name):
    expert = expert_of(name)
    model, pixels = expert.backbone.model, pixels_of(expert)
    found = token_map(expert, pixels)
    with torch.no_grad():
        tokens = expert.encode(pixels[None]).tokens[0][0]
        side = round(len(tokens) ** 0.5)
        assert found.kind == LOGIT and found.values.shape == (side, side)
        for place in (0, len(tokens) - 1):
            alike = tokens[place].expand(len(tokens), -1)
            features = alike.T.reshape(1, -1, side, side)
            if hasattr(model, "blocks") and model.__class__.__name__ == "VisionTransformer":
                features = torch.cat([alike[:1], alike])[None]
            logit = expert.head(model.forward_head(features, pre_logits=True))
            assert found.values.flatten()[place].item() == pytest.approx(logit.item(), abs=1e-5)


def test_the_mean_of_a_linear_heads_map_is_the_logit():
    expert = create_expert("timm:test_efficientnet", "random", input_size=96, head_hidden=0).eval()
    found = token_map(expert, pixels_of(expert))
    assert found.values.mean().item() == pytest.approx(found.logit, abs=1e-5)


def test_other_poolings_show_the_norm_of_the_tokens():
    expert = expert_of("timm:test_vit")
    expert.backbone.model.global_pool = "max"
    found = token_map(expert, pixels_of(expert))
    tokens = expert.encode(pixels_of(expert)[None]).tokens[0][0]
    assert found.kind == NORM
    torch.testing.assert_close(found.values.flatten(), tokens.norm(dim=1))


def test_an_explanation_has_the_input_its_texture_and_the_mask_of_training():
    expert, image = expert_of("timm:test_vit"), smooth_picture(5, 120, 150)
    options = Masking(mask="smooth", mask_ratio=0.25, mask_score="sobel")
    found = explain(expert, image, options)
    pixels = prepare(image, *expert.preprocessing.key)
    assert np.array_equal(found["image"], pixels.permute(1, 2, 0))
    assert np.array_equal(found["texture"].ravel(), texture_scores(pixels[None], 16, "sobel")[0])
    masking = PatchMasking(expert, options)
    assert np.array_equal(found["mask"].ravel(), masking.mask(pixels[None])[0])
    painted, _ = masking({"images": pixels[None]})
    assert np.array_equal(found["masked"], painted[0].permute(1, 2, 0))
    logit = expert(pixels[None]).item()
    assert found["logit"] == pytest.approx(logit, abs=1e-6)
    assert found["probability"] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-6)
    one, other = (explain(expert, image, Masking(mask="random"), seed)["mask"] for seed in (0, 1))
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("kind", [CLASS_TOKEN, LOGIT])
def test_an_overlay_colors_the_part_of_the_image_behind_each_token(kind):
    values = np.array([[-1, 0, 2], [0, 0, 0]], dtype=np.float32)
    found = {"image": np.full((12, 12, 3), 100, np.uint8), "map": values, "map_kind": kind}
    painted = overlay(found).reshape(2, 6, 3, 4, 3).swapaxes(1, 2)
    assert (painted == painted[:, :, :1, :1]).all()
    colors = painted[:, :, 0, 0].astype(int)
    assert (colors[1] == colors[0, 1]).all() and (colors[0, 0] != colors[0, 2]).any()
    red_over_blue = colors[..., 0] - colors[..., 2]
    if kind == LOGIT:
        assert red_over_blue[0, 0] < -50 < 50 < red_over_blue[0, 2] and abs(red_over_blue[1, 0]) < 5
    # What is below stays visible: 0.3 of a step of 100.
    brighter = overlay(found | {"image": np.full((12, 12, 3), 200, np.uint8)}).astype(int)
    assert (brighter - overlay(found) == 30).all()


def test_the_command_writes_a_picture_and_the_same_bytes_again(tmp_path, capsys):
    save_expert(expert_of("tiny_clip"), tmp_path / "expert", {"recipe": {"name": "mine"}})
    Image.fromarray(smooth_picture(1)).save(tmp_path / "photo.png")
    flags = [str(tmp_path / "photo.png"), "--expert", str(tmp_path / "expert"), "--mask", "random"]
    for name in ("one.png", "two.png"):
        main(["explain", *flags, "--out", str(tmp_path / name)])
    assert "attention of the class token" in capsys.readouterr().out
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    width, height = Image.open(tmp_path / "one.png").size
    assert width > 3 * height / 1.5 and height > 300


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"$a_$b.png"])
def test_an_image_may_have_any_name(name, tmp_path, capsys):
    save_expert(expert_of("tiny_siglip"), tmp_path / "expert")
    path = tmp_path / os.fsdecode(name)
    Image.fromarray(smooth_picture(1)).save(path)
    main(["explain", str(path), "--expert", str(tmp_path / "expert"), "--out", str(tmp_path / "out.png")])
    assert (tmp_path / "out.png").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["none.png"], r"cannot read .*none\.png"),
        (["photo.png", "--mask-ratio", "1.5"], "--mask-ratio: must be from 0 to 1, not 1.5"),
        (["photo.png", "--mask", "textur"], "invalid choice: 'textur'"),
        (["photo.png", "--seed", "-1"], "--seed: must be 0 or more, not -1"),
        (["photo.png", "--out", "out.jpg"], r"--out: must be the name of a \.png file, not out\.jpg"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, flags, message):
    save_expert(expert_of("tiny_siglip"), tmp_path / "expert")
    Image.fromarray(smooth_picture(1)).save(tmp_path / "photo.png")
    flags = [str(tmp_path / flags[0]), *flags[1:], "--expert", str(tmp_path / "expert")]
    with pytest.raises(UserError, match=message):
        main(["explain", "--out", str(tmp_path / "out.png"), *flags])
    assert not (tmp_path / "out.png").exists()
