"""What each part of the method brings: distortions, stage 2 against more of stage 1, masking; over seeds.

    python studies/method.py --recipe demo_clip_a --seeds 1 2 3 --out study \\
        --train data/demo/train.csv --val data/demo/holdout.csv --test data/demo/val.csv

Each seed trains stage 1 once for every distortion policy, and then, from the expert of the recipe's own
policy, every variant of stage 2 for the same number of epochs; `continued` is cross-entropy alone, so that
the benefit of the others is not merely that of longer training. Masking (MPFT) is tried in stage 1, under the
recipe's own distortions.

The expert of the last epoch is scored on `--test`, which no run has seen: clean, and with distortions of a
preset drawn from (draw, name). A table shows the mean AUC over seeds and draws with its 95 % interval
(DeLong, over the test images), and the mean difference to a reference with the same seed, with two intervals:
over the test images (DeLong, paired), and over the seeds (Student's t).

`--tokens BANK` is for `--set finetune=last_n crop=center flip=0`: runs start from tokens that banks keep (see
`studies/token_banks.py`). BANK has those of all images of `--val` and `--test`, with `embed --draw evaluation
--tokens-before-last`; its distortions count instead of `--preset`. Masks need images, so
the runs of `--masks` start from images all the same.

The same command continues a study that was stopped; finished runs and scores are kept.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.metrics import average_precision_score

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distill
import train
from featdistill import command_line, text_tables
from featdistill.atomic import replace_file, sha256_of, write_text
from featdistill.bank.figures import MeanAuc, mean_auc
from featdistill.command_line import Parser, UserError, counted
from featdistill.distortions.presets import parse_policy
from featdistill.evaluation.metrics import roc_auc
from featdistill.inference.scoring import score
from featdistill.models.expert import WEIGHTS_FILE, Expert, load_expert, read_card
from featdistill.recipe_groups import Architecture
from featdistill.records.manifest import read_manifests
from featdistill.training import recipe as recipes
from featdistill.training.recipe import DistillRecipe, Recipe, flag_of, keys_of

# Distortions of stage 1: the same probability and number of operations, from other libraries.
POLICIES = {
    "none": "none",
    "official": "official,probability=0.8",
    "extended": "official,probability=0.8,libraries=extended:1",
    "official and extended": "released_featdistill",
}
BASE = "official and extended"
# Stage 1 with half of the patches masked, by their texture.
MASKS = {"no mask": [], **{kind: ["--mask", kind] for kind in ("random", "smooth", "texture")}}
MASKS |= {f"{kind} .25": ["--mask", kind, "--mask-ratio", ".25"] for kind in ("random", "smooth", "texture")}
# Stage 2: recipes on top, and flags. All variants start from the same expert and train for as long.
STAGE_2: dict[str, tuple[list[str], list[str]]] = {
    "continued": ([], ["--objective", "crd", "--teacher-view", "same", "--crd-weight", "0"]),
    "reading A (dense)": ([], []),
    "reading B (crd)": (["featdistill_crd"], []),
    "both": (["featdistill_both"], []),
}
STAGES = {train: (1, Recipe), distill: (2, DistillRecipe)}
KINDS = ("clean", "distorted")
REFERENCES = {"stage 1": "none", "stage 2": "continued", "masking": "no mask"}


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", nargs="+", required=True, metavar="NAME", help="recipes, as for train.py")
    for flag, text in (("train", "training"), ("val", "hold-out"), ("test", "test")):
        parser.add_argument(
            f"--{flag}", nargs="+", required=True, metavar="MANIFEST", help=f"labeled {text} manifests"
        )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of all runs and of the tables")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="N")
    parser.add_argument("--tokens", metavar="BANK", help="train the last layers and score from tokens")
    parser.add_argument("--preset", default="test_public", help="distortions of the test images")
    parser.add_argument("--draws", type=int, default=1, help="distorted copies of each test image")
    parser.add_argument("--policies", nargs="*", default=list(POLICIES), choices=POLICIES, help="of stage 1")
    parser.add_argument("--stage2", nargs="*", default=list(STAGE_2), choices=STAGE_2, help="of stage 2")
    parser.add_argument("--masks", nargs="*", default=[], choices=MASKS, help="of stage 1, with masking")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="recipe keys of both stages"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if len(set(arguments.seeds)) < 2:
        raise UserError("--seeds needs at least two different seeds, for the intervals")
    out, test = Path(arguments.out), read_manifests(arguments.test)
    common = ["--train", *arguments.train, "--val", *arguments.val]
    flags_of = {train: [recipe_flag(pair) for pair in arguments.set]}
    # The experts of stage 2 are built like their teachers.
    architecture = tuple(f"{flag_of(key)}=" for key in keys_of(Architecture))
    flags_of[distill] = [flag for flag in flags_of[train] if not flag.startswith(architecture)]
    rows, logits = [], {}
    for seed in arguments.seeds:
        folder = out / f"seed{seed}"
        for part, variant, script, on_top, flags in _runs(arguments, folder):
            run = folder / part.replace(" ", "") / _folder(variant)
            recipe = ["--recipe", *arguments.recipe, *on_top, "--seed", str(seed)]
            argv = [*recipe, *flags, *flags_of[script], *common, "--out", str(run)]
            if arguments.tokens and part != "masking":
                argv += _token_flags(script, argv, [*recipe, *flags_of[train]], folder / "banks", arguments)
            script.main(argv)
            found = _logits(run, test, arguments)
            logits[part, variant, seed] = found
            rows.append({"part": part, "variant": variant, "seed": seed} | _scores(found, test))
    table = pd.DataFrame(rows)
    means = _means(test["label"].to_numpy(np.int64), logits)
    text = "\n\n".join(_markdown(part, of_part, means) for part, of_part in table.groupby("part", sort=False))
    write_text(out / "study.csv", table.to_csv(index=False))
    write_text(out / "study.md", text + "\n")
    print(text)
    return 0


def _runs(arguments, folder: Path) -> list[tuple]:
    """Return (part, variant, script, recipes on top, flags) of the runs of one seed, in order."""
    policies = dict.fromkeys([*arguments.policies, *([BASE] if arguments.stage2 else [])])
    teacher = ["--teacher", str(folder / "stage1" / _folder(BASE) / "expert-last")]
    runs = [("stage 1", name, train, [], ["--distortions", POLICIES[name]]) for name in policies]
    # From tokens, all variants have the distortions of reading A, which compares tokens: one bank serves all.
    policy = POLICIES[BASE] + (",keeps_layout_only=true" if arguments.tokens else "")
    for name in arguments.stage2:
        on_top, flags = STAGE_2[name]
        runs.append(("stage 2", name, distill, on_top, ["--distortions", policy, *flags, *teacher]))
    return runs + [("masking", name, train, [], MASKS[name]) for name in arguments.masks]


def _token_flags(script, argv: list[str], stage_1: list[str], folder: Path, arguments) -> list[str]:
    """Make the bank that a run starts from, if there is none; return the flags that name it."""
    from studies.token_banks import make_bank

    recipe = recipes.resolve(STAGES[script][1], script.build_parser().parse_args(argv))
    needed = ["--train", *arguments.train, "--val", *arguments.val, "--out", str(folder)]
    architecture = recipes.resolve(Recipe, train.build_parser().parse_args([*stage_1, *needed]))
    bank = make_bank(recipe, STAGES[script][0], architecture, arguments.train, folder)
    return ["--tokens", str(bank), "--val-tokens", arguments.tokens]


def _logits(run: Path, test: pd.DataFrame, arguments) -> dict[str, np.ndarray]:
    """Return the logits of a run's last expert: (1, N) `clean` and (draws, N) `distorted`."""
    path, folder = run / "study_logits.npz", run / "expert-last"
    made_from = {
        "weights": sha256_of(folder / WEIGHTS_FILE),
        "test": [sha256_of(manifest) for manifest in arguments.test],
        "preset": arguments.preset,
        "draws": arguments.draws,
        "tokens": arguments.tokens and sha256_of(Path(arguments.tokens) / "bank.json"),
    }
    return kept_logits(path, made_from, lambda: _compute(folder, test, arguments))


