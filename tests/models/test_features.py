"""Features: any part of any layer from one forward pass, equal to what is computed by hand."""

import json

import numpy as np
import open_clip
import pytest
import torch

from featdistill.command_line import UserError
from featdistill.models.backbones import build, resolve_spec
from featdistill.models.encoders import Backbone, BackboneSpec
from featdistill.models.expert import create_expert, load_expert, save_expert
from featdistill.models.features import (
    Atom,
    FisherSums,
    fisher_scores,
    layout,
    parse,
    parse_atom,
    read_atoms,
    top_positions,
)
from featdistill.models.open_clip_encoders import OpenClipTransformer


def images_for(backbone: Backbone, count: int = 2) -> torch.Tensor:
    size = backbone.input_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def open_clip_backbone() -> Backbone:
    torch.manual_seed(0)
    visual = open_clip.transformer.VisionTransformer(32, 8, 32, 3, 2, 4.0, output_dim=24)
    return OpenClipTransformer(visual, 24, 32, (0.5,) * 3, (0.5,) * 3).eval()


def backbone_of(name: str) -> Backbone:
    if name == "open":
        return open_clip_backbone()
    torch.manual_seed(0)
    sizes = {"timm:test_vit": 64, "timm:test_vit3": 64, "timm:test_efficientnet": 64}
    return build(
        resolve_spec(name, sizes.get(name), "pool+projection" if name == "tiny_clip" else None)
    ).eval()


def by_hand(backbone: Backbone, images: torch.Tensor) -> list[torch.Tensor]:
    """Return all tokens after every block, the last ones after the final norm."""
    if isinstance(backbone, OpenClipTransformer):
        visual = backbone.visual
        hidden = visual.conv1(images).flatten(2).transpose(1, 2)
        first = visual.class_embedding.expand(len(images), 1, -1)
        hidden = visual.ln_pre(torch.cat([first, hidden], dim=1) + visual.positional_embedding)
        blocks, norm = visual.transformer.resblocks, visual.ln_post
    else:
        model = backbone.model
        hidden = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        blocks, norm = model.blocks, model.norm
    outputs = []
    for block in blocks:
        hidden = block(hidden)
        outputs.append(hidden)
    return [*outputs[:-1], norm(outputs[-1])]


@pytest.mark.parametrize("name", ["tiny_clip", "timm:test_vit", "open"])
@torch.no_grad()
def test_class_tokens_of_several_layers_equal_a_forward_pass_by_hand(name):
    backbone = backbone_of(name)
    images, depth = images_for(backbone), backbone.depth
    feature = parse(f"layers:{depth},1", backbone)
    expected = by_hand(backbone, images)
    found = feature.combine(read_atoms(backbone, images, feature.atoms))
    assert [atom.name for atom in feature.atoms] == [f"class-{depth}", "class-1"]
    torch.testing.assert_close(found, torch.cat([expected[-1][:, 0], expected[0][:, 0]], dim=1))
    assert found.shape == (2, feature.dim)


@torch.no_grad()
def test_parts_come_layer_by_layer_as_written_after_the_pooled_ones():
    backbone = backbone_of("tiny_clip")
    images = images_for(backbone)
    first, last = (tokens[:, 1:] for tokens in by_hand(backbone, images))
    feature = parse("std+mean+projection:1,2", backbone)
    found = feature.combine(read_atoms(backbone, images, feature.atoms))
    projection = backbone.model(images)
    parts = [projection, first.std(1, correction=0), first.mean(1), last.std(1, correction=0), last.mean(1)]
    torch.testing.assert_close(found, torch.cat(parts, dim=1))
    numbers = {atom: value.numpy() for atom, value in read_atoms(backbone, images, feature.atoms).items()}
    np.testing.assert_array_equal(feature.combine(numbers), found.numpy())


