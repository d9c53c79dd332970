"""Train many backbones with one recipe and compare them with the paper's Table 2 (section 4.5).

    python studies/backbones.py --recipe clip_l14_a --backbones swin_t dinov2_b clip_l14 \\
        --train data/train.csv --val data/holdout.csv --out runs/study
    python studies/backbones.py ... --backbones mocov3_b --weights-files mocov3_b=vit-b-300ep.pth.tar
    python studies/backbones.py ... --probe pool mean_tokens    frozen backbones: minutes per row

Every backbone gets a run folder, as `train.py` writes it. The same command continues a study; finished runs
are left alone. The results are in `OUT/table.csv` and `OUT/table.md`. A backbone that fails (for example
because its weights are not available) is listed with the reason, the others continue, and the exit status is
1. Every setting of the recipe is a flag, and applies to all backbones.

With `--probe`, only a logistic regression is fitted on each feature, and the folder of a backbone holds banks
of the training and the hold-out images, and the probe. The recipe's distortions, crops and mirroring make the
training views, and `weights`, `input_size`, `resize`, `balance` and `seed` count as well.
"""

import gc
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from featdistill import atomic, command_line, text_tables
from featdistill.command_line import Parser, UserError, within
from featdistill.models.backbones import facts, resolve_spec
from featdistill.models.expert import read_card
from featdistill.records.provenance import Claim
from featdistill.training import recipe as recipes
from featdistill.training import stages
from featdistill.training.recipe import Recipe
from featdistill.training.run_folder import RunFolder
from studies import probing

