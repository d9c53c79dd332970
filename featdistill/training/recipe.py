"""Recipes: from recipe files, `--config` and flags to one checked set of settings.

A recipe file is a YAML of flat keys; keys of one kind of training alone are in `stage1:`, `stage2:` and
`student:`; `base:` names a recipe to start from, and the keys of `About` say what is not a setting. Later
recipes override earlier ones: `--recipe clip_l14_a featdistill_crd` is the first with the settings of the
second on top. Precedence: defaults < recipes < `--config my.yaml` < flags.
"""

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featdistill import remote_files
from featdistill.command_line import Parser, UserError, nearest, one_of
from featdistill.hub import download as hub
from featdistill.recipe_groups import (
    About,
    Architecture,
    Augmentation,
    Data,
    Distillation,
    Finetuning,
    General,
    Group,
    Masking,
    Objective,
    Optimization,
    Runtime,
    Selection,
    Student,
    check_weights,
    choices_of,
    typed_fields,
)

RECIPE_FOLDER = Path(__file__).resolve().parents[1] / "recipes"
RUNTIME_KEYS = tuple(field.name for field in dataclasses.fields(Runtime))
# Former names of keys, which are refused with the present one.
_RENAMED = {
    "equalise": "equalize",
    "synchronise_groups": "synchronize_groups",
    "crop_least_area": "crop_min_area",
    "amplitude_mixup_most": "amplitude_mixup_max",
    "skipped_steps": "max_skipped_steps",
    "final_learning_rate": "final_learning_rate_factor",
}


