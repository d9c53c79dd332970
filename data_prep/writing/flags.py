"""Flags that several commands share, each with its type, default and help in one place."""

import argparse
import os
from pathlib import Path

from featdistill.command_line import MAX_WORKERS, Parser, within, worker_count
from featdistill.remote_files import is_remote


def add_flags(parser: Parser, *names: str) -> None:
    """Add some of the shared flags, by name without dashes."""
    for name in names:
        parser.add_argument(f"--{name}", **_FLAGS[name])


def copy_parser(name: str, description: str) -> Parser:
    """Build the parser of a command that copies a manifest's images to a new folder."""
    parser = Parser(prog=f"python -m data_prep.{name}", description=description)
    parser.add_argument("manifest", metavar="MANIFEST")
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder for the result")
    return parser


def existing(text: str) -> str:
    """Argparse type: the path of a file or folder that exists."""
    if not os.path.exists(text):
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return text


def folder(text: str) -> str:
    """Argparse type: the path of a folder that exists."""
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return text


def folder_or_address(text: str) -> str:
    """Argparse type: the path of a folder that exists, or the address of one."""
    return text if is_remote(text) else folder(text)


def csv_file(text: str) -> Path:
    """Argparse type: the path of a CSV file to write."""
    if not text.endswith(".csv"):
        raise argparse.ArgumentTypeError(f"{text} must be the name of a .csv file")
    return Path(text)


_SHARE = within(0, 1, float, exclusive=True)
_FLAGS = {
    "limit": {"type": within(1), "metavar": "N", "help": "keep N images, in the same proportions"},
    "holdout": {"type": _SHARE, "metavar": "SHARE", "help": "share of images for a hold-out manifest"},
    "seed": {"type": within(0), "default": 0, "help": "random seed"},
    "verify": {"action": "store_true", "help": "decode every image and leave out broken ones"},
    "workers": {
        "type": worker_count(1),
        "default": min(os.cpu_count() or 1, MAX_WORKERS),
        "help": "number of processes",
    },
}
