"""The engine, test-time augmentation, and the numbers that experts compute with."""

import io
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import smooth_picture
from PIL import Image
from torch import nn

from featdistill.command_line import UserError
from featdistill.data.loading import Joined, ScoreDataset
from featdistill.data.preprocessing import fit, prepare
from featdistill.data.views import View, cut_view, cut_views, parse_tta
from featdistill.distortions.official import OFFICIAL
from featdistill.distortions.plan import Step, apply_plan
from featdistill.images.reading import read_image
from featdistill.inference.compute import (
    automatic_batch_size,
    cast,
    compile_experts,
    full_memory_is_an_error,
    largest_batch,
    set_up_compiler,
)
from featdistill.inference.float8 import E4M3, Float8Linear, quantize, with_float8
from featdistill.inference.scoring import score, score_all, score_dataset
from featdistill.models.backbones import BackboneSpec, build
from featdistill.models.expert import Expert, create_expert
from featdistill.records.manifest import read_manifest


@pytest.fixture(scope="module")
def experts():
    found = []
    for seed, (backbone, size) in enumerate([("tiny_clip", 48), ("tiny_siglip", 32), ("tiny_clip", 48)]):
        torch.manual_seed(seed)
        found.append(create_expert(backbone, "random", input_size=size, head_hidden=8).eval())
    return found


def logits_of(batches) -> np.ndarray:
    return np.concatenate([batch.logits for batch in batches], axis=1)


def test_scores_are_those_of_each_expert_on_its_own_batches(make_set, experts):
    rows = read_manifest(make_set("val", 7))
    found = list(score(experts, rows, batch_size=3))
    assert [batch.rows for batch in found] == [[0, 1, 2], [3, 4, 5], [6]]
    for batch in found:
        for expert, logits in zip(experts, batch.logits, strict=True):
            images = [
                prepare(read_image(rows["image"][row]), *expert.preprocessing.key) for row in batch.rows
            ]
            with torch.inference_mode():
                assert np.array_equal(expert(torch.stack(images)).numpy(), logits)
    some = list(score(experts, rows, batch_size=3, batches=[2, 0], workers=1))
    assert [batch.number for batch in some] == [2, 0]
    assert np.array_equal(some[1].logits, found[0].logits)


def test_sets_that_are_scored_together_have_the_scores_of_each(make_set, experts):
    manifests = [make_set("one", 7), make_set("two", 5, first=20)]
    Path(read_manifest(manifests[1])["image"][3]).write_bytes(b"broken")
    keys = [expert.preprocessing.key for expert in experts]
    one, two = map(read_manifest, manifests)
    sets = [ScoreDataset(rows, keys) for rows in (one, one[:0], two)]
    alone = [score_all(experts, dataset, batch_size=3) for dataset in sets]
    lengths = list(map(len, sets))
    logits, broken = score_all(experts, Joined(sets), batch_size=3, lengths=lengths, workers=1)
    assert np.array_equal(logits, np.concatenate([part for part, _ in alone], axis=1), equal_nan=True)
    assert broken == {7 + row: reason for row, reason in alone[2][1].items()} and list(broken) == [10]


def test_what_an_image_scores_does_not_depend_on_whether_its_neighbors_can_be_read(make_set, experts):
    manifest = make_set("val", 9)
    rows = read_manifest(manifest)
    whole = logits_of(score(experts, rows, batch_size=4))
    for name in ("00000.jpg", "00002.jpg", "00008.jpg"):
        (manifest.parent / name).write_text("no image")
    found = list(score(experts, rows, batch_size=4))
    assert [[item.index for item in batch.broken] for batch in found] == [[0, 2], [], [8]]
    assert [batch.rows for batch in found] == [[1, 3], [4, 5, 6, 7], []]
    assert np.array_equal(logits_of(found), whole[:, [1, 3, 4, 5, 6, 7]])


class Recorder(nn.Module):
    """Stands for a compiled expert: gives the mean of each image and keeps the shapes it saw."""

    def __init__(self, expert) -> None:
        super().__init__()
        self.preprocessing, self.shapes = expert.preprocessing, []

    def forward(self, images):
        self.shapes.append(tuple(images.shape))
        return images.float().mean((1, 2, 3))


