"""Community Forensics: images of thousands of generators, from parquet files to one manifest.

    python -m data_prep.community_forensics --root data/community_forensics --out data/manifests/cf.csv
    python -m data_prep.community_forensics --preset community_forensics_small --root DIR --out FILE.csv

The images are read from the parquet files in place. Their columns: `image_data` (an image file's bytes),
`label` (1 AI, 0 real), `model_name` and `architecture`. The full set has AI-generated images only: a detector
needs real images of another source beside it, or the smaller sets (Small, Eval), which have some.
"""

from typing import Any

from data_prep.reading import parquet as parquet_parts
from data_prep.writing import source as sources
from data_prep.writing.source import Source
from featdistill import command_line

COLUMNS = ["label", "model_name", "architecture"]
FULL = Source(
    name="community_forensics",
    title="Community Forensics, the full set (AI images only)",
    origin="the project's page or the Hugging Face hub (data_prep.download --list)",
    licence="unknown",
)
SMALL = Source(
    name="community_forensics_small",
    title="Community Forensics, Small or Eval",
    origin=FULL.origin,
    licence="non-commercial",
)


def row_of(values: dict[str, Any]) -> dict[str, Any]:
    """Return the cells of a manifest for a row of the data set; `architecture` is a column of its own.

    Raises:
        ValueError: the label is unknown.
    """
    label = values["label"]
    if type(label) is not int or label not in (0, 1):
        raise ValueError(f"label is {label!r}; it must be 1 (AI) or 0 (real)")
    texts = [parquet_parts.text_of(values[column], column) for column in ("model_name", "architecture")]
    generator, architecture = texts if label else ("", "")
    return {"label": label, "generator": generator, "architecture": architecture}


def build_parser() -> command_line.Parser:
    return sources.build_parser("community_forensics", FULL, SMALL)


def main(argv: list[str] | None = None) -> int:
    args = sources.parse(build_parser(), argv)
    source = sources.chosen(args, FULL, SMALL)
    rows = parquet_parts.read_rows(parquet_parts.find_parts(args.root), "image_data", COLUMNS, row_of)
    real = rows["label"].count(0)
    if not real:
        print("note: there are no real images here, as in the whole full set; take those of another source")
    elif source is FULL:
        print(f"warning: {real} real images are here, and the full set has none: --preset {SMALL.name}?")
    return sources.finish(rows, source, args)


if __name__ == "__main__":
    command_line.run(main)
