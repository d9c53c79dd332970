"""Score images with an ensemble of experts: P(AI-generated), averaged (paper, section 4.4, eq. 3).

    python predict.py --split private_test                 with the experts of the last run
    python predict.py --split val val_hard public_test     several splits, one after the other
    python predict.py --images FOLDER --experts runs/paper/stage2/*/expert --out scores.csv
    python predict.py --manifest data/val.csv

It writes `OUT.csv` (name, score, a column an expert), `OUT.csv.json` (what made it) and, where images could
not be read, `OUT.errors.csv`; the status is then 1. A run that was killed is continued by the same command.
"""

import dataclasses
import os
from pathlib import Path

import pandas as pd
import torch

from featdistill import command_line, ensemble, image_io
from featdistill.command_line import Parser, UserError
from featdistill.experts import Expert, load_expert, read_card
from featdistill.manifest import make_manifest, read_manifest, write_manifest
from featdistill.predictions import (
    difference,
    errors_path,
    manifest_entry,
    read_errors,
    read_sidecar,
    write_predictions,
)
from featdistill.run_folder import latest_experts


def build_parser() -> Parser:
    parser = Parser(description="Score images with an ensemble of experts: P(AI-generated), averaged.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--split", nargs="+", metavar="NAME", help="splits by name: NAME.csv in the --data folder"
    )
    what.add_argument("--manifest", nargs="+", metavar="FILE", help="manifests")
    what.add_argument("--images", metavar="DIR", help="a folder of images, searched with all its subfolders")
    parser.add_argument(
        "--experts", nargs="+", metavar="DIR", help="experts' folders (default: those of the last run)"
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder of the splits' manifests (default: where the experts' training manifest lies)",
    )
    parser.add_argument(
        "--out",
        help="predictions file (FILE.csv), or a folder for NAME.csv of each split (default: the folder "
        "predictions beside the stage of the last run; with --experts, predictions)",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="images a batch")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="loader processes")
    parser.add_argument(
        "--precision",
        choices=tuple(ensemble.PRECISIONS),
        default=None,
        help="arithmetic of the experts (default: bf16 on a GPU, fp32 on a CPU)",
    )
    parser.add_argument(
        "--device", default=None, help="cuda, cuda:1, cpu, ... (default: a GPU where there is one)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.batch_size < 1 or arguments.workers < 0:
        raise UserError("--batch-size must be at least 1 and --workers at least 0")
    folders = [Path(folder) for folder in arguments.experts] if arguments.experts else latest_experts()
    jobs = _jobs(arguments, folders)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = arguments.precision or ("bf16" if device.type == "cuda" else "fp32")
    if precision == "fp16" and device.type == "cpu":
        raise UserError("precision fp16 needs a GPU; give --precision bf16 or fp32")
    named = _names(folders)
    experts = {name: load_expert(folder).to(device) for name, folder in named.items()}
    print(f"{len(experts)} experts on {device} in {precision}: {', '.join(experts)}")
    settings = {"batch_size": arguments.batch_size, "workers": arguments.workers, "precision": precision}
    settings["device"] = device
    sidecar = {
        "experts": {name: read_card(folder)["weights_sha256"] for name, folder in named.items()},
        "preprocessing": {name: dataclasses.asdict(expert.preprocessing) for name, expert in experts.items()},
        "fusion": "probability_mean",
        "precision": precision,
        "batch_size": arguments.batch_size,
    }
    return max(_predict(experts, manifest, out, sidecar, settings) for manifest, out in jobs)


def _predict(experts: dict[str, Expert], manifest: Path, out: Path, sidecar: dict, settings: dict) -> int:
    """Score one manifest to one file; return 1 where images could not be read, else 0."""
    sidecar = sidecar | {"manifest": manifest_entry(manifest, out)}
    rows = read_manifest(manifest)
    if rows.empty:
        raise UserError(f"manifest {manifest} has no rows")
    former = read_sidecar(out)
    changed = difference(former, sidecar) if former is not None else None
    if changed:
        raise UserError(
            f"{out} was made otherwise: {changed}; give another --out, or remove it to predict anew"
        )
    if former is not None and out.is_file():
        broken = read_errors(out)
        print(f"{out} is finished; nothing to do")
        return _report_broken(broken, out)
    partial_path = out.with_name(f".{out.name}.partial")
    if out.is_file() and former is None and not partial_path.is_file():
        raise UserError(f"{out} exists and was not made by this command; give another --out, or remove it")
    partial = ensemble.PartialScores(partial_path, sidecar)
    logits, broken_rows = ensemble.score_resumably(
        list(experts.values()), rows, partial, manifest.stem, **settings
    )
    names = rows["name"].tolist()
    broken = [(names[row.index], row.reason) for row in broken_rows]
    good = ~pd.Series(range(len(rows))).isin([row.index for row in broken_rows]).to_numpy()
    single = ensemble.probabilities(logits[:, good])
    fused = ensemble.fuse(single)
    write_predictions(
        out,
        rows["name"][good].tolist(),
        fused,
        dict(zip(experts, single, strict=True)),
        sidecar,
        broken,
    )
    partial.remove()
    print(f"{out}: {int(good.sum())} images scored, mean P(AI) {fused.mean():.3f}")
    return _report_broken(broken, out)


def _report_broken(broken: list[tuple[str, str]], out: Path) -> int:
    for name, reason in broken[:10]:
        print(f"could not be read: {name}: {reason}")
    if broken:
        print(f"{len(broken)} images could not be read; all of them are in {errors_path(out)}")
    return 1 if broken else 0


def _names(folders: list[Path]) -> dict[str, Path]:
    """Name each expert after its run: `runs/x/stage2/clip_l14_a/expert` is `clip_l14_a`."""
    names: dict[str, Path] = {}
    for folder in folders:
        absolute = folder.resolve()
        name = absolute.parent.name if absolute.name in ("expert", "expert-last") else absolute.name
        if name in names:
            name = f"{name}_{len(names) + 1}"
        names[name] = folder
    return names


def _jobs(arguments, folders: list[Path]) -> list[tuple[Path, Path]]:
    """Return (manifest, predictions file) of all that is asked for."""
    by_hand = arguments.experts is not None
    default_folder = Path("predictions") if by_hand else folders[0].parent.parent.parent / "predictions"
    out = Path(arguments.out or default_folder)
    is_file = out.suffix == ".csv"
    if arguments.images:
        images = Path(arguments.images)
        out = out if is_file else out / f"{images.resolve().name}.csv"
        return [(_manifest_of_folder(images, out), out)]
    if arguments.manifest:
        manifests = [Path(manifest) for manifest in arguments.manifest]
    else:
        data = Path(arguments.data) if arguments.data else _data_folder(folders[0])
        manifests = [data / f"{split}.csv" for split in arguments.split]
        for manifest in manifests:
            if not manifest.is_file():
                known = sorted(path.stem for path in data.glob("*.csv"))
                nearest = command_line.nearest(manifest.stem, known)
                raise UserError(
                    f"no manifest {manifest}{nearest}; make it with data_prep, or give --data DIR"
                )
    if is_file and len(manifests) > 1:
        raise UserError("--out names one file, but several splits are asked for; name a folder")
    return [(path, out if is_file else out / f"{path.stem}.csv") for path in manifests]


def _data_folder(expert: Path) -> Path:
    """Return the folder of the manifest an expert was trained on."""
    trained_on = read_card(expert).get("data", {}).get("train")
    if not trained_on:
        raise UserError(f"{expert} does not say what it was trained on; give --data DIR or --manifest FILE")
    return Path(trained_on[0]["path"]).parent


def _manifest_of_folder(folder: Path, out: Path) -> Path:
    """Write the manifest of a folder beside the predictions; names are paths relative to the folder."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder")
    images = image_io.list_images(folder)
    if not images:
        raise UserError(f"{folder} holds no images ({', '.join(image_io.IMAGE_SUFFIXES)})")
    path = out.with_suffix(".manifest.csv")
    names = [image.relative_to(folder).as_posix() for image in images]
    write_manifest(make_manifest({"image": [str(image.resolve()) for image in images], "name": names}), path)
    return path


if __name__ == "__main__":
    command_line.run(main)
