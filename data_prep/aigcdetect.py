"""AIGCDetectBenchmark and Chameleon: test sets of many generators, and of images that people take for real.

    python -m data_prep.aigcdetect --root data/aigcdetect --out data/manifests/aigcdetect.csv
    python -m data_prep.aigcdetect --root data/chameleon --preset chameleon --out data/manifests/chameleon.csv

Layout: `<set>/{0_real,1_fake}` or `<set>/<class>/{0_real,1_fake}`; Chameleon `{0_real,1_fake}`, optionally
below a class folder. In folders or archives, at any depth below `--root`.

Pitfalls: sets of AIGCDetectBenchmark share photographs (those of GenImage). Equal files are kept once, and
`protocol_sets` names the sets that use a photograph. The generators of Chameleon are unpublished.

Terms: Chameleon for non-commercial or academic use only; those of AIGCDetectBenchmark are unknown.

| column | holds |
|---|---|
| `class` | the class folder, if any |
| `group` | set, class and stem, which a photograph and the images made from it share |
| `protocol_sets` | the sets that the row is scored in, separated by `;` |
"""

from data_prep import genimage
from data_prep.reading.files import ImageFile, nothing_else, one_on_path, set_class_label
from data_prep.writing import source as sources
from featdistill import command_line

LABELS = {"0_real": 0, "1_fake": 1}
# Half of the images of each set: arXiv 2311.12397, table of test sets, in multiples of 100 images.
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


def aigcdetect_row(file: ImageFile) -> sources.Cells:
    """Return the cells of an image; a `UserError` names a folder that is not in the layout."""
    return sources.set_cells(file, *set_class_label(file, SETS, LABELS))


def chameleon_row(file: ImageFile) -> sources.Cells:
    """Return the cells of an image; a `UserError` names a folder that is not in the layout."""
    position, label = one_on_path(file, LABELS, "a label")
    nothing_else(file, LABELS, position)
    return sources.set_cells(file, "", "", label) | {"protocol_sets": "chameleon"}


main = sources.command(
    sources.Source(
        name="aigcdetect",
        title="AIGCDetectBenchmark",
        origin="the release of AIGCDetectBenchmark (PatchCraft, arXiv 2311.12397)",
        licence="unknown",
        row=aigcdetect_row,
        published={("", 0): sum(SET_SIZES.values()), **{(name, 1): size for name, size in SET_SIZES.items()}},
        rounding=100,
        keep_once=True,
    ),
    sources.Source(
        name="chameleon",
        title="Chameleon",
        origin="the release of AIDE (arXiv 2406.19435), on request",
        licence="non-commercial or academic use only",
        row=chameleon_row,
        published={("", 0): 14_863, ("", 1): 11_170},
        keep_once=True,
    ),
)

if __name__ == "__main__":
    command_line.run(main)