def test_full_batches_have_one_shape_and_the_same_rows(make_set, experts):
    manifest = make_set("val", 7)
    (manifest.parent / "00001.jpg").unlink()
    rows = read_manifest(manifest)
    dataset, recorder = ScoreDataset(rows, [(48, "shorter")]), Recorder(experts[0])
    found = list(score_dataset([recorder], dataset, batch_size=4, full_batches=True))
    assert recorder.shapes == [(4, 3, 48, 48)] * 2 and [batch.rows for batch in found] == [
        [0, 2, 3],
        [4, 5, 6],
    ]
    expected = [dataset[row]["images"][48, "shorter"].float().mean() for row in (0, 2, 3, 4, 5, 6)]
    np.testing.assert_allclose(logits_of(found)[0], expected, rtol=1e-6)


def test_views_are_averaged_expert_by_expert_on_their_logits(make_set, experts):
    rows = read_manifest(make_set("val", 3))
    name, views = parse_tta("five_crop+hflip")
    assert name == "hflip+five_crop" and len(views) == 10 and len(set(views)) == 10
    keys = [expert.preprocessing.key for expert in experts]
    dataset = ScoreDataset(rows, keys, views=views)
    found = logits_of(score_dataset(experts, dataset, batch_size=3, views=views))
    for expert, logits in zip(experts, found, strict=True):
        single = []
        for view in views:
            pixels = [
                cut_view(read_image(path), *expert.preprocessing.key, view=view) for path in rows["image"]
            ]
            pixels = torch.stack(pixels)
            with torch.inference_mode():
                single.append(expert(pixels.flip(3) if view.mirrored else pixels).numpy())
        np.testing.assert_allclose(logits, np.mean(single, axis=0), rtol=1e-5, atol=1e-6)
    # Mirroring alone needs no other pixels than the plain view.
    hflip = parse_tta("hflip")[1]
    assert (
        list(ScoreDataset(rows, keys, views=hflip)[0]["images"]) == list(dict.fromkeys(keys))
        and len(hflip) == 2
    )
    assert parse_tta("none") == ("none", (View(),)) and len(parse_tta("scales")[1]) == 3


def test_each_crop_of_five_shows_its_own_corner():
    image = np.zeros((60, 96, 3), np.uint8)
    for place, (rows, columns) in enumerate([(s, t) for s in (0, 52) for t in (0, 88)]):
        image[rows : rows + 8, columns : columns + 8, place % 3] = 250 - place // 3 * 100
    corners = parse_tta("five_crop")[1]
    for resize in ("shorter", "squash", "crop"):
        cuts = [cut_view(image, 32, resize, view=view).numpy() for view in corners]
        assert all(cut.shape == (3, 32, 32) and cut.dtype == np.uint8 for cut in cuts)
        for place, (row, column) in enumerate([(s, t) for s in (1, 30) for t in (1, 30)]):
            assert cuts[place][place % 3, row, column] > 100 and cuts[4][:, row, column].max() < 20
    # Corners together show all of the shorter side, the center alone 7 / 8 of it.
    ramp = np.repeat(np.arange(224, dtype=np.uint8)[:, None, None], 224, 1).repeat(3, 2)
    top, center = (cut_view(ramp, 224, "shorter", view=corners[place])[0, :, 0].numpy() for place in (0, 4))
    assert top[0] == 0 and abs(int(top[-1]) - 195) <= 1 and abs(int(center[0]) - 14) <= 1


