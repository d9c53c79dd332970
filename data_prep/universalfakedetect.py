"""ForenSynths and UniversalFakeDetect: the 19 sets on which generalization is usually tested.

    python -m data_prep.universalfakedetect --root data/ufd --out data/manifests/ufd.csv

Layout: `<set>/{0_real,1_fake}`, some sets `<set>/<class>/{0_real,1_fake}`; and
`diffusion_datasets/{imagenet,laion}` with photographs only, next to the folders of the eight diffusion sets
with AI images only, with or without `0_real` and `1_fake`. In folders or archives, at any depth below
`--root`. ForenSynths' `stylegan2` and `whichfaceisreal` are included; they do not belong to the 19.

Pitfalls: `imagenet` is the real half of `guided`, and `laion` that of the seven sets of LDM, GLIDE and
DALL-E; `crn` and `imle` share theirs. Such a photograph is one row, and `protocol_sets` names the sets that
use it. One of ProGAN's classes is called `train`.

Terms: ForenSynths for non-commercial or academic use only; those of the diffusion sets are unknown.

| column | holds |
|---|---|
| `generator` | the name of the set, for AI images |
| `class` | the class folder, if any |
| `group` | set, class and stem, which a photograph and the images made from it share; for the diffusion \
sets, the photographs' folder and the stem |
| `protocol_sets` | the sets that the row is scored in, separated by `;`; empty for sets beyond the 19 |
"""

from data_prep.duplicates.keep_once import SET_SEPARATOR
from data_prep.reading.files import ImageFile, nothing_else, one_on_path, set_class_label
from data_prep.writing import source as sources
from featdistill import command_line
from featdistill.command_line import UserError

# AI images by set in the archive of ForenSynths (arXiv 1912.11035); there are as many photographs, and nine
# more of deepfake. The diffusion sets (arXiv 2302.10174) have 1,000 images each.
FORENSYNTHS = {
    **{"progan": 4_000, "cyclegan": 1_321, "biggan": 2_000, "stylegan": 5_991, "gaugan": 5_000},
    **{"stargan": 1_999, "deepfake": 2_698, "seeingdark": 180, "san": 219, "crn": 6_382, "imle": 6_382},
}
BEYOND_THE_19 = ("stylegan2", "whichfaceisreal")
SETS = {name: name for name in (*FORENSYNTHS, *BEYOND_THE_19)}
LAION_SETS = ("ldm_200", "ldm_200_cfg", "ldm_100", "glide_100_27", "glide_50_27", "glide_100_10", "dalle")
# Folders of photographs, and the diffusion sets that they are the real half of.
SHARED_REALS = {"imagenet": ("guided",), "laion": LAION_SETS}
REALS_OF = {name: reals for reals, names in SHARED_REALS.items() for name in names}
DIFFUSION = {name: name for name in (*SHARED_REALS, *REALS_OF)}
LABELS = {"0_real": 0, "1_fake": 1}


def row(file: ImageFile) -> sources.Cells:
    """Return the cells of an image; a `UserError` names a folder that is not in the layout."""
    position, name = one_on_path(file, {**SETS, **DIFFUSION}, "a set")
    if name in SETS:
        cells = sources.set_cells(file, *set_class_label(file, SETS, LABELS))
        return cells | {"licence": "", **({"protocol_sets": ""} if name in BEYOND_THE_19 else {})}
    nothing_else(file, {*DIFFUSION, *LABELS}, position)
    label = int(name in REALS_OF)
    if any(LABELS.get(folder.casefold(), label) != label for folder in file.folders):
        raise UserError(f"folder '{file.folder}': {name} holds only {sources.LABEL_NAMES[label]} images")
    group = f"{REALS_OF.get(name, name)}/{file.stem}"
    cells = {"label": label, "generator": name, "class": "", "group": group}
    return cells | {"protocol_sets": SET_SEPARATOR.join(SHARED_REALS.get(name, [name])), "licence": "unknown"}


SOURCE = sources.Source(
    name="universalfakedetect",
    title="UniversalFakeDetect / ForenSynths",
    origin="the release of CNNDetection, CNN_synth_testset, and that of UniversalFakeDetect",
    licence="non-commercial or academic use only",
    row=row,
    published={
        ("", 0): sum(FORENSYNTHS.values()) + 9 + 2 * 1_000,
        **{(name, 1): count for name, count in FORENSYNTHS.items()},
        **{(name, 1): 1_000 for name in REALS_OF},
    },
    keep_once=True,
)
main = sources.command(SOURCE)

if __name__ == "__main__":
    command_line.run(main)
