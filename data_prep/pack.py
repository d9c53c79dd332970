"""The images of a manifest, bytes unchanged, in one zip that is read in place, with a manifest of it.

    python -m data_prep.pack data/defactify.csv --out data/defactify_packed

For images that are slow to read where they are: rows of parquet files, which cannot be read at random without
the rows around them, and very many small files. The zip is uncompressed, so that one read gets one image.

| file | holds |
|---|---|
| `images.zip` | the images, `images/<name>`, in the manifest's order; a name without suffix gets one |
| `manifest.csv` | the rows of the images that could be read; only `image` changes |
| `errors.csv` | name and reason of images that could not be read, if any; the exit status is then 1 |
| `pack.json` | what the copy is made from, and whether it is finished |

The same images and the same manifest give the same bytes. A stopped run leaves no partial file; the same
command then starts again. A finished copy is left as it is.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from data_prep.writing.copies import finished_status, write_listing
from data_prep.writing.flags import add_flags, copy_parser
from featdistill import atomic, command_line
from featdistill.command_line import Parser, UserError, counted
from featdistill.images import reading as image_io
from featdistill.images.archive_index import name_fault
from featdistill.images.formats import suffix_of, without_extension
from featdistill.images.reading import BrokenImage
from featdistill.records import provenance
from featdistill.records.manifest import read_manifest
from featdistill.records.parts import content_sha256
from featdistill.remote_files import located

_log = logging.getLogger(__name__)
_RECORD = "pack.json"
_FILES = ("images.zip", "manifest.csv", "errors.csv")


def member_name(name: str, row: int, data: bytes, taken: set[str]) -> str:
    """Return an image's name in the zip: its own name if that is valid there and not taken, else its row.

    `data`, the image's bytes, determine the suffix if the name has none.
    """
    suffix = "" if without_extension(name) != name else suffix_of(data)
    member = f"images/{name}{suffix}"
    is_hidden = any(part.startswith(".") or not part for part in name.split("/"))
    if is_hidden or "\\" in name or name_fault(name) or name_fault(member) or member in taken:
        member = f"images/row_{row:09}{suffix_of(data)}"
    return member


def pack(frame: pd.DataFrame, path: Path, *, verify: bool) -> tuple[dict[int, str], list[tuple[str, str]]]:
    """Copy the images of a manifest into the zip `path`; with `verify`, only those that can be decoded.

    Returns:
        Names in the zip by row; name and reason of each image that could not be read.
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
            reason = errors[0][1] if errors else "no rows"
            raise UserError(f"none of {len(frame)} images could be read: {reason}")

    atomic.write_zip(path, images())
    return members, errors


def build_parser() -> Parser:
    parser = copy_parser("pack", "Copy a manifest's images, bytes unchanged, into one zip.")
    add_flags(parser, "verify")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    source, out = located(arguments.manifest), Path(arguments.out)
    frame = read_manifest(source)
    made_from = {"manifest_sha256": content_sha256(source), "verify": arguments.verify}
    recorded = provenance.read_record(out / _RECORD)
    is_finished = bool(recorded and recorded.pop("finished"))
    occupied = any((out / name).exists() for name in _FILES)
    status = finished_status(
        out, provenance.claim(out, recorded, made_from, finished=is_finished, occupied=occupied)
    )
    if status is not None:
        return status
    atomic.write_json(out / _RECORD, {**made_from, "finished": False})
    members, errors = pack(frame, out / "images.zip", verify=arguments.verify)
    status = write_listing(out, frame.iloc[list(members)], list(members.values()), errors)
    atomic.write_json(out / _RECORD, {**made_from, "finished": True})
    skipped = f"; {len(errors)} could not be read, see {out / 'errors.csv'}" if errors else ""
    size_gb = (out / "images.zip").stat().st_size / 1e9
    _log.info(f"{out}: {counted(len(members), 'image')}, {size_gb:.2f} GB{skipped}")
    return status


if __name__ == "__main__":
    command_line.run(main)
