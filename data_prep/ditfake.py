"""DiTFake, of SAFE (KDD 2025): images of three diffusion transformers, and photographs of COCO.

    python -m data_prep.ditfake --root data/ditfake --out data/manifests/ditfake.csv

Layout: `test*/<generator>/{0_real,1_fake}`, in folders or archives, however deep below `--root`.

Traps: the photographs repeat over the three generators. Equal files are kept once; the column `protocol_sets`
names the generators that a photograph is held against, separated by `;`.

Terms: the card on the hub could not be read; the licence is unknown. The photographs are COCO's.

| column | holds |
|---|---|
| `group` | the file's stem, which a photograph and an image made from its caption may share |
| `protocol_sets` | the generators whose images the row is scored with |
"""

from data_prep.reading.files import ImageFile, columns_of, find_images, nothing_else, one_on_path
from data_prep.writing import source as sources
from featdistill import command_line
from featdistill.command_line import Parser

GENERATORS = {
    name.casefold(): name
    for name in ("FLUX.1-schnell", "PixArt-Sigma-XL-2-1024-MS", "stable-diffusion-3-medium-diffusers")
}
LABELS = {"0_real": 0, "1_fake": 1}
SOURCE = sources.Source(
    name="ditfake",
    title="DiTFake",
    origin="lioooox/DiTFake on the Hugging Face hub",
    licence="unknown",
    # 30,000 images: of each generator 5,000 and as many photographs, which repeat.
    promised={("", 0): 15_000, **{(name, 1): 5_000 for name in GENERATORS.values()}},
    keep_once=True,
)


def columns(files: list[ImageFile]) -> dict[str, list]:
    """Return the columns of the manifest.

    Raises:
        UserError: a folder does not tell one generator and one label.
    """
    generators, labels = [], []
    for file in files:
        place, generator = one_on_path(file, GENERATORS, "a generator")
        _, label = one_on_path(file, LABELS, "a label")
        nothing_else(file, {*GENERATORS, *LABELS}, place)
        generators.append(generator)
        labels.append(label)
    return {
        **columns_of(files),
        "label": labels,
        "generator": [name if label else "" for name, label in zip(generators, labels, strict=True)],
        "protocol_sets": generators,
    }


def build_parser() -> Parser:
    return sources.build_parser("ditfake", SOURCE)


def main(argv: list[str] | None = None) -> int:
    args = sources.parse(build_parser(), argv)
    return sources.finish(columns(find_images(args.root)), SOURCE, args)


if __name__ == "__main__":
    command_line.run(main)
