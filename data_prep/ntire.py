"""The NTIRE challenge's splits: from the archives, as downloaded, to one manifest per split.

    python -m data_prep.ntire --root data/ntire --out data/manifests --holdout 0.05

The archives are read in place and need not be unpacked; folders that they were unpacked to work as well,
nested or not. Both are searched for in `--root` and in three levels of folders below it:

| split | archive or folder | labels |
|---|---|---|
| train | shard_0, shard_1, .. | labels.csv in each |
| val | val_images | val_labels.csv |
| val_hard | val_images_hard | val_hard_labels.csv |
| public_test | test_images | test_labels.csv |
| private_test | private_test_images or private_test | none |
| toy | toy or toy_images | none |
"""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from data_prep.reading import archives
from data_prep.reading.archives import Container, Tree
from data_prep.reading.files import FAULT
from data_prep.writing.flags import add_flags, folder
from data_prep.writing.manifests import (
    LeftOut,
    check_out,
    remove_old_holdout,
    take_left_out,
    write_readable,
)
from featdistill import command_line
from featdistill.command_line import UserError, counted
from featdistill.images.listing import printable
from featdistill.records import label_files, manifest
from featdistill.records.predictions import name_key
from featdistill.text_tables import table

_log = logging.getLogger(__name__)
SEARCH_DEPTH = 3
# Columns that --extra must not have: they come from the images and their label files.
PROTECTED_COLUMNS = ("image", "name", "label", "is_distorted", "distortions")


@dataclass(frozen=True)
class Split:
    """How a split is distributed."""

    name: str
    part: str  # regular expression for the names of its folders and, with `.zip`, of its archives
    expected: str  # those names, for messages
    label_file: str | None  # None if the labels are not public
    is_distorted: int | None = None  # None if only a label file can tell


_SPLITS = (
    Split("train", r"shard_\d+", "shard_0, shard_1, ..", "labels.csv", is_distorted=0),
    Split("val", "val_images", "val_images", "val_labels.csv"),
    Split("val_hard", "val_images_hard", "val_images_hard", "val_hard_labels.csv"),
    Split("public_test", "test_images", "test_images", "test_labels.csv"),
    Split("private_test", "private_test(_images)?", "private_test_images or private_test", None),
    Split("toy", "toy(_images)?", "toy or toy_images", None, is_distorted=0),
)
SPLITS = {split.name: split for split in _SPLITS}


def find_containers(tree: Tree, split: Split) -> list[Container]:
    """Return the archives and folders of a split, ordered by the numbers in their names.

    An archive takes precedence over a folder of the same part. A copy, `shard_1 (1).zip`, counts as the part.

    Raises:
        UserError: an archive is damaged, or there are two of a part.
    """
    candidates = [archives.open_archive(path) for path in tree.files if _is_part_archive(path, split)]
    for path in tree.folders:
        *above, name = tree.relative(path).split(os.sep)
        if _is_part(name, split) and not any(_is_part(parent, split) for parent in above):
            container = archives.open_folder(path)
            candidates += [container] if container.images else []
    parts: dict[object, Container] = {}
    for container in candidates:
        used = parts.setdefault(tuple(_numbers(container)) if split.name == "train" else "", container)
        if used is not container and used.is_archive and not container.is_archive:
            unused, archive = tree.relative(container.path), tree.relative(used.path)
            _log.info(f"note: {unused} is ignored: the archive {archive} is used")
        elif used is not container:
            raise UserError(
                f"{used.path} and {container.path} are the same part of a split; keep one of them"
            )
    return sorted(parts.values(), key=_numbers)


def find_labels(tree: Tree, split: Split, containers: list[Container]) -> pd.DataFrame | None:
    """Read the label files of a split, with a further column `file`; None if there are no labels."""
    if split.label_file is None:
        return None
    tables, unlabeled = [], []
    loose = [path for path in tree.files if os.path.basename(path).lower() == split.label_file]
    for container in containers:
        inside = [file for file in container.files if file.rpartition("/")[2].lower() == split.label_file]
        locations = [container.location(file) for file in inside]
        if split.name != "train":
            locations = loose + locations
        if not locations:
            unlabeled.append(container)
            continue
        first, *others = [label_files.read_labels(location) for location in locations]
        for location, other in zip(locations[1:], others, strict=True):
            if not other.equals(first):
                raise UserError(f"{locations[0]} and {location} differ; keep the right one")
        tables.append(first.assign(file=locations[0]))
    if tables and unlabeled:
        raise UserError(f"{unlabeled[0].path} has no {split.label_file}, other parts of its split do")
    if not tables:
        _log.info(f"note: {split.name} has no labels: there is no {split.label_file}")
        return None
    return pd.concat(tables)


