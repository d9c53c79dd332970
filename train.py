"""Stage 1: train one expert with binary cross-entropy on distorted images (paper, sections 4.3 and 4.7).

    python train.py --recipe clip_l14_a --train data/train.csv --val data/holdout.csv --out runs/s1/clip_l14_a
    accelerate launch --num_processes 2 train.py ...          the same on two GPUs

It writes `RUN/expert/` (best by hold-out robust AUC), `RUN/expert-last/`, `RUN/metrics.jsonl`, and
checkpoints, from which the same command continues a killed run. Images that cannot be read are listed in
`RUN/unreadable.csv`; the status is then 1.
"""

from featdistill import command_line
from featdistill.command_line import Parser
from featdistill.process_setup import large_imports
from featdistill.recipe_groups import Architecture, values_of
from featdistill.seeds import stage_seed
from featdistill.training import recipe as recipes
from featdistill.training.recipe import Recipe


def build_parser() -> Parser:
    parser = Parser(
        usage="%(prog)s --recipe NAME --train MANIFEST --val MANIFEST --out RUN [settings]",
        description="Stage 1: train one expert with binary cross-entropy on distorted images.",
    )
    recipes.add_run_arguments(parser)
    recipes.add_arguments(parser, Recipe)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    recipe = recipes.resolve(Recipe, arguments)
    recipes.check_paths(arguments, recipe)
    # Loading PyTorch takes seconds; --help and mistakes in the arguments do not need it.
    with large_imports():
        from featdistill.models.expert import create_expert
        from featdistill.models.masking import make_masking
        from featdistill.training import stages
        from featdistill.training.tasks import ClassifyTask

    def make_task() -> ClassifyTask:
        expert = create_expert(**values_of(Architecture, recipe))
        return ClassifyTask(expert, recipe, make_masking(expert, recipe, stage_seed(recipe.seed, 1)))

    return stages.run(arguments, recipe, make_task, stage=1)


if __name__ == "__main__":
    command_line.run(main)
