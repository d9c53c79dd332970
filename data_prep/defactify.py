"""De-Factify: captions with one real image and five generated ones each, from parquet files to one manifest.

    python -m data_prep.defactify --root data/defactify --out data/manifests/defactify.csv

The images are read from the parquet files in place. Columns: `Caption`, `Image` {bytes, path}, `Label_A`
(0 real, 1 AI) and `Label_B`, the generator; the two labels must agree in every row. Images with the same
caption are one group. Only the split `train` is read unless `--split` names another: in one revision, about
16 % of the labels of the split `test` were wrong. `data_prep.download` records which revision it fetched.
"""

import hashlib
import logging
from dataclasses import replace
from typing import Any

from data_prep.reading.parquet import text_of
from data_prep.writing import source as sources
from featdistill import command_line

_log = logging.getLogger(__name__)
# Generators by Label_B, from the data set's card.
GENERATORS = ("", "sd21", "sdxl", "sd3", "dalle3", "midjourney6")


def row(values: dict[str, Any]) -> sources.Cells:
    """Return the cells of an image; a `ValueError` says which label is unknown, or that they disagree."""
    label, generator = values["Label_A"], values["Label_B"]
    if type(label) is not int or label not in (0, 1):
        raise ValueError(f"Label_A is {label!r}; it must be 0 (real) or 1 (AI)")
    if type(generator) is not int or not 0 <= generator < len(GENERATORS):
        raise ValueError(f"Label_B is {generator!r}; it must be 0 (real) or 1 to {len(GENERATORS) - 1}")
    if label != (generator > 0):
        raise ValueError(f"Label_A {label} and Label_B {generator} disagree on whether the image is real")
    caption = " ".join(text_of(values["Caption"], "Caption").split())
    group = f"caption-{hashlib.sha256(caption.encode()).hexdigest()[:20]}" if caption else ""
    return {"label": label, "generator": GENERATORS[generator], "group": group}


SOURCE = sources.Source(
    name="defactify",
    title="De-Factify (train)",
    origin="the Hugging Face data set Rajarshi-Roy-research/Defactify_Image_Dataset",
    licence="none stated",
    row=row,
    image_column="Image.bytes",
    columns=("Caption", "Label_A", "Label_B"),
    published_total=42_000,
)


def main(argv: list[str] | None = None) -> int:
    parser = sources.build_parser("defactify", SOURCE)
    parser.add_argument("--split", default="train", help="split to read, by file name: <split>-*.parquet")
    args = parser.parse_args(argv)
    source = SOURCE
    if args.split != "train":
        source = replace(SOURCE, title=f"De-Factify ({args.split})", published_total=None)
    if args.split == "test":
        _log.info("note: about 16 % of the labels of test were wrong in one revision; check yours")
    rows = sources.read(source, args.root, args.split)
    _log.info(f"{len(set(rows['group']))} captions; images with the same caption are one group")
    return sources.finish(rows, source, args)


if __name__ == "__main__":
    command_line.run(main)
