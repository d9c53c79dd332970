"""What each part of the method brings: distortions, stage 2 against more of stage 1, masking; over seeds.

    python studies/method.py --recipe demo_clip_a --seeds 1 2 3 --out study \\
        --train data/demo/train.csv --val data/demo/holdout.csv --test data/demo/val.csv

Each seed trains stage 1 once for every distortion policy, and then, from the expert of the recipe's own
policy, every variant of stage 2 for the same number of epochs; `continued` is cross-entropy alone, so that
the benefit of the others is not merely that of longer training. Masking (MPFT) is tried in stage 1, under the
recipe's own distortions.

The expert of the last epoch is scored on `--test`, which no run has seen: clean, and with distortions of a
preset drawn from (draw, name). A table shows the mean over the seeds and the mean difference to a reference
with the same seed, with its 95 % interval (Student's t).

The same command continues a study that was stopped; finished runs and scores are kept.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.metrics import average_precision_score

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distill
import train
from featdistill import command_line, text_tables
from featdistill.atomic import sha256_of, write_json, write_text
from featdistill.command_line import Parser, UserError, counted
from featdistill.distortions.presets import parse_policy
from featdistill.evaluation.metrics import roc_auc
from featdistill.inference.scoring import score
from featdistill.models.expert import WEIGHTS_FILE, load_expert
from featdistill.recipe_groups import Architecture
from featdistill.records.manifest import read_manifests
from featdistill.training.recipe import flag_of, keys_of

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
# Stage 2: recipes on top, and flags. All variants start from the same expert and train for as long.
STAGE_2: dict[str, tuple[list[str], list[str]]] = {
    "continued": ([], ["--objective", "crd", "--teacher-view", "same", "--crd-weight", "0"]),
    "reading A (dense)": ([], []),
    "reading B (crd)": (["featdistill_crd"], []),
    "both": (["featdistill_both"], []),
}
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
    flags_of = {train: [_flag(pair) for pair in arguments.set]}
    # The experts of stage 2 are built like their teachers.
    architecture = tuple(f"{flag_of(key)}=" for key in keys_of(Architecture))
    flags_of[distill] = [flag for flag in flags_of[train] if not flag.startswith(architecture)]
    rows = []
    for seed in arguments.seeds:
        for part, variant, script, recipes, flags in _runs(arguments, out / f"seed{seed}"):
            run = out / f"seed{seed}" / part.replace(" ", "") / _folder(variant)
            recipe = ["--recipe", *arguments.recipe, *recipes, "--seed", str(seed)]
            script.main([*recipe, *flags, *flags_of[script], *common, "--out", str(run)])
            rows.append({"part": part, "variant": variant, "seed": seed} | _scores(run, test, arguments))
    table = pd.DataFrame(rows)
    text = "\n\n".join(_markdown(part, of_part) for part, of_part in table.groupby("part", sort=False))
    write_text(out / "study.csv", table.to_csv(index=False))
    write_text(out / "study.md", text + "\n")
    print(text)
    return 0


def _runs(arguments, folder: Path) -> list[tuple]:
    """Return (part, variant, script, recipes on top, flags) of the runs of one seed, in order."""
    policies = dict.fromkeys([*arguments.policies, *([BASE] if arguments.stage2 else [])])
    teacher = ["--teacher", str(folder / "stage1" / _folder(BASE) / "expert-last")]
    runs = [("stage 1", name, train, [], ["--distortions", POLICIES[name]]) for name in policies]
    for name in arguments.stage2:
        recipes, flags = STAGE_2[name]
        runs.append(("stage 2", name, distill, recipes, ["--distortions", POLICIES[BASE], *flags, *teacher]))
    return runs + [("masking", name, train, [], MASKS[name]) for name in arguments.masks]


def _scores(run: Path, test: pd.DataFrame, arguments) -> dict[str, float]:
    """Return AUC and average precision of a run's last expert on the test rows, clean and distorted."""
    path, folder = run / "study_score.json", run / "expert-last"
    made_from = {
        "weights": sha256_of(folder / WEIGHTS_FILE),
        "test": [sha256_of(manifest) for manifest in arguments.test],
        "preset": arguments.preset,
        "draws": arguments.draws,
    }
    stored = json.loads(path.read_text()) if path.is_file() else {}
    if stored.get("what") == made_from:
        return stored["auc"]
    expert, label = load_expert(folder), test["label"].to_numpy(np.int64)
    policy, draws = parse_policy(arguments.preset), range(arguments.draws)
    logits = {
        "clean": _logits(expert, test),
        "distorted": np.concatenate([_logits(expert, test, policy=policy, seed=draw) for draw in draws]),
    }
    labels = {"clean": label, "distorted": np.tile(label, arguments.draws)}
    scores = {kind: roc_auc(labels[kind], logits[kind]) for kind in logits}
    scores |= {f"{kind} AP": float(average_precision_score(labels[kind], logits[kind])) for kind in logits}
    write_json(path, {"what": made_from, "auc": scores})
    return scores


def _logits(expert, rows: pd.DataFrame, **distortions) -> np.ndarray:
    logits = np.full(len(rows), np.nan)
    for batch in score([expert], rows, batch_size=64, workers=2, **distortions):
        logits[batch.rows] = batch.logits[0]
    if np.isnan(logits).any():
        raise UserError(f"{counted(int(np.isnan(logits).sum()), 'test image')} not readable")
    return logits


def _markdown(part: str, table: pd.DataFrame) -> str:
    """Return one part's table: means over the seeds, and differences to the reference with their interval."""
    reference = REFERENCES[part]
    variants = {name: rows.set_index("seed") for name, rows in table.groupby("variant", sort=False)}
    against = f"against {reference}"
    lines = []
    for name, rows in variants.items():
        cells = [name]
        for kind in ("clean", "distorted"):
            compared = name != reference and reference in variants
            cells.append(f"{rows[kind].mean():.4f}")
            cells.append(_difference(rows[kind] - variants[reference][kind]) if compared else "")
        lines.append([*cells, f"{rows['clean AP'].mean():.4f} / {rows['distorted AP'].mean():.4f}"])
    return text_tables.table([part, "clean AUC", against, "distorted AUC", against, "AP"], lines)


def _difference(values: pd.Series) -> str:
    """Return the mean and its 95 % interval by Student's t."""
    mean = values.mean()
    low, high = stats.t.interval(0.95, len(values) - 1, mean, stats.sem(values))
    return f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"


def _flag(pair: str) -> str:
    key, separator, value = pair.partition("=")
    if not separator:
        raise UserError(f"--set {pair} is not of the form KEY=VALUE")
    return f"{flag_of(key)}={value}"


def _folder(name: str) -> str:
    return "_".join("".join(letter if letter.isalnum() else " " for letter in name).split())


if __name__ == "__main__":
    command_line.run(main)
