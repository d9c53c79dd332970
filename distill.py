"""Stage 2: refine a stage-1 expert by self-distillation, as the paper's two readings have it.

    python distill.py --recipe clip_l14_a --teacher runs/stage1/clip_l14_a/expert \\
        --train data/train.csv --val data/holdout.csv --out runs/stage2/clip_l14_a
    python distill.py --recipe clip_l14_a featdistill_crd --teacher ...          reading B on top

The stage-1 expert is both the teacher and the student's start. Beside binary cross-entropy the student is
held to the teacher's tokens (reading A, section 4.7, eq. 2: `objective: dense`, a frozen teacher that sees
the clean image), or its feature to that of a teacher that follows it and sees another distortion of the image
(reading B, section 5.1: `objective: crd`), or both. Where tokens are compared, distortions that move pixels
are left out, since token i must keep its place. It writes the same files as `train.py`.
"""

import copy
import dataclasses

from featdistill import command_line
from featdistill.command_line import Parser
from featdistill.models.expert import load_expert, read_card
from featdistill.training import recipe as recipes
from featdistill.training import stages as training
from featdistill.training.recipe import DistillRecipe
from featdistill.training.tasks import DistillTask
from featdistill.training.teachers import FrozenTeacher, MomentumTeacher

# The student is built like its teacher, whatever the recipe says of the architecture.
ARCHITECTURE_KEYS = ("backbone", "weights", "input_size", "resize", "head_hidden", "head_dropout")
TEACHERS = {"frozen": FrozenTeacher, "momentum": MomentumTeacher}


def build_parser() -> Parser:
    parser = Parser(description="Stage 2: refine a stage-1 expert by self-distillation.")
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
            TEACHERS[recipe.teacher_kind](copy.deepcopy(student)),
            objective=recipe.objective,
            teacher_view=recipe.teacher_view,
            metric=recipe.metric,
            dense_weight=recipe.dense_weight,
            dense_layers=recipe.dense_layers,
            crd_weight=recipe.crd_weight,
            crd_dim=recipe.crd_dim,
            crd_temperature=recipe.crd_temperature,
            crd_queue=recipe.crd_queue,
            crd_negatives=recipe.crd_negatives,
            momentum_base=recipe.momentum_base,
            momentum_max=recipe.momentum_max,
            **training.task_settings(student, recipe),
        )

    training.run(
        arguments,
        recipe,
        make_task,
        stage=2,
        teacher={"path": str(arguments.teacher), "weights_sha256": card["weights_sha256"]},
    )
    return 0


if __name__ == "__main__":
    command_line.run(main)
