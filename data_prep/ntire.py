"""The NTIRE challenge's splits: from the archives, as downloaded, to one manifest a split.

    python -m data_prep.ntire --root data/ntire --out data/manifests --holdout 0.05

The archives are read in place and need not be unpacked; folders that they were unpacked to do as well,
whether or not the unpacking nested them. Both are looked for in `--root` and three levels of folders below:

| split | archive or folder | labels |
|---|---|---|
| train | shard_0, shard_1, .. | labels.csv in each |
| val | val_images | val_labels.csv |
| val_hard | val_images_hard | val_hard_labels.csv |
| public_test | test_images | test_labels.csv |
| private_test | private_test_images or private_test | none |
| toy | toy or toy_images | none |
"""

import argparse
import os
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pandas as pd

from data_prep.reading import archives
from data_prep.reading.archives import Container, Tree
from featdistill import command_line
from featdistill.command_line import UserError
from featdistill.images.reading import without_extension
from featdistill.records import label_files, manifest

SEARCH_DEPTH = 3
# What --extra must not touch: these columns come from the images and their label files.
PROTECTED_COLUMNS = ("image", "name", "label", "is_distorted", "distortions")


@dataclass(frozen=True)
class Split:
    """How a split comes.

    Attributes:
        name: what it is called here.
        part: regular expression for the name of its folders and, with `.zip`, of its archives.
        expected: those names for a person.
        label_file: name of its label file; None where no labels were given out.
        is_distorted: 0 where no image is distorted, None where the label file says it or nothing does.
    """

    name: str
    part: str
    expected: str
    label_file: str | None
    is_distorted: int | None = None


_SPLITS = (
    Split("train", r"shard_\d+", "shard_0, shard_1, ..", "labels.csv", is_distorted=0),
    Split("val", "val_images", "val_images", "val_labels.csv"),
    Split("val_hard", "val_images_hard", "val_images_hard", "val_hard_labels.csv"),
    Split("public_test", "test_images", "test_images", "test_labels.csv"),
    Split("private_test", "private_test(_images)?", "private_test_images or private_test", None),
    Split("toy", "toy(_images)?", "toy or toy_images", None, is_distorted=0),
)
SPLITS = {split.name: split for split in _SPLITS}


def find_containers(tree: Tree, split: Split, notes: list[str]) -> list[Container]:
    """Return the archives and folders of a split, ordered by the numbers in their names.

    An archive goes before a folder of the same part. What a person should know is appended to `notes`.

    Raises:
        UserError: an archive is damaged or hostile, or a part is there twice.
    """
    parts: dict[str, Container] = {}

    def add(path: str, name: str, container: Container) -> None:
        part = name if split.name == "train" else split.name
        taken = parts.setdefault(part, container)
        if taken is container:
            return
        if taken.is_archive and not container.is_archive:
            used = tree.relative(taken.path)
            notes.append(f"{tree.relative(path)} is left out: the archive {used} is used")
            return
        raise UserError(f"{taken.path} and {path} are the same part of a split; keep one of them")

    for path in tree.files:
        name, extension = os.path.splitext(os.path.basename(path))
        if extension == ".zip" and re.fullmatch(split.part, name):
            add(path, name, archives.open_archive(path))
    for path in tree.folders:
        *above, name = tree.relative(path).split(os.sep)
        if re.fullmatch(split.part, name) and not any(re.fullmatch(split.part, folder) for folder in above):
            container = archives.open_folder(path)
            if container.images():
                add(path, name, container)
    return sorted(parts.values(), key=lambda part: [int(n) for n in re.findall(r"\d+", Path(part.path).name)])


def find_labels(
    tree: Tree, split: Split, containers: list[Container], notes: list[str]
) -> pd.DataFrame | None:
    """Read the label files of a split, of each part for the training shards.

    Returns:
        What `label_files.read_labels` gives, with a further column `file`; None if there are none.

    Raises:
        UserError: a file is wrong, some training shards have labels and others none, or there are two label
            files that differ.
    """
    if split.label_file is None:
        return None
    found, without = [], []
    beside = [path for path in tree.files if os.path.basename(path) == split.label_file]
    for container in containers:
        locations = [container.location(file) for file in container.named(split.label_file)]
        if split.name != "train":
            locations = beside + locations
        if not locations:
            without.append(container)
            continue
        tables = [label_files.read_labels(location) for location in locations]
        for location, table in zip(locations, tables, strict=True):
            if not table.equals(tables[0]):
                raise UserError(f"{locations[0]} and {location} differ; keep the right one")
        found.append(tables[0].assign(file=locations[0]))
    if found and without:
        raise UserError(f"{without[0].path} holds no {split.label_file}, other parts of its split do")
    if not found:
        notes.append(f"{split.name} has no labels: there is no {split.label_file}")
        return None
    return pd.concat(found)


