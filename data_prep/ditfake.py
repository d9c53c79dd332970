"""DiTFake, of SAFE (KDD 2025): images of three diffusion transformers, and photographs of COCO.

    python -m data_prep.ditfake --root data/ditfake --out data/manifests/ditfake.csv

Layout: `test*/<generator>/{0_real,1_fake}`, in folders or archives, at any depth below `--root`.

Pitfalls: the three generators come with the same photographs. Equal files are kept once; `protocol_sets`
names the generators that a photograph is compared with, separated by `;`.

Terms: unknown; the card on the hub could not be read. The photographs are from COCO.

| column | holds |
|---|---|
| `group` | the file's stem, which a photograph and an image made from its caption may share |
| `protocol_sets` | the generators whose images the row is scored with |
"""

from data_prep.reading.files import ImageFile, nothing_else, one_on_path
from data_prep.writing import source as sources
from featdistill import command_line

GENERATORS = {
    name.casefold(): name
    for name in ("FLUX.1-schnell", "PixArt-Sigma-XL-2-1024-MS", "stable-diffusion-3-medium-diffusers")
}
LABELS = {"0_real": 0, "1_fake": 1}


def row(file: ImageFile) -> sources.Cells:
    """Return the cells of an image; a `UserError` names a folder that is not in the layout."""
    position, generator = one_on_path(file, GENERATORS, "a generator")
    label = one_on_path(file, LABELS, "a label")[1]
    nothing_else(file, {*GENERATORS, *LABELS}, position)
    return {"label": label, "generator": generator, "protocol_sets": generator}


main = sources.command(
    sources.Source(
        name="ditfake",
        title="DiTFake",
        origin="lioooox/DiTFake on the Hugging Face hub",
        licence="unknown",
        row=row,
        # 30,000 images: 5,000 of each generator and as many photographs, which repeat.
        published={("", 0): 15_000, **{(name, 1): 5_000 for name in GENERATORS.values()}},
        keep_once=True,
    )
)

if __name__ == "__main__":
    command_line.run(main)