@torch.no_grad()
def test_registers_follow_the_class_token():
    backbone = build(resolve_spec("timm:vit_small_patch14_reg4_dinov2", 28)).eval()
    images = images_for(backbone)
    features = backbone.model.forward_features(images)
    feature = parse("class+registers+mean_tokens", backbone)
    expected = torch.cat([features[:, 0], features[:, 1:5].flatten(1), features[:, 5:].mean(1)], dim=1)
    found = feature.combine(read_atoms(backbone, images, feature.atoms))
    torch.testing.assert_close(found, expected)
    assert feature.dim == 6 * 384


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_dinov3", "beit_base_patch16_224", "eva02_tiny_patch14_224"]
)
@torch.no_grad()
def test_blocks_that_add_positions_themselves_get_them(name):
    torch.manual_seed(0)
    sizes = {"depth": 4, "embed_dim": 48, "num_heads": 3}
    backbone = build(BackboneSpec("timm", name, options=sizes)).eval()
    images = images_for(backbone)
    depth, prefix = backbone.depth, backbone.class_tokens + backbone.register_tokens
    features, pairs = backbone.model.forward_intermediates(
        images, indices=[1, depth - 2], return_prefix_tokens=True, output_fmt="NLC"
    )
    reading = backbone.read(images, [2, depth - 1, depth])
    for number, (tokens, first) in zip((2, depth - 1), pairs, strict=True):
        layer = reading.layers[number]
        assert torch.equal(layer.tokens, tokens) and torch.equal(layer.prefix, first)
        resumed = backbone.resume(layer.hidden, number, [depth])
        torch.testing.assert_close(resumed.layers[depth].tokens, features[:, prefix:])
    assert torch.equal(reading.layers[depth].tokens, features[:, prefix:])


@pytest.mark.parametrize("name", ["tiny_siglip", "timm:test_vit", "timm:test_efficientnet", "open"])
@torch.no_grad()
def test_the_mean_is_that_of_the_tokens_that_stage_2_aligns(name):
    backbone = backbone_of(name)
    images = images_for(backbone)
    pooled, tokens = backbone.intermediates(images, 2)
    last = backbone.depth
    atoms = [Atom(backbone.kind), Atom("mean", last), Atom("mean", last - 1), Atom("tokens", last)]
    found = read_atoms(backbone, images, atoms)
    torch.testing.assert_close(found[atoms[0]], pooled)
    torch.testing.assert_close(found[atoms[1]], tokens[1].mean(dim=1))
    torch.testing.assert_close(found[atoms[2]], tokens[0].mean(dim=1))
    torch.testing.assert_close(found[atoms[3]], backbone(images)[1])


@torch.no_grad()
def test_every_stage_of_a_convolutional_network_is_read_at_once():
    backbone = backbone_of("timm:test_efficientnet")
    images = images_for(backbone)
    feature = parse("mean+std:all", backbone)
    found = feature.combine(read_atoms(backbone, images, feature.atoms))
    features, maps = backbone.model.forward_intermediates(images)
    maps = [*maps[:-1], features]
    expected = [part for one in maps for part in (one.mean((2, 3)), one.std((2, 3), correction=0))]
    torch.testing.assert_close(found, torch.cat(expected, dim=1))
    early = parse("mean:1,2", backbone)
    torch.testing.assert_close(
        early.combine(read_atoms(backbone, images, early.atoms)),
        torch.cat([maps[0].mean((2, 3)), maps[1].mean((2, 3))], dim=1),
    )


@pytest.mark.parametrize("name", ["tiny_clip", "timm:test_vit3", "open", "timm:test_efficientnet"])
@torch.no_grad()
def test_the_layout_is_that_of_a_real_forward_pass(name):
    backbone = backbone_of(name)
    facts, numbers = layout(backbone), range(1, backbone.depth + 1)
    reading = backbone.read(images_for(backbone), numbers, backbone.kinds)
    assert facts.pooled == {kind: value.shape[1] for kind, value in reading.pooled.items()}
    assert [(facts.tokens[n - 1], facts.widths[n - 1]) for n in numbers] == [
        tuple(reading.layers[n].tokens.shape[1:]) for n in numbers
    ]
    atoms = [Atom(kind, 2) for kind in ("mean", "std", "registers", "tokens")]
    atoms += [Atom("hidden", 2)] if facts.is_plain else []
    for atom, values in read_atoms(backbone, images_for(backbone), atoms).items():
        assert tuple(values.shape[1:]) == facts.shape(atom)


