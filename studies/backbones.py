"""Train many backbones by one recipe and set them beside the paper's Table 2 (section 4.5).

    python studies/backbones.py --recipe clip_l14_a --backbones swin_t dinov2_b clip_l14 \\
        --train data/train.csv --val data/holdout.csv --out runs/study
    python studies/backbones.py ... --backbones mocov3_b --weights-files mocov3_b=vit-b-300ep.pth.tar

One run folder a backbone, as `train.py` writes it. The same command continues a study: what is finished is
left alone. It writes `OUT/table.csv` and `OUT/table.md`. A backbone that fails (its weights are not to be
had, say) is listed with the reason, and the others go on; the exit status is then 1. Every setting of the
recipe is a flag, and holds for all backbones.
"""

import dataclasses
import gc
import json
import re
import statistics
import sys
from pathlib import Path

import torch
from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from featdistill import atomic, command_line
from featdistill.command_line import Parser, UserError
from featdistill.models.backbones import facts, resolve_spec
from featdistill.models.expert import read_card
from featdistill.training import recipe as recipes
from featdistill.training.recipe import Recipe
from featdistill.training.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Published:
    """A row of the paper's Table 2: parameters in millions, and ROC AUC on the challenge's distorted images.

    Attributes:
        stage1, stage2: online validation, without and with distillation.
        hard: hard online test, with distillation.
    """

    parameters: int | None = None
    stage1: float | None = None
    stage2: float | None = None
    hard: float | None = None


