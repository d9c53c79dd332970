import copy
import json

import numpy as np
import open_clip.transformer
import pytest
import torch
from conftest import set_maker
from torch import Tensor

import distill
import train
from featdistill.command_line import UserError
from featdistill.models.encoders import Backbone
from featdistill.models.expert import create_expert, load_expert
from featdistill.models.masking import (
    SCORES,
    PatchMasking,
    make_masking,
    masked_count,
    patch_order,
    texture_scores,
    uniforms,
)
from featdistill.models.open_clip_encoders import OpenClipTransformer
from featdistill.recipe_groups import Distillation, Masking, Objective
from featdistill.training.objectives import layers_alignment
from featdistill.training.tasks import ClassifyTask, DistillTask
from featdistill.training.teachers import FrozenTeacher

CLIP_GRAY = (123, 117, 104)  # CLIP's mean color, 0.4815, 0.4578 and 0.4082, in 8 bits
SMALL_STAGE_2 = ["--recipe", "demo_clip_a", "--batch-size", "8", "--epochs", "1", "--workers", "0"]
SMALL_STAGE_2 += ["--score-batch-size", "8", "--log-every", "1"]
SMALL = [*SMALL_STAGE_2, "--input-size", "32"]


def masking_of(expert, kind: str, seed: int = 0, **options) -> PatchMasking:
    """Masking with the given options of a recipe, without `mask_`."""
    return PatchMasking(
        expert, Masking(kind, **{f"mask_{key}": value for key, value in options.items()}), seed
    )


