"""Copies of a manifest's images, as one zip and a manifest: made in many processes, continued after a kill.

What is under way lies in `.work-HASH` in the copy's folder, a file an image; the zip, the manifest and, last
of all, a JSON file that says what the copy was made with are written once every image is there.
"""

import hashlib
import json
import multiprocessing
import shutil
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import pandas as pd

from featdistill import atomic
from featdistill.command_line import UserError, progress
from featdistill.images.archives import ARCHIVE_SEPARATOR
from featdistill.images.reading import BrokenImage, without_extension
from featdistill.process_setup import keep_freed_memory
from featdistill.records.manifest import write_manifest

_IMAGES_A_TASK = 8


class ImageCopy:
    """A folder with `images.zip`, `manifest.csv`, where needed `errors.csv`, and a mark of what made it.

    Args:
        out: the folder.
        mark: name of the JSON file that is written last.
        made_with: all that decides the copy's bytes; JSON values.
    """

    def __init__(self, out: str | Path, mark: str, made_with: dict[str, Any]) -> None:
        self.out, self.made_with = Path(out), made_with
        self.mark = self.out / mark

    @property
    def work(self) -> Path:
        """The folder of what is under way; another one for what is made otherwise."""
        digest = hashlib.sha256(json.dumps(self.made_with).encode()).hexdigest()
        return self.out / f".work-{digest[:16]}"

    def finished_status(self) -> int | None:
        """Return the exit status of the run that finished this copy, or None where there was none.

        Raises:
            UserError: the copy is finished, but was made otherwise.
        """
        if not self.mark.is_file():
            return None
        former = json.loads(self.mark.read_text(encoding="utf-8"))
        changed = [
            f"{key} was {former.get(key)}, is {value}"
            for key, value in json.loads(json.dumps(self.made_with)).items()
            if former.get(key) != value
        ]
        if changed:
            raise UserError(f"{self.out} was made otherwise: {'; '.join(changed)}; give another --out")
        print(f"{self.out} is finished; nothing to do")
        return int((self.out / "errors.csv").is_file())

    def finish(self, rows: pd.DataFrame, files: Sequence[Path], broken: Sequence[tuple[str, str]]) -> int:
        """Write all that belongs to the copy and remove what was under way.

        Args:
            rows: of the manifest; `name` is what the copies are called, `image` is filled in here.
            files: the copies, in the rows' order.
            broken: (name, reason) of images that could not be read.

        Returns:
            The exit status.
        """
        archive = self.out / "images.zip"
        members = [f"images/{name}" for name in rows["name"]]
        atomic.write_zip(
            archive, ((member, file.read_bytes()) for member, file in zip(members, files, strict=True))
        )
        located = [f"{archive.absolute()}{ARCHIVE_SEPARATOR}{member}" for member in members]
        write_manifest(rows.assign(image=located), self.out / "manifest.csv")
        for name, reason in broken[:10]:
            print(f"could not be read: {name}: {reason}")
        (self.out / "errors.csv").unlink(missing_ok=True)
        if broken:
            atomic.write_text(self.out / "errors.csv", atomic.csv_text(("name", "reason"), broken))
        atomic.write_json(self.mark, self.made_with)
        shutil.rmtree(self.work)
        return 1 if broken else 0


def file_names(names: Sequence[str], ending: str) -> list[str]:
    """Return what the copies are called: the images' names with `ending` in the place of their extension.

    Raises:
        UserError: two of them would be the same, or one cannot stand in an archive.
    """
    found = [f"{without_extension(name)}{ending}" for name in names]
    seen: set[str] = set()
    for name in found:
        if name in seen:
            raise UserError(f"two images would both be {name}; rename one of them in the manifest")
        if name.startswith("/") or "\\" in name or ".." in name.split("/") or ARCHIVE_SEPARATOR in name:
            raise UserError(f"the name {name!r} cannot stand in an archive; change it in the manifest")
        seen.add(name)
    return found


def make_files(
    tasks: Sequence[tuple], paths: Sequence[Path], make: Callable[..., bytes], workers: int, what: str
) -> dict[int, str]:
    """Write `make(*task)` to each task's path where no file is yet.

    Args:
        tasks: what `make` is called with; it must work in another process, where there are several.
        make: returns an image file's bytes, or raises `BrokenImage`.
        workers: number of processes; with 1 the work is done in this one.
        what: shown beside the bar.

    Returns:
        Why it could not be made, for the number of each task that could not.

    Raises:
        UserError: a process died.
    """
    missing = [row for row, path in enumerate(paths) if not path.is_file()]
    errors: dict[int, str] = {}
    write = partial(_write, make)
    with progress(len(paths), what, initial=len(paths) - len(missing)) as bar:

        def note(row: int, reason: str | None) -> None:
            if reason is not None:
                errors[row] = reason
            bar.update()

        if workers == 1:
            for row in missing:
                note(row, write(tasks[row], paths[row]))
            return errors
        # Fresh processes: a fork would inherit OpenCV's threads in an unknown state.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_set_up_worker) as pool:
            own, targets = [tasks[row] for row in missing], [paths[row] for row in missing]
            try:
                found = pool.map(write, own, targets, chunksize=_IMAGES_A_TASK)
                for row, reason in zip(missing, found, strict=True):
                    note(row, reason)
            except BrokenProcessPool as error:
                raise UserError("a process died while it worked; try fewer --workers") from error
    return errors


def _set_up_worker() -> None:
    # The first process is interrupted and stops the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(0)
    keep_freed_memory()


def _write(make: Callable[..., bytes], task: tuple, path: Path) -> str | None:
    try:
        data = make(*task)
    except BrokenImage as error:
        return str(error)
    with atomic.replace_file(path) as beside:
        beside.write_bytes(data)
    return None