# Paper, Table 2. Section 4.5 names DINO and CoCa among the candidates, without figures.
TABLE_2: dict[str, Published] = {
    "swin_t": Published(28, 0.785),
    "clip_rn50x64": Published(420, 0.828),
    "mocov3_b": Published(86, 0.851),
    "convnext_b": Published(89, 0.855),
    "beit_b": Published(86, 0.857),
    "dinov2_b": Published(86, 0.868),
    "dino_b": Published(),
    "coca_l14": Published(),
    "clip_l14": Published(304, 0.8926, 0.934, 0.845),
    "siglip_so400m": Published(400, None, 0.926, 0.848),
}
_HEADER = ("backbone", "paper_parameters_m", "paper_stage1_robust_auc", "paper_stage2_robust_auc")
_HEADER += ("paper_stage2_hard_auc", "parameters_m", "clean_auc", "robust_auc", "images_per_s", "note")


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of one backbone.

    Attributes:
        parameters: of the backbone, in millions.
        clean_auc, robust_auc: of the best epoch on the hold-out.
        images_per_s: median of the training log's lines.
        note: why there is no result.
    """

    parameters: float | None = None
    clean_auc: float | None = None
    robust_auc: float | None = None
    images_per_s: float | None = None
    note: str = ""


def build_parser() -> Parser:
    parser = Parser(description="Train many backbones by one recipe and set them beside the paper's Table 2.")
    parser.add_argument(
        "--backbones",
        nargs="+",
        default=list(TABLE_2),
        metavar="NAME",
        help="short names, timm:NAME or open_clip:NAME/TAG",
    )
    parser.add_argument(
        "--weights-files",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="local weights of single backbones",
    )
    parser.add_argument(
        "--train", nargs="+", required=True, metavar="MANIFEST", help="labelled training manifests"
    )
    parser.add_argument(
        "--val",
        nargs="+",
        required=True,
        metavar="MANIFEST",
        help="labelled manifests that the AUCs are taken on after each epoch",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the runs and the table")
    recipes.add_arguments(parser, Recipe)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    settings = {key: value for key, value in vars(arguments).items() if key.startswith("recipe_")}
    if "recipe_backbone" in settings:
        raise UserError("--backbone names one; give --backbones")
    names = list(dict.fromkeys(arguments.backbones))
    for name in names:
        resolve_spec(name)
    files = _weights_files(arguments.weights_files, names)
    common = ["--recipe", *arguments.recipe]
    common += ["--config", arguments.config] if arguments.config else []
    common += [
        f"--{key.removeprefix('recipe_').replace('_', '-')}={value}" for key, value in settings.items()
    ]
    out, results = Path(arguments.out), {}
    for name in names:
        own = ["--backbone", name] + (["--weights", files[name]] if name in files else [])
        data = ["--train", *arguments.train, "--val", *arguments.val]
        results[name] = _study(name, [*common, *own, *data, "--out", str(out / _folder_name(name))])
        if PartialState().is_main_process:
            _write(out, results, " ".join(arguments.recipe), arguments.val)
    if PartialState().is_main_process:
        print((out / "table.md").read_text(encoding="utf-8"), end="")
    return 1 if any(result.note for result in results.values()) else 0


def _study(name: str, argv: list[str]) -> Result:
    """Train one backbone to its end, unless it is there, and read its results."""
    parameters = None
    try:
        arguments = train.build_parser().parse_args(argv)
        recipe = recipes.resolve(Recipe, arguments)
        parameters = facts(resolve_spec(name, recipe.input_size)).parameters
        run = RunFolder(arguments.out)
        if _epochs_done(run) == recipe.epochs:
            _check_same(run, recipe, arguments.train, arguments.val)
        else:
            train.main(argv)
        if _epochs_done(run) != recipe.epochs:
            raise UserError(f"stopped after {_epochs_done(run)} of {recipe.epochs} epochs")
        holdout = read_card(run.expert)["metrics"]["holdout"]
        return Result(parameters, holdout["clean_auc"], holdout["robust_auc"], _images_per_s(run))
    except (UserError, OSError, RuntimeError) as error:  # CUDA's lack of memory is a RuntimeError
        reason = " ".join(str(error).split())[:300]
        print(f"{name} failed: {reason}")
        return Result(parameters, note=reason)
    finally:
        # What one backbone leaves on the GPU, and among compiled graphs, must not be in the next one's way.
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()


def _weights_files(pairs: list[str], names: list[str]) -> dict[str, str]:
    files = {}
    for pair in pairs:
        name, separator, path = pair.partition("=")
        if not separator or not path:
            raise UserError(f"--weights-files: '{pair}' is not of the form NAME=FILE")
        files[command_line.one_of("backbone of --weights-files", name, names)] = path
    return files


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


def _epochs_done(run: RunFolder) -> int:
    return read_card(run.expert_last)["epoch"] if run.expert_last.is_dir() else 0


def _check_same(run: RunFolder, recipe: Recipe, train_paths: list[str], val_paths: list[str]) -> None:
    """Raise a `UserError` where a finished run was trained otherwise than is now asked for."""
    card = read_card(run.expert)
    changed = recipes.differences(card["recipe"], dataclasses.asdict(recipe))
    for part, paths in (("train", train_paths), ("val", val_paths)):
        hashes = [entry["sha256"] for entry in card["data"][part]]
        changed += [f"{part} data changed"] if hashes != [atomic.sha256_of(path) for path in paths] else []
    if changed:
        raise UserError(
            f"{run.path} holds a run with other settings ({'; '.join(changed)}); give another --out"
        )


def _images_per_s(run: RunFolder) -> float | None:
    lines = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [line["images_per_s"] for line in map(json.loads, lines) if "images_per_s" in line]
    return round(statistics.median(rates), 1) if rates else None


def _write(out: Path, results: dict[str, Result], recipe: str, val: list[str]) -> None:
    """Write `table.csv` and `table.md`: the paper's rows in its order, then what else was trained."""
    rows = []
    for name in dict.fromkeys([*TABLE_2, *results]):
        paper, ours = TABLE_2.get(name, Published()), results.get(name, Result(note="not trained here"))
        parameters = None if ours.parameters is None else round(ours.parameters, 1)
        rows.append(
            (name, *dataclasses.astuple(paper), parameters, *dataclasses.astuple(ours)[1:-1], ours.note)
        )
    atomic.write_text(out / "table.csv", atomic.csv_text(_HEADER, rows))
    lines = [
        "# Backbones",
        "",
        "Paper: its own figures (Table 2), ROC AUC on the distorted images of the challenge's online",
        "validation (stage 1 without, stage 2 with distillation) and hard online test; not measured here.",
        f"Ours: recipe {recipe}, stage 1, ROC AUC on {', '.join(val)}.",
        "",
        "| backbone | paper: params (M) | paper: stage 1 | paper: stage 2 | paper: hard test, stage 2 "
        "| params (M) | clean AUC | robust AUC | training images/s | note |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [_cell(value, column) for value, column in zip(row, _HEADER, strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    atomic.write_text(out / "table.md", "\n".join(lines) + "\n")


def _cell(value: str | float | None, column: str) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if column.endswith("_auc") else f"{value:.1f}"
    return "" if value is None else str(value).replace("|", "/")


if __name__ == "__main__":
    command_line.run(main)
