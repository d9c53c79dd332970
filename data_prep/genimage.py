"""GenImage: ImageNet's photographs, and images of its classes by eight generators.

    python -m data_prep.genimage --root data/genimage --out data/manifests/genimage.csv

Layout: `<Generator>/<inner>/{train,val}/{ai,nature}`, where the inner folder alone identifies the generator
too; or repackaged, `<Generator>/{0_real,1_fake}` in any case, optionally with `{train,val}`. In folders or
archives, at any depth below `--root`. The archives are published in parts (`.z01`, `.z02`, .., `.zip`), which
must be joined or unpacked.

Pitfalls: `ai` comes before `nature` in the alphabet, so labels numbered in order are inverted: only the names
count here. The photographs are JPEGs and the AI images PNGs of fixed sizes, which a model can exploit: see
`data_prep.equalize`. Equal files are not searched for among the millions of files: see `data_prep.audit`.

Terms: non-commercial or academic use only.

| column | holds |
|---|---|
| `split` | `train` or `val`; empty where the folders do not tell |
| `group` | the file's stem |
| `protocol_sets` | the generator that the row is scored with, for photographs too |
"""

from data_prep.reading.files import ImageFile, nothing_else, one_on_path
from data_prep.writing import source as sources
from featdistill import command_line

# The usual names, with the inner folders as published and the names seen in repackaged sets.
ALIASES = {
    "Midjourney": ("midjourney", "imagenet_midjourney"),
    "stable_diffusion_v_1_4": (
        *("stable_diffusion_v_1_4", "imagenet_ai_0419_sdv4", "stable_diffusion_v1_4", "stable_diffusion_1_4"),
        *("sdv1.4", "sdv14", "sdv1_4", "sd14", "sd_v1.4", "sdv4"),
    ),
    "stable_diffusion_v_1_5": (
        *("stable_diffusion_v_1_5", "imagenet_ai_0424_sdv5", "stable_diffusion_v1_5", "stable_diffusion_1_5"),
        *("sdv1.5", "sdv15", "sdv1_5", "sd15", "sd_v1.5", "sdv5"),
    ),
    "ADM": ("adm", "imagenet_ai_0508_adm"),
    "glide": ("glide", "imagenet_glide"),
    "wukong": ("wukong", "imagenet_ai_0424_wukong"),
    "VQDM": ("vqdm", "imagenet_ai_0419_vqdm"),
    "BigGAN": ("biggan", "imagenet_ai_0419_biggan"),
}
GENERATORS = {alias: name for name, aliases in ALIASES.items() for alias in aliases}
LABELS = {"nature": 0, "ai": 1, "0_real": 0, "1_fake": 1}
SPLITS = {"train": "train", "val": "val"}


def row(file: ImageFile) -> sources.Cells:
    """Return the cells of an image; a `UserError` names a folder that is not in the layout."""
    position, generator = one_on_path(file, GENERATORS, "a generator")
    label = one_on_path(file, LABELS, "a label")[1]
    nothing_else(file, {*GENERATORS, *LABELS, *SPLITS}, position)
    has_split = any(name.casefold() in SPLITS for name in file.folders)
    split = one_on_path(file, SPLITS, "a split")[1] if has_split else ""
    return {"label": label, "generator": generator, "split": split, "protocol_sets": generator}


SOURCE = sources.Source(
    name="genimage",
    title="GenImage",
    origin="the release of the paper, arXiv 2306.08571",
    licence="non-commercial or academic use only",
    # Section 3 of the paper: 162,000 training and 6,000 validation images per generator, 166,000 and 8,000 of
    # Stable Diffusion 1.5; the photographs are those of ImageNet's training and validation sets.
    row=row,
    published={
        ("", 0): 1_331_167,
        **{(name, 1): 174_000 if name == "stable_diffusion_v_1_5" else 168_000 for name in ALIASES},
    },
)
main = sources.command(SOURCE)

if __name__ == "__main__":
    command_line.run(main)