def test_top_tokens_finds_a_planted_token():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    tokens = rng.normal(size=(60, 16, 8)).astype(np.float32)
    tokens[:, 11] += labels[:, None]
    tokens[:, 3] += 0.5 * labels[:, None]
    scores = fisher_scores(tokens, labels)
    assert top_positions(scores, 1) == (11,) and top_positions(scores, 2) == (3, 11)
    one, other = tokens[labels == 1][:, 11], tokens[labels == 0][:, 11]
    expected = (one.mean(0) - other.mean(0)) ** 2 / (one.var(0) + other.var(0))
    assert scores[11] == pytest.approx(expected.mean(), rel=1e-5)
    sums = FisherSums()
    for start in range(0, 60, 7):
        sums.add(torch.from_numpy(tokens[start : start + 7]), torch.from_numpy(labels[start : start + 7]))
    np.testing.assert_allclose(sums.scores(), scores)
    with pytest.raises(UserError, match="both classes"):
        fisher_scores(tokens[:3], np.zeros(3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("meen", r"unknown part 'meen' \(did you mean mean\?\)"),
        ("class+class:1", "names a part twice"),
        ("mean:0", "0 is not a layer; the backbone has layers 1 to 6"),
        ("mean:1,1", "names a layer twice"),
        ("mean:", "nothing is not a layer"),
        ("registers", "has no registers; it has pool, class, mean, std, and 6 layers"),
        ("projection+mean", "has no projection"),
        ("pool:2", "pool has no layers; write pool"),
        ("top_tokens", "write top_tokens:K with the number of patch tokens, from 1 to 16"),
        ("top_tokens:17", "from 1 to 16"),
    ],
)
def test_a_feature_that_the_backbone_lacks_is_one_clear_error(text, message):
    with torch.device("meta"):
        backbone = build(resolve_spec("timm:test_vit", 64))
    with pytest.raises(UserError, match=message.replace("+", r"\+")):
        parse(text, backbone)


def test_atoms_are_named():
    for atom in (Atom("pool"), Atom("mean", 12), Atom("hidden", 10)):
        assert parse_atom(atom.name) == atom
    for name in ("mean", "pool-1", "mean-0", "mean-x", "eye-1", "mean-"):
        with pytest.raises(UserError, match="unknown atom"):
            parse_atom(name)


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("tiny_clip", "pool+projection+std:1"),
        ("tiny_siglip", "mean_tokens"),
        ("timm:test_convnext", "mean:all"),
    ],
)
def test_an_expert_with_another_feature_is_saved_and_loaded(tmp_path, name, feature):
    torch.manual_seed(0)
    size = 64 if name.startswith("timm") else None
    expert = create_expert(name, "random", feature=feature, input_size=size, head_hidden=0).eval()
    side = expert.preprocessing.size
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    save_expert(expert, tmp_path / "expert")
    with torch.no_grad():
        encoded = expert.encode(images, 2)
        logit = load_expert(tmp_path / "expert")(images)
        again = read_atoms(expert.backbone, expert.normalized(images), expert.feature.atoms)
    assert encoded.feature.shape == (2, expert.feature_dim) and len(encoded.tokens) == 2
    torch.testing.assert_close(expert.feature.combine(again), encoded.feature)
    assert torch.equal(logit, encoded.logit)


def test_a_card_without_the_new_fields_has_the_same_scores(tmp_path):
    torch.manual_seed(0)
    expert = create_expert("tiny_clip", "random").eval()
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    save_expert(expert, tmp_path / "expert")
    card = json.loads((tmp_path / "expert" / "expert.json").read_text())
    assert list(card["backbone"]) == ["library", "name", "tag", "feature", "input_size", "options"]
    model = expert.backbone.model
    with torch.no_grad():
        # As experts were computed before features could be chosen.
        feature = model(
            ((images / 255 - expert.mean) / expert.std).contiguous(memory_format=torch.channels_last)
        )
        assert torch.equal(load_expert(tmp_path / "expert")(images), expert.head(feature)[:, 0])