def build_manifest(split: Split, containers: list[Container], labels: pd.DataFrame | None) -> pd.DataFrame:
    """Join the images of a split with their labels, ordered by name; a mismatch is a `UserError`.

    If some images cannot be used, a column `fault` says why; see `manifests.take_left_out`.
    """
    locations = [
        (container.location(file), file.rpartition("/")[2], container.left_out.get(file, ""))
        for container in containers
        for file in (*container.images, *container.left_out)
    ]
    faults = [fault for *_, fault in locations if fault]
    if len(faults) == len(locations):
        reason = f" that can be used: {faults[0]}" if faults else ""
        raise UserError(f"{containers[0].path} holds no images{reason}")
    locations.sort(key=lambda row: row[1])
    images = pd.DataFrame(
        [tuple(map(printable, row)) for row in locations], columns=["image", "name", FAULT], dtype="object"
    )
    images.index = pd.Index(map(name_key, images["name"]), dtype="object")
    repeated = images.index.duplicated()
    if repeated.any():
        first, second = images.loc[[images.index[repeated][0]], "image"].iloc[:2]
        raise UserError(f"{split.name}: two images have one name: {first} and {second}")
    columns = {"image": images["image"], "name": images["name"], "source": ["ntire2026"] * len(images)}
    columns["group"] = images.index
    columns["is_distorted"] = [split.is_distorted] * len(images)
    if faults:
        columns[FAULT] = images[FAULT]
    if labels is not None:
        _check_match(images, labels)
        labels = labels.reindex(images.index)
        columns["label"] = labels["label"]
        columns["distortions"] = labels["distortions"]
        if split.is_distorted is None:
            columns["is_distorted"] = labels["is_distorted"]
    return manifest.make_manifest({column: list(cells) for column, cells in columns.items()})


def join_extra(frame: pd.DataFrame, extra: pd.DataFrame) -> pd.DataFrame:
    """Add the columns of `extra`, a table from `label_files.read_table`, to the rows it names.

    Existing columns are filled in where `extra` has a value; unknown names are ignored.
    """
    columns = [column for column in extra if column != "image_name"]
    for column in columns:
        if column in PROTECTED_COLUMNS:
            raise UserError(f"--extra must not have a column {column}: it comes from the challenge's files")
    values = extra[columns].reindex([name_key(name) for name in frame["name"]]).fillna("")
    values.index = frame.index
    for column in columns:
        frame[column] = values[column].where(values[column] != "", frame.get(column, ""))
    return frame


def _check_match(images: pd.DataFrame, labels: pd.DataFrame) -> None:
    repeated, missing = labels[labels.index.duplicated()], labels[~labels.index.isin(images.index)]
    advice = f"which does not exist; {counted(len(missing), 'image')} missing: download or unpack again"
    for rows, problem in ((repeated, "as another label file does"), (missing, advice)):
        if len(rows):
            raise UserError(f"{rows['file'].iloc[0]} names {rows['image_name'].iloc[0]}, {problem}")
    unlabeled = images["image"][~images.index.isin(labels.index) & (images[FAULT] == "")]
    if len(unlabeled):
        first, file = unlabeled.iloc[0], labels["file"].iloc[0]
        raise UserError(
            f"{first} has no label in {file} or another file; {counted(len(unlabeled), 'image')} without one"
        )


def _gaps(containers: list[Container]) -> list[str]:
    """Return the first shards that are missing below the highest number."""
    numbers = {_numbers(container)[0] for container in containers}
    return [f"shard_{number}" for number in range(max(numbers)) if number not in numbers][:10]


def _numbers(container: Container) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", _part_name(container.path))]


def _part_name(path: str) -> str:
    name = os.path.basename(path)
    return archives.without_copy_number(os.path.splitext(name)[0] if archives.is_archive(name) else name)


