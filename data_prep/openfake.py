"""OpenFake: real images and those of recent generators, from parquet files to one manifest.

    python -m data_prep.openfake --root data/openfake --out data/manifests/openfake.csv

The images are read from the parquet files in place. Their columns: `image` {bytes, path}, `label` (the text
`real` or `fake`) and `model`, what made the image.
"""

from typing import Any

from data_prep.reading import parquet as parquet_parts
from data_prep.writing import source as sources
from data_prep.writing.source import Source
from featdistill import command_line

COLUMNS = ["label", "model"]
LABELS = {"real": 0, "fake": 1}
SOURCE = Source(
    name="openfake",
    title="OpenFake",
    origin="the Hugging Face hub (data_prep.download --list)",
    licence="unknown",
)


def row_of(values: dict[str, Any]) -> dict[str, Any]:
    """Return the cells of a manifest for a row of the data set.

    Raises:
        ValueError: the label is unknown.
    """
    text = values["label"]
    if not isinstance(text, str) or text.casefold() not in LABELS:
        raise ValueError(f"label is {text!r}; it must be one of {', '.join(LABELS)}")
    label = LABELS[text.casefold()]
    return {"label": label, "generator": parquet_parts.text_of(values["model"], "model") if label else ""}


def build_parser() -> command_line.Parser:
    return sources.build_parser("openfake", SOURCE)


def main(argv: list[str] | None = None) -> int:
    args = sources.parse(build_parser(), argv)
    rows = parquet_parts.read_rows(parquet_parts.find_parts(args.root), "image.bytes", COLUMNS, row_of)
    return sources.finish(rows, SOURCE, args)


if __name__ == "__main__":
    command_line.run(main)