def random_images(count: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def batch_of(images: Tensor, epoch: int = 0, first: int = 0) -> dict[str, Tensor]:
    count = len(images)
    return {
        "images": images,
        "label": torch.arange(count) % 2.0,
        "epoch": torch.full((count,), epoch),
        "index": torch.arange(first, first + count),
    }


def places(count: int, epoch: int = 0, first: int = 0) -> tuple[Tensor, Tensor]:
    return torch.full((count,), epoch), torch.arange(first, first + count)


@pytest.fixture(scope="module")
def expert():
    """A plain vision transformer: 36 patches of 16 px, a class token, and no BatchNorm."""
    torch.manual_seed(0)
    return create_expert("timm:test_vit", "random", input_size=96, head_dropout=0.0).eval()


def slow_score(patch: np.ndarray, score: str) -> int:
    """The score of one channel of a patch (P, P), pixel by pixel."""
    rows, columns = patch.shape
    value = [[int(number) for number in row] for row in patch]
    total = 0
    if score == "variance":
        numbers = [number for row in value for number in row]
        count = len(numbers)
        return sum((count * number - sum(numbers)) ** 2 for number in numbers) // count
    for y in range(rows):
        for x in range(columns):
            if score == "differences":
                for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
                    if y + down < rows and 0 <= x + right < columns:
                        total += abs(value[y][x] - value[y + down][x + right])
            elif 0 < y < rows - 1 and 0 < x < columns - 1:
                weights = ((-1, 1), (0, 2), (1, 1))
                across = sum(w * (value[y + d][x + 1] - value[y + d][x - 1]) for d, w in weights)
                along = sum(w * (value[y + 1][x + d] - value[y - 1][x + d]) for d, w in weights)
                total += across**2 + along**2
    return total


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("patch_px", [5, 8])
def test_the_texture_score_equals_a_slow_plain_double_loop(score, patch_px):
    images = random_images(2, 3 * patch_px + 2)
    found = texture_scores(images, patch_px, score)
    assert found.shape == (2, 9) and found.dtype == torch.int64
    for image, scores in zip(images.numpy(), found.tolist(), strict=True):
        for place, expected in enumerate(scores):
            top, left = place // 3 * patch_px, place % 3 * patch_px
            patch = image[:, top : top + patch_px, left : left + patch_px]
            assert sum(slow_score(channel, score) for channel in patch) == expected


def test_the_score_of_a_checkerboard_is_known():
    board = (torch.tensor(np.indices((14, 14)).sum(0) % 2) * 10).to(torch.uint8).expand(1, 3, 14, 14)
    # 14 x 13 pairs each way differ by 10, and diagonal neighbors are equal.
    assert texture_scores(board, 14).item() == 3 * 2 * 14 * 13 * 10
    assert texture_scores(torch.full((1, 3, 28, 28), 200, dtype=torch.uint8), 14).tolist() == [[0] * 4]


def test_only_8_bit_images_have_a_texture():
    with pytest.raises(ValueError, match=r"on uint8 images, not on torch\.float32"):
        texture_scores(torch.rand(1, 3, 28, 28), 14)


@pytest.mark.parametrize("score", SCORES)
def test_at_half_the_noisy_half_is_masked_and_smooth_masks_the_other(expert, score):
    images = torch.full((3, 3, 96, 96), 90, dtype=torch.uint8)
    images[:, :, :, :48] = random_images(3, 96)[:, :, :, :48]
    noisy = (torch.arange(36) % 6 < 3).expand(3, -1)
    assert torch.equal(masking_of(expert, "texture", score=score).mask(images), noisy)
    assert torch.equal(masking_of(expert, "smooth", score=score).mask(images), ~noisy)


@pytest.mark.parametrize("select", ["top", "sample"])
def test_smooth_and_texture_are_complements_even_for_an_odd_number_of_patches(select):
    expert = create_expert("timm:test_vit", "random", input_size=80)
    options, images, where = {"select": select, "seed": 4}, random_images(4, 80), places(4)
    for ratio in (0.5, 0.25, 1 / 3):
        texture = masking_of(expert, "texture", ratio=1 - ratio, **options)
        smooth = masking_of(expert, "smooth", ratio=ratio, **options)
        assert torch.equal(smooth.mask(images, *where), ~texture.mask(images, *where))


@pytest.mark.parametrize("kind", ["texture", "smooth", "random"])
@pytest.mark.parametrize(("ratio", "count"), [(0.0, 0), (0.25, 9), (0.5, 18), (0.6, 22), (1.0, 35)])
def test_every_image_has_the_ratio_and_keeps_a_patch(expert, kind, ratio, count):
    masking = masking_of(expert, kind, ratio=ratio)
    mask = masking.mask(random_images(5, 96), *places(5))
    assert mask.sum(1).tolist() == [count] * 5 and masked_count(kind, ratio, 36) == count


def test_equal_patches_are_taken_from_the_top_left_on(expert):
    flat = torch.full((1, 3, 96, 96), 7, dtype=torch.uint8)
    mask = masking_of(expert, "texture", ratio=0.25).mask(flat)
    assert mask[0].nonzero()[:, 0].tolist() == list(range(9))


def test_draws_are_uniform_and_differ_by_seed_epoch_index_and_place():
    index = torch.arange(2000)
    found = uniforms(3, torch.zeros_like(index), index, 20)
    assert found.min() > 0 and found.max() < 1 and found.dtype == torch.float64
    assert found.mean().item() == pytest.approx(0.5, abs=0.006)
    counts = torch.histc(found.float(), bins=16, min=0, max=1)
    assert (counts / counts.mean() - 1).abs().max() < 0.08
    assert found.unique().numel() > 0.9999 * found.numel()
    # Neither neighboring images nor neighboring places go together.
    for one, other in ((found[1:], found[:-1]), (found[:, 1:], found[:, :-1])):
        assert abs(np.corrcoef(one.flatten(), other.flatten())[0, 1]) < 0.02
    for seed, epoch in ((4, 0), (3, 1)):
        changed = uniforms(seed, torch.full_like(index, epoch), index, 20)
        assert abs(np.corrcoef(found.flatten(), changed.flatten())[0, 1]) < 0.02


def test_a_sample_is_drawn_in_proportion_to_the_score():
    count = 6000
    draws = uniforms(0, torch.zeros(count, dtype=torch.int64), torch.arange(count), 3)
    order = patch_order(torch.tensor([[100, 300, 600]]).expand(count, -1), draws)
    first = torch.bincount(order[:, 0], minlength=3) / count
    assert first.tolist() == pytest.approx([0.1, 0.3, 0.6], abs=0.02)
    # Of those whose first was the last patch, the other two follow as 1 to 3.
    second = order[order[:, 0] == 2, 1]
    assert (second == 1).double().mean().item() == pytest.approx(0.75, abs=0.03)


def test_patches_without_texture_are_sampled_last_in_random_order():
    draws = uniforms(0, torch.zeros(400, dtype=torch.int64), torch.arange(400), 4)
    order = patch_order(torch.tensor([[0, 5, 0, 1]]).expand(400, -1), draws)
    assert set(order[:, 2].tolist()) == {0, 2}
    assert {tuple(pair) for pair in order[:, :2].tolist()} == {(1, 3), (3, 1)}


@pytest.mark.parametrize("options", [{"kind": "random"}, {"kind": "texture", "select": "sample"}])
def test_a_mask_is_a_function_of_seed_epoch_and_image_and_not_of_the_batch(expert, options):
    masking, images = masking_of(expert, seed=1, **options), random_images(6, 96)
    whole = masking.mask(images, *places(6))
    parts = [masking.mask(images[first : first + 2], *places(2, 0, first)) for first in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))
    for changed in (
        masking.mask(images, *places(6, epoch=1)),
        masking_of(expert, seed=2, **options).mask(images, *places(6)),
    ):
        assert (whole != changed).any(1).all()
    assert torch.equal(whole, masking.mask(images, *places(6)))


