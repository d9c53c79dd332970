"""How every script talks to its user: one parser, one way to fail, one line that says why.

An error that a user can cause is a `UserError`. It ends the program with status 2 and one line on standard
error; `--debug` shows the traceback instead. What the system refuses (a full disk, no permission) ends alike.
Any other exception is a defect of the program, with a status of its own.
"""

import argparse
import difflib
import errno
import gc
import io
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

# More processes than any machine has cores for: a slip of the pen, which would exhaust the memory.
MAX_WORKERS = 256
_MAKE_ROOM = "; make room, and run the same command again"
_REMEDIES = {
    errno.ENOSPC: _MAKE_ROOM,
    errno.EDQUOT: _MAKE_ROOM,
    errno.EROFS: "; choose a folder that can be written to",
    errno.EACCES: "; check its permissions",
}


class UserError(Exception):
    """Something the user can put right. The message says what is wrong, where, and what to do."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return ` (did you mean X?)` for the choice closest to `name`, or nothing where none is close."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f" (did you mean {found[0]}?)" if found else ""


def one_of(what: str, name: str, choices: Iterable[str]) -> str:
    """Return `name` when it is one of `choices`; raise a `UserError` that names the nearest one otherwise."""
    choices = list(choices)
    if name not in choices:
        known = ", ".join(choices)
        raise UserError(f"unknown {what} '{name}'{nearest(name, choices)}; known: {known}")
    return name


def explained(error: Exception) -> str:
    """Return an error's message; of what the system refuses, where, why, and perhaps what to do."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error) or type(error).__name__
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror}{_REMEDIES.get(error.errno, '')}"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, `1 image` or `1,234 images`."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False or action.default == []
        says_nothing = says_nothing or "(default: " in (action.help or "")
        return action.help if says_nothing else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line and name the nearest flag; no flag is abbreviated."""

    def __init__(self, **kwargs) -> None:
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        flags = [flag for action in self._actions for flag in action.option_strings]
        # Looked for first: a mistyped flag is the reason why one that is required seems to be missing.
        for argument in args:
            flag = argument.split("=")[0]
            if flag.startswith("--") and flag not in (*flags, "--"):
                raise UserError(f"unknown argument {flag}{nearest(flag, flags)}; see --help")
        for action in self._actions:
            # Of a list given twice, argparse would keep the second part alone, without a word.
            if action.nargs in ("+", "*") and type(action).__name__ == "_StoreAction":
                for flag in action.option_strings:
                    if sum(argument.split("=")[0] == flag for argument in args) > 1:
                        raise UserError(f"{flag} is given twice; give it once, with all its values")
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise UserError(f"unexpected argument {unknown[0]}; see --help")
        return known


def within(
    low: float, high: float = math.inf, kind: Callable[[str], float] = int, *, exclusive: bool = False
) -> Callable[[str], float]:
    """Return a `type` for `add_argument` that accepts numbers from `low` to `high`.

    Args:
        kind: `int` or `float`.
        exclusive: whether `low` and `high` themselves are refused.
    """
    limits = f"from {low:g} to {high:g}" if high < math.inf else f"{low:g} or more"
    if exclusive:
        limits = f"between {low:g} and {high:g}" if high < math.inf else f"more than {low:g}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number {limits}, not {text}") from None
        if not (low < value < high if exclusive else low <= value <= high):
            raise argparse.ArgumentTypeError(f"must be {limits}, not {text}")
        return value

    return parse


def worker_count(low: int = 0) -> Callable[[str], float]:
    """Return a `type` for a number of processes or threads, from `low` to `MAX_WORKERS`."""
    return within(low, MAX_WORKERS)


def file_name(suffix: str) -> Callable[[str], str]:
    """Return a `type` for the name of a file to write, which must end in `suffix`, such as `.png`."""

    def parse(text: str) -> str:
        if Path(text).suffix.lower() != suffix:
            raise argparse.ArgumentTypeError(f"must be the name of a {suffix} file, not {text}")
        return text

    return parse


def progress(total: int, what: str, *, initial: int = 0, show: bool = True, unit: str = "img") -> tqdm:
    """Return a bar that counts images, or other units.

    A log file gets a line every half minute instead of a moving bar.
    """
    every_s = 0.2 if sys.stderr.isatty() else 30
    return tqdm(total=total, desc=what, unit=unit, initial=initial, mininterval=every_s, disable=not show)


class _Console(logging.Handler):
    """Shows messages to a person: information on standard output, warnings on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        text = f"{record.levelname.lower()}: {record.getMessage()}" if is_warning else record.getMessage()
        tqdm.write(text, file=sys.stderr if is_warning else sys.stdout)


def show_messages() -> None:
    """Show what the package and its commands log, from level INFO on.

    Programs that import the package decide for themselves.
    """
    # A module that is run with `python -m` is called `__main__`.
    for name in ("featdistill", "data_prep", "__main__"):
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _Console) for handler in logger.handlers):
            logger.addHandler(_Console())
        logger.setLevel(logging.INFO)
        logger.propagate = False


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Call `main` with the command line and leave with its status.

    Statuses: 0 done; 1 done, but some images could not be read; 2 a user's error; 3 an unexpected error, with
    its traceback; 4 done, and the run is worse than its baseline (`evaluate.py --gate`); 130 interrupted; 141
    the reader of the output has closed it.
    """
    arguments, script = sys.argv[1:], Path(sys.argv[0])
    program = f"python -m {script.parent.name}" if script.name == "__main__.py" else script.name
    for stream in (sys.stdout, sys.stderr):
        # Text that the terminal's encoding lacks is escaped: a name must not cost the result.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    show_messages()
    try:
        status = main(arguments) or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{program}: interrupted; run the same command again to continue", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        # As after `| head`. Nothing more is written, not even when the interpreter flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except Exception as error:
        if "--debug" in arguments:
            raise
        if isinstance(error, UserError | OSError):
            print(f"{program}: error: {' '.join(explained(error).split())}", file=sys.stderr)
            status = 2
        else:
            traceback.print_exc()
            print(f"{program}: unexpected error; please report it with the lines above", file=sys.stderr)
            status = 3
    # Python would search everything that was imported for garbage once more: 1.5 s with PyTorch.
    gc.freeze()
    sys.exit(status)
