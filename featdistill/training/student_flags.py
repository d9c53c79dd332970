"""The flags of `distill.py` for a student of several experts, and flags without effect; without PyTorch."""

from argparse import Namespace
from typing import Any

from featdistill.command_line import Parser, UserError
from featdistill.recipe_groups import Architecture
from featdistill.training import recipe as recipes
from featdistill.training.recipe import DistillRecipe, StudentRecipe

_OWN = ("banks", "student", "unlabeled", "fusion", "fusion_weights")


def add_arguments(parser: Parser, teachers: Any) -> None:
    """Add the flags.

    Args:
        teachers: the group of flags that name teachers, one of which must be given.
    """
    teachers.add_argument("--teachers", nargs="+", metavar="EXPERT", help="folders of the student's teachers")
    teachers.add_argument(
        "--predictions",
        nargs="+",
        metavar="FILE",
        help="instead of --teachers: what predict.py wrote for each manifest of --train and --unlabeled, in "
        "this order",
    )
    group = parser.add_argument_group("student of several experts")
    group.add_argument(
        "--banks",
        nargs="+",
        metavar="BANK",
        help="banks of the training images, made with embed --expert for each of the teachers, which then do "
        "not run",
    )
    group.add_argument("--student", metavar="BACKBONE", help="the student's backbone, as --backbone")
    group.add_argument(
        "--unlabeled",
        "--unlabelled",
        nargs="+",
        metavar="MANIFEST",
        help="further training images, which only the teachers label; --train may be omitted",
    )
    group.add_argument(
        "--fusion",
        metavar="HOW",
        help="how the teachers are fused, as for predict.py: logit_mean (the default here), "
        "probability_mean, or a file written by python -m featdistill fuse",
    )
    group.add_argument("--fusion-weights", metavar="A=2,B=1", help="weights of the teachers")


def check_refinement(arguments: Namespace) -> None:
    """Refuse what stage 2 lacks, or what has no effect in it.

    Raises:
        UserError: a flag is missing, or has no effect.
    """
    for flag in ("recipe", "train"):
        if getattr(arguments, flag) is None:
            raise UserError(f"the following arguments are required: --{flag}; see --help")
    for flag in _OWN:
        if getattr(arguments, flag) is not None:
            flag = flag.replace("_", "-")
            raise UserError(f"--{flag} has no effect with --teacher; did you mean --teachers?")
    reason = "no effect with --teacher, since the student is built like its teacher"
    recipes.refuse_flags(arguments, recipes.keys_of(Architecture), reason)
    reason = "no effect with --teacher; they are for a student of several (--teachers)"
    recipes.refuse_flags(arguments, recipes.only_in(StudentRecipe, DistillRecipe), reason)


def check_student(arguments: Namespace) -> None:
    """Refuse what a student of several lacks, or what has no effect on it, and fill in its defaults.

    Raises:
        UserError: a flag is missing, or has no effect.
    """
    if not (arguments.train or arguments.unlabeled):
        raise UserError("there are no training images; use --train, --unlabeled, or both")
    if arguments.tokens:
        raise UserError("--tokens has no effect on a student of several, whose teachers need images")
    if arguments.banks and not arguments.teachers:
        raise UserError("--banks holds features; name the experts whose they are with --teachers")
    if arguments.student and hasattr(arguments, "recipe_backbone"):
        raise UserError("--student and --backbone are the same; use one of them")
    reason = "no effect on a student of several; they are for stage 2 (--teacher)"
    recipes.refuse_flags(arguments, recipes.only_in(DistillRecipe, StudentRecipe), reason)
    if arguments.student:
        arguments.recipe_backbone = arguments.student
    arguments.recipe = arguments.recipe or ["student"]
