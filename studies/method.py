"""What each part of the method brings: distortions, stage 2 against more of stage 1, masking; over seeds.

    python studies/method.py --recipe demo_clip_a --seeds 1 2 3 --out study \\
        --train data/demo/train.csv --val data/demo/holdout.csv --test data/demo/val.csv

Each seed trains stage 1 once for every distortion policy, and from the one of the recipe's own policy every
variant of stage 2, all of the same length; `continued` is cross-entropy alone, so that what the others bring
is not the longer training. Masking (MPFT) is tried in stage 1, under the recipe's own distortions.

The expert of the last epoch is scored on `--test`, which no run has seen: clean, and under a preset of
distortions drawn from (draw, name). A table gives the mean over the seeds and, against the reference of its
half, the mean difference of the same seed with its 95 % interval (Student's t).

A study that was stopped goes on with the same command; finished runs and scores are kept.
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
from featdistill import command_line
from featdistill.atomic import sha256_of, write_json, write_text
from featdistill.command_line import Parser, UserError, one_of
from featdistill.distortions.presets import parse_policy
from featdistill.evaluation import metrics
from featdistill.inference import scoring as ensemble
from featdistill.models.expert import WEIGHTS_FILE, load_expert
from featdistill.records.manifest import read_manifests

# Stage 1 under other distortions than the recipe's: the same probability and number, another library.
POLICIES = {
    "none": "none",
    "official": "official,probability=0.8",
    "extended": "official,probability=0.8,libraries=extended:1",
    "official and extended": "released_featdistill",
}
BASE = "official and extended"
# Stage 1 with half of the patches masked, by what they hold.
MASKS = {
    "no mask": [],
    "random": ["--mask", "random"],
    "smooth": ["--mask", "smooth"],
    "texture": ["--mask", "texture"],
}
REFERENCES = {"stage 1": "none", "stage 2": "continued", "masking": "no mask"}
# Stage 2; every variant trains as long as the others, from the same stage-1 expert.
STAGE_2 = {
    "continued": ["--objective", "crd", "--teacher-view", "same", "--crd-weight", "0"],
    "reading A (dense)": [],
    "reading B (crd)": ["--recipe", "featdistill_crd"],
    "both": ["--recipe", "featdistill_both"],
}


def build_parser() -> Parser:
    parser = Parser(description="What each part of the method brings, over several seeds.")
    parser.add_argument("--recipe", nargs="+", required=True, metavar="NAME", help="recipes, as for train.py")
    for flag, text in (("train", "training"), ("val", "hold-out"), ("test", "test")):
        parser.add_argument(
            f"--{flag}", nargs="+", required=True, metavar="MANIFEST", help=f"labelled {text} manifests"
        )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of all runs and of the tables")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="N")
    parser.add_argument("--preset", default="test_public", help="distortions of the test images")
    parser.add_argument("--draws", type=int, default=1, help="distorted copies of each test image")
    parser.add_argument("--policies", nargs="*", default=list(POLICIES), metavar="NAME", help="of stage 1")
    parser.add_argument("--stage2", nargs="*", default=list(STAGE_2), metavar="NAME", help="variants")
    parser.add_argument("--masks", nargs="*", default=[], metavar="NAME", help=", ".join(MASKS))
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="recipe keys of both stages"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    for name in arguments.policies:
        one_of("policy", name, POLICIES)
    for name in arguments.stage2:
        one_of("variant", name, STAGE_2)
    for name in arguments.masks:
        one_of("mask", name, MASKS)
    if len(set(arguments.seeds)) < 2:
        raise UserError("--seeds needs two different ones at least: an interval is taken over them")
    out, test = Path(arguments.out), read_manifests(arguments.test)
    common = [part for pair in arguments.set for part in _flag(pair)]
    data = ["--train", *arguments.train, "--val", *arguments.val]
    rows = []
    for seed in arguments.seeds:
        for name in dict.fromkeys([*arguments.policies, *([BASE] if arguments.stage2 else [])]):
            run = out / f"seed{seed}" / "stage1" / _folder(name)
            flags = ["--recipe", *arguments.recipe, "--seed", str(seed), "--distortions", POLICIES[name]]
            train.main([*flags, *common, *data, "--out", str(run)])
            rows.append({"half": "stage 1", "variant": name, "seed": seed} | _score(run, test, arguments))
        teacher = out / f"seed{seed}" / "stage1" / _folder(BASE) / "expert-last"
        for name in arguments.stage2:
            run = out / f"seed{seed}" / "stage2" / _folder(name)
            flags = ["--recipe", *arguments.recipe, *_recipes(STAGE_2[name]), "--seed", str(seed)]
            flags += ["--distortions", POLICIES[BASE], *_others(STAGE_2[name])]
            distill.main([*flags, *common, *data, "--teacher", str(teacher), "--out", str(run)])
            rows.append({"half": "stage 2", "variant": name, "seed": seed} | _score(run, test, arguments))
        for name in arguments.masks:
            run = out / f"seed{seed}" / "masking" / _folder(name)
            flags = ["--recipe", *arguments.recipe, "--seed", str(seed), *MASKS[name]]
            train.main([*flags, *common, *data, "--out", str(run)])
            rows.append({"half": "masking", "variant": name, "seed": seed} | _score(run, test, arguments))
    table = pd.DataFrame(rows)
    tried = [half for half in REFERENCES if half in set(table["half"])]
    text = "\n\n".join(_markdown(half, table, REFERENCES[half]) for half in tried)
    write_text(out / "study.csv", table.to_csv(index=False))
    write_text(out / "study.md", text + "\n")
    print(text)
    return 0


def _score(run: Path, test: pd.DataFrame, arguments) -> dict[str, float]:
    """Return AUC and average precision of a run's last expert on the test rows, clean and distorted."""
    path, folder = run / "study_score.json", run / "expert-last"
    what = {
        "weights": sha256_of(folder / WEIGHTS_FILE),
        "test": [sha256_of(manifest) for manifest in arguments.test],
        "preset": arguments.preset,
        "draws": arguments.draws,
    }
    known = json.loads(path.read_text()) if path.is_file() else {}
    if known.get("what") == what:
        return known["auc"]
    expert, label = load_expert(folder), test["label"].to_numpy(np.int64)
    settings = {"batch_size": 64, "workers": 2}
    policy = parse_policy(arguments.preset)
    clean = _logits(expert, test, **settings)
    distorted = np.concatenate(
        [_logits(expert, test, policy=policy, seed=draw, **settings) for draw in range(arguments.draws)]
    )
    again = np.tile(label, arguments.draws)
    scores = {
        "clean": metrics.roc_auc(label, clean),
        "distorted": metrics.roc_auc(again, distorted),
        "clean AP": float(average_precision_score(label, clean)),
        "distorted AP": float(average_precision_score(again, distorted)),
    }
    write_json(path, {"what": what, "auc": scores})
    return scores


