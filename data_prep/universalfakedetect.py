"""ForenSynths and UniversalFakeDetect: the 19 sets that the field tests generalisation on.

    python -m data_prep.universalfakedetect --root data/ufd --out data/manifests/ufd.csv

Layout: `<set>/{0_real,1_fake}`, some sets `<set>/<class>/{0_real,1_fake}`; and
`diffusion_datasets/{imagenet,laion}`, which hold photographs alone, beside the folders of the eight diffusion
sets, which hold AI images alone, with or without `0_real` and `1_fake`. In folders or archives, however deep
below `--root`. ForenSynths' own `stylegan2` and `whichfaceisreal` are taken too; they are not of the 19.

Traps: `imagenet` is the real half of `guided`, and `laion` of the seven sets of LDM, GLIDE and DALL-E; `crn`
and `imle` share theirs. Such a photograph is one row, and `protocol_sets` names the sets it serves. One of
ProGAN's classes is called `train`.

Terms: ForenSynths for non-commercial or academic use only; those of the diffusion sets are unknown.

| column | holds |
|---|---|
| `generator` | the name of the set, for AI images |
| `class` | the class level, where there is one |
| `group` | set, class and stem, which a photograph and what was made from it share; over the diffusion sets \
that share photographs, these and the stem |
| `protocol_sets` | the sets that the row is scored in, separated by `;`; empty for what is not of the 19 |
"""

from data_prep.duplicates.keep_once import SET_SEPARATOR
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
from featdistill.command_line import Parser, UserError

# AI images by set, as the archive of ForenSynths (arXiv 1912.11035) holds them; the photographs are as many,
# but for deepfake, which has nine more. The diffusion sets (arXiv 2302.10174) have 1,000 images each.
FORENSYNTHS = {
    **{"progan": 4_000, "cyclegan": 1_321, "biggan": 2_000, "stylegan": 5_991, "gaugan": 5_000},
    **{"stargan": 1_999, "deepfake": 2_698, "seeingdark": 180, "san": 219, "crn": 6_382, "imle": 6_382},
}
NOT_OF_THE_19 = ("stylegan2", "whichfaceisreal")
SETS = {name: name for name in (*FORENSYNTHS, *NOT_OF_THE_19)}
LAION_SETS = ("ldm_200", "ldm_200_cfg", "ldm_100", "glide_100_27", "glide_50_27", "glide_100_10", "dalle")
# The diffusion sets' folders: the sets that the images serve, and the photographs of these sets.
SHARED_REALS = {"imagenet": ("guided",), "laion": LAION_SETS}
REALS_OF = {name: reals for reals, names in SHARED_REALS.items() for name in names}
DIFFUSION = {name: name for name in (*SHARED_REALS, *REALS_OF)}
LABELS = {"0_real": 0, "1_fake": 1}
SOURCE = sources.Source(
    name="universalfakedetect",
    title="UniversalFakeDetect / ForenSynths",
    origin="the release of CNNDetection, CNN_synth_testset, and that of UniversalFakeDetect",
    licence="non-commercial or academic use only",
    promised={
        ("", 0): sum(FORENSYNTHS.values()) + 9 + 2 * 1_000,
        **{(name, 1): count for name, count in FORENSYNTHS.items()},
        **{(name, 1): 1_000 for name in REALS_OF},
    },
    keep_once=True,
)


def row(file: ImageFile) -> dict[str, object]:
    """Return what the folders of an image say.

    Raises:
        UserError: they do not tell one set and one label.
    """
    place, name = one_on_path(file, {**SETS, **DIFFUSION}, "a set")
    if name in SETS:
        name, class_, label = set_class_label(file, SETS, LABELS)
        group = "/".join(filter(None, (name, class_, file.stem)))
        serves = "" if name in NOT_OF_THE_19 else name
        return _row(label, name, class_, group, serves, "")
    nothing_else(file, {*DIFFUSION, *LABELS}, place)
    label = int(name in REALS_OF)
    if any(LABELS.get(folder.casefold(), label) != label for folder in file.folders):
        raise UserError(
            f"folder '{file.folder}': {name} holds {'AI images' if label else 'photographs'} only"
        )
    serves = name if label else SET_SEPARATOR.join(SHARED_REALS[name])
    return _row(label, name, "", f"{REALS_OF.get(name, name)}/{file.stem}", serves, "unknown")


def _row(label: int, name: str, class_: str, group: str, serves: str, licence: str) -> dict[str, object]:
    generator = name if label else ""
    row = {"label": label, "generator": generator, "class": class_, "group": group}
    return {**row, "protocol_sets": serves, "licence": licence}


def columns(files: list[ImageFile]) -> dict[str, list]:
    """Return the columns of the manifest; see `row`."""
    rows = [row(file) for file in files]
    return {**columns_of(files), **{column: [cells[column] for cells in rows] for column in rows[0]}}


def build_parser() -> Parser:
    return sources.build_parser("universalfakedetect", SOURCE)


def main(argv: list[str] | None = None) -> int:
    args = sources.parse(build_parser(), argv)
    return sources.finish(columns(find_images(args.root)), SOURCE, args)


if __name__ == "__main__":
    command_line.run(main)
