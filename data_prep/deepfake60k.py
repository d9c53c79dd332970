"""Deepfake-60K: photographs of faces and deepfakes.

    python -m data_prep.deepfake60k --root data/deepfake60k --out data/manifests/deepfake60k.csv

Layout: `Real/` and `Fake/`, or `train/Real/` and `train/Fake/`, in folders or archives, however deep below
`--root`.

Traps: sister sets number Fake 0 and Real 1, and the alphabet does the same. Only the two names give a label;
a folder `0` or `1` is an error.

Terms: the card on the hub could not be read; the licence is unknown.

The column `group` holds the file's stem. What made the deepfakes is not published: `generator` is empty.
"""

from data_prep.reading.files import ImageFile, columns_of, find_images, nothing_else, one_on_path
from data_prep.writing import source as sources
from featdistill import command_line
from featdistill.command_line import Parser

LABELS = {"real": 0, "fake": 1}
SOURCE = sources.Source(
    name="deepfake60k",
    title="Deepfake-60K",
    origin="prithivMLmods/Deepfake-vs-Real-60K on the Hugging Face hub, or Kaggle",
    licence="unknown",
    promised_images=60_000,
    rounding=1_000,
    keep_once=True,
)


def columns(files: list[ImageFile]) -> dict[str, list]:
    """Return the columns of the manifest.

    Raises:
        UserError: a folder does not tell one label.
    """
    labels = []
    for file in files:
        place, label = one_on_path(file, LABELS, "a label")
        nothing_else(file, {*LABELS, "train"}, place)
        labels.append(label)
    return {**columns_of(files), "label": labels}


def build_parser() -> Parser:
    return sources.build_parser("deepfake60k", SOURCE)


def main(argv: list[str] | None = None) -> int:
    args = sources.parse(build_parser(), argv)
    return sources.finish(columns(find_images(args.root)), SOURCE, args)


if __name__ == "__main__":
    command_line.run(main)
