"""Stage 2: refine a stage-1 expert by self-distillation, in both readings of the paper.

    python distill.py --recipe clip_l14_a --teacher runs/stage1/clip_l14_a/expert-last \\
        --train data/train.csv --val data/holdout.csv --out runs/stage2/clip_l14_a
    python distill.py --recipe clip_l14_a featdistill_crd --teacher ...          reading B on top

The stage-1 expert is both the teacher and the student's initial state. In addition to binary cross-entropy,
the student's tokens are aligned with the teacher's (reading A, section 4.7, eq. 2: `objective: dense`, a
frozen teacher that sees the clean image), or its feature with that of a teacher that follows it and sees
another distortion and crop of the image (reading B, section 5.1: `objective: crd`), or both. Where tokens are
compared, both see the same crop, and distortions that move pixels are left out, since token i must stay in
place. It writes the same files as `train.py`.
"""

import dataclasses

from featdistill import command_line
from featdistill.command_line import Parser
from featdistill.recipe_groups import Architecture
from featdistill.seeds import stage_seed
from featdistill.training import recipe as recipes
from featdistill.training.recipe import DistillRecipe


def build_parser() -> Parser:
    parser = Parser(
        usage="%(prog)s --recipe NAME --teacher EXPERT --train MANIFEST --val MANIFEST --out RUN [settings]",
        description="Stage 2: refine a stage-1 expert by self-distillation.",
    )
    group = recipes.add_run_arguments(parser)
    group.add_argument(
        "--teacher",
        required=True,
        metavar="EXPERT",
        help="folder of the stage-1 expert: RUN/expert-last, as in the paper, or RUN/expert",
    )
    recipes.add_arguments(parser, DistillRecipe)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    recipe = recipes.resolve(DistillRecipe, arguments)
    recipes.check_paths(arguments, recipe)
    # Loading PyTorch takes seconds; --help and mistakes in the arguments do not need it.
    from featdistill.models.expert import load_expert, read_card
    from featdistill.models.masking import make_masking
    from featdistill.training import stages
    from featdistill.training.tasks import DistillTask

    card = read_card(arguments.teacher)
    # The student is built like its teacher, whatever the recipe says about the architecture.
    keys = {field.name for field in dataclasses.fields(Architecture)} & card.get("recipe", {}).keys()
    values = {"feature": card["backbone"]["feature"]} | {key: card["recipe"][key] for key in keys}
    recipe = dataclasses.replace(recipe, **values)

    def make_task() -> DistillTask:
        student = load_expert(arguments.teacher)
        return DistillTask(student, recipe, make_masking(student, recipe, stage_seed(recipe.seed, 2)))

    teacher = {"path": str(arguments.teacher), "weights_sha256": card["weights_sha256"]}
    return stages.run(arguments, recipe, make_task, stage=2, teacher=teacher)


if __name__ == "__main__":
    command_line.run(main)
