"""Community Forensics: images of thousands of generators, from parquet files to one manifest.

    python -m data_prep.community_forensics --root data/community_forensics --out data/manifests/cf.csv
    python -m data_prep.community_forensics --preset community_forensics_small --root DIR --out FILE.csv

The images are read from the parquet files in place. Columns: `image_data` (bytes of an image file), `label`
(1 AI, 0 real), `model_name` and `architecture`. The full set has AI images only: combine it with real images
of another source, or use the smaller sets (Small, Eval), which have some.
"""

import logging
from typing import Any

from data_prep.reading.parquet import text_of
from data_prep.writing import source as sources
from featdistill import command_line

_log = logging.getLogger(__name__)


def row(values: dict[str, Any]) -> sources.Cells:
    """Return the cells of an image; a `ValueError` says that its label is unknown."""
    label = values["label"]
    if type(label) is not int or label not in (0, 1):
        raise ValueError(f"label is {label!r}; it must be 1 (AI) or 0 (real)")
    generator, architecture = (text_of(values[column], column) for column in ("model_name", "architecture"))
    return {"label": label, "generator": generator, "architecture": architecture if label else ""}


_COMMON = {"row": row, "image_column": "image_data", "columns": ("label", "model_name", "architecture")}
FULL = sources.Source(
    name="community_forensics",
    title="Community Forensics, the full set (AI images only)",
    origin="the project's page or the Hugging Face hub (data_prep.download --list)",
    licence="unknown",
    **_COMMON,
)
SMALL = sources.Source(
    name="community_forensics_small",
    title="Community Forensics, Small or Eval",
    origin=FULL.origin,
    licence="non-commercial",
    **_COMMON,
)


def main(argv: list[str] | None = None) -> int:
    args = sources.build_parser("community_forensics", FULL, SMALL).parse_args(argv)
    source = sources.chosen(args, FULL, SMALL)
    rows = sources.read(source, args.root)
    real = rows["label"].count(0)
    if not real:
        _log.info("note: there are no real images, as in the whole full set; add those of another source")
    elif source is FULL:
        _log.warning(f"found {real} real images, and the full set has none: --preset {SMALL.name}?")
    return sources.finish(rows, source, args)


if __name__ == "__main__":
    command_line.run(main)
