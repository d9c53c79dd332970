"""Stage 1: train one expert with binary cross-entropy on distorted images (paper, sections 4.3 and 4.7).

    python train.py --recipe clip_l14_a --train data/train.csv --val data/holdout.csv --out runs/s1/clip_l14_a
    accelerate launch --num_processes 2 train.py ...          the same on two GPUs

It writes `RUN/expert/` (best by hold-out robust AUC), `RUN/expert-last/`, `RUN/metrics.jsonl` and what a
killed run needs: the same command continues it.
"""

from featdistill import command_line
from featdistill.command_line import Parser
from featdistill.models.expert import create_expert
from featdistill.training import recipe as recipes
from featdistill.training import stages as training
from featdistill.training.recipe import Recipe
from featdistill.training.tasks import ClassifyTask


def build_parser() -> Parser:
    parser = Parser(description="Stage 1: train one expert with binary cross-entropy on distorted images.")
    training.add_arguments(parser)
    recipes.add_arguments(parser, Recipe)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    recipe = recipes.resolve(Recipe, arguments)

    def make_task() -> ClassifyTask:
        expert = create_expert(
            recipe.backbone,
            recipe.weights,
            input_size=recipe.input_size,
            resize=recipe.resize,
            head_hidden=recipe.head_hidden,
            head_dropout=recipe.head_dropout,
        )
        return ClassifyTask(expert, **training.task_settings(expert, recipe))

    training.run(arguments, recipe, make_task, stage=1)
    return 0


if __name__ == "__main__":
    command_line.run(main)
