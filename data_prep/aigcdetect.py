"""AIGCDetectBenchmark and Chameleon: test sets of many generators, and of images that people take for real.

    python -m data_prep.aigcdetect --root data/aigcdetect --out data/manifests/aigcdetect.csv
    python -m data_prep.aigcdetect --root data/chameleon --preset chameleon --out data/manifests/chameleon.csv

Layout: `<set>/{0_real,1_fake}` or `<set>/<class>/{0_real,1_fake}`; Chameleon `{0_real,1_fake}`, also with one
class level above. In folders or archives, however deep below `--root`.

Traps: sets of AIGCDetectBenchmark share photographs (those of GenImage): equal files are kept once, and
`protocol_sets` names the sets that a photograph serves. What made Chameleon's images is not published.

Terms: Chameleon for non-commercial or academic use only; those of AIGCDetectBenchmark are unknown.

| column | holds |
|---|---|
| `class` | the class level, where there is one |
| `group` | set, class and stem, which a photograph and what was made from it share |
| `protocol_sets` | the sets that the row is scored in, separated by `;` |
"""

from data_prep import genimage
from data_prep.reading.files import (
    ImageFile,
    columns_of,
    find_images,
    nothing_else,
    one_on_path,
    set_class_label,
)
from data_prep.writing import source as sources
from featdistill import command_line
from featdistill.command_line import Parser

LABELS = {"0_real": 0, "1_fake": 1}
# Half the images of each set: arXiv 2311.12397, its table of test sets, in steps of 100 images.
SET_SIZES = {
    **{"progan": 4_000, "stylegan": 6_000, "biggan": 2_000, "cyclegan": 1_300, "stargan": 2_000},
    **{"gaugan": 5_000, "stylegan2": 7_950, "whichfaceisreal": 1_000, "ADM": 6_000, "glide": 6_000},
    **{"Midjourney": 6_000, "stable_diffusion_v_1_4": 6_000, "stable_diffusion_v_1_5": 8_000},
    **{"VQDM": 6_000, "wukong": 6_000, "DALLE2": 1_000},
}
SETS = {
    **{name.casefold(): name for name in SET_SIZES},
    **{alias: name for alias, name in genimage.GENERATORS.items() if name in SET_SIZES},
    **{"dalle-2": "DALLE2", "dalle_2": "DALLE2", "sd_xl": "SDXL", "sdxl": "SDXL"},
}
AIGCDETECT = sources.Source(
    name="aigcdetect",
    title="AIGCDetectBenchmark",
    origin="the release of AIGCDetectBenchmark (PatchCraft, arXiv 2311.12397)",
    licence="unknown",
    promised={("", 0): sum(SET_SIZES.values()), **{(name, 1): size for name, size in SET_SIZES.items()}},
    rounding=100,
    keep_once=True,
)
CHAMELEON = sources.Source(
    name="chameleon",
    title="Chameleon",
    origin="the release of AIDE (arXiv 2406.19435), on request",
    licence="non-commercial or academic use only",
    promised={("", 0): 14_863, ("", 1): 11_170},
    keep_once=True,
)


def columns(files: list[ImageFile], source: sources.Source) -> dict[str, list]:
    """Return the columns of the manifest.

    Raises:
        UserError: a folder does not tell one set and one label.
    """
    sets, classes, labels = [], [], []
    for file in files:
        if source is AIGCDETECT:
            name, class_, label = set_class_label(file, SETS, LABELS)
        else:
            place, label = one_on_path(file, LABELS, "a label")
            nothing_else(file, LABELS, place)
            name, class_ = "", ""
        sets.append(name)
        classes.append(class_)
        labels.append(label)
    stems = [file.stem for file in files]
    return {
        **columns_of(files),
        "label": labels,
        "generator": [name if label else "" for name, label in zip(sets, labels, strict=True)],
        "class": classes,
        "group": ["/".join(filter(None, parts)) for parts in zip(sets, classes, stems, strict=True)],
        "protocol_sets": [name or source.name for name in sets],
    }


def build_parser() -> Parser:
    return sources.build_parser("aigcdetect", AIGCDETECT, CHAMELEON)


def main(argv: list[str] | None = None) -> int:
    args = sources.parse(build_parser(), argv)
    source = sources.chosen(args, AIGCDETECT, CHAMELEON)
    return sources.finish(columns(find_images(args.root), source), source, args)


if __name__ == "__main__":
    command_line.run(main)
