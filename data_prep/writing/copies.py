"""Copies of a manifest's images: one zip with a manifest, made in several processes and resumable.

While a copy is being made, its images are single files in `.work-HASH` in the output folder. Once all are
there, the zip, the manifest and finally a JSON file with the settings of the copy are written.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from data_prep.writing.manifests import write_or_remove
from data_prep.writing.parallel import map_in_order
from featdistill import atomic
from featdistill.command_line import UserError
from featdistill.images.formats import without_extension
from featdistill.images.listing import ARCHIVE_SEPARATOR
from featdistill.images.reading import BrokenImage
from featdistill.records import provenance
from featdistill.records.manifest import write_manifest
from featdistill.records.provenance import Claim

_log = logging.getLogger(__name__)
_MAX_SHOWN_ERRORS = 10


class ImageCopy:
    """A folder with `images.zip`, `manifest.csv`, possibly `errors.csv`, and a record of the settings.

    Args:
        out: the folder.
        record_name: name of the JSON file with the settings.
        made_with: everything that determines the copy's bytes, as JSON values.
        suffix: of the image files.
    """

    def __init__(self, out: str | Path, record_name: str, made_with: dict[str, Any], suffix: str) -> None:
        self.out, self.made_with, self.suffix = Path(out), made_with, suffix
        self.record = self.out / record_name

    def start(self, **results: Any) -> None:
        """Create the folder of unfinished work, which depends on the settings and the given results."""
        self.made_with |= results
        digest = hashlib.sha256(json.dumps(self.made_with).encode()).hexdigest()
        self.work = self.out / f".work-{digest[:16]}"
        self.work.mkdir(parents=True, exist_ok=True)

    def path(self, row: int) -> Path:
        """Return the path of a row's image in the work folder."""
        return self.work / f"{row}{self.suffix}"

    def finished_status(self) -> int | None:
        """Return the exit status of the run that finished this copy; None if there is work to do."""
        recorded = provenance.read_record(self.record)
        if recorded is not None:
            # Other keys are results, such as the sizes that were found.
            recorded = {key: value for key, value in recorded.items() if key in self.made_with}
        # What a killed run left has its work folder beside it; other files are somebody else's.
        ours = any(self.out.glob(".work-*"))
        occupied = not ours and any((self.out / name).exists() for name in ("images.zip", "manifest.csv"))
        claimed = provenance.claim(self.out, recorded, self.made_with, occupied=occupied)
        return finished_status(self.out, claimed)

    def make(
        self, tasks: Sequence[tuple], make: Callable[..., bytes], workers: int, title: str
    ) -> dict[int, str]:
        """Write `make(*task)`, the bytes of an image file, for each row that has none yet.

        Returns:
            Reasons by row, for those where `make` raised `BrokenImage`.
        """
        rows = [row for row in range(len(tasks)) if not self.path(row).is_file()]
        jobs = [(tasks[row], self.path(row)) for row in rows]
        reasons = map_in_order(partial(_write, make), jobs, workers, title, done=len(tasks) - len(rows))
        return {row: reason for row, reason in zip(rows, reasons, strict=True) if reason is not None}

    def finish(self, rows: pd.DataFrame, source: pd.DataFrame, errors: dict[int, str]) -> int:
        """Write the files of the copy, remove the work folder and return the exit status.

        Args:
            rows: of the copy's manifest, indexed by their row in `source`; `image` is filled in here.
            source: rows of the manifest that was copied.
            errors: reasons by row of `source`, for the images that could not be made.
        """
        members = [f"images/{name}" for name in rows["name"]]
        files = (self.path(row).read_bytes() for row in rows.index)
        atomic.write_zip(self.out / "images.zip", zip(members, files, strict=True))
        broken = [(source["name"][row], errors[row]) for row in sorted(errors)]
        status = write_listing(self.out, rows, members, broken)
        atomic.write_json(self.record, self.made_with)
        shutil.rmtree(self.work)
        return status


def finished_status(out: Path, claimed: Claim) -> int | None:
    """Return the exit status of the run that finished an output; None if there is work to do."""
    if claimed is not Claim.FINISHED:
        return None
    errors = out / "errors.csv"
    more = f"; {errors} lists the images that could not be read" if errors.is_file() else ""
    _log.info(f"{out} is finished; nothing to do{more}")
    return int(errors.is_file())


def write_listing(
    out: Path, rows: pd.DataFrame, members: Sequence[str], broken: Sequence[tuple[str, str]]
) -> int:
    """Write the manifest of `images.zip` and the (name, reason) of broken images; return the exit status."""
    archive = (out / "images.zip").absolute()
    located = [f"{archive}{ARCHIVE_SEPARATOR}{member}" for member in members]
    write_manifest(rows.assign(image=located), out / "manifest.csv")
    for name, reason in broken[:_MAX_SHOWN_ERRORS]:
        _log.info(f"could not be read: {name}: {reason}")
    write_or_remove(out / "errors.csv", ("name", "reason"), broken)
    return 1 if broken else 0


def file_names(names: Sequence[str], suffix: str) -> list[str]:
    """Return the names of the copies: those of the images, with `suffix` instead of their extension."""
    # A backslash is also how odd characters are written, and no separator for all programs.
    renamed = [f"{without_extension(name)}{suffix}".replace("\\", "_") for name in names]
    seen: set[str] = set()
    for name in renamed:
        if name in seen:
            raise UserError(f"two images would both be called {name}; rename one of them in the manifest")
        if name.startswith("/") or ".." in name.split("/"):
            raise UserError(f"the name {name!r} cannot be used in an archive; change it in the manifest")
        seen.add(name)
    return renamed


def _write(make: Callable[..., bytes], job: tuple[tuple, Path]) -> str | None:
    task, path = job
    try:
        data = make(*task)
    except BrokenImage as error:
        return str(error)
    with atomic.replace_file(path) as temporary:
        temporary.write_bytes(data)
    return None
