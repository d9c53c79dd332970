"""The images of any manifest, bytes unchanged, in one zip that is read in place, and a manifest of it.

    python -m data_prep.pack data/defactify.csv --out data/defactify_packed

For images that are slow to read where they are: rows of parquet files, which cannot be read at random without
the rows around them, and very many small files. The zip is not compressed, so that any image is one read.

| file | holds |
|---|---|
| `images.zip` | the images, `images/<name>`, in the order of the manifest; a name without suffix gets one |
| `manifest.csv` | the rows of the images that could be read, all columns as they were but for `image` |
| `errors.csv` | the name of every other one and the reason, where there are any; the status is then 1 |
| `pack.json` | what the copy is made from, and whether it is finished |

The same images and the same manifest give the same bytes. A run that was stopped leaves no half of a file;
the same command makes the copy anew, and leaves a finished one as it is.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from featdistill import atomic, command_line
from featdistill.command_line import Parser, UserError
from featdistill.images import reading as image_io
from featdistill.images.archive_index import name_fault
from featdistill.images.archives import ARCHIVE_SEPARATOR
from featdistill.images.reading import BrokenImage
from featdistill.records.manifest import read_manifest, write_manifest

_MARK = "pack.json"
_FILES = ("images.zip", "manifest.csv", "errors.csv")
_SHOWN_ERRORS = 10
# How the files of each format begin, for images whose name has no suffix.
_STARTS = (
    (b"\xff\xd8\xff", ".jpg"),
    (b"\x89PNG", ".png"),
    (b"GIF8", ".gif"),
    (b"BM", ".bmp"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
)


def member_name(name: str, row: int, data: bytes, taken: set[str]) -> str:
    """Return what an image is called in the zip: by its name where that can be a member's, else by its row.

    Args:
        name: the manifest's name of the image.
        row: its place in the manifest.
        data: its bytes, which tell the suffix where the name has none.
        taken: names in the zip so far.
    """
    suffix = "" if image_io.without_extension(name) != name else _suffix_of(data)
    member = f"images/{name}{suffix}"
    is_hidden = any(part.startswith(".") or not part for part in name.split("/"))
    if is_hidden or "\\" in name or name_fault(name) or name_fault(member) or member in taken:
        member = f"images/row_{row:09}{_suffix_of(data)}"
    return member


def pack(frame: pd.DataFrame, path: Path, *, verify: bool) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """Copy the images of a manifest into one zip.

    Args:
        frame: rows as `read_manifest` gives them.
        path: the zip.
        verify: whether an image must be decoded to count as readable.

    Returns:
        The rows that were copied, with their new location; name and reason of each other one.

    Raises:
        UserError: no image could be read.
    """
    members: dict[int, str] = {}
    errors: list[tuple[str, str]] = []
    taken: set[str] = set()

    def images() -> Iterator[tuple[str, bytes]]:
        with command_line.progress(len(frame), "pack") as bar:
            for row, (location, name) in enumerate(zip(frame["image"], frame["name"], strict=True)):
                bar.update()
                try:
                    data = image_io.read_bytes(location)
                    if verify:
                        image_io.decode(data)
                except BrokenImage as error:
                    errors.append((name, str(error)))
                    continue
                members[row] = member_name(name, row, data, taken)
                taken.add(members[row])
                yield members[row], data
        if not members:
            raise UserError(
                f"none of {len(frame)} images could be read: {errors[0][1] if errors else 'no rows'}"
            )

    atomic.write_zip(path, images())
    copy = frame.iloc[list(members)].copy()
    copy["image"] = [f"{path.absolute()}{ARCHIVE_SEPARATOR}{member}" for member in members.values()]
    return copy, errors


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m data_prep.pack",
        description="Copy the images of a manifest, bytes unchanged, into one zip that is read in place.",
    )
    parser.add_argument("manifest", metavar="MANIFEST")
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder for the zip and its manifest")
    parser.add_argument("--verify", action="store_true", help="decode every image and leave broken ones out")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    source, out = Path(arguments.manifest), Path(arguments.out)
    frame = read_manifest(source)
    made_from = {"manifest_sha256": atomic.sha256_of(source), "verify": arguments.verify}
    errors_path = out / "errors.csv"
    if _is_finished(out, made_from):
        again = f"; {errors_path} lists what could not be read" if errors_path.is_file() else ""
        print(f"{out} is finished; nothing to do{again}")
        return int(errors_path.is_file())
    atomic.write_json(out / _MARK, {**made_from, "finished": False})
    copy, errors = pack(frame, out / "images.zip", verify=arguments.verify)
    write_manifest(copy, out / "manifest.csv")
    errors_path.unlink(missing_ok=True)
    if errors:
        atomic.write_text(errors_path, atomic.csv_text(("name", "reason"), errors))
    atomic.write_json(out / _MARK, {**made_from, "finished": True})
    for name, reason in errors[:_SHOWN_ERRORS]:
        print(f"could not be read: {name}: {reason}")
    left_out = f"; {len(errors)} could not be read, see {errors_path}" if errors else ""
    size_gb = (out / "images.zip").stat().st_size / 1e9
    print(f"{out}: {len(copy)} images, {size_gb:.2f} GB{left_out}")
    return 1 if errors else 0


def _is_finished(out: Path, made_from: dict) -> bool:
    mark = out / _MARK
    if not mark.is_file():
        foreign = [name for name in _FILES if (out / name).exists()]
        if foreign:
            raise UserError(f"{out} holds a {foreign[0]} of something else; give another --out")
        return False
    former = json.loads(mark.read_text(encoding="utf-8"))
    is_finished = former.pop("finished")
    if former != made_from:
        raise UserError(f"{out} was made from another manifest or with other flags; give another --out")
    return is_finished


def _suffix_of(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return ".avif"
    return next((suffix for start, suffix in _STARTS if data.startswith(start)), ".bin")


if __name__ == "__main__":
    command_line.run(main)