def _logits(expert, rows: pd.DataFrame, **settings) -> np.ndarray:
    logits = np.full(len(rows), np.nan)
    for batch in ensemble.score([expert], rows, **settings):
        logits[batch.rows] = batch.logits[0]
    if np.isnan(logits).any():
        raise UserError(f"{int(np.isnan(logits).sum())} test images cannot be read")
    return logits


def _markdown(half: str, table: pd.DataFrame, reference: str) -> str:
    """Return one half's table: means over the seeds, and differences to the reference with their interval."""
    part = table[table["half"] == half]
    lines = [f"| {half} | clean AUC | against {reference} | distorted AUC | against {reference} | AP |"]
    lines.append("|---|---|---|---|---|---|")
    for name in dict.fromkeys(part["variant"]):
        own = part[part["variant"] == name].set_index("seed")
        base = part[part["variant"] == reference].set_index("seed")
        cells = [name]
        for column in ("clean", "distorted"):
            cells.append(f"{own[column].mean():.4f}")
            difference = own[column] - base[column] if len(base) else None
            cells.append("" if name == reference or difference is None else _difference(difference))
        cells.append(" / ".join(f"{own[f'{column} AP'].mean():.4f}" for column in ("clean", "distorted")))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _difference(values: pd.Series) -> str:
    """Return the mean and Student's 95 % interval of it."""
    mean, spread = values.mean(), stats.sem(values)
    reach = float(stats.t.ppf(0.975, len(values) - 1) * spread)
    return f"{mean:+.4f} ({mean - reach:+.4f} to {mean + reach:+.4f})"


def _flag(pair: str) -> tuple[str, str]:
    key, separator, value = pair.partition("=")
    if not separator:
        raise UserError(f"--set takes KEY=VALUE, not '{pair}'")
    return f"--{key.replace('_', '-')}", value


def _recipes(flags: list[str]) -> list[str]:
    return flags[1:] if flags[:1] == ["--recipe"] else []


def _others(flags: list[str]) -> list[str]:
    return [] if flags[:1] == ["--recipe"] else flags


def _folder(name: str) -> str:
    return "_".join("".join(letter if letter.isalnum() else " " for letter in name).split())


if __name__ == "__main__":
    command_line.run(main)
