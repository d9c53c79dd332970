"""Distillation: refine one expert by itself (stage 2 of the paper), or train one small student of several.

    python distill.py --recipe clip_l14_a --teacher runs/stage1/clip_l14_a/expert-last \\
        --train data/train.csv --val data/holdout.csv --out runs/stage2/clip_l14_a
    python distill.py --recipe clip_l14_a featdistill_crd --teacher ...          reading B on top
    python distill.py --teachers runs/stage2/*/expert --unlabeled data/more.csv \\
        --train data/train.csv --val data/holdout.csv --out runs/student

With `--teacher`, the stage-1 expert is both the teacher and the student's initial state. In addition to
binary cross-entropy, the student's tokens are aligned with the teacher's (reading A, section 4.7, eq. 2:
`objective: dense`, a frozen teacher that sees the clean image), or its feature with that of a teacher that
follows it and sees another distortion and crop of the image (reading B, section 5.1: `objective: crd`), or
both. Where tokens are compared, both see the same crop, and distortions that move pixels are left out, since
token i must stay in place.

With `--teachers`, a new network of any architecture learns the fused logit of any experts, on labeled images
and on images without labels. With `--predictions`, the teachers' scores are read from files that `predict.py`
has written. Either way it writes the same files as `train.py`.
"""

import dataclasses
from argparse import Namespace

from featdistill import command_line
from featdistill.command_line import Parser
from featdistill.process_setup import large_imports
from featdistill.recipe_groups import Architecture, values_of
from featdistill.seeds import stage_seed
from featdistill.training import recipe as recipes
from featdistill.training import student_flags
from featdistill.training.recipe import DistillRecipe, StudentRecipe


def build_parser() -> Parser:
    parser = Parser(
        usage="%(prog)s --teacher EXPERT --recipe NAME --train MANIFEST --val MANIFEST --out RUN [settings]\n"
        "       %(prog)s --teachers EXPERT... --train MANIFEST --val MANIFEST --out RUN [settings]",
        description="Stage 2: refine an expert by self-distillation; or train a small student of several.",
    )
    group = recipes.add_run_arguments(parser, needs_train=False)
    teacher = group.add_mutually_exclusive_group(required=True)
    teacher.add_argument(
        "--teacher",
        metavar="EXPERT",
        help="folder of the stage-1 expert to refine: RUN/expert-last, as in the paper, or RUN/expert; or "
        "hub:OWNER/NAME",
    )
    student_flags.add_arguments(parser, teacher)
    recipes.add_arguments(parser, DistillRecipe, StudentRecipe, needs_recipe=False)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return _refine(arguments) if arguments.teacher else _teach(arguments)


def _refine(arguments: Namespace) -> int:
    """Stage 2."""
    student_flags.check_refinement(arguments)
    recipe = recipes.resolve(DistillRecipe, arguments)
    recipes.check_paths(arguments, recipe)
    # Loading PyTorch takes seconds; --help and mistakes in the arguments do not need it.
    with large_imports():
        from featdistill.inference.references import located
        from featdistill.models.expert import load_expert, read_card
        from featdistill.models.masking import make_masking
        from featdistill.training import stages
        from featdistill.training.tasks import DistillTask

    folder, name = located(arguments.teacher)
    card = read_card(folder)
    # The student is built like its teacher, whatever the recipe says about the architecture.
    keys = {field.name for field in dataclasses.fields(Architecture)} & card.get("recipe", {}).keys()
    values = {"feature": card["backbone"]["feature"]} | {key: card["recipe"][key] for key in keys}
    recipe = dataclasses.replace(recipe, **values)

    def make_task() -> DistillTask:
        student = load_expert(folder, draws=True)
        return DistillTask(student, recipe, make_masking(student, recipe, stage_seed(recipe.seed, 2)))

    teacher = {"path": name, "weights_sha256": card["weights_sha256"]}
    return stages.run(arguments, recipe, make_task, stage=2, teacher=teacher)


def _teach(arguments: Namespace) -> int:
    """A student of several experts."""
    student_flags.check_student(arguments)
    recipe = recipes.resolve(StudentRecipe, arguments)
    recipes.check_paths(arguments, recipe)
    with large_imports():
        from featdistill.models.expert import create_expert
        from featdistill.models.masking import make_masking
        from featdistill.training import stages, student_targets
        from featdistill.training.student import StudentTask

    teachers, targets, description = student_targets.find(arguments, recipe)

    def make_task() -> StudentTask:
        expert = create_expert(**values_of(Architecture, recipe))
        masking = make_masking(expert, recipe, stage_seed(recipe.seed, 1))
        return StudentTask(expert, recipe, teachers, masking, targets.drawn if targets else 0)

    return stages.run(arguments, recipe, make_task, stage=1, teacher=description, targets=targets)


if __name__ == "__main__":
    command_line.run(main)
