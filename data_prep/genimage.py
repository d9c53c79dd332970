"""GenImage: ImageNet's photographs, and images of its classes by eight generators.

    python -m data_prep.genimage --root data/genimage --out data/manifests/genimage.csv

Layout: `<Generator>/<inner>/{train,val}/{ai,nature}`, where the inner folder alone tells the generator too;
or re-packed, `<Generator>/{0_real,1_fake}` in any capitals, also with `{train,val}`. In folders or archives,
however deep below `--root`. The archives are published in parts (`.z01`, `.z02`, .., `.zip`), which must be
joined or unpacked.

Traps: the alphabet has `ai` before `nature`, so numbers by order are inverted: only the names count here. The
photographs are JPEG and the AI images PNG of fixed sizes, which a model can score on alone: see
`data_prep.equalise`. With millions of files, equal ones are not looked for: see `data_prep.audit`.

Terms: non-commercial or academic use only.

| column | holds |
|---|---|
| `split` | `train` or `val`; empty where the folders do not say |
| `group` | the file's stem |
| `protocol_sets` | the generator that the row is scored with, also for photographs |
"""

from data_prep.reading.files import ImageFile, columns_of, find_images, nothing_else, one_on_path
from data_prep.writing import source as sources
from featdistill import command_line
from featdistill.command_line import Parser

# The field's names, with the inner folders as published and the names seen in re-packed sets.
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
SOURCE = sources.Source(
    name="genimage",
    title="GenImage",
    origin="the release of the paper, arXiv 2306.08571",
    licence="non-commercial or academic use only",
    # The paper's section 3: 162,000 images a generator to train on and 6,000 to validate, of Stable Diffusion
    # 1.5 166,000 and 8,000; the photographs are all of ImageNet's training and validation sets.
    promised={
        ("", 0): 1_331_167,
        **{(name, 1): 174_000 if name == "stable_diffusion_v_1_5" else 168_000 for name in ALIASES},
    },
)


def columns(files: list[ImageFile]) -> dict[str, list]:
    """Return the columns of the manifest.

    Raises:
        UserError: a folder does not tell one generator and one label, or tells two splits.
    """
    generators, labels, splits = [], [], []
    for file in files:
        place, generator = one_on_path(file, GENERATORS, "a generator")
        _, label = one_on_path(file, LABELS, "a label")
        nothing_else(file, {*GENERATORS, *LABELS, *SPLITS}, place)
        has_split = any(name.casefold() in SPLITS for name in file.folders)
        splits.append(one_on_path(file, SPLITS, "a split")[1] if has_split else "")
        generators.append(generator)
        labels.append(label)
    return {
        **columns_of(files),
        "label": labels,
        "generator": [name if label else "" for name, label in zip(generators, labels, strict=True)],
        "split": splits,
        "protocol_sets": generators,
    }


def build_parser() -> Parser:
    return sources.build_parser("genimage", SOURCE)


def main(argv: list[str] | None = None) -> int:
    args = sources.parse(build_parser(), argv)
    return sources.finish(columns(find_images(args.root)), SOURCE, args)


if __name__ == "__main__":
    command_line.run(main)
