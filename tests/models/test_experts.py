import json
import os
from pathlib import Path

import pytest
import torch

from featdistill.command_line import UserError
from featdistill.models.expert import (
    CARD_FILE,
    WEIGHTS_FILE,
    copy_expert,
    create_expert,
    load_expert,
    read_card,
    save_expert,
)

TIMM = {"library": "timm", "name": "test_vit", "tag": ""}


@pytest.fixture
def expert():
    torch.manual_seed(0)
    return create_expert("tiny_clip", "random", input_size=48, resize="crop", head_hidden=16).eval()


def images(count: int = 3, size: int = 48) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(1)).to(
        torch.uint8
    )


@pytest.mark.parametrize("backbone", ["tiny_clip", "tiny_siglip", "timm:test_efficientnet"])
def test_a_loaded_expert_has_bit_equal_logits(tmp_path, backbone):
    torch.manual_seed(0)
    expert = create_expert(backbone, "random", input_size=64, head_hidden=8).eval()
    save_expert(expert, tmp_path / "expert")
    with torch.no_grad():
        assert torch.equal(load_expert(tmp_path / "expert")(images(size=64)), expert(images(size=64)))


def test_the_forward_pass_returns_one_float32_logit_per_image_and_normalizes_uint8_as_float(expert):
    with torch.no_grad():
        logit = expert(images())
        assert logit.shape == (3,) and logit.dtype == torch.float32
        torch.testing.assert_close(expert(images().float() / 255), logit)
        by_hand = (images() / 255 - expert.mean) / expert.std
        torch.testing.assert_close(expert.head(expert.backbone(by_hand)[0])[:, 0], logit)


def test_a_head_without_a_hidden_layer_is_linear():
    expert = create_expert("tiny_siglip", "random", input_size=32, head_hidden=0)
    assert [type(layer).__name__ for layer in expert.head] == ["Dropout", "Linear"]


def test_one_logit_equals_a_softmax_over_two_classes(expert):
    """The release's head has two outputs; ours is their difference."""
    two = torch.nn.Linear(16, 2)
    with torch.no_grad():
        expert.head[3].weight.copy_(two.weight[1:] - two.weight[:1])
        expert.head[3].bias.copy_(two.bias[1:] - two.bias[:1])
        pooled = expert.backbone((images() / 255 - expert.mean) / expert.std)[0]
        expected = two(expert.head[:3](pooled)).softmax(1)[:, 1]
        torch.testing.assert_close(expert(images()).sigmoid(), expected)


def test_the_card_describes_the_expert(expert, tmp_path):
    save_expert(expert, tmp_path / "expert", {"stage": 1, "metrics": {"holdout": {"robust_auc": 0.5}}})
    card = read_card(tmp_path / "expert")
    assert card["backbone"]["name"] == "clip" and card["backbone"]["input_size"] == 48
    assert card["preprocessing"]["size"] == 48 and card["preprocessing"]["resize"] == "crop"
    assert card["head"] == {"hidden": 16, "dropout": 0.3}
    assert card["stage"] == 1 and card["versions"]["torch"] == torch.__version__
    assert sorted(path.name for path in (tmp_path / "expert").iterdir()) == [CARD_FILE, WEIGHTS_FILE]


def test_saving_over_an_expert_replaces_it_whole(expert, tmp_path):
    save_expert(expert, tmp_path / "expert")
    with torch.no_grad():
        expert.head[3].bias += 1
    save_expert(expert, tmp_path / "expert")
    with torch.no_grad():
        assert torch.equal(load_expert(tmp_path / "expert")(images()), expert(images()))
    assert [path.name for path in tmp_path.iterdir()] == ["expert"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / CARD_FILE).unlink(), "is not an expert: it has no expert.json"),
        (lambda folder: (folder / WEIGHTS_FILE).unlink(), "has no expert.safetensors"),
        (lambda folder: (folder / WEIGHTS_FILE).write_bytes(b"x" * 99), "its SHA-256 differs"),
        (lambda folder: (folder / CARD_FILE).write_text("{"), "is not readable JSON"),
        (lambda folder: (folder / CARD_FILE).write_text("{}"), "has format None; this version reads"),
        (lambda folder: edit(folder, head={"hidden": 8, "dropout": 0.3}), "cannot be loaded: RuntimeError"),
        (lambda folder: edit(folder, backbone={"library": "tiny"}), "cannot be loaded: TypeError"),
        (lambda folder: edit(folder, backbone=TIMM | {"name": "hf-hub:me/any"}), "not just an architecture"),
        (lambda folder: edit(folder, backbone=TIMM | {"tag": "x:y"}), "not just an architecture"),
        (
            lambda folder: edit(folder, backbone=TIMM | {"options": {"checkpoint_path": "any.pth"}}),
            "not just an architecture",
        ),
    ],
)
def test_a_damaged_expert_is_one_clear_error(expert, tmp_path, damage, message):
    save_expert(expert, tmp_path / "expert")
    damage(tmp_path / "expert")
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        load_expert(tmp_path / "expert")


def edit(folder, **changes):
    card = json.loads((folder / CARD_FILE).read_text())
    (folder / CARD_FILE).write_text(json.dumps(card | changes))


def test_the_weights_can_be_read_by_those_who_can_read_the_card(expert, tmp_path):
    save_expert(expert, tmp_path / "expert")
    modes = {path.stat().st_mode for path in (tmp_path / "expert").iterdir()}
    assert len(modes) == 1


def test_loading_draws_no_random_weights_unless_asked_to(expert, tmp_path):
    save_expert(expert, tmp_path / "expert")
    # What the fixture has drawn for a new one.
    drawn = torch.get_rng_state()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    load_expert(tmp_path / "expert")
    assert torch.equal(torch.get_rng_state(), before)
    load_expert(tmp_path / "expert", draws=True)
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("can_link", [True, False])
def test_a_copy_is_an_expert_of_its_own(expert, tmp_path, can_link, monkeypatch):
    if not can_link:
        monkeypatch.setattr(os, "link", refuse_links)
    first, copy = tmp_path / "first", tmp_path / "copy"
    save_expert(expert, first)
    copy_expert(first, copy)
    files = [folder / "expert.safetensors" for folder in (first, copy)]
    assert os.path.samefile(*files) == can_link
    saved = load_expert(copy).head[0].weight
    with torch.no_grad():
        expert.head[0].weight.zero_()
    save_expert(expert, first)
    assert torch.equal(load_expert(copy).head[0].weight, saved) and saved.any()


def refuse_links(source: Path, target: Path) -> None:
    raise PermissionError(1, "Operation not permitted", str(source))
