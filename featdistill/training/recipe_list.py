"""What `python -m featdistill recipes` prints: the recipes, one of them, what `run_all.sh` does with some."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from featdistill.command_line import UserError, progress
from featdistill.recipe_groups import About
from featdistill.text_tables import table
from featdistill.training import recipe as recipes
from featdistill.training.recipe import DistillRecipe, Recipe

_HEADER = ("recipe", "team", "rank", "robust AUC", "backbone", "params (M)", "input px", "training GiB")


def recipe_table(names: Sequence[str]) -> str:
    """Return recipes as a table, those of the challenge's teams first, by rank."""
    abouts = {name: recipes.about(name) for name in names}
    names = sorted(names, key=lambda name: (abouts[name].rank or math.inf, not abouts[name].committee, name))
    rows = []
    with progress(len(names), "recipes", unit="recipe") as bar:
        for name in names:
            about = abouts[name]
            team = [about.team or "-", str(about.rank or "-")]
            team.append(f"{about.robust_auc:.4f}" if about.robust_auc else "-")
            rows.append([name, *team, *_sizes(name, about)])
            bar.update()
    return table(_HEADER, rows)


def _sizes(name: str, about: About) -> list[str]:
    """Return the last columns of a recipe; of a committee, all parameters and its largest expert's memory."""
    if about.committee:
        found = [_estimate(member, recipes.about(member)) for member in about.committee.split()]
        total, memory = sum(each.parameters for each in found), max(each.training_gib for each in found)
        return [f"{len(found)} experts", f"{total / 1e6:.1f}", "-", f"{memory:.0f}"]
    settings = recipes.settings([name])
    if "backbone" not in settings:
        return ["on top of others", "-", "-", "-"]
    estimate = _estimate(name, about)
    memory = f"{estimate.training_gib:.0f}" if estimate.training_gib >= 1 else "< 1"
    return [settings["backbone"], f"{estimate.parameters / 1e6:.1f}", estimate.input, memory]


def _estimate(name: str, about: About) -> Any:
    """Return the estimate of the last stage that a recipe has, which needs most."""
    # Here, so that a plan does not load PyTorch.
    from featdistill.training.memory import estimate

    return estimate(_resolve([name], about.stages))


def _resolve(names: Sequence[str], stage: int) -> Recipe:
    kind = DistillRecipe if stage == 2 else Recipe
    return recipes.from_values(kind, recipes.settings(names, f"stage{stage}"))


def show(names: Sequence[str]) -> str:
    """Return all settings of recipes on top of each other as YAML, which `--config` accepts."""
    about = recipes.about(*names)
    if about.committee:
        said = {key: value for key, value in dataclasses.asdict(about).items() if value is not None}
        return f"# {'+'.join(names)}\n{yaml.safe_dump(said, sort_keys=False)}"
    first = dataclasses.asdict(_resolve(names, 1))
    del first["name"]
    text = f"# {'+'.join(names)}\n{yaml.safe_dump(first, sort_keys=False)}"
    if about.stages == 2:
        second = dataclasses.asdict(_resolve(names, 2))
        del second["name"]
        changed = {k: value for k, value in second.items() if k not in first or first[k] != value}
        text += yaml.safe_dump({"stage2": changed}, sort_keys=False)
    return text


def plan(names: Sequence[str], on_top: Sequence[str] = ()) -> Iterator[str]:
    """Yield what `run_all.sh` does with the recipes that EXPERTS names, one line each.

    The lines are `expert RECIPE STAGES`, then `predict FLAGS...`, and `weights_by robust_auc` if the weights
    of a committee are measured.

    Args:
        on_top: recipes on top of each.

    Raises:
        UserError: a recipe is unknown, or their experts cannot be scored together as their recipes say.
    """
    experts, flags, weights_by = {}, {}, "given"
    for name in names:
        committee, about = recipes.about(name).committee, recipes.about(name, *on_top)
        for member in committee.split() if committee else [name]:
            experts[member] = recipes.about(member, *on_top).stages
            _resolve([member, *on_top], experts[member])
        if about.predict:
            flags[about.predict] = name
        weights_by = about.weights_by
        if len(names) > 1 and (weights_by != "given" or "--weights" in (about.predict or "")):
            raise UserError(f"{name} has weights for its own experts; name it alone")
    if len(flags) > 1:
        ways = "; ".join(f"{name} with {text}" for text, name in flags.items())
        raise UserError(f"these recipes are scored in different ways; name them one by one: {ways}")
    yield from (f"expert {name} {stages}" for name, stages in experts.items())
    yield " ".join(["predict", *flags])
    if weights_by != "given":
        yield f"weights_by {weights_by}"