def test_scales_show_more_or_less_of_the_image_and_reflect_what_lies_beyond():
    image = smooth_picture(3, 80, 80)
    plain, small, large = parse_tta("scales")[1]
    assert torch.equal(cut_view(image, 64, "shorter", view=plain), prepare(image, 64, "shorter"))
    wide = cut_view(image, 80, "shorter", view=small).numpy().transpose(1, 2, 0)
    inner = cv2.resize(image, (68, 68), interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(wide[6:74, 6:74].astype(int) - inner).mean() < 4
    border = np.abs(wide[:6].astype(int) - wide[7:13][::-1].astype(int)).mean()
    assert border < 6 < np.abs(wide[:6].astype(int) - wide[40:46].astype(int)).mean()
    near = cut_view(image, 64, "shorter", view=large).numpy().transpose(1, 2, 0)
    window = np.ascontiguousarray(image[5:75, 5:75])
    assert np.array_equal(near, fit(window, 64, "squash"))
    for shape in ((1, 400), (3, 2), (17, 300)):
        for resize in ("shorter", "squash", "crop"):
            picture = smooth_picture(1, *shape)
            for view in parse_tta("scales+five_crop")[1]:
                assert cut_view(picture, 32, resize, view=view).shape == (3, 32, 32)


def test_degraded_views_are_the_input_blurred_or_in_jpeg():
    image = smooth_picture(3, 90, 70)
    for name, expected in (("blur", OFFICIAL["gausblur"]), ("jpeg", None)):
        canonical, (plain, view) = parse_tta(name)
        assert canonical == name and plain == View()
        for key in ((48, "shorter"), (48, "squash"), (48, "crop"), (48, "shorter", 60)):
            square = fit(image, *key)
            seen = cut_view(image, *key, view=view).numpy().transpose(1, 2, 0)
            assert seen.shape == square.shape and not np.array_equal(seen, square)
            if expected:
                # The official blur of level 3 has sigma 1 too, cut off at 2 instead of 3 sigma.
                blurred = expected(square, 3, np.random.default_rng(0))
                assert np.abs(seen.astype(int) - blurred).max() <= 3
            else:
                buffer = io.BytesIO()
                Image.fromarray(square).save(buffer, "JPEG", quality=75)
                assert np.abs(seen.astype(int) - np.asarray(Image.open(buffer)).astype(int)).max() <= 2
            assert np.array_equal(cut_view(image, *key, view=view).numpy().transpose(1, 2, 0), seen)


def test_the_eight_views_of_rapid():
    name, views = parse_tta("rapid")
    assert name == "rapid" and len(set(views)) == 8
    assert sum(view.mirrored for view in views) == 1 and View() in views
    assert {view.scale for view in views} == {1, 0.85, 1.15, 256 / 224}
    assert [view.degraded for view in views if view.degraded] == ["blur", "jpeg"]
    assert [(view.top, view.left) for view in views if view.scale == 256 / 224] == [(0, 0), (1, 1)]
    # Views that several names share are not counted twice.
    assert parse_tta("rapid+scales+blur") == ("scales+blur+rapid", parse_tta("scales+blur+rapid")[1])
    assert set(parse_tta("rapid+scales+blur")[1]) == set(views)
    mirrored = parse_tta("hflip+rapid")[1]
    assert (
        len(mirrored) == 14
        and {view._replace(mirrored=False) for view in mirrored} <= {*views}
        and sum(view.mirrored for view in mirrored) == 7
    )
    # Seven inputs serve all eight.
    assert len(cut_views(smooth_picture(0, 60, 60), [(32, "squash")], views)) == 7


@pytest.mark.parametrize("backbone", ["tiny_clip", "tiny_siglip", "timm:test_vit", "timm:test_efficientnet"])
def test_cast_experts_stay_near_and_their_scores_do_not_tie(backbone):
    torch.manual_seed(0)
    expert = create_expert(backbone, "random", input_size=64, head_hidden=32).eval()
    images = torch.stack([prepare(smooth_picture(seed), 64, "shorter") for seed in range(24)])
    with torch.inference_mode():
        exact = expert(images)
        cast(expert, "bf16")
        found = expert(images)
    assert {p.dtype for p in expert.backbone.parameters()} == {torch.bfloat16}
    assert {expert.mean.dtype, expert.std.dtype, expert.head[0].weight.dtype} == {torch.float32}
    assert found.dtype == torch.float32 and (found - exact).abs().max() < 0.05 * exact.abs().max()
    assert not torch.equal(found, found.bfloat16().float())


def test_rows_are_quantized_each_by_its_own_scale():
    values = (
        torch.randn(6, 32, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-3, 3)[:, None]
    )
    values[2] = 0
    quantized, scale = quantize(values)
    assert quantized.dtype == E4M3 and scale.shape == (6, 1) and torch.isfinite(quantized.float()).all()
    error = (quantized.float() * scale - values).abs()
    # Three bits of mantissa: half a step is 1/16; below the smallest normal number the step stays the same.
    assert (error <= torch.maximum(values.abs() / 16, scale * 2**-10) * 1.001).all()
    assert torch.equal(quantized[2].float(), torch.zeros(32))


def test_an_8_bit_layer_is_the_product_of_what_was_quantized():
    torch.manual_seed(0)
    linear, values = nn.Linear(32, 48), torch.randn(2, 5, 32)
    try:
        found = Float8Linear(linear)(values)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this PyTorch has no 8-bit products on a CPU: {error}")
    (rows, row_scale), (weight, weight_scale) = (
        quantize(values.flatten(0, 1)),
        quantize(linear.weight.detach()),
    )
    expected = (rows.float() * row_scale) @ (weight.float() * weight_scale).T + linear.bias.detach()
    assert found.shape == (2, 5, 48) and found.dtype == torch.bfloat16
    torch.testing.assert_close(found.flatten(0, 1).float(), expected, rtol=0.01, atol=0.02)
    torch.testing.assert_close(found.float(), linear(values).detach(), rtol=0.1, atol=0.15)


def test_only_linear_layers_of_blocks_with_fitting_sides_become_8_bit(experts):
    expert = cast(create_expert("tiny_clip", "random", input_size=48, head_hidden=8).eval(), "bf16")
    quantized = with_float8(expert)
    names = {name for name, module in quantized.named_modules() if isinstance(module, Float8Linear)}
    ends = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert names == {f"backbone.model.blocks.{layer}.{end}" for layer in range(2) for end in ends}
    assert not any(isinstance(module, Float8Linear) for module in expert.modules())
    assert type(quantized.backbone.model.head) is nn.Linear


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("beit_base_patch16_224", 224, {"embed_dim": 48, "depth": 1, "num_heads": 3}),
        ("eva_giant_patch14_224", 224, {"embed_dim": 48, "depth": 1, "num_heads": 3, "mlp_ratio": 2.0}),
        ("swinv2_tiny_window8_256", 256, {"embed_dim": 16, "depths": (1,), "num_heads": (1,)}),
    ],
)
def test_layers_whose_weight_is_read_without_calling_them_stay_as_they_are(name, size, options):
    spec = BackboneSpec("timm", name, options=options, input_size=size)
    expert = cast(Expert(build(spec), spec, head_hidden=8).eval(), "bf16")
    quantized = with_float8(expert)
    kinds = {name: type(module) for name, module in quantized.named_modules()}
    assert {kind for name, kind in kinds.items() if name.endswith("attn.qkv")} == {nn.Linear}
    ends = ("attn.proj", "mlp.fc1", "mlp.fc2")
    assert {kind for name, kind in kinds.items() if name.endswith(ends)} == {Float8Linear}
    images = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
    with torch.inference_mode():
        try:
            logit = quantized(images)
        except (RuntimeError, NotImplementedError) as error:
            pytest.skip(f"this PyTorch has no 8-bit products on a CPU: {error}")
        torch.testing.assert_close(logit, expert(images), rtol=0, atol=0.05)


