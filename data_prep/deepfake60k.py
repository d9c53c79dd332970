"""Deepfake-60K: photographs of faces and deepfakes.

    python -m data_prep.deepfake60k --root data/deepfake60k --out data/manifests/deepfake60k.csv

Layout: `Real/` and `Fake/`, or `train/Real/` and `train/Fake/`, in folders or archives, at any depth below
`--root`.

Pitfalls: related sets number Fake 0 and Real 1, as the alphabet does. Only these two names set a label; a
folder `0` or `1` is an error.

Terms: unknown; the card on the hub could not be read.

The column `group` holds the file's stem. The generators are unpublished: `generator` is empty.
"""

from data_prep.reading.files import ImageFile, nothing_else, one_on_path
from data_prep.writing import source as sources
from featdistill import command_line

LABELS = {"real": 0, "fake": 1}


def row(file: ImageFile) -> sources.Cells:
    """Return the cells of an image; a `UserError` names a folder that is not in the layout."""
    position, label = one_on_path(file, LABELS, "a label")
    nothing_else(file, {*LABELS, "train"}, position)
    return {"label": label}


main = sources.command(
    sources.Source(
        name="deepfake60k",
        title="Deepfake-60K",
        origin="prithivMLmods/Deepfake-vs-Real-60K on the Hugging Face hub, or Kaggle",
        licence="unknown",
        row=row,
        published_total=60_000,
        rounding=1_000,
        keep_once=True,
    )
)

if __name__ == "__main__":
    command_line.run(main)