def _is_part(name: str, split: Split) -> bool:
    return re.fullmatch(split.part, archives.without_copy_number(name), re.IGNORECASE) is not None


def _is_part_archive(path: str, split: Split) -> bool:
    return path.lower().endswith(".zip") and _is_part(_part_name(path), split)


def _table(frames: dict[str, pd.DataFrame], origins: dict[str, str]) -> str:
    header = ("split", "images", "real", "AI", "unlabeled", "distorted", "from")
    rows = []
    for name, frame in frames.items():
        real, ai = ((frame["label"] == label).sum() for label in (0, 1))
        counts = (len(frame), real, ai, frame["label"].isna().sum(), (frame["is_distorted"] == 1).sum())
        rows.append((name, *map(str, counts), origins[name]))
    return table(header, rows)


def build_splits(
    root: str, names: list[str] | None, extra: pd.DataFrame | None
) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """Return manifests and their origins, by split: those in `names`, or all that are below `root`."""
    tree = archives.search(root, SEARCH_DEPTH)
    frames, origins, opened = {}, {}, []
    for name in dict.fromkeys(names or SPLITS):
        split = SPLITS[command_line.one_of("split", name, SPLITS)]
        containers = find_containers(tree, split)
        if not containers:
            missing = f"{name} is missing: no archive (.zip) or folder {split.expected} below {root}"
            if names:
                raise UserError(missing)
            _log.info(f"note: {missing}")
            continue
        opened += containers
        if name == "train" and _gaps(containers):
            _log.info(f"note: train is incomplete: {', '.join(_gaps(containers))} missing")
        frame = build_manifest(split, containers, find_labels(tree, split, containers))
        frames[name] = frame if extra is None else join_extra(frame, extra)
        paths = [tree.relative(container.path) for container in containers]
        origins[name] = paths[0] if len(paths) == 1 else f"{paths[0]} .. {paths[-1]} ({len(paths)})"
    others = [path for path in tree.files if not any(_is_part_archive(path, split) for split in _SPLITS)]
    archives.note_archives([tree.relative(path) for path in others], "not named like a split, or not a zip")
    archives.note_ignored(opened, tree.ignored)
    if not frames:
        raise UserError(f"no split of the challenge below {root}; expected its archives as downloaded")
    if extra is not None:
        stems = {name_key(image) for frame in frames.values() for image in frame["name"]}
        known = sum(name in stems for name in extra.index)
        _log.info(f"note: {known} of the {len(extra)} names in --extra are here")
    return frames, origins


def build_parser() -> command_line.Parser:
    about = "Write one manifest per split of the NTIRE challenge."
    parser = command_line.Parser(prog="python -m data_prep.ntire", description=about)
    parser.add_argument("--root", type=folder, required=True, help="folder of the archives, or unpacked")
    parser.add_argument("--out", type=Path, required=True, help="folder for the manifests, <split>.csv")
    parser.add_argument("--splits", nargs="+", metavar="NAME", help=f"only these, of {', '.join(SPLITS)}")
    parser.add_argument("--extra", metavar="FILE.csv", help="more columns, such as generator, by image_name")
    add_flags(parser, "holdout", "seed", "verify", "workers")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    extra = label_files.read_table(args.extra) if args.extra else None
    frames, origins = build_splits(args.root, args.splits, extra)
    left_out: dict[str, LeftOut] = {}
    for name, frame in frames.items():
        frames[name], left_out[name] = take_left_out(frame)
    if args.holdout is not None:
        if "train" not in frames:
            raise UserError("--holdout needs the train split")
        training, held = manifest.split_holdout(frames["train"], args.holdout, args.seed)
        frames = {"train": training, "holdout": held, **{k: v for k, v in frames.items() if k != "train"}}
        origins["holdout"] = f"{args.holdout:g} of train"
    for name in frames:
        check_out(args.out / f"{name}.csv")
    if "train" in frames:
        holdout, train = args.out / "holdout.csv", args.out / "train.csv"
        remove_old_holdout(holdout, train, is_replaced="holdout" in frames)
    _log.info(_table(frames, origins))
    unreadable = sum(
        write_readable(frame, args.out / f"{name}.csv", args, left_out.get(name, ()))
        for name, frame in frames.items()
    )
    return 1 if unreadable else 0


if __name__ == "__main__":
    command_line.run(main)
