"""Images that a trained expert gets wrong, or should: attacked ones, and reconstructions of real ones.

    python -m data_prep.hard_negatives data/train.csv --expert runs/a/stage1/clip_l14_a/expert \\
        --method pgd --epsilon 4 --steps 10 --out data/hard_pgd
    python -m data_prep.hard_negatives data/train.csv --method reconstruct \\
        --autoencoder diffusers:stabilityai/sd-vae-ft-mse --out data/hard_vae

The paper (4.6) trains on hard negatives from targeted adversarial attacks; it does not say which. Here an
attack (`pgd`, `mi-pgd`) changes an image by at most `--epsilon` in 8-bit steps so that the expert takes it
for the other class; the label stays what it is. `reconstruct` passes images, by default the real ones,
through an autoencoder and calls the result AI-generated: what was shown stays, the decoder's traces are new.

| file | holds |
|---|---|
| `images.zip` | the images, below `images/` |
| `manifest.csv` | the rows of the originals with the columns below; `name` ends in `_METHOD.png` or `.jpg` |
| `errors.csv` | images that could not be read, where there are any; the status is then 1 |
| `hard_negatives.json` | what they were made from and with; written last |

| column | holds |
|---|---|
| `original` | the name of the image it was made of |
| `method`, `epsilon`, `steps` | how; the last two are empty for reconstructions |
| `score_before` | P(AI) of the original, by the expert |
| `score_after` | P(AI) of what is stored, read back from the file's own bytes |
| `survives` | 1 where the expert is on the wrong side of 0.5 about the stored image, else 0 |

Scores are empty where no expert is given. `group` is the original's, or for one without a group the group
that `manifest.split_holdout` gives it, so that both stay on one side of a hold-out. An image whose longer
side exceeds `--max-side` is reduced first, and the budget is against the reduced image.

Attack both classes, which is the default, and store negatives as the other training images are stored (see
data_prep.equalise): else the noise or the PNG itself says what class an image is of. What was under way when
a run was stopped is continued by the same command, a batch at a time; a finished one is left as it is.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch

from data_prep.attacks import adversarial
from data_prep.attacks.reconstructions import Autoencoder, load_autoencoder, reconstruct
from data_prep.writing import copies as image_copies
from featdistill import atomic, command_line
from featdistill.command_line import Parser, UserError, progress
from featdistill.images.reading import BrokenImage, decode, encode_jpeg, limit_side, read_image
from featdistill.models.expert import Expert, load_expert, read_card
from featdistill.records.manifest import read_manifest
from featdistill.seeds import evaluation_generator

METHODS = (*adversarial.METHODS, "reconstruct")
LABELS = {"real": (0,), "ai": (1,), "both": (0, 1)}
FORMATS = {"png": ".png", "jpeg": ".jpg"}


@dataclass
class Maker:
    """Makes the images of one batch.

    Attributes:
        expert: None only where images are reconstructed and not scored.
        attack: None where images are reconstructed.
        autoencoder: None where images are attacked.
    """

    expert: Expert | None
    attack: adversarial.Attack | None
    autoencoder: Autoencoder | None
    device: torch.device
    seed: int
    file_format: str
    quality_0_100: int
    max_side_px: int

    def make(self, rows: pd.DataFrame, paths: list[Path]) -> dict[str, Any]:
        """Write the images of some rows to their paths.

        Returns:
            For each row that could be read its two scores, or [] without an expert; else why it could not.
        """
        images: dict[int, np.ndarray] = {}
        record: dict[str, Any] = {"scores": {}, "errors": {}}
        for place, location in enumerate(rows["image"]):
            try:
                images[place] = limit_side(read_image(location), self.max_side_px)
            except BrokenImage as error:
                record["errors"][str(rows.index[place])] = str(error)
        if not images:
            return record
        originals = list(images.values())
        written = [self._encode(image) for image in self._change(rows.iloc[list(images)], originals)]
        for place, data in zip(images, written, strict=True):
            with atomic.replace_file(paths[place]) as beside:
                beside.write_bytes(data)
        keys = [str(rows.index[place]) for place in images]
        if self.expert is None:
            return record | {"scores": {key: [] for key in keys}}
        before = adversarial.score(self.expert, originals).tolist()
        after = adversarial.score(self.expert, [decode(data) for data in written]).tolist()
        scores = {key: list(pair) for key, *pair in zip(keys, before, after, strict=True)}
        return record | {"scores": scores}

    def _change(self, rows: pd.DataFrame, images: list[np.ndarray]) -> list[np.ndarray]:
        if self.autoencoder is not None:
            return reconstruct(self.autoencoder, images, self.device)
        generators = [evaluation_generator(self.seed, name) for name in rows["name"]]
        towards_ai = (rows["label"] == 0).tolist()
        return adversarial.attack(self.expert, images, towards_ai, self.attack, generators)

    def _encode(self, image: np.ndarray) -> bytes:
        if self.file_format == "jpeg":
            return encode_jpeg(image, self.quality_0_100)
        return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def describe(
    rows: pd.DataFrame, scores: list[list[float]], attack: adversarial.Attack | None, generator: str
) -> pd.DataFrame:
    """Return the manifest's rows of what was made of `rows`; `name` and `image` are still the originals'.

    Args:
        scores: [before, after] of each row, or [].
        attack: None for reconstructions.
        generator: what made reconstructions.
    """
    made = rows.assign(original=rows["name"], method=attack.method if attack else "reconstruct")
    made["group"] = made["group"].where(made["group"] != "", "name:" + made["name"])
    made["epsilon"], made["steps"] = (attack.epsilon, attack.steps) if attack else ("", "")
    if not attack:
        made["label"], made["generator"] = 1, generator
    for place, column in enumerate(("score_before", "score_after")):
        made[column] = [str(pair[place]) if pair else "" for pair in scores]
    made["survives"] = [
        str(int((pair[1] >= 0.5) != (label == 1))) if pair else ""
        for pair, label in zip(scores, made["label"], strict=True)
    ]
    return made


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m data_prep.hard_negatives",
        description="Make adversarial hard negatives against an expert, or reconstructions.",
    )
    parser.add_argument("manifest", metavar="MANIFEST")
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder for the images")
    parser.add_argument("--method", required=True, metavar="NAME", help=f"one of {', '.join(METHODS)}")
    parser.add_argument(
        "--expert", metavar="DIR", help="folder of the expert that is attacked, or that scores"
    )
    parser.add_argument("--label", choices=LABELS, help="which images (default: both; real for reconstruct)")
    parser.add_argument("--seed", type=int, default=0, help="another seed starts pgd elsewhere")
    attack = parser.add_argument_group("attacks")
    attack.add_argument("--epsilon", type=int, default=4, help="budget in 8-bit steps")
    attack.add_argument("--steps", type=int, default=10, help="gradient steps")
    attack.add_argument(
        "--step-size", type=float, help="in 8-bit steps (default: 2.5 or, for mi-pgd, 1 x epsilon / steps)"
    )
    attack.add_argument("--momentum", type=float, default=1.0, help="decay of mi-pgd")
    parser.add_argument_group("reconstructions").add_argument(
        "--autoencoder", metavar="NAME", help="module:function or diffusers:REPO"
    )
    storage = parser.add_argument_group("storage and computing")
    storage.add_argument("--format", choices=FORMATS, default="png", help="of the images")
    storage.add_argument("--quality", type=int, default=95, help="of JPEGs")
    storage.add_argument("--max-side", type=int, default=1024, help="longer images are reduced to it, in px")
    storage.add_argument("--batch-size", type=int, default=8, help="images a batch")
    storage.add_argument("--device", help="cuda, cuda:1, cpu, ... (default: a GPU where there is one)")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    _check(arguments)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    is_attack = arguments.method in adversarial.METHODS
    attack = None
    if is_attack:
        given = (
            arguments.method,
            arguments.epsilon,
            arguments.steps,
            arguments.step_size,
            arguments.momentum,
        )
        attack = adversarial.Attack(*given)
    label = arguments.label or ("both" if is_attack else "real")
    frame = read_manifest(arguments.manifest)
    rows = frame[frame["label"].isin(LABELS[label])].reset_index(drop=True)
    if rows.empty:
        raise UserError(f"{arguments.manifest} has no image with label {label}")
    made_with = {
        "manifest_sha256": atomic.sha256_of(arguments.manifest),
        "expert": read_card(arguments.expert)["weights_sha256"] if arguments.expert else None,
        "attack": asdict(attack) if attack else None,
        "autoencoder": None if is_attack else arguments.autoencoder,
        # Sums are rounded otherwise on another device or in another batch.
        "device": device.type,
        "label": label,
    }
    flags = ("seed", "format", "quality", "max_side", "batch_size")
    made_with |= {flag: getattr(arguments, flag) for flag in flags}
    copy = image_copies.ImageCopy(arguments.out, "hard_negatives.json", made_with)
    status = copy.finished_status()
    if status is not None:
        return status
    names = image_copies.file_names(rows["name"], f"_{arguments.method}{FORMATS[arguments.format]}")
    expert = load_expert(arguments.expert).to(device).requires_grad_(False) if arguments.expert else None
    autoencoder = None if is_attack else load_autoencoder(arguments.autoencoder, device)
    maker = Maker(
        expert,
        attack,
        autoencoder,
        device,
        arguments.seed,
        arguments.format,
        arguments.quality,
        arguments.max_side,
    )
    paths = [copy.work / f"{row}{FORMATS[arguments.format]}" for row in range(len(rows))]
    scores, errors = _make(maker, rows, paths, copy.work, arguments.batch_size)
    good = sorted(scores)
    generator = "" if is_attack else _generator(arguments.autoencoder)
    made = describe(rows.iloc[good], [scores[row] for row in good], attack, generator)
    made["name"] = [names[row] for row in good]
    broken = [(rows["name"][row], errors[row]) for row in sorted(errors)]
    status = copy.finish(made, [paths[row] for row in good], broken)
    print(f"{arguments.out}: {len(made)} images")
    for label, own in made.groupby(rows["label"].iloc[good]) if expert is not None else ():
        means = [own[column].astype(float).mean() for column in ("score_before", "score_after")]
        wrong = (own["survives"] == "1").mean()
        print(
            f"{len(own)} made of label {label}: mean P(AI) {means[0]:.3f} before, {means[1]:.3f} after; "
            f"wrong as stored {wrong:.1%}"
        )
    return status


def _make(
    maker: Maker, rows: pd.DataFrame, paths: list[Path], work: Path, batch_size: int
) -> tuple[dict[int, list[float]], dict[int, str]]:
    """Make all batches that are not there yet; return the scores and the errors by row."""
    work.mkdir(parents=True, exist_ok=True)
    scores: dict[int, list[float]] = {}
    errors: dict[int, str] = {}
    with progress(len(rows), "hard negatives") as bar:
        for first in range(0, len(rows), batch_size):
            own = slice(first, first + batch_size)
            # Written after the batch's images, so that it says that all of them are there.
            path = work / f"batch-{first}.json"
            if path.is_file():
                record = json.loads(path.read_text(encoding="utf-8"))
            else:
                record = maker.make(rows.iloc[own], paths[own])
                atomic.write_json(path, record)
            scores |= {int(row): pair for row, pair in record["scores"].items()}
            errors |= {int(row): reason for row, reason in record["errors"].items()}
            bar.update(len(rows.iloc[own]))
    return scores, errors


def _check(arguments) -> None:
    command_line.one_of("--method", arguments.method, METHODS)
    if arguments.method == "reconstruct":
        if not arguments.autoencoder:
            raise UserError("--method reconstruct needs --autoencoder module:function or diffusers:REPO")
    elif not arguments.expert:
        raise UserError(f"--method {arguments.method} needs --expert DIR, the expert that is attacked")
    elif arguments.autoencoder:
        raise UserError(f"--autoencoder is for --method reconstruct, not {arguments.method}")
    for flag, low, high in (
        ("epsilon", 1, 255),
        ("steps", 1, None),
        ("quality", 1, 100),
        ("max_side", 16, None),
        ("batch_size", 1, None),
        ("seed", 0, None),
        ("momentum", 0, None),
    ):
        value = getattr(arguments, flag)
        if not low <= value <= (high or float("inf")):
            limits = f"from {low} to {high}" if high else f"{low} or more"
            raise UserError(f"--{flag.replace('_', '-')} must be {limits}, not {value}")
    if arguments.step_size is not None and not arguments.step_size > 0:
        raise UserError(f"--step-size must be more than 0, not {arguments.step_size}")


def _generator(autoencoder: str) -> str:
    """Name a reconstruction's generator: `AutoencoderKL REPO`, or the function as it was given."""
    library, _, rest = autoencoder.partition(":")
    return f"AutoencoderKL {rest}" if library == "diffusers" else autoencoder


if __name__ == "__main__":
    command_line.run(main)
