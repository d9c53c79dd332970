"""Flags of several commands that read records."""

from typing import Any


def add_labels(group: Any) -> None:
    """Add `--labels` to a parser or one of its groups."""
    group.add_argument(
        "--labels",
        nargs="+",
        metavar="FILE",
        help="manifests or official label files: one for each predictions file, in the same order, or one "
        "for all (default: the manifest in each sidecar)",
    )
