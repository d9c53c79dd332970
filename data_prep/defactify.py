"""De-Factify: captions with one real image and five generated ones each, from parquet files to one manifest.

    python -m data_prep.defactify --root data/defactify --out data/manifests/defactify.csv

The images are read from the parquet files in place. Columns: `Caption`, `Image` {bytes, path}, `Label_A`
(0 real, 1 AI) and `Label_B`, which tells the generator; the two labels must agree in every row. Images of one
caption are one group. Only the split `train` is taken unless `--split` asks for another: about 16 % of the
labels of the split `test` were wrong at one time. `data_prep.download` notes which revision it fetched.
"""

import hashlib
from dataclasses import replace
from typing import Any

from data_prep.reading import parquet as parquet_parts
from data_prep.writing import source as sources
from data_prep.writing.source import Source
from featdistill import command_line

# What Label_B stands for, from the data set's card.
GENERATORS = ("", "sd21", "sdxl", "sd3", "dalle3", "midjourney6")
COLUMNS = ["Caption", "Label_A", "Label_B"]
SOURCE = Source(
    name="defactify",
    title="De-Factify (train)",
    origin="the Hugging Face data set Rajarshi-Roy-research/Defactify_Image_Dataset",
    licence="none stated",
    promised_images=42_000,
)


def row_of(values: dict[str, Any]) -> dict[str, Any]:
    """Return the cells of a manifest for a row of the data set.

    Raises:
        ValueError: a label is unknown, or the two disagree.
    """
    label, generator = values["Label_A"], values["Label_B"]
    if type(label) is not int or label not in (0, 1):
        raise ValueError(f"Label_A is {label!r}; it must be 0 (real) or 1 (AI)")
    if type(generator) is not int or not 0 <= generator < len(GENERATORS):
        raise ValueError(f"Label_B is {generator!r}; it must be 0 (real) or 1 to {len(GENERATORS) - 1}")
    if label != (generator > 0):
        raise ValueError(f"Label_A {label} and Label_B {generator} disagree on whether the image is real")
    return {
        "label": label,
        "generator": GENERATORS[generator],
        "group": _group(parquet_parts.text_of(values["Caption"], "Caption")),
    }


def _group(caption: str) -> str:
    """Return a short text that equal captions share; an image without a caption has no group."""
    words = " ".join(caption.split())
    return f"caption-{hashlib.sha256(words.encode()).hexdigest()[:20]}" if words else ""


def build_parser() -> command_line.Parser:
    parser = sources.build_parser("defactify", SOURCE)
    parser.add_argument(
        "--split", default="train", help="which parts, by their file names: <split>-*.parquet"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = sources.parse(build_parser(), argv)
    source = SOURCE
    if args.split != "train":
        source = replace(SOURCE, title=f"De-Factify ({args.split})", promised_images=None)
    if args.split == "test":
        print("note: about 16 % of the labels of test were wrong in one revision; check yours")
    parts = parquet_parts.find_parts(args.root, args.split)
    rows = parquet_parts.read_rows(parts, "Image.bytes", COLUMNS, row_of)
    print(f"{len(set(rows['group']))} captions; images of one caption are one group")
    return sources.finish(rows, source, args)


if __name__ == "__main__":
    command_line.run(main)
