"""`compile: auto`: what it decides, and that runs continue with what they began with."""

import dataclasses
import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from training_runs import SMALL, losses, weights

import train
from featdistill.command_line import UserError
from featdistill.models.backbones import BACKBONES, build, resolve_spec
from featdistill.training import compilation
from featdistill.training.recipe import DistillRecipe, Recipe, StudentRecipe, from_values, settings

# 250,000 images.
ENOUGH = 1954


def student(name: str = "clip_l14", size: int = 224) -> SimpleNamespace:
    return SimpleNamespace(spec=BACKBONES[name], preprocessing=SimpleNamespace(size=size))


def recipe(kind: type[Recipe] = Recipe, name: str = "clip_l14_a", **changes: object) -> Recipe:
    section = {Recipe: "stage1", DistillRecipe: "stage2", StudentRecipe: "student"}[kind]
    return from_values(kind, settings([name], section) | changes)


def test_long_runs_of_the_measured_network_are_compiled_in_both_stages():
    for kind in (Recipe, DistillRecipe):
        assert recipe(kind).compile == "auto"
        assert compilation.reason_against(recipe(kind), student(), "cuda", 1, ENOUGH) is None


@pytest.mark.parametrize(
    ("reason", "made", "expert", "device", "processes", "steps"),
    [
        ("the device is cpu", recipe(), student(), "cpu", 1, ENOUGH),
        ("siglip_384 at 384 px", recipe(), student("siglip_so400m", 384), "cuda", 1, ENOUGH),
        ("quickgelu_224 at 336 px", recipe(), student(size=336), "cuda", 1, ENOUGH),
        ("2 processes", recipe(), student(), "cuda", 2, ENOUGH),
        ("precision fp32", recipe(precision="fp32"), student(), "cuda", 1, ENOUGH),
        ("input_sizes", recipe(input_sizes="224,448"), student(), "cuda", 1, ENOUGH),
        ("finetune last_n", recipe(finetune="last_n"), student(), "cuda", 1, ENOUGH),
        ("gradient_checkpointing", recipe(gradient_checkpointing=True), student(), "cuda", 1, ENOUGH),
        ("a student of several", recipe(StudentRecipe, "student"), student(), "cuda", 1, ENOUGH),
        ("249,984 images, and compiling pays from 250,000", recipe(), student(), "cuda", 1, ENOUGH - 1),
    ],
)
def test_nothing_else_is_compiled(reason, made, expert, device, processes, steps):
    assert reason in compilation.reason_against(made, expert, device, processes, steps)


def test_a_machine_that_cannot_compile_trains_without(monkeypatch, caplog):
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    monkeypatch.setattr(compilation.compute, "set_up_compiler", lambda device: None)
    monkeypatch.setattr(compilation, "reason_against", lambda *_: None)

    def fail(function):
        raise torch._dynamo.exc.TorchDynamoException("no Triton")

    with caplog.at_level(logging.INFO, "featdistill"):
        for compiler in (lambda function: function, fail):
            monkeypatch.setattr(torch, "compile", compiler)
            assert compilation.is_wanted(recipe(), student(), accelerator, 1) == (compiler is not fail)
            assert compilation.is_wanted(recipe(compile=True), student(), accelerator, 1) is True
            assert compilation.is_wanted(recipe(compile="False"), student(), accelerator, 1) is False
    messages = [record.message for record in caplog.records]
    assert messages[0] == "compile auto: compiled" and len(messages) == 2
    assert (
        messages[1].startswith("compile auto: not compiled (--compile does not work")
        and "Triton" in messages[1]
    )


def test_on_a_cpu_auto_is_false_and_an_earlier_run_continues(sets, tmp_path, monkeypatch, caplog):
    arguments = [*SMALL, *sets, "--epochs", "1", "--checkpoint-every-s", "0", "--out"]
    assert train.main([*arguments, str(tmp_path / "auto")]) == 0
    run = tmp_path / "false"
    assert train.main([*arguments, str(run), "--compile", "false"]) == 0
    assert weights(run) == weights(tmp_path / "auto") and losses(run) == losses(tmp_path / "auto")
    recorded = [
        json.loads((each / "run.json").read_text())["recipe"]["compile"] for each in (tmp_path / "auto", run)
    ]
    assert recorded == ["auto", False]
    # The present default goes on with what an earlier run recorded.
    assert train.main([*arguments, str(run)]) == 0
    assert json.loads((run / "run.json").read_text())["recipe"]["compile"] is False
    with pytest.raises(UserError, match=r"recipe\.compile was \"auto\", is true"):
        train.main([*arguments, str(tmp_path / "auto"), "--compile"])


def test_auto_compiles_the_task_in_place(sets, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(compilation, "reason_against", lambda *_: None)
    monkeypatch.setattr(compilation, "_failure", lambda device: None)
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    assert train.main([*SMALL, *sets, "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    assert len(compiled) == 1


def test_the_key_is_a_switch_with_a_third_value():
    assert [recipe(compile=value).compile for value in ("auto", True, "true", "False")] == [
        "auto",
        True,
        True,
        False,
    ]
    with pytest.raises(UserError, match="unknown value of compile 'yes'; known: auto, true, false"):
        recipe(compile="yes")
    with pytest.raises(UserError, match="compile needs inputs of one size"):
        recipe(input_sizes="224,448", compile=True)
    assert dataclasses.replace(recipe(input_sizes="224,448"), compile=False).compile is False


@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context:FutureWarning")
def test_compiled_blocks_with_selective_checkpointing_keep_less_and_have_the_same_gradients():
    torch.manual_seed(0)
    backbone = build(resolve_spec("timm:test_vit", 32)).train()
    [block, *_] = backbone._block_list
    tokens = torch.rand(8, 5, block.norm1.weight.numel())
    weights = {value.untyped_storage().data_ptr() for value in block.parameters()}

    def step() -> tuple[list[torch.Tensor], int]:
        """Return the gradients, and how many bytes of activations were kept for them."""
        block.zero_grad()
        kept = {}

        def keep(value: torch.Tensor) -> torch.Tensor:
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            block(tokens).square().sum().backward()
        gradients = [value.grad.clone() for value in block.parameters()]
        return gradients, sum(count for place, count in kept.items() if place not in weights)

    gradients, kept = step()
    backbone.set_gradient_checkpointing(True, selective=True)
    # Without generated C++, which takes minutes.
    block.compile(backend="aot_eager")
    found, kept_compiled = step()
    torch.testing.assert_close(found, gradients)
    assert 0 < kept_compiled < 0.8 * kept


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
def test_compiled_dropout_draws_the_masks_of_eager_dropout(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def twice(values):
        return torch.nn.functional.dropout(2 * values, 0.3, True)

    drawn = []
    with torch._inductor.config.patch(fallback_random=False):
        compilation.compute.set_up_compiler(torch.device("cpu"))
        for function in (twice, torch.compile(twice)):
            torch.manual_seed(0)
            drawn.append(function(torch.ones(64, 64)))
    assert torch.equal(*drawn) and 0 < drawn[0].count_nonzero() < drawn[0].numel()
