"""Predictions at an address: written on this machine first, journal included, and copied there when finished.

Until then they are in the user's cache folder (`XDG_CACHE_HOME`, by default `~/.cache`), below
`featdistill/outputs`, in folders named like the address; a killed run continues there, on the same machine.
"""

import contextlib
import os
from pathlib import Path

from featdistill import atomic, remote_files
from featdistill.calibration.verdict_files import copies_path, verdicts_path
from featdistill.command_line import UserError
from featdistill.inference.journal import journals
from featdistill.records.predictions import errors_path, sidecar_path


def local_path(out: str | Path) -> Path:
    """Return where an output is written on this machine: the path itself, or a place for an address."""
    if not remote_files.is_remote(out):
        return Path(out)
    if remote_files.is_web(out):
        raise UserError(f"--out {out}: a web server does not take files")
    scheme, _, rest = remote_files.join(os.fspath(out), "").partition("://")
    return _outputs() / scheme.lower() / rest


def shown(path: Path) -> str:
    """Return the address that a path stands for, or the path itself."""
    if not path.is_relative_to(_outputs()):
        return str(path)
    scheme, *parts = path.relative_to(_outputs()).parts
    return f"{scheme}://{'/'.join(parts)}"


def fetch(out: Path) -> list[Path]:
    """Bring what is at an output's address to this machine, unless there are newer files here already.

    Returns:
        The files that are at the address.
    """
    there = []
    for path in _files(out) if shown(out) != str(out) else ():
        with contextlib.suppress(FileNotFoundError):
            data = remote_files.read(shown(path))
            there.append(path)
            if not path.exists():
                with atomic.replace_file(path) as temporary:
                    temporary.write_bytes(data)
                os.utime(path, (0, 0))  # marks it as not changed
    return there


def publish(out: Path, there: list[Path]) -> None:
    """Copy what has changed to an output's address, the sidecars last, and remove it from this machine.

    Args:
        there: what `fetch` returned.

    Raises:
        UserError: it cannot be written there; the files stay on this machine.
    """
    if shown(out) == str(out):
        return
    files = [path for path in (*_files(out), out.with_suffix(".manifest.csv")) if path.exists()]
    changed = [path for path in files if path.stat().st_mtime]
    try:
        # Scores are never next to a sidecar of others.
        for path in there:
            if (path in changed and path.suffix == ".json") or path not in files:
                remote_files.remove(shown(path))
        for path in sorted(changed, key=lambda path: path.suffix == ".json"):
            remote_files.write(shown(path), path.read_bytes())
    except (OSError, UserError) as error:
        raise UserError(
            f"{error}; the predictions are kept in {out}; the same command copies them"
        ) from error
    for path in (*files, *journals(out)):
        path.unlink(missing_ok=True)
    for folder in out.parents:
        if folder == _outputs() or any(folder.iterdir()):
            break
        folder.rmdir()


def _files(out: Path) -> list[Path]:
    files = []
    for path in (out, copies_path(out)):
        files += [path, errors_path(path), sidecar_path(path)]
    return [*files, verdicts_path(out), sidecar_path(verdicts_path(out))]


def _outputs() -> Path:
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "featdistill/outputs"
    )
