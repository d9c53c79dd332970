"""OpenFake: real images and those of recent generators, from parquet files to one manifest.

    python -m data_prep.openfake --root data/openfake --out data/manifests/openfake.csv

The images are read from the parquet files in place. Columns: `image` {bytes, path}, `label` (the text `real`
or `fake`) and `model`, the generator.
"""

from typing import Any

from data_prep.reading.parquet import text_of
from data_prep.writing import source as sources
from featdistill import command_line

LABELS = {"real": 0, "fake": 1}


def row(values: dict[str, Any]) -> sources.Cells:
    """Return the cells of an image; a `ValueError` says that its label is unknown."""
    text = values["label"]
    if not isinstance(text, str) or text.casefold() not in LABELS:
        raise ValueError(f"label is {text!r}; it must be one of {', '.join(LABELS)}")
    return {"label": LABELS[text.casefold()], "generator": text_of(values["model"], "model")}


main = sources.command(
    sources.Source(
        name="openfake",
        title="OpenFake",
        origin="the Hugging Face hub (data_prep.download --list)",
        licence="unknown",
        row=row,
        image_column="image.bytes",
        columns=("label", "model"),
    )
)

if __name__ == "__main__":
    command_line.run(main)