def test_a_batch_fills_the_share_of_the_memory_but_no_more_than_needed():
    sizes = [largest_batch(fits) for fits in (0.5, 8, 15.9, 16, 100, 128, 1e6)]
    assert sizes == [8, 8, 8, 16, 64, 128, 128]
    assert automatic_batch_size([], torch.device("cpu")) == 32


def test_compiled_experts_are_run_once_at_the_batch_size(experts, monkeypatch, tmp_path):
    made = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(torch, "compile", lambda expert, **_: made.append(Recorder(expert)) or made[-1])
    compiled = compile_experts(experts, 5, torch.device("cpu"))
    assert compiled == made and [one.shapes for one in made] == [
        [(5, 3, 48, 48)],
        [(5, 3, 32, 32)],
        [(5, 3, 48, 48)],
    ]
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "featdistill" / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compile_experts(experts, 5, torch.device("cpu"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)


def test_on_hopper_compiled_code_is_kept_apart_from_that_with_other_attention(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    before = torch.compiler.config.cache_key_tag
    with torch.compiler.config.patch(cache_key_tag=before):
        for capability, is_ours in (((8, 0), False), ((9, 0), True)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
            set_up_compiler(torch.device("cuda"))
            assert (torch.compiler.config.cache_key_tag != before) == is_ours


def test_a_full_gpu_is_an_error_that_says_what_to_do():
    with pytest.raises(UserError, match="smaller --batch-size"), full_memory_is_an_error():
        raise torch.OutOfMemoryError


def test_the_views_of_redelivery_are_the_whole_image_as_it_arrives():
    name, views = parse_tta("redelivery")
    assert name == "redelivery" and len({view.delivery for view in views}) == len(views) == 6
    image, key = smooth_picture(2, 90, 130), (48, "shorter")
    cuts = cut_views(image, [key, (40, "squash")], views)
    assert len(cuts) == 12 and len({cut.numpy().tobytes() for cut in cuts.values()}) == 12
    (jpeg,) = (view for view in views if view.delivery == "resaved_jpeg4")
    arrived = apply_plan(image, (Step("redelivery", "resaved_jpeg", 4, 0),))
    assert torch.equal(cuts[jpeg.key(key)], prepare(arrived, *key))
    # An image that is too small for the operations is seen as it is.
    strip = smooth_picture(2, 9, 60)
    assert torch.equal(cut_view(strip, *key, view=jpeg), prepare(strip, *key))