def build_manifest(split: Split, containers: list[Container], table: pd.DataFrame | None) -> pd.DataFrame:
    """Join the images of a split with their labels, ordered by name.

    Raises:
        UserError: there is no image, two images have one name, or images and labels do not match one to one.
    """
    locations = [(c.location(file), file.rpartition("/")[2]) for c in containers for file in c.images()]
    if not locations:
        raise UserError(f"{containers[0].path} holds no images")
    locations.sort(key=lambda pair: pair[1])
    images = pd.DataFrame(locations, columns=["image", "name"], dtype="object")
    images.index = pd.Index([without_extension(file) for file in images["name"]], dtype="object")
    again = images.index.duplicated()
    if again.any():
        first, second = images.loc[[images.index[again][0]], "image"].iloc[:2]
        raise UserError(f"{split.name}: two images have one name: {first} and {second}")
    columns = {"image": images["image"], "name": images["name"], "source": ["ntire2026"] * len(images)}
    columns["group"] = images.index
    columns["is_distorted"] = [split.is_distorted] * len(images)
    if table is not None:
        _check_match(images, table)
        table = table.loc[images.index]
        columns["label"] = table["label"]
        columns["distortions"] = table["distortions"]
        if split.is_distorted is None:
            columns["is_distorted"] = table["is_distorted"]
    return manifest.make_manifest({column: list(cells) for column, cells in columns.items()})


def join_extra(frame: pd.DataFrame, extra: pd.DataFrame) -> pd.DataFrame:
    """Add the columns of `extra`, a table of `label_files.read_table`, to the rows it names.

    A column that the manifest has already is filled in where `extra` has a value; names it does not know are
    ignored.

    Raises:
        UserError: `extra` has a column that the images and label files decide.
    """
    columns = [column for column in extra if column != "image_name"]
    for column in columns:
        if column in PROTECTED_COLUMNS:
            raise UserError(f"--extra must not have a column {column}: the challenge's own files give it")
    values = extra[columns].reindex([without_extension(name) for name in frame["name"]]).fillna("")
    values.index = frame.index
    for column in columns:
        frame[column] = values[column].where(values[column] != "", frame.get(column, ""))
    return frame


def _check_match(images: pd.DataFrame, table: pd.DataFrame) -> None:
    twice = table[table.index.duplicated()]
    if len(twice):
        first = twice.iloc[0]
        raise UserError(f"{first['file']} names {first['image_name']}, as another label file does")
    missing = table[~table.index.isin(images.index)]
    if len(missing):
        first = missing.iloc[0]
        raise UserError(
            f"{first['file']} names {first['image_name']}, which is not there; {len(missing)} images are "
            "missing: download or unpack them again"
        )
    bare = images["image"][~images.index.isin(table.index)]
    if len(bare):
        file = table["file"].iloc[0]
        raise UserError(f"{bare.iloc[0]} has no label in {file} or its like; {len(bare)} images have none")


def _gaps(containers: list[Container]) -> list[str]:
    """Return the first names of shards that are missing below the highest number that is there."""
    numbers = {int(re.search(r"\d+", Path(container.path).name)[0]) for container in containers}
    gaps = (f"shard_{number}" for number in range(max(numbers)) if number not in numbers)
    return list(islice(gaps, 10))


def _print_table(frames: dict[str, pd.DataFrame], origins: dict[str, str]) -> None:
    print(f"{'split':12} {'images':>8} {'real':>8} {'AI':>8} {'unlabelled':>10} {'distorted':>9}  from")
    for name, frame in frames.items():
        real, ai = ((frame["label"] == label).sum() for label in (0, 1))
        unlabelled, distorted = frame["label"].isna().sum(), (frame["is_distorted"] == 1).sum()
        numbers = f"{len(frame):8} {real:8} {ai:8} {unlabelled:10} {distorted:9}"
        print(f"{name:12} {numbers}  {origins[name]}")