# Fields come in the order of the groups from the last to the first.
@dataclass(frozen=True)
class Recipe(
    Runtime,
    Selection,
    Optimization,
    Finetuning,
    Objective,
    Masking,
    Augmentation,
    Data,
    Architecture,
    General,
):
    """All settings of stage 1: binary cross-entropy on distorted images (paper, sections 4.3 and 4.7)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.finetune == "lora" and (self.ema or getattr(self, "teacher_kind", None) == "momentum"):
            raise UserError(
                "finetune lora does not change the weights that ema and a momentum teacher follow; use ema 0 "
                "and teacher_kind frozen"
            )
        if self.swa_start and self.ema:
            raise UserError("ema and swa_start are two averages of the weights; use ema 0 or swa_start 0")
        if self.swa_start > self.epochs:
            raise UserError(f"swa_start {self.swa_start} comes after the last of {self.epochs} epochs")
        if self.focal_alpha and self.ai_weight != 1:
            raise UserError(
                "focal_alpha and ai_weight both weight the classes; use focal_alpha 0 or ai_weight 1 "
                "(alpha is ai_weight alpha / (1 - alpha) with bce_weight 1 - alpha)"
            )
        uses = {
            "mask": self.mask != "none",
            "cache": self.cache is not None,
            "compile": self.compile is True,
            "objective crd": "crd" in getattr(self, "objective", ""),
        }
        if self.input_sizes is not None and any(uses.values()):
            names = ", ".join(name for name, is_used in uses.items() if is_used)
            raise UserError(f"{names} needs inputs of one size; use input_size instead of input_sizes")
        if self.batch_size % self.accumulation:
            raise UserError(
                f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}"
            )
        if self.supcon_weight and self.batch_size == self.accumulation:
            raise UserError(
                f"supcon_weight compares the images of a forward pass, and batch_size {self.batch_size} with "
                f"accumulation {self.accumulation} has one for each; use a larger batch_size"
            )


@dataclass(frozen=True)
class DistillRecipe(Distillation, Recipe):
    """All settings of stage 2: self-distillation in addition to cross-entropy."""


@dataclass(frozen=True)
class StudentRecipe(Student, Recipe):
    """All settings of a student of several experts."""


# The section of a recipe file for the keys of one kind of training alone.
_SECTIONS: dict[str, type[Recipe]] = {"stage1": Recipe, "stage2": DistillRecipe, "student": StudentRecipe}


def keys_of(group: type[Group]) -> list[str]:
    """Return the keys of a group or a recipe."""
    return [field.name for field in dataclasses.fields(group)]


def only_in(recipe_class: type[Recipe], other: type[Recipe]) -> list[str]:
    """Return the keys of one kind of recipe that another does not have."""
    return [key for key in keys_of(recipe_class) if key not in keys_of(other)]


def list_recipes() -> list[str]:
    """Return the names of the recipes that come with the project, such as `strong` and `teams/intsig`."""
    paths = (path.relative_to(RECIPE_FOLDER) for path in RECIPE_FOLDER.rglob("*.yaml"))
    return sorted(path.with_suffix("").as_posix() for path in paths)


def about(*names: str) -> About:
    """Return what recipes say besides settings, each on top of the one before it; `predict` flag by flag."""
    values: dict[str, Any] = {}
    flags: dict[str, str] = {}
    for name in names:
        values |= _read_recipe(name, "stage1")
        given = re.split(r"\s+(?=--)", (values.get("predict") or "").strip())
        flags |= {text.split()[0]: text for text in given if text}
        values["predict"] = " ".join(flags.values()) or None
    return from_values(About, {key: values[key] for key in keys_of(About) if key in values})


def add_run_arguments(parser: Parser, *, needs_train: bool = True) -> Any:
    """Add the flags for the data and the output of a run, and return their group."""
    group = parser.add_argument_group("data and output")
    group.add_argument(
        "--train", nargs="+", required=needs_train, metavar="MANIFEST", help="labeled training images"
    )
    group.add_argument("--val", nargs="+", required=True, metavar="MANIFEST", help="labeled hold-out images")
    group.add_argument("--out", required=True, metavar="RUN", help="folder of the run")
    group.add_argument(
        "--resume",
        choices=("auto", "off"),
        default="auto",
        help="continue the run in RUN if there is one, or refuse to",
    )
    group.add_argument(
        "--tokens",
        metavar="BANK",
        help="train the last layers from tokens that embed --tokens-before-last has kept of the training "
        "images, with the same weights as from images (needs --finetune last_n)",
    )
    group.add_argument(
        "--val-tokens",
        metavar="BANK",
        help="with --tokens, score the hold-out from tokens of a bank of embed --draw evaluation as well",
    )
    return group


def add_arguments(parser: Parser, *recipe_classes: type[Recipe], needs_recipe: bool = True) -> None:
    """Add `--recipe`, `--config` and a flag for every key of the recipes, the important ones first."""
    first = parser.add_argument_group("recipe and most important settings")
    first.add_argument(
        "--recipe",
        required=needs_recipe,
        nargs="+",
        metavar="NAME",
        help="recipes, each on top of the one before it; python -m featdistill recipes --list: "
        + ", ".join(list_recipes()),
    )
    groups: list[type[Group]] = list(reversed(Recipe.__bases__))
    shown = set()
    own = [kind.__bases__[0] for kind in recipe_classes if kind is not Recipe]
    for group in [*groups, *own]:
        title, _, more = group.__doc__.partition(".\n")
        title = title[0].lower() + title[1:].rstrip(".")
        section = parser.add_argument_group(title, more.strip() or None)
        if group is General:
            section.add_argument("--config", metavar="FILE", help="a YAML file that overrides the recipe")
        for field, kind in typed_fields(group):
            if field.name not in shown | {"name"}:
                _add_flag(first if field.metadata["important"] else section, field, kind)
        shown |= {*keys_of(group)}
    for old in _RENAMED:
        parser.add_argument(
            flag_of(old), dest=f"recipe_{old}", nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )


def flag_of(key: str) -> str:
    """Return the flag of a recipe key."""
    return "--" + key.replace("_", "-")


def _add_flag(group: Any, field: dataclasses.Field, kind: Any) -> None:
    choices = choices_of(kind)
    is_switch = True in choices.values()
    number = "N" if kind in (int, int | None) else "X" if kind is float else "TEXT"
    default = str(field.default).lower() if field.default in (None, True, False) else field.default
    notes = f"default {default}" + (f", {field.metadata['bounds']}" if field.metadata["bounds"] else "")
    group.add_argument(
        flag_of(field.name),
        dest=f"recipe_{field.name}",
        default=argparse.SUPPRESS,
        nargs="?" if is_switch else None,
        const="true" if is_switch else None,
        metavar="{" + ",".join(choices) + "}" if choices else number,
        help=f"{field.metadata['help']} ({notes})",
    )


def resolve(recipe_class: type[Recipe], arguments: argparse.Namespace) -> Recipe:
    """Merge defaults, recipes, `--config` and flags into one checked recipe.

    Raises:
        UserError: an unknown recipe or key (the nearest one is named), a value of the wrong type or range, or
            a flag that has no effect.
    """
    section = next(name for name, kind in _SECTIONS.items() if kind is recipe_class)
    values = settings(arguments.recipe, section)
    values["name"] = "+".join(arguments.recipe)
    if arguments.config:
        values |= _read_yaml(Path(arguments.config), section)
    values |= {
        key.removeprefix("recipe_"): value
        for key, value in vars(arguments).items()
        if key.startswith("recipe_")
    }
    recipe = from_values(recipe_class, values)
    if recipe.finetune != "lora":
        adapters = [key for key in keys_of(Finetuning) if key.startswith("lora_")]
        refuse_flags(arguments, adapters, f"no effect with --finetune {recipe.finetune}, only with lora")
    if not recipe.finetune.endswith("last_n"):
        reason = f"no effect with --finetune {recipe.finetune}, only with last_n and norms_last_n"
        refuse_flags(arguments, ["last_n"], reason)
    if not recipe.gradient_checkpointing:
        refuse_flags(arguments, ["checkpointing"], "no effect without --gradient-checkpointing")
    return recipe


def settings(names: Iterable[str], section: str = "stage1") -> dict[str, Any]:
    """Return what recipe files set, each on top of the one before it, with the keys of a section.

    Raises:
        UserError: a name is unknown, or that of a committee.
    """
    values: dict[str, Any] = {}
    for name in names:
        values |= _read_recipe(name, section)
        if "committee" in values:
            members = ", ".join(values["committee"].split())
            command = f"PROFILE=paper DATA=archives EXPERTS={name} bash run_all.sh"
            raise UserError(f"recipe {name} is a committee; train each of {members}, or run {command}")
    return {key: value for key, value in values.items() if key not in keys_of(About)}


def refuse_flags(arguments: argparse.Namespace, keys: Iterable[str], reason: str) -> None:
    """Refuse flags that have no effect, rather than ignore them.

    Args:
        keys: of the settings that have none.
        reason: follows the flags in the message.
    """
    given = [flag_of(key) for key in keys if hasattr(arguments, f"recipe_{key}")]
    if given:
        raise UserError(f"{', '.join(given)}: {reason}")


def check_paths(arguments: argparse.Namespace, recipe: Recipe) -> None:
    """Refuse paths that do not exist, before anything takes time.

    Raises:
        UserError: a manifest, a bank, a teacher, the backbone's weights or the settings of an equalized copy
            are missing.
    """
    given = {"teacher": None, "teachers": None, "unlabeled": None} | vars(arguments)
    remote_files.check_manifests([*(arguments.train or ()), *arguments.val, *(given["unlabeled"] or ())])
    for flag, bank in (("--tokens", arguments.tokens), ("--val-tokens", arguments.val_tokens)):
        if bank and not (Path(bank) / "bank.json").is_file():
            raise UserError(f"{flag} {bank} is not a bank: it has no bank.json; make one with embed")
    if arguments.val_tokens and not arguments.tokens:
        raise UserError("--val-tokens is for a run from tokens; add --tokens, or leave it out")
    if given["teacher"] is None:
        check_weights(recipe.weights)
    for teacher in [given["teacher"]] if given["teacher"] else given["teachers"] or ():
        folder = Path(teacher) / ("expert-last" if given["teacher"] else "expert")
        if hub.is_hub(teacher):
            hub.parse(teacher)
        elif not (Path(teacher) / "expert.json").is_file():
            if ":" in str(teacher):
                # Only now, since it loads PyTorch: a name of an expert that can only be scored with?
                from featdistill.inference.references import located

                located(teacher)
            hint = f"; did you mean {folder}?" if (folder / "expert.json").is_file() else ""
            raise UserError(f"{teacher} is not an expert: it has no expert.json{hint}")
    if recipe.equalize and not Path(recipe.equalize).is_file():
        raise UserError(f"cannot read {recipe.equalize}: it does not exist")


def from_values(recipe_class: type[Group], values: dict[str, Any]) -> Any:
    """Build a recipe from plain values, checking keys, types and ranges."""
    kinds = {field.name: kind for field, kind in typed_fields(recipe_class)}
    _check_keys(values, kinds)
    return recipe_class(**{key: _convert(key, value, kinds[key]) for key, value in values.items()})


def _convert(key: str, value: Any, kind: Any) -> Any:
    """Turn a YAML value or the text of a flag into the type of a key.

    Raises:
        UserError: this is not possible.
    """
    if isinstance(kind, types.UnionType):
        if value is None or str(value).lower() in ("none", "null"):
            return None
        kind = next(part for part in typing.get_args(kind) if part is not types.NoneType)
    if choices := choices_of(kind):
        if kind is bool and str(value).lower() not in choices:
            raise UserError(f"recipe key '{key}' must be true or false, not {value!r}")
        return choices.get(str(value).lower(), str(value))
    try:
        if kind is int and (isinstance(value, bool) or not float(value).is_integer()):
            raise ValueError
        return int(float(value)) if kind is int else kind(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"recipe key '{key}' must be of type {kind.__name__}, not {value!r}") from error


def _read_recipe(name: str, section: str) -> dict[str, Any]:
    one_of("recipe", name, list_recipes())
    return _read_yaml(RECIPE_FOLDER / f"{name}.yaml", section, keys_of(About))


def _read_yaml(path: Path, section: str, more_keys: Iterable[str] = ()) -> dict[str, Any]:
    """Return the flat keys of a file and those of one of its sections, on top of those of its base recipe.

    Args:
        more_keys: known in addition to the settings.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    sections = content if isinstance(content, dict) else {}
    parts = {name: sections.pop(name, None) or {} for name in _SECTIONS}
    for part in (content, *parts.values()):
        if not isinstance(part, dict):
            raise UserError(f"{path} must hold keys and values, not a {type(part).__name__}")
    base = content.pop("base", None)
    values = _read_recipe(base, section) if base else {}
    for part, kind in ((content, Recipe), *((parts[name], kind) for name, kind in _SECTIONS.items())):
        _check_keys(part, [*keys_of(kind), *more_keys], f"{path}: ")
    return values | content | parts[section]


def _check_keys(keys: Iterable, known: Iterable[str], where: str = "") -> None:
    """Refuse unknown keys and former names of keys."""
    for key in keys:
        if key in _RENAMED:
            raise UserError(f"{where}recipe key '{key}' is now called '{_RENAMED[key]}'")
        if key not in known:
            raise UserError(f"{where}unknown recipe key '{key}'{nearest(str(key), known)}")
