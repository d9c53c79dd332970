"""Flags that several commands share, each with its type, default and help in one place."""

import argparse
import os
from pathlib import Path

from featdistill.command_line import Parser, within


def add_flags(parser: Parser, *names: str) -> None:
    """Add some of the shared flags, by name without dashes."""
    for name in names:
        parser.add_argument(f"--{name}", **_FLAGS[name])


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


def csv_file(text: str) -> Path:
    """Argparse type: the path of a CSV file to write."""
    if not text.endswith(".csv"):
        raise argparse.ArgumentTypeError(f"{text} must be the name of a .csv file")
    return Path(text)


_FLAGS = {
    "limit": {
        "type": within(1),
        "metavar": "N",
        "help": "keep N images, with the same proportions of labels and sources or generators",
    },
    "holdout": {
        "type": within(0, 1, float, exclusive=True),
        "metavar": "SHARE",
        "help": "share of the images that go to a hold-out manifest instead",
    },
    "seed": {"type": within(0), "default": 0, "help": "random seed"},
    "verify": {"action": "store_true", "help": "decode every image and leave out broken ones"},
    "workers": {"type": within(1), "default": os.cpu_count() or 1, "help": "number of processes"},
}