def build_splits(
    root: str, names: list[str] | None, extra: pd.DataFrame | None
) -> tuple[dict[str, pd.DataFrame], dict[str, str], list[str]]:
    """Build the manifests of the splits below `root`.

    Args:
        root: folder to search.
        names: the splits that must be there; None takes those that are.
        extra: further columns, as `join_extra` takes them.

    Returns:
        By the name of the split, its manifest and where it comes from; what a person should know.

    Raises:
        UserError: a split that is asked for is missing, none is there, or the data are wrong.
    """
    tree = archives.search(root, SEARCH_DEPTH)
    frames, origins, notes = {}, {}, []
    for name in dict.fromkeys(names or SPLITS):
        split = SPLITS[command_line.one_of("split", name, SPLITS)]
        containers = find_containers(tree, split, notes)
        if not containers:
            missing = f"{name} is not there: no archive (.zip) or folder {split.expected} below {root}"
            if names:
                raise UserError(missing)
            notes.append(missing)
            continue
        if name == "train" and _gaps(containers):
            notes.append(f"train is not whole: {', '.join(_gaps(containers))} missing")
        frame = build_manifest(split, containers, find_labels(tree, split, containers, notes))
        frames[name] = frame if extra is None else join_extra(frame, extra)
        paths = [tree.relative(container.path) for container in containers]
        origins[name] = paths[0] if len(paths) == 1 else f"{paths[0]} .. {paths[-1]} ({len(paths)})"
    if not frames:
        raise UserError(f"no split of the challenge below {root}; expected its archives as downloaded")
    if extra is not None:
        stems = {without_extension(image) for frame in frames.values() for image in frame["name"]}
        unknown = sum(name not in stems for name in extra.index)
        notes.append(f"{len(extra) - unknown} of the {len(extra)} names in --extra are here")
    return frames, origins, notes


def build_parser() -> argparse.ArgumentParser:
    parser = command_line.Parser(
        prog="python -m data_prep.ntire", description="Write one manifest a split of the NTIRE challenge."
    )
    parser.add_argument(
        "--root", required=True, help="folder with the downloaded archives, or with folders unpacked"
    )
    parser.add_argument("--out", required=True, help="folder for the manifests, <split>.csv")
    parser.add_argument(
        "--splits",
        nargs="+",
        metavar="NAME",
        help=f"these only, of {', '.join(SPLITS)}; default: what is there",
    )
    parser.add_argument("--holdout", type=float, help="share of the training images to write to holdout.csv")
    parser.add_argument("--seed", type=int, default=0, help="another seed holds out other images")
    parser.add_argument(
        "--extra",
        metavar="FILE.csv",
        help="further columns for the manifests, such as generator, by image_name",
    )
    parser.add_argument("--verify", action="store_true", help="decode every image and leave broken ones out")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that verify")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not Path(args.root).is_dir():
        raise UserError(f"--root {args.root} is no folder")
    extra = label_files.read_table(args.extra) if args.extra else None
    frames, origins, notes = build_splits(args.root, args.splits, extra)
    if args.holdout is not None:
        if "train" not in frames:
            raise UserError("--holdout needs the train split")
        training, held = manifest.split_holdout(frames["train"], args.holdout, args.seed)
        frames = {"train": training, "holdout": held, **{k: v for k, v in frames.items() if k != "train"}}
        origins["holdout"] = f"{args.holdout:g} of train"
    if "train" in frames:
        # Beside a new train.csv, an earlier run's hold-out would be rows that are trained on.
        former = Path(args.out) / "holdout.csv"
        if former.exists() and "holdout" not in frames:
            notes.append(f"{former}, of an earlier run, is removed: its rows are in train.csv")
        former.unlink(missing_ok=True)

    for note in notes:
        print(f"note: {note}")
    _print_table(frames, origins)
    unreadable = 0
    for name, frame in frames.items():
        path = Path(args.out) / f"{name}.csv"
        unreadable += archives.write_readable(frame, path, verify=args.verify, workers=args.workers)
    return 1 if unreadable else 0


if __name__ == "__main__":
    command_line.run(main)
