"""The authors' files: the reference outputs, the files' forms, what is refused, and the pixels they see."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from released_folders import clip_shapes, random_weights, siglip_shapes, write_manifest, write_release
from sklearn.datasets import load_sample_images
from torch import nn

from featdistill.command_line import UserError
from featdistill.data.preprocessing import prepare
from featdistill.models.backbones import BACKBONES, build
from featdistill.models.expert import load_expert, read_card
from featdistill.models.released import convert, read_released, read_spec, released_hashes
from featdistill.models.released_files import ReleasedTensors

TOWER = "vision_encoder.vision_model."
SHAPES = {"clip": clip_shapes, "siglip": siglip_shapes}


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    """The three images of the reference outputs."""
    china, flower = (np.array(image) for image in load_sample_images().images)
    return [china, flower, np.array(Image.fromarray(china).crop((100, 50, 333, 411)))]


def as_the_release(image: np.ndarray, size: int) -> np.ndarray:
    """Pillow's bicubic to the shorter side, and a crop whose place is rounded to the nearest even pixel."""
    height, width = (size * side // min(image.shape[:2]) for side in image.shape[:2])
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    top, left = round((height - size) / 2), round((width - size) / 2)
    return resized[top : top + size, left : left + size]


def probabilities(expert, images: list[np.ndarray]) -> torch.Tensor:
    with torch.inference_mode():
        return expert(torch.stack([torch.from_numpy(image.copy()) for image in images])).sigmoid()


def score(folder) -> torch.Tensor:
    """Logits of the only expert in a folder for two fixed images."""
    (expert,) = read_released(folder).values()
    images = torch.rand(2, 3, 28 + 4, 28 + 4, generator=torch.Generator().manual_seed(1))
    size = expert.preprocessing.size
    with torch.inference_mode():
        return expert(images[..., :size, :size])


@pytest.mark.parametrize("name", ["clip_tiny", "siglip_tiny"])
def test_the_reference_outputs_are_met_on_the_release_s_own_pixels(shared, photographs, name):
    expert = read_released(shared / "golden/released_experts")[name]
    expected = json.loads((shared / "golden/released_experts/expected.json").read_text())[name]
    assert expert.preprocessing.size == expected["input_size"] and not expert.training
    pixels = [as_the_release(image, expected["input_size"]) for image in photographs]
    found = probabilities(expert, [(image.transpose(2, 0, 1) / 255).astype(np.float32) for image in pixels])
    torch.testing.assert_close(found, torch.tensor(expected["p_ai"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["clip_tiny", "siglip_tiny"])
def test_the_reference_outputs_are_met_through_our_own_image_path(shared, photographs, name):
    expert = read_released(shared / "golden/released_experts")[name]
    expected = json.loads((shared / "golden/released_experts/expected.json").read_text())[name]
    pixels = [prepare(image, *expert.preprocessing.key).numpy() for image in photographs]
    found = probabilities(expert, pixels)
    torch.testing.assert_close(found, torch.tensor(expected["p_ai"]), atol=2e-3, rtol=0)


def difference(image: np.ndarray, size: int) -> np.ndarray:
    ours = prepare(image, size, "shorter").permute(1, 2, 0).numpy()
    return np.abs(ours.astype(int) - as_the_release(image, size))


@pytest.mark.parametrize("size", [28, 56, 96, 224, 384, 512])
def test_prepared_photographs_are_pillow_s_but_for_a_sample_in_a_hundred(photographs, size):
    for image in photographs:
        steps = difference(image, size)
        assert (steps > 0).mean() <= 0.01 and steps.max() <= 2


def test_prepared_images_of_the_pool_are_pillow_s_but_for_a_sample_in_a_hundred(shared):
    """Each one at the experts' sizes; the mean of them at 96 px, where flat areas can round the other way."""
    paths = sorted((shared / "pool").glob("*/*/*.jpg"))[::110]
    images = [np.array(Image.open(path).convert("RGB")) for path in paths]
    assert len(images) > 10
    for size, count, limit in (
        (16, 20, 0.01),
        (96, 20, 0.06),
        (224, 20, 0.01),
        (384, 9, 0.01),
        (1024, 3, 0.01),
    ):
        steps = [difference(image, size) for image in images[:count]]
        shares = [(step > 0).mean() for step in steps]
        assert max(shares) <= limit and np.mean(shares) <= 0.01, size
        assert max(step.max() for step in steps) <= 2, size


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(
    "form", ["model_state_dict", "no_vision_model", "position_ids", "half", "before_zip", "other_order"]
)
def test_a_file_in_another_form_has_the_same_logits(tmp_path, kind, form):
    state = random_weights(SHAPES[kind]())
    state = {key: value.half().float() for key, value in state.items()}
    expected = score(write_release(tmp_path / "plain", {"a.pth": state}, num_heads=4))
    content, options = state, {}
    if form == "model_state_dict":
        content = {"model_state_dict": state, "epoch": 3, "optimizer": {"state": {}}}
    elif form == "no_vision_model":
        content = {key.replace("vision_model.", ""): value for key, value in state.items()}
    elif form == "position_ids":
        content = state | {f"{TOWER}embeddings.position_ids": torch.arange(4)[None]}
    elif form == "half":
        content = {key: value.half() for key, value in state.items()}
    elif form == "other_order":
        content = dict(reversed(state.items()))
    else:
        options = {"_use_new_zipfile_serialization": False}
    folder = tmp_path / "other"
    folder.mkdir()
    torch.save(content, folder / "a.pth", **options)
    assert torch.equal(score(write_manifest(folder, num_heads=4)), expected)


def test_the_head_is_the_difference_of_the_two_classes(tmp_path):
    state = random_weights(clip_shapes())
    (expert,) = read_released(write_release(tmp_path, {"a.pth": state}, num_heads=4)).values()
    two = nn.Linear(256, 2)
    two.load_state_dict({"weight": state["classifier.3.weight"], "bias": state["classifier.3.bias"]})
    hidden = torch.rand(5, 256)
    torch.testing.assert_close(expert.head[3](hidden)[:, 0].sigmoid(), two(hidden).softmax(1)[:, 1])
    assert expert.head[2].p == 0.3 and [type(layer) for layer in expert.head][1:3] == [nn.ReLU, nn.Dropout]


FULL_SIZE = {
    "clip": (clip_shapes(1024, 4096, 24, 257, 768), BACKBONES["clip_l14"], 224),
    "siglip": (siglip_shapes(1152, 4304, 27, 729), BACKBONES["siglip_so400m"], 384),
}


@pytest.mark.parametrize("kind", FULL_SIZE)
def test_a_file_of_the_released_sizes_is_the_paper_s_backbone_and_nothing_else(tmp_path, kind):
    shapes, base, size = FULL_SIZE[kind]
    # Of an expanded tensor, a single number is stored.
    state = {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}
    write_release(tmp_path, {"a.pth": state})
    spec = read_spec(ReleasedTensors(tmp_path / "a.pth"))
    activation = {} if kind == "clip" else {"act_layer": "gelu_tanh"}
    assert spec == dataclasses.replace(base, input_size=size, options=base.options | activation)


@pytest.mark.parametrize("kind", FULL_SIZE)
def test_the_full_size_backbones_have_the_sizes_norms_and_activations_of_the_release(kind, tmp_path):
    shapes, _, size = FULL_SIZE[kind]
    state = {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}
    write_release(tmp_path, {"a.pth": state})
    with torch.device("meta"):
        backbone = build(read_spec(ReleasedTensors(tmp_path / "a.pth")))
    model = backbone.model
    width, heads, layers, mlp, eps, feature = {
        "clip": (1024, 16, 24, 4096, 1e-5, 768),
        "siglip": (1152, 16, 27, 4304, 1e-6, 1152),
    }[kind]
    assert (backbone.input_size, backbone.feature_dim, len(model.blocks)) == (size, feature, layers)
    assert model.patch_embed.proj.kernel_size == (14, 14)
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {eps} and len(norms) == 2 * layers + 2
    values = torch.linspace(-4, 4, 99)
    quick, tanh = values * torch.sigmoid(1.702 * values), nn.functional.gelu(values, approximate="tanh")
    pool = [model.attn_pool] if kind == "siglip" else []
    for block in [*model.blocks, *pool]:
        torch.testing.assert_close(block.mlp.act(values), quick if kind == "clip" else tanh)
        assert block.mlp.fc1.weight.shape == (mlp, width)
    assert {block.attn.num_heads for block in model.blocks} | {part.num_heads for part in pool} == {heads}
    half = (0.5, 0.5, 0.5)
    clip = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    assert (backbone.mean, backbone.std) == (clip if kind == "clip" else (half, half))


def test_heads_are_as_stated_else_of_64_channels_in_clip_and_16_in_siglip(tmp_path):
    write_release(tmp_path, {"clip.pth": random_weights(clip_shapes(128))}, num_heads=8)
    (stated,) = read_released(tmp_path).values()
    assert stated.backbone.model.blocks[1].attn.num_heads == 8
    torch.save(random_weights(siglip_shapes(64)), tmp_path / "siglip.pth")
    experts = read_released(write_manifest(tmp_path))
    heads = {name: expert.backbone.model.blocks[0].attn.num_heads for name, expert in experts.items()}
    assert heads == {"clip": 2, "siglip": 16}
    assert experts["siglip"].backbone.model.attn_pool.num_heads == 16


@pytest.mark.parametrize(("width", "hidden"), [(32, 100), (72, 269), (96, 287)])
def test_any_width_of_the_mlp_is_read(tmp_path, width, hidden):
    state = random_weights(siglip_shapes(width, hidden))
    (expert,) = read_released(write_release(tmp_path, {"a.pth": state}, num_heads=8)).values()
    assert expert.backbone.model.blocks[0].mlp.fc1.weight.shape == (hidden, width)


def test_released_experts_are_converted_once_and_load_as_they_were_read(tmp_path, capsys):
    contents = {f"Expert_{kind}.pth": random_weights(shapes()) for kind, shapes in SHAPES.items()}
    folder, out = write_release(tmp_path / "weights", contents, num_heads=4), tmp_path / "experts"
    convert(folder, out)
    hashes = released_hashes(folder)
    images = torch.rand(2, 3, 32, 32)
    for name, expert in read_released(folder).items():
        card = read_card(out / name)
        assert card["released"]["file"] == f"{name}.pth" and card["released"]["sha256"] == hashes[name]
        assert "no license" in card["released"]["licence"]
        size = expert.preprocessing.size
        loaded = load_expert(out / name)
        with torch.inference_mode():
            assert torch.equal(loaded(images[..., :size, :size]), expert(images[..., :size, :size]))
    assert "no license" in capsys.readouterr().out
    # Made of another file, one is made anew, and the other, whose file has not changed, is not read.
    before = {path: path.stat().st_ino for path in out.glob("*/*")}
    torch.save(random_weights(clip_shapes(depth=1)), folder / "Expert_clip.pth")
    write_manifest(folder, num_heads=4)
    convert(folder, out)
    kept = {path for path, inode in before.items() if path.stat().st_ino == inode}
    assert kept == set((out / "Expert_siglip").iterdir())
    assert len(load_expert(out / "Expert_clip").backbone.model.blocks) == 1


def test_an_expert_that_was_not_converted_is_not_overwritten(tmp_path):
    folder = write_release(tmp_path / "weights", {"a.pth": random_weights(clip_shapes())}, num_heads=4)
    (tmp_path / "experts/a").mkdir(parents=True)
    with pytest.raises(UserError, match="a exists and is not a converted expert"):
        convert(folder, tmp_path / "experts")
    assert list((tmp_path / "experts/a").iterdir()) == []


class Payload:
    def __reduce__(self):
        return (print, ("this must never run",))


def without(key):
    return lambda state: {name: value for name, value in state.items() if name != key}


def with_shape(key, *shape):
    return lambda state: state | {key: torch.zeros(shape)}


LAYER = f"{TOWER}encoder.layers.1"


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("clip", without(f"{LAYER}.mlp.fc2.bias"), f"lacks the key {LAYER}.mlp.fc2.bias"),
        ("clip", without(f"{TOWER}pre_layrnorm.weight"), f"lacks the key {TOWER}pre_layrnorm.weight"),
        (
            "clip",
            without("vision_encoder.visual_projection.weight"),
            "lacks the key vision_encoder.visual_projection.weight",
        ),
        ("siglip", without(f"{TOWER}head.probe"), f"lacks the key {TOWER}head.probe"),
        ("siglip", without("classifier.3.bias"), "lacks the key classifier.3.bias"),
        (
            "siglip",
            lambda state: {key: value for key, value in state.items() if "layers.0." not in key},
            f"lacks the key {TOWER}encoder.layers.0.layer_norm1.bias",
        ),
        ("clip", with_shape(f"{TOWER}head.probe", 1, 1, 32), f"has the key {TOWER}head.probe, which no such"),
        ("siglip", with_shape(f"{LAYER}.ls1.gamma", 32), f"has the key {LAYER}.ls1.gamma, which no such"),
        ("clip", with_shape("optimizer.step", 1), "has the key optimizer.step, which no released"),
        ("clip", with_shape("vision_encoder.classifier.0.bias", 256), "classifier.0.bias twice"),
        (
            "clip",
            with_shape(f"{LAYER}.self_attn.k_proj.weight", 32, 31),
            f"{LAYER}.self_attn.k_proj.weight is (32, 31), expected (32, 32)",
        ),
        (
            "clip",
            with_shape(f"{LAYER}.layer_norm1.bias", 33),
            f"{LAYER}.layer_norm1.bias is (33,), expected (32,)",
        ),
        (
            "siglip",
            with_shape(f"{TOWER}head.mlp.fc1.weight", 63, 32),
            f"{TOWER}head.mlp.fc1.weight is (63, 32), expected (64, 32)",
        ),
        (
            "siglip",
            with_shape(f"{TOWER}embeddings.patch_embedding.weight", 32, 3, 7, 14),
            f"{TOWER}embeddings.patch_embedding.weight is (32, 3, 7, 14), expected (32, 3, 14, 14)",
        ),
        (
            "siglip",
            with_shape(f"{TOWER}embeddings.position_embedding.weight", 5, 32),
            "position_embedding.weight is (5, 32), not a square of patches",
        ),
        ("clip", with_shape(f"{TOWER}embeddings.patch_embedding.weight", 32), "is (32,), expected 4 sides"),
        (
            "clip",
            with_shape("classifier.3.weight", 3, 256),
            "classifier.3.weight is (3, 256), expected (2, 256)",
        ),
        ("clip", with_shape("classifier.0.weight", 256, 32), "is (256, 32), expected (256, 24)"),
        ("clip", lambda state: state | {"classifier.0.bias": 1}, "classifier.0.bias is int, not a tensor"),
        (
            "clip",
            lambda state: state | {"classifier.0.bias": torch.zeros(256, dtype=torch.int64)},
            "classifier.0.bias is torch.int64, not a tensor of floating-point",
        ),
        ("clip", lambda state: random_weights(clip_shapes(24)), "24 channels do not divide into 5 heads"),
        (
            "clip",
            lambda state: {"classifier.0.bias": torch.zeros(256)},
            "its keys are neither CLIP's nor SigLIP's",
        ),
        ("clip", lambda state: list(state), "has no state dict"),
        ("clip", lambda state: {"model_state_dict": Payload()}, "is not a readable weights file"),
    ],
)
def test_a_file_that_holds_anything_else_is_one_clear_error(tmp_path, capsys, kind, damage, message):
    state = damage(random_weights(SHAPES[kind]()))
    heads = 5 if "5 heads" in message else 4
    write_release(tmp_path, {"a.pth": state}, num_heads=heads)
    with pytest.raises(UserError) as error:
        read_released(tmp_path)
    assert message in str(error.value) and str(tmp_path / "a.pth") in str(error.value)
    assert "never run" not in capsys.readouterr().out


def test_an_unclear_number_of_heads_is_requested(tmp_path):
    write_release(tmp_path, {"a.pth": random_weights(clip_shapes(96))})
    with pytest.raises(UserError, match=r"96 channels do not divide into 1\.5 heads; add num_heads"):
        read_released(tmp_path)


def edit(**changes):
    def change(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["a.pth"] |= changes
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return change


def rename(name):
    def change(folder):
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text.replace("a.pth", name))

    return change


def replace_text(text):
    return lambda folder: (folder / "manifest.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "it has no manifest.json"),
        (replace_text("{"), "is not readable JSON"),
        (replace_text('{"schema_version": 2, "files": {}}'), "schema_version 2; this version reads 1"),
        (replace_text("[]"), "must hold a JSON object"),
        (replace_text('{"schema_version": 1, "files": {}}'), "lists no files"),
        (rename("../a.pth"), "a name must be plain and end in .pth"),
        (rename("sub/a.pth"), "a name must be plain and end in .pth"),
        (rename(".."), "a name must be plain and end in .pth"),
        (rename("c:a.pth"), "a name must be plain and end in .pth"),
        (rename("b.pth"), "b.pth does not exist, but manifest.json lists it"),
        (edit(size_bytes=7), "bytes, manifest.json says 7"),
        (edit(size_bytes=None), "size_bytes of a.pth is None"),
        (edit(sha256="ab" * 32), f"manifest.json says {'ab' * 32}"),
        (edit(sha256="abc"), "sha256 of a.pth is 'abc'"),
        (edit(num_heads=0), "num_heads of a.pth is 0"),
        (lambda folder: (folder / "a.pth").write_bytes(b"short"), "a.pth has 5 bytes"),
    ],
)
def test_a_folder_that_differs_from_its_manifest_is_one_clear_error(tmp_path, damage, message):
    folder = write_release(tmp_path, {"a.pth": random_weights(clip_shapes())}, num_heads=4)
    damage(folder)
    with pytest.raises(UserError) as error:
        read_released(folder)
    assert message in str(error.value)


def test_a_file_of_the_right_size_and_another_byte_is_found_before_it_is_read(tmp_path, monkeypatch):
    folder = write_release(tmp_path, {"a.pth": random_weights(clip_shapes())}, num_heads=4)
    data = bytearray((folder / "a.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "a.pth").write_bytes(data)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(UserError, match=r"a\.pth has the SHA-256 .*, manifest\.json says .*; download"):
        read_released(folder)


def test_a_file_without_weights_is_one_clear_error(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"a\.pth is not a readable weights file"):
        read_released(write_manifest(tmp_path))
