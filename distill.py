"""Stage 2: refine a stage-1 expert by dense self-distillation (paper, section 4.7, eq. 2: reading A).

    python distill.py --recipe clip_l14_a --teacher runs/stage1/clip_l14_a/expert \\
        --train data/train.csv --val data/holdout.csv --out runs/stage2/clip_l14_a

The stage-1 expert is both the frozen teacher and the student's start. The student sees the distorted image
and is held to the teacher's tokens of the clean one, beside binary cross-entropy. Distortions that move
pixels are left out, since token i must keep its place. It writes the same files as `train.py`.
"""

import copy
import dataclasses

from featdistill import command_line, recipes, training
from featdistill.command_line import Parser
from featdistill.experts import load_expert, read_card
from featdistill.recipes import DistillRecipe
from featdistill.tasks import DistillTask
from featdistill.teachers import FrozenTeacher

# The student is built like its teacher, whatever the recipe says of the architecture.
ARCHITECTURE_KEYS = ("backbone", "weights", "input_size", "resize", "head_hidden", "head_dropout")


def build_parser() -> Parser:
    parser = Parser(description="Stage 2: refine a stage-1 expert by dense self-distillation.")
    parser.add_argument("--teacher", required=True, metavar="EXPERT", help="the stage-1 expert's folder")
    training.add_arguments(parser)
    recipes.add_arguments(parser, DistillRecipe)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    recipe = recipes.resolve(DistillRecipe, arguments)
    card = read_card(arguments.teacher)
    architecture = {key: card["recipe"][key] for key in ARCHITECTURE_KEYS if key in card.get("recipe", {})}
    recipe = dataclasses.replace(recipe, **architecture)

    def make_task() -> DistillTask:
        student = load_expert(arguments.teacher)
        return DistillTask(
            student,
            FrozenTeacher(copy.deepcopy(student)),
            metric=recipe.metric,
            dense_weight=recipe.dense_weight,
            bce_weight=recipe.bce_weight,
        )

    training.run(
        arguments,
        recipe,
        make_task,
        stage=2,
        teacher={"path": str(arguments.teacher), "weights_sha256": card["weights_sha256"]},
        keeps_layout_only=True,
        teacher_view=recipe.teacher_view,
    )
    return 0


if __name__ == "__main__":
    command_line.run(main)