def _compute(folder: Path, test: pd.DataFrame, arguments) -> dict[str, np.ndarray]:
    expert = load_expert(folder)
    if arguments.tokens:
        from studies.token_banks import token_logits

        precision = read_card(folder)["recipe"]["precision"]
        logits = token_logits(arguments.tokens, expert, test, precision, arguments.draws)
    else:
        policy = parse_policy(arguments.preset)
        draws = range(arguments.draws)
        drawn = [image_logits([expert], test, policy=policy, seed=draw)[0] for draw in draws]
        logits = {"clean": image_logits([expert], test), "distorted": np.stack(drawn)}
    if unread := int(np.isnan(logits["clean"]).sum()):
        raise UserError(f"{counted(unread, 'test image')} not readable")
    return logits


def kept_logits(
    path: Path, made_from: Any, compute: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return the arrays of a file if they were made from the same; else compute them and write the file."""
    described = json.dumps(made_from)
    if path.is_file():
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["made_from"]) == described:
                return {kind: stored[kind] for kind in stored if kind != "made_from"}
    logits = compute()
    with replace_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, made_from=described, **logits)
    return logits


def image_logits(experts: Sequence[Expert], rows: pd.DataFrame, **distortions) -> np.ndarray:
    """Return logits (experts, N) under distortions of `score`; NaN for an image that cannot be read."""
    logits = np.full((len(experts), len(rows)), np.nan)
    for batch in score(experts, rows, batch_size=64, workers=2, **distortions):
        logits[:, batch.rows] = batch.logits
    return logits


def _scores(logits: dict[str, np.ndarray], test: pd.DataFrame) -> dict[str, float]:
    """Return AUC and average precision on the test rows, the mean over the draws."""
    label, scores = test["label"].to_numpy(np.int64), {}
    for kind, drawn in logits.items():
        scores[kind] = float(np.mean([roc_auc(label, each) for each in drawn]))
        scores[f"{kind} AP"] = float(np.mean([average_precision_score(label, each) for each in drawn]))
    return scores


def _means(
    label: np.ndarray, logits: dict[tuple, dict[str, np.ndarray]]
) -> dict[tuple[str, str, str], MeanAuc]:
    """Return the mean AUC over seeds and draws of each part, variant and kind."""
    everything, drawn = np.ones(len(label), bool), {}
    for (part, variant, _), kinds in logits.items():
        for kind, scores in kinds.items():
            drawn.setdefault((part, variant, kind), []).extend((each, everything) for each in scores)
    return {key: mean_auc(label, scores) for key, scores in drawn.items()}


def _markdown(part: str, table: pd.DataFrame, means: dict[tuple[str, str, str], MeanAuc]) -> str:
    """Return one part's table: means over the seeds, and differences to the reference."""
    reference = REFERENCES[part]
    variants = {name: rows.set_index("seed") for name, rows in table.groupby("variant", sort=False)}
    against = f"against {reference}"
    lines = []
    for name, rows in variants.items():
        cells = [name]
        for kind in KINDS:
            mean = means[part, name, kind]
            cells.append(shown(mean))
            if name == reference or reference not in variants:
                cells.append("")
                continue
            low, high = _seed_bounds(rows[kind] - variants[reference][kind])
            images = difference(mean, means[part, reference, kind]).removesuffix(")")
            cells.append(f"{images}; seeds {low:+z.3f} to {high:+z.3f})")
        lines.append([*cells, f"{rows['clean AP'].mean():.3f} / {rows['distorted AP'].mean():.3f}"])
    return text_tables.table([part, "clean AUC", against, "distorted AUC", against, "AP"], lines)


def shown(auc: MeanAuc) -> str:
    """Return `0.900 (0.850 to 0.940)`, an AUC with its interval."""
    figures = auc.describe()
    return f"{figures['auc']:.3f} ({figures['low']:.3f} to {figures['high']:.3f})"


def difference(auc: MeanAuc, other: MeanAuc) -> str:
    """Return `+0.050 (-0.010 to +0.110)`, what an AUC exceeds another one by."""
    figures = auc.exceeds(other)
    return f"{figures['difference']:+z.3f} ({figures['low']:+z.3f} to {figures['high']:+z.3f})"


def _seed_bounds(values: pd.Series) -> tuple[float, float]:
    """Return the 95 % interval of a mean by Student's t."""
    return stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))


def recipe_flag(pair: str) -> str:
    key, separator, value = pair.partition("=")
    if not separator:
        raise UserError(f"--set {pair} is not of the form KEY=VALUE")
    return f"{flag_of(key)}={value}"


def _folder(name: str) -> str:
    return "_".join("".join(letter if letter.isalnum() else " " for letter in name).split())


if __name__ == "__main__":
    command_line.run(main)
