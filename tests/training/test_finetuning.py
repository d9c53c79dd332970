import importlib.util

import pytest
import torch
from torch import nn

from featdistill.command_line import UserError
from featdistill.models.expert import Expert, create_expert, load_expert, save_expert
from featdistill.recipe_groups import Finetuning
from featdistill.training import finetuning


def expert_of(backbone: str) -> Expert:
    torch.manual_seed(0)
    return create_expert(backbone, "random", input_size=None if ":" in backbone else 32)


def trained(expert: Expert) -> set[str]:
    return {name for name, parameter in expert.named_parameters() if parameter.requires_grad}


def test_a_frozen_backbone_leaves_only_the_head_to_train_and_keeps_its_statistics():
    expert = expert_of("tiny_clip")
    finetuning.restrict(expert, Finetuning(finetune="frozen"))
    assert trained(expert) == {f"head.{name}" for name, _ in expert.head.named_parameters()}
    finetuning.train_mode(expert)
    norms = [module for module in expert.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    expert(torch.full((2, 3, 32, 32), 255, dtype=torch.uint8))
    assert all(torch.equal(norm.running_mean, old) for norm, old in zip(norms, before, strict=True))
    assert len(norms) == 4 and not expert.backbone.training
    assert all(module.training for module in expert.head.modules())


def test_what_is_trained_keeps_its_dropout_and_statistics_in_training_mode():
    expert = expert_of("tiny_clip")
    finetuning.restrict(expert, Finetuning())
    expert.eval()
    finetuning.train_mode(expert)
    assert all(module.training for module in expert.modules())


def test_last_n_trains_the_last_layers_and_what_comes_behind_them():
    expert = expert_of("tiny_clip")
    finetuning.restrict(expert, Finetuning(finetune="last_n", last_n=1))
    found = {name.split(".")[2] for name in trained(expert) if name.startswith("backbone.")}
    assert found == {"blocks", "norm", "head"}
    assert not any("blocks.0." in name for name in trained(expert))
    assert any("blocks.1." in name for name in trained(expert))
    finetuning.train_mode(expert)
    assert not expert.backbone.model.blocks[0].training and expert.backbone.model.blocks[1].training


@pytest.mark.parametrize("key", ["last_n", "lora_last_n"])
def test_more_layers_than_there_are_is_one_clear_error(key):
    kind = "last_n" if key == "last_n" else pytest.importorskip("peft") and "lora"
    finetuning.restrict(expert_of("timm:test_vit"), Finetuning(finetune=kind, **{key: 6}))
    with pytest.raises(UserError, match=f"^{key} 7: test_vit has 6 layers; use at most 6"):
        finetuning.restrict(expert_of("timm:test_vit"), Finetuning(finetune=kind, **{key: 7}))


@pytest.mark.parametrize("backbone", ["tiny_clip", "timm:test_vit", "timm:test_efficientnet"])
def test_norms_trains_the_scales_and_shifts_of_all_norms_and_the_head(backbone):
    expert = expert_of(backbone)
    finetuning.restrict(expert, Finetuning(finetune="norms"))
    kinds = (nn.LayerNorm, nn.BatchNorm2d)
    wanted = {
        f"{path}.{name}"
        for path, module in expert.named_modules()
        if isinstance(module, kinds)
        for name in ("weight", "bias")
    }
    assert trained(expert) == wanted | {f"head.{name}" for name, _ in expert.head.named_parameters()}
    finetuning.train_mode(expert)
    linear = [module for module in expert.backbone.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert all(module.training for module in expert.modules() if isinstance(module, kinds))
    assert linear and not any(module.training for module in linear)


def test_norms_and_the_last_layers_are_trained_together():
    sets = {}
    for kind in ("norms", "last_n", "norms_last_n"):
        expert = expert_of("timm:test_vit")
        finetuning.restrict(expert, Finetuning(finetune=kind, last_n=2))
        sets[kind] = trained(expert)
    assert sets["norms_last_n"] == sets["norms"] | sets["last_n"]
    assert sets["norms"] - sets["last_n"] and sets["last_n"] - sets["norms"]


def test_a_backbone_without_norms_is_one_clear_error():
    expert = expert_of("timm:test_resnet")
    for path, module in list(expert.backbone.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            expert.backbone.set_submodule(path, nn.Identity())
    with pytest.raises(UserError, match="finetune norms: test_resnet has no norms to train; use finetune"):
        finetuning.restrict(expert, Finetuning(finetune="norms"))


@pytest.mark.parametrize(
    "options, parts, blocks",
    [
        ({}, {"qkv", "proj", "fc1", "fc2"}, range(6)),
        ({"lora_layers": "attention"}, {"qkv", "proj"}, range(6)),
        ({"lora_layers": "mlp"}, {"fc1", "fc2"}, range(6)),
        ({"lora_last_n": 2}, {"qkv", "proj", "fc1", "fc2"}, (4, 5)),
        ({"lora_layers": "mlp", "lora_last_n": 1}, {"fc1", "fc2"}, (5,)),
    ],
)
def test_adapters_of_rank_and_scale_are_in_the_chosen_layers(options, parts, blocks):
    pytest.importorskip("peft")
    expert = expert_of("timm:test_vit")
    finetuning.restrict(expert, Finetuning(finetune="lora", lora_rank=3, lora_alpha=12, **options))
    adapted = {name: module for name, module in expert.backbone.named_modules() if hasattr(module, "lora_A")}
    wanted = {
        f"model.blocks.{block}.{'attn' if part in ('qkv', 'proj') else 'mlp'}.{part}"
        for block in blocks
        for part in parts
    }
    assert adapted.keys() == wanted
    assert all(module.r["default"] == 3 and module.scaling["default"] == 4 for module in adapted.values())
    with pytest.raises(UserError, match="test_efficientnet has no linear layers of kind attention"):
        options = Finetuning(finetune="lora", lora_layers="attention")
        finetuning.restrict(expert_of("timm:test_efficientnet"), options)


@pytest.mark.parametrize(
    "name, part",
    [
        ("model.blocks.3.attn.q_proj", "attention"),
        ("visual.transformer.resblocks.0.mlp.c_fc", "mlp"),
        ("model.attn_pool.kv", "attention"),
        ("model.attn_pool.mlp.fc1", "mlp"),
        ("model.layers.1.downsample.reduction", None),
    ],
)
def test_the_innermost_part_decides_what_a_layer_belongs_to(name, part):
    assert finetuning._part_of_block(name) == part


@pytest.mark.parametrize("backbone", ["tiny_siglip", "tiny_clip", "timm:test_vit"])
def test_a_merged_expert_gives_the_logits_of_its_additions_and_loads_without_peft(backbone, tmp_path):
    pytest.importorskip("peft")
    expert, plain_names = expert_of(backbone), set(expert_of(backbone).state_dict())
    finetuning.restrict(expert, Finetuning(finetune="lora", lora_rank=2, lora_alpha=4))
    assert {name for name in trained(expert) if "lora_" not in name} == {
        f"head.{name}" for name, _ in expert.head.named_parameters()
    }
    images = torch.randint(0, 256, (3, 3, *[expert.preprocessing.size] * 2), dtype=torch.uint8)
    with torch.no_grad():
        for name, parameter in expert.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
        wanted = expert.eval()(images)
        merged = finetuning.merged(expert)
        assert set(merged.state_dict()) == plain_names
        save_expert(merged, tmp_path / "expert")
        found = load_expert(tmp_path / "expert")(images)
        untouched = expert_of(backbone).eval()(images)
        again = expert(images)
    assert torch.allclose(found, wanted, atol=1e-5) and torch.equal(again, wanted)
    assert not torch.allclose(untouched, wanted, atol=1e-3)


def test_only_layers_that_are_called_get_additions():
    pytest.importorskip("peft")
    expert = expert_of("timm:test_vit")
    # A layer whose weight is read by somebody else: an addition to it would never be seen.
    expert.backbone.model.idle = nn.Linear(8, 8)
    finetuning.restrict(expert, Finetuning(finetune="lora", lora_rank=2))
    added = {name for name in trained(expert) if "lora_" in name}
    assert any("attn.qkv" in name for name in added) and any("mlp.fc1" in name for name in added)
    assert not any("idle" in name for name in added)


def test_lora_without_peft_or_without_linear_layers_is_one_clear_error(monkeypatch):
    recipe = Finetuning(finetune="lora")
    if importlib.util.find_spec("peft"):
        with pytest.raises(UserError, match="test_resnet has no linear layers"):
            finetuning.restrict(expert_of("timm:test_resnet"), recipe)
    monkeypatch.setattr(finetuning.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install peft"):
        finetuning.restrict(expert_of("tiny_clip"), recipe)


def test_an_expert_without_additions_is_left_as_it_is():
    expert = expert_of("tiny_clip")
    assert finetuning.merged(expert) is expert