# Paper, Table 2: parameters in millions, and ROC AUC on the challenge's distorted images: online validation
# in stage 1 and in stage 2 (with distillation), and the hard online test in stage 2. Section 4.5 names DINO
# and CoCa among the candidates, without figures.
TABLE_2: dict[str, tuple[float | None, ...]] = {
    "swin_t": (28, 0.785),
    "clip_rn50x64": (420, 0.828),
    "mocov3_b": (86, 0.851),
    "convnext_b": (89, 0.855),
    "beit_b": (86, 0.857),
    "dinov2_b": (86, 0.868),
    "dino_b": (),
    "coca_l14": (),
    "clip_l14": (304, 0.8926, 0.934, 0.845),
    "siglip_so400m": (400, None, 0.926, 0.848),
}
_PAPER = ("paper_parameters_m", "paper_stage1_robust_auc", "paper_stage2_robust_auc", "paper_stage2_hard_auc")
# Column of `table.csv`: its title in `table.md`.
_COLUMNS = {
    "backbone": "backbone",
    "feature": "ours: feature",
    **dict(zip(_PAPER, ("params (M)", "stage 1", "stage 2", "hard test, stage 2"), strict=True)),
    "parameters_m": "ours: params (M)",
    "clean_auc": "clean AUC",
    "robust_auc": "robust AUC",
    "images_per_s": "training images/s",
    "note": "note",
}


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--backbones",
        nargs="+",
        default=list(TABLE_2),
        metavar="NAME",
        help="short names, timm:NAME or open_clip:NAME/TAG",
    )
    parser.add_argument(
        "--weights-files", nargs="+", default=[], metavar="NAME=FILE", help="local weights of some backbones"
    )
    for flag, text in (("--train", "training manifests"), ("--val", "manifests scored after each epoch")):
        parser.add_argument(flag, nargs="+", required=True, metavar="MANIFEST", help=f"labeled {text}")
    parser.add_argument(
        "--probe",
        nargs="+",
        metavar="FEATURE",
        help="instead of training, fit logistic regressions on these features of the frozen backbones; the "
        "recipe says how training views are distorted, cropped and mirrored",
    )
    parser.add_argument(
        "--probe-views",
        type=within(1),
        default=4,
        metavar="N",
        help="of --probe: the clean image and N - 1 views as in training",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the runs and the table")
    recipes.add_arguments(parser, Recipe)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    settings = {key: value for key, value in vars(arguments).items() if key.startswith("recipe_")}
    if "recipe_backbone" in settings:
        raise UserError("--backbone names a single one; use --backbones")
    if arguments.probe and PartialState().num_processes > 1:
        raise UserError("--probe needs one process; start it without torchrun or accelerate launch")
    names = list(dict.fromkeys(arguments.backbones))
    for name in names:
        resolve_spec(name)
    files = weights_files(arguments.weights_files, names)
    common = ["--recipe", *arguments.recipe, "--train", *arguments.train, "--val", *arguments.val]
    common += ["--config", arguments.config] if arguments.config else []
    for key, value in settings.items():
        common.append(f"--{key.removeprefix('recipe_').replace('_', '-')}={value}")
    out, results = Path(arguments.out), {}
    for name in names:
        weights = ["--weights", files[name]] if name in files else []
        run = str(out / re.sub(r"[^\w.-]", "_", name))
        results[name] = _results(
            name,
            [*common, "--backbone", name, *weights, "--out", run],
            arguments.probe,
            arguments.probe_views,
        )
        if PartialState().is_main_process:
            _write(out, results, " ".join(arguments.recipe), arguments.val, arguments.probe is not None)
    if PartialState().is_main_process:
        print((out / "table.md").read_text(encoding="utf-8"), end="")
    return 1 if any("note" in row for rows in results.values() for row in rows) else 0


def _results(name: str, argv: list[str], features: list[str] | None, views: int) -> list[dict[str, Any]]:
    """Train or probe one backbone unless it is finished; return the columns of its rows of the table."""
    result = {}
    try:
        arguments = train.build_parser().parse_args(argv)
        recipe = recipes.resolve(Recipe, arguments)
        result["parameters_m"] = round(facts(resolve_spec(name, recipe.input_size)).parameters, 1)
        if features:
            return [result | row for row in probing.probe_backbone(recipe, arguments, features, views)]
        result["feature"] = recipe.feature or resolve_spec(name).feature
        run = RunFolder(arguments.out)
        is_finished = _epochs_done(run) == recipe.epochs
        description = stages.describe(arguments, recipe, stage=1)
        if run.claim(description, arguments.resume, finished=is_finished) is not Claim.FINISHED:
            train.main(argv)
        if _epochs_done(run) != recipe.epochs:
            raise UserError(f"stopped after {_epochs_done(run)} of {recipe.epochs} epochs")
        scores = read_card(run.expert)["metrics"]["holdout"]
        result |= {key: scores[key] for key in ("clean_auc", "robust_auc")}
        lines = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rates = [line["images_per_s"] for line in map(json.loads, lines) if "images_per_s" in line]
        return [result | ({"images_per_s": round(statistics.median(rates), 1)} if rates else {})]
    except (UserError, OSError, RuntimeError) as error:  # CUDA's lack of memory is a RuntimeError
        reason = " ".join(str(error).split())[:300]
        print(f"{name} failed: {reason}")
        return [result | {"note": reason}]
    finally:
        # Memory of the GPU and compiled graphs of one backbone must not get in the way of the next.
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()


def _epochs_done(run: RunFolder) -> int:
    return read_card(run.expert_last)["epoch"] if run.expert_last.is_dir() else 0


def weights_files(pairs: list[str], names: list[str]) -> dict[str, str]:
    files = {}
    for pair in pairs:
        name, _, path = pair.partition("=")
        if not path:
            raise UserError(f"--weights-files: '{pair}' is not of the form NAME=FILE")
        files[command_line.one_of("backbone of --weights-files", name, names)] = path
    return files


def _write(
    out: Path, results: dict[str, list[dict[str, Any]]], recipe: str, val: list[str], is_probed: bool
) -> None:
    """Write `table.csv` and `table.md`: the paper's rows in its order, then what else was trained."""
    rows = []
    for name in dict.fromkeys([*TABLE_2, *results]):
        paper = dict(zip(_PAPER, TABLE_2.get(name, ()), strict=False))
        for ours in results.get(name, [{"note": "not trained here"}]):
            row = {"backbone": name} | paper | ours
            rows.append([row.get(column) for column in _COLUMNS])
    atomic.write_text(out / "table.csv", atomic.csv_text(list(_COLUMNS), rows))
    ours, titles = "stage 1", dict(_COLUMNS)
    if is_probed:
        ours = "logistic regression on features of the frozen backbone"
        titles["images_per_s"] = "views embedded/s"
    cells = [[_cell(value, column) for value, column in zip(row, _COLUMNS, strict=True)] for row in rows]
    lines = [
        "# Backbones",
        "",
        "Columns 2 to 5 are the paper's own figures (Table 2), not measured here: ROC AUC on the distorted",
        "images of the challenge's online validation (stage 2 is with distillation) and hard online test.",
        f"Ours: recipe {recipe}, {ours}, ROC AUC on {', '.join(val)}.",
        "",
        text_tables.table(list(titles.values()), cells),
    ]
    atomic.write_text(out / "table.md", "\n".join(lines) + "\n")


def _cell(value: str | float | None, column: str) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if column.endswith("_auc") else f"{value:.1f}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    command_line.run(main)