@pytest.mark.parametrize("kind", ["texture", "smooth", "random"])
@pytest.mark.parametrize("level", ["pixel", "token"])
def test_both_classes_are_masked_alike(expert, kind, level):
    batch = batch_of(random_images(8, 96))
    swapped = batch | {"label": 1 - batch["label"]}
    masking = masking_of(expert, kind, level=level, prob=0.5 if level == "pixel" else 1.0)
    for one, other in zip(masking(batch), masking(swapped), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_chance_does_not_tell_the_classes_apart(expert):
    batch = batch_of(torch.zeros(3000, 3, 96, 96, dtype=torch.uint8))
    masking = masking_of(expert, "random", prob=0.5)
    masked = masking.mask(*(batch[key] for key in ("images", "epoch", "index")))
    share = [masked[batch["label"] == label].float().mean().item() for label in (0, 1)]
    assert share == pytest.approx([0.25, 0.25], abs=0.02)


def test_pixels_are_painted_with_the_mean_color_exactly_where_the_mask_is():
    torch.manual_seed(0)
    tiny = create_expert("tiny_clip", "random", input_size=32)
    masking, images = masking_of(tiny, "texture"), random_images(3, 32)
    painted, keep = masking(batch_of(images))
    mask = masking.mask(images)
    assert keep is None and painted.dtype == torch.uint8
    gray = torch.tensor(CLIP_GRAY, dtype=torch.uint8)
    for image in range(3):
        for place in range(4):
            part = (slice(None), *(slice(16 * side, 16 * side + 16) for side in divmod(place, 2)))
            expected = gray[:, None, None].expand(3, 16, 16) if mask[image, place] else images[image][part]
            assert torch.equal(painted[image][part], expected)


def test_a_margin_without_a_whole_patch_is_never_masked():
    odd = create_expert("timm:test_convnext", "random", input_size=100)
    masking, images = masking_of(odd, "random", ratio=1.0), random_images(2, 100)
    painted, _ = masking(batch_of(images))
    assert masking.patch_px == 16
    assert torch.equal(painted[:, :, 96:], images[:, :, 96:])
    assert torch.equal(painted[:, :, :, 96:], images[:, :, :, 96:])
    assert (painted != images).any(1).sum((1, 2)).tolist() == pytest.approx([35 * 256] * 2, rel=0.01)


@pytest.mark.parametrize("kind", ["texture", "smooth", "random"])
def test_both_levels_see_the_same_patches(expert, kind):
    batch = batch_of(random_images(2, 96))
    painted, _ = masking_of(expert, kind)(batch)
    images, keep = masking_of(expert, kind, level="token")(batch)
    assert torch.equal(images, batch["images"]) and (keep.diff(dim=1) > 0).all()
    kept = torch.zeros(2, 36, dtype=torch.bool).scatter(1, keep, True)
    by_pixels = (painted != images).any(1).unflatten(2, (6, 16)).unflatten(1, (6, 16)).any(4).any(2)
    assert torch.equal(by_pixels.flatten(1), ~kept)
    # What the network sees is what is kept: its output depends on these pixels, and on no others.
    pixels = (images / 255).requires_grad_()
    expert.encode(pixels, keep=keep).logit.sum().backward()
    seen = (pixels.grad != 0).any(1).unflatten(2, (6, 16)).unflatten(1, (6, 16)).any(4).any(2)
    assert torch.equal(seen.flatten(1), kept)


def open_clip_backbone() -> Backbone:
    torch.manual_seed(0)
    visual = open_clip.transformer.VisionTransformer(32, 8, 32, 2, 2, 4.0, output_dim=24)
    return OpenClipTransformer(visual, 24, 32, (0.5,) * 3, (0.5,) * 3)


# A class token; the mean of tokens; attention pooling; no class token; open_clip's own transformer.
@pytest.mark.parametrize("name", ["timm:test_vit", "timm:test_vit2", "timm:test_vit3", "tiny_siglip", "open"])
def test_keeping_all_tokens_equals_the_plain_forward_pass_bit_for_bit(name):
    backbone = open_clip_backbone() if name == "open" else create_expert(name, "random").backbone
    backbone.eval()
    with torch.no_grad():
        images = torch.randn(2, 3, backbone.input_size, backbone.input_size)
        pooled, tokens = backbone.intermediates(images, 2)
        everything = torch.arange(backbone.grid**2).expand(2, -1)
        same, same_tokens = backbone.intermediates(images, 2, everything)
        plain = backbone(images)[0]
    assert backbone.drops_tokens and tokens[-1].shape[1] == backbone.grid**2
    assert torch.equal(pooled, same) and torch.equal(plain, same)
    assert all(torch.equal(one, other) for one, other in zip(tokens, same_tokens, strict=True))


@pytest.mark.parametrize("name", ["timm:test_vit", "timm:test_vit3", "open"])
def test_positions_stay_with_their_tokens(name):
    if name == "open":
        backbone = open_clip_backbone().eval()
        table, first = backbone.visual.positional_embedding, 1
    else:
        torch.manual_seed(0)
        backbone = create_expert(name, "random", input_size=96).backbone.eval()
        table, first = backbone.model.pos_embed[0], backbone.model.num_prefix_tokens
    grid, size = backbone.grid, backbone.input_size
    generator = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(grid**2, generator=generator) for _ in range(2)])
    images = torch.randn(2, 3, size, size, generator=generator)
    keep = order[:, : grid**2 // 2]
    with torch.no_grad():
        table[first:] += torch.randn(table[first:].shape, generator=generator)
        pooled, tokens = backbone.intermediates(images, 1, keep)
        # In another order, the same tokens come out in that order, and the feature stays: a transformer knows
        # a token's place by the position that was added to it alone.
        shuffle = torch.randperm(keep.shape[1], generator=generator)
        again, shuffled = backbone.intermediates(images, 1, keep[:, shuffle])
        torch.testing.assert_close(again, pooled, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(shuffled[0], tokens[0][:, shuffle], rtol=1e-4, atol=1e-4)
        # The positions of places that are left out do not matter; those that are kept do.
        only, out = backbone.intermediates(images[:1], 1, keep[:1]), order[0, grid**2 // 2 :]
        table[first + out] += torch.randn(table.shape[1], generator=generator)
        assert torch.equal(backbone.intermediates(images[:1], 1, keep[:1])[0], only[0])
        table[first + keep[0, 0]] += torch.randn(table.shape[1], generator=generator)
        assert not torch.allclose(backbone.intermediates(images[:1], 1, keep[:1])[0], only[0])


@pytest.mark.parametrize("level", ["pixel", "token"])
def test_nothing_is_masked_in_evaluation_mode(expert, level):
    batch = batch_of(random_images(4, 96))
    task = ClassifyTask(copy.deepcopy(expert), Objective(), masking_of(expert, "texture", level=level)).eval()
    with torch.no_grad():
        assert torch.equal(task(batch)["logit"], expert(batch["images"]))
        assert not torch.allclose(task.train()(batch)["logit"], expert(batch["images"]))
        assert torch.equal(task.evaluated.eval()(batch["images"]), expert(batch["images"]))


def test_without_masking_nothing_is_drawn_and_epochs_are_not_needed(expert):
    assert make_masking(expert, Masking(), 0) is None
    batch = batch_of(random_images(4, 96))
    state = torch.get_rng_state()
    output = ClassifyTask(copy.deepcopy(expert), Objective())(
        {key: batch[key] for key in ("images", "label")}
    )
    assert torch.equal(output["logit"], expert(batch["images"]))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("level", ["pixel", "token"])
def test_masking_the_most_textured_patches_is_deterministic(expert, level):
    state = torch.get_rng_state()
    masking_of(expert, "texture", level=level)({"images": random_images(2, 96)})
    assert torch.equal(torch.get_rng_state(), state)


def test_the_probability_is_an_images_at_pixels_and_a_forward_passs_at_tokens(expert):
    images = random_images(1, 96).expand(400, -1, -1, -1)
    painted = masking_of(expert, "random", prob=0.3)(batch_of(images))[0]
    share = (painted != images).flatten(1).any(1).double().mean().item()
    assert share == pytest.approx(0.3, abs=0.06)
    masking = masking_of(expert, "random", level="token", prob=0.3)
    torch.manual_seed(0)
    kept = [masking(batch_of(images[:2]))[1] for _ in range(300)]
    assert sum(keep is not None for keep in kept) / 300 == pytest.approx(0.3, abs=0.08)


def test_masking_adds_nothing_to_a_checkpoint(expert):
    plain, masked = (
        ClassifyTask(expert, Objective()),
        ClassifyTask(expert, Objective(), masking_of(expert, "random")),
    )
    assert plain.checkpoint().keys() == masked.checkpoint().keys()
    assert plain.state_dict().keys() == masked.state_dict().keys()


def test_the_teacher_sees_the_whole_image_and_only_kept_tokens_are_compared(expert):
    batch = batch_of(random_images(3, 96))
    masking = masking_of(expert, "texture", level="token", ratio=0.75)
    student = create_expert("timm:test_vit", "random", input_size=96, head_dropout=0.0)
    task = DistillTask(student, Distillation(teacher_view="same", dense_layers=2), masking)
    task.teacher = FrozenTeacher(copy.deepcopy(expert))
    output = task.train()(batch)
    keep = masking(batch)[1]
    assert keep.shape == (3, 9)
    with torch.no_grad():
        tokens = student.encode(batch["images"], 2, keep).tokens
        whole = expert.encode(batch["images"], 2).tokens
    expected = [torch.stack([image[k] for image, k in zip(layer, keep, strict=True)]) for layer in whole]
    assert output["dense"].item() == pytest.approx(
        layers_alignment(tokens, expected, "layernorm_mse").item(), rel=1e-5
    )
    output["loss"].backward()
    assert all(parameter.grad is not None for parameter in student.backbone.model.blocks.parameters())


def test_checkpointing_keeps_gradients_equal_when_tokens_are_dropped(expert):
    batch = batch_of(random_images(2, 96))
    gradients = []
    for enabled in (False, True):
        student = copy.deepcopy(expert)
        student.backbone.set_gradient_checkpointing(enabled)
        task = ClassifyTask(student, Objective(), masking_of(student, "texture", level="token"))
        task(batch)["loss"].backward()
        gradients.append([parameter.grad for parameter in student.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert (one is None and other is None) or torch.allclose(one, other, rtol=1e-4, atol=1e-7)


def test_a_backbone_that_cannot_drop_tokens_names_the_other_level():
    convolutional = create_expert("timm:test_convnext", "random")
    with pytest.raises(UserError, match=r"test_convnext cannot leave tokens out .* --mask-level pixel"):
        masking_of(convolutional, "texture", level="token")
    with pytest.raises(ValueError, match="cannot leave tokens out"):
        convolutional.encode(random_images(1, 160), keep=torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(UserError, match=r"unknown value of mask 'textur' \(did you mean texture\?\)"):
        Masking(mask="textur")


def test_the_recipes_defaults_are_those_of_the_masking(expert):
    options, masking = Masking(), masking_of(expert, "texture")
    assert options.mask == "none" and not masking.is_drawn
    found = (masking.ratio, masking.level, masking.score, masking.probability)
    assert found == (options.mask_ratio, options.mask_level, options.mask_score, options.mask_prob)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    make = set_maker(tmp_path_factory.mktemp("sets"))
    return ["--train", str(make("train", 24)), "--val", str(make("val", 8, first=1000))]


def curve(run) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_both_stages_train_with_masking_and_it_changes_the_loss(sets, tmp_path):
    train.main([*SMALL, *sets, "--out", str(tmp_path / "plain")])
    runs = {
        "pixel": ["--mask", "random", "--mask-prob", "0.8"],
        "token": ["--mask", "texture", "--mask-ratio", "0.5", "--mask-level", "token"],
    }
    curves = {"plain": curve(tmp_path / "plain")}
    for name, flags in runs.items():
        assert train.main([*SMALL, *sets, *flags, "--out", str(tmp_path / name)]) == 0
        load_expert(tmp_path / name / "expert")
        curves[name] = curve(tmp_path / name)
    assert len({tuple(losses) for losses in curves.values()}) == 3
    flags = ["--teacher", str(tmp_path / "plain" / "expert"), *runs["token"], "--objective", "dense"]
    assert distill.main([*SMALL_STAGE_2, *sets, *flags, "--out", str(tmp_path / "two")]) == 0
    assert all(np.isfinite(curve(tmp_path / "two")))


def test_masks_do_not_depend_on_gradient_accumulation(sets, tmp_path):
    flags = [*SMALL, *sets, "--mask", "texture", "--mask-select", "sample", "--backbone", "timm:test_vit"]
    flags += ["--head-dropout", "0"]
    for name, parts in {"whole": "1", "parts": "2"}.items():
        train.main([*flags, "--accumulation", parts, "--out", str(tmp_path / name)])
    assert curve(tmp_path / "parts") == pytest.approx(curve(tmp_path / "whole"), rel=1e-4)
