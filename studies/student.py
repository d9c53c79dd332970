"""A student of frozen experts against the same network trained on labels alone, on sources never seen.

    python studies/student.py --images pool/manifest.csv --train split=train --folds fold --out study \\
        --bank features/CLIP/banks/both --score features/CLIP/banks/scored \\
        --features class:6,8,10,12 mean:6,8,10,12 --recipe efficientnet_lite0 --set distill_target=clean

The teachers are logistic regressions on features of a bank (see `studies/features.py`), fused by their
logits. For each fold of the training images, and for the hold-out, they are fitted without it; what they say
of a training image is the score of heads that were fitted without that image's own fold, so it is as unsure
as the teachers are on sources they do not know. The student learns these scores and the labels, the other
network the labels alone: same recipe, seed, images and distortions.

Both are scored on what was left out, clean and with distortions of a preset. A table shows the mean AUC over
seeds, draws and folds with its 95 % interval (DeLong, over images), and the difference to labels alone. The
same command continues a study that was stopped.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distill
import train
from featdistill import command_line, text_tables
from featdistill.atomic import sha256_of, write_text
from featdistill.bank import probe_plan
from featdistill.bank.figures import MeanAuc, mean_auc
from featdistill.bank.probe import folder_name, probe
from featdistill.command_line import Parser, UserError, within
from featdistill.distortions.presets import parse_policy
from featdistill.models.expert import WEIGHTS_FILE, load_expert
from featdistill.records.logits import logits_of, probabilities
from featdistill.records.manifest import read_manifest, split_holdout, write_manifest
from featdistill.records.predictions import read_predictions
from studies.method import difference, image_logits, kept_logits, recipe_flag, shown

_HOLDOUT, _LABELS, _STUDENT, _TEACHERS = "hold-out", "labels alone", "student", "teachers"
_RUNS = {_LABELS: "labels", _STUDENT: "student"}
# What train.py wants as its own hold-out, in whole groups: nothing is chosen by it.
_VAL_SHARE = 0.05


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", required=True, metavar="MANIFEST", help="all images, labeled")
    parser.add_argument("--train", required=True, metavar="COLUMN=VALUE", help="those that are trained on")
    parser.add_argument("--folds", required=True, metavar="COLUMN", help="folds of the training images")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of all runs and of the table")
    parser.add_argument("--bank", required=True, metavar="BANK", help="training views of a backbone")
    parser.add_argument("--score", required=True, metavar="BANK", help="all images as they are scored")
    parser.add_argument("--features", nargs="+", required=True, metavar="TEXT", help="one teacher for each")
    parser.add_argument("--recipe", nargs="+", required=True, metavar="NAME", help="of the small network")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="N")
    parser.add_argument("--draws", type=within(1), default=3, metavar="N", help="draws of --preset")
    parser.add_argument("--preset", default="test_public", help="distortions of the scored images")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="recipe keys of both")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    parts = list(_parts(arguments))
    for part in parts:
        part.fit_teachers(arguments)
    text = ""
    for seed in arguments.seeds:
        for part in parts:
            part.run(seed, arguments)
        text = _tables(parts)
        write_text(Path(arguments.out) / "student.md", text)
    print(text, end="")
    return 0


class Part:
    """A fold or the hold-out: images that are scored, and those that are trained on.

    Args:
        scored, train: labeled rows.
        conditions: `COLUMN=VALUE` of the images to train on.
    """

    def __init__(
        self, name: str, folder: Path, scored: pd.DataFrame, train: pd.DataFrame, conditions: list[str]
    ) -> None:
        self.name, self.folder, self.scored, self.conditions = name, folder, scored, conditions
        self.label = scored["label"].to_numpy(np.int64)
        self.logits: dict[tuple[str, str], list[np.ndarray]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.train, val = split_holdout(train, _VAL_SHARE, seed=0)
        for rows, which in ((self.train, "train"), (val, "val")):
            write_manifest(rows, folder / f"{which}.csv")

    def fit_teachers(self, arguments) -> None:
        """Fit the teachers; keep their scores of the training images, and those of the scored ones."""
        settings = probe_plan.Settings(
            banks=[arguments.bank],
            score=[arguments.score],
            features=arguments.features,
            train=self.conditions,
            folds=arguments.folds,
            control=False,
            write_experts=False,
        )
        probe(settings, self.folder / "teachers")
        fused = self._taught(probe_plan.FOLDS_PART, "clean", arguments).loc[self.train["name"]]
        table = pd.DataFrame({"name": fused.index, "score": probabilities(fused.to_numpy())})
        write_text(self.folder / "teachers.csv", table.to_csv(index=False))
        views = {"clean": ["clean"], "robust": [f"evaluation-{draw + 1}" for draw in range(arguments.draws)]}
        for kind, names in views.items():
            rows = [self._taught(probe_plan.HOLDOUT_PART, view, arguments) for view in names]
            self.logits[_TEACHERS, kind] = [each.loc[self.scored["name"]].to_numpy() for each in rows]

    def _taught(self, which: str, view: str, arguments) -> pd.Series:
        """Return the teachers' mean logit of the images of a part of the probe, by their names."""
        found = []
        for feature in arguments.features:
            table = read_predictions(self.folder / "teachers" / folder_name(feature) / f"{which}-{view}.csv")
            found.append(pd.Series(logits_of(table["score"].to_numpy()), table["name"]))
        return sum(found) / len(found)

    def run(self, seed: int, arguments) -> None:
        """Train both networks with a seed, and score what was left out."""
        folder = self.folder / f"seed{seed}"
        common = ["--recipe", *arguments.recipe, "--seed", str(seed)]
        common += ["--train", str(self.folder / "train.csv"), "--val", str(self.folder / "val.csv")]
        flags = [recipe_flag(pair) for pair in arguments.set]
        # What the student alone knows: how it learns from its teachers.
        of_both = [flag for flag in flags if not flag.startswith("--distill-")]
        train.main([*common, *of_both, "--out", str(folder / _RUNS[_LABELS])])
        targets = ["--predictions", str(self.folder / "teachers.csv")]
        distill.main([*common, *flags, *targets, "--out", str(folder / _RUNS[_STUDENT])])
        for kind, logits in self._scores(folder, arguments).items():
            for name, drawn in zip(_RUNS, logits, strict=True):
                self.logits.setdefault((name, kind), []).extend(drawn)

    def _scores(self, folder: Path, arguments) -> dict[str, np.ndarray]:
        """Return the logits of both networks' last experts, (2, views, N), `clean` and `robust`."""
        folders = [folder / run / "expert-last" for run in _RUNS.values()]
        made_from = [sha256_of(each / WEIGHTS_FILE) for each in folders], arguments.preset, arguments.draws
        return kept_logits(folder / "logits.npz", made_from, lambda: self._compute(folders, arguments))

    def _compute(self, folders: list[Path], arguments) -> dict[str, np.ndarray]:
        experts, policy = [load_expert(each) for each in folders], parse_policy(arguments.preset)
        rows, draws = self.scored.assign(is_distorted=0), range(arguments.draws)
        drawn = [image_logits(experts, rows, policy=policy, seed=draw) for draw in draws]
        return {"clean": image_logits(experts, rows)[:, None], "robust": np.stack(drawn, axis=1)}


def _parts(arguments) -> Iterator[Part]:
    """Return the folds, and the hold-out."""
    rows, out = read_manifest(arguments.images), Path(arguments.out)
    rows = rows[rows["label"].notna()].reset_index(drop=True)
    column, sign, value = arguments.train.partition("=")
    if not sign or column not in rows or arguments.folds not in rows:
        raise UserError("--train must be COLUMN=VALUE, and --folds a column, of the manifest")
    is_train, fold = rows[column].astype(str) == value, rows[arguments.folds].astype(str)
    folds = sorted(fold[is_train].unique())
    for left in folds:
        others = [f"{arguments.folds}={each}" for each in folds if each != left]
        is_left = is_train & (fold == left)
        yield Part(f"fold {left}", out / f"fold{left}", rows[is_left], rows[is_train & ~is_left], others)
    yield Part(_HOLDOUT, out / "holdout", rows[~is_train], rows[is_train], [arguments.train])


def _tables(parts: list[Part]) -> str:
    """Return a table for the folds, and one for the hold-out."""
    texts = []
    for title, chosen in (("folds", parts[:-1]), (_HOLDOUT, parts[-1:])):
        lines = []
        for name in (_TEACHERS, *_RUNS):
            cells = [name]
            for kind in ("clean", "robust"):
                auc = _auc(chosen, name, kind)
                cells += [shown(auc), "" if name == _LABELS else difference(auc, _auc(chosen, _LABELS, kind))]
            lines.append(cells)
        header = ["", "clean", "- labels alone", "robust", "- labels alone"]
        texts.append(f"## {title}\n\n{text_tables.table(header, lines)}\n")
    return "\n".join(texts)


def _auc(parts: list[Part], name: str, kind: str) -> MeanAuc:
    """Return the mean AUC within the parts, over seeds and draws."""
    label, found, start = np.concatenate([part.label for part in parts]), [], 0
    for part in parts:
        inside = slice(start, start := start + len(part.label))
        for logits in part.logits[name, kind]:
            score, mask = np.zeros(len(label)), np.zeros(len(label), bool)
            score[inside], mask[inside] = logits, True
            found.append((score, mask))
    return mean_auc(label, found)


if __name__ == "__main__":
    command_line.run(main)
