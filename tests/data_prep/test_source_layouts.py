"""Each source of folders in its documented layout: rows, labels, generators, groups, and what is refused."""

import re

import pytest
from image_trees import KINDS, rows_of, write_tree

from data_prep import aigcdetect, deepfake60k, diffface, ditfake, genimage, universalfakedetect
from featdistill.command_line import UserError

FLUX, PIXART, SD3 = ditfake.GENERATORS.values()
UNKNOWN = "unknown"


def cells(rows, *columns: str) -> dict[str, tuple]:
    """Return some columns by the path of the image, below the root of the tree."""
    return {path: tuple(row) for path, row in zip(rows.index, rows[list(columns)].to_numpy(), strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_ditfake_keeps_the_photographs_that_repeat_once(tmp_path, capsys, kind):
    files = {f"test1/{name}/0_real/{i}.png": i for name in (FLUX, PIXART, SD3) for i in range(3)}
    files |= {
        f"test1/{name}/1_fake/{i}.png": 10 * place + i
        for place, name in enumerate((FLUX, PIXART, SD3), start=1)
        for i in range(3)
    }
    rows = rows_of(ditfake, write_tree(tmp_path / "data", files, kind))
    real, ai = rows[rows["label"] == 0], rows[rows["label"] == 1]
    assert len(real) == 3 and set(real["generator"]) == {""}
    assert set(real["protocol_sets"]) == {f"{FLUX};{PIXART};{SD3}"}
    assert ai["generator"].value_counts().to_dict() == {FLUX: 3, PIXART: 3, SD3: 3}
    assert (ai["protocol_sets"] == ai["generator"]).all()
    assert rows.loc[f"test1/{SD3}/1_fake/2.png", "group"] == real.loc[f"test1/{FLUX}/0_real/2.png", "group"]
    assert set(rows["source"]) == {"ditfake"} and set(rows["licence"]) == {UNKNOWN}
    shown = capsys.readouterr()
    assert "note: 6 byte-for-byte copies of other images" in shown.out
    assert "warning: 9 real images found, 15000 published" in shown.err
    assert f"warning: 3 AI images of {FLUX} found, 5000 published" in shown.err


def test_ditfake_is_found_nested_in_other_capitals_and_as_one_archive_a_generator(tmp_path):
    root = write_tree(tmp_path / "data", {"DiTFake/TEST2/flux.1-SCHNELL/1_Fake/a.png": 0})
    write_tree(root / SD3, {f"{SD3}/0_real/a.png": 1}, "zip")
    assert cells(rows_of(ditfake, root), "label", "generator", "protocol_sets") == {
        "DiTFake/TEST2/flux.1-SCHNELL/1_Fake/a.png": (1, FLUX, FLUX),
        f"{SD3}.zip/{SD3}/0_real/a.png": (0, "", SD3),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("front", ["", "train/", "Train/", "Deepfake-vs-Real/train/"])
def test_deepfake60k_goes_by_the_two_names_with_or_without_a_train_level(tmp_path, capsys, kind, front):
    root = write_tree(tmp_path / "1_fake", {f"{front}Real/7.png": 0, f"{front}FAKE/7.png": 1}, kind)
    rows = rows_of(deepfake60k, root)
    assert cells(rows, "label", "generator", "group", "licence") == {
        f"{front}FAKE/7.png": (1, "", "7", UNKNOWN),
        f"{front}Real/7.png": (0, "", "7", UNKNOWN),
    }
    assert "warning: 2 images found, 60000 published" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_genimage_is_read_as_published_and_the_alphabet_does_not_invert_it(tmp_path, capsys, kind):
    files = {
        "Midjourney/imagenet_midjourney/val/ai/1_midjourney_2.png": 0,
        "Midjourney/imagenet_midjourney/val/nature/ILSVRC2012_val_00000001.JPEG": 1,
        "imagenet_ai_0419_sdv4/train/ai/a.PNG": 2,
        "stable_diffusion_v_1_5/imagenet_ai_0424_sdv5/train/nature/n01440764_10026.JPEG": 3,
        "BigGAN/1_FAKE/x.png": 4,
        "glide/val/0_Real/x.jpg": 5,
    }
    rows = rows_of(genimage, write_tree(tmp_path / "ai", files, kind))
    found = cells(rows, "label", "generator", "split", "group", "protocol_sets")
    assert [found[file] for file in files] == [
        (1, "Midjourney", "val", "1_midjourney_2", "Midjourney"),
        (0, "", "val", "ILSVRC2012_val_00000001", "Midjourney"),
        (1, "stable_diffusion_v_1_4", "train", "a", "stable_diffusion_v_1_4"),
        (0, "", "train", "n01440764_10026", "stable_diffusion_v_1_5"),
        (1, "BigGAN", "", "x", "BigGAN"),
        (0, "", "val", "x", "glide"),
    ]
    assert "warning: published, but not found: ADM, VQDM" in capsys.readouterr().err


def test_every_name_that_genimage_is_known_by_gives_one_of_its_eight_generators(tmp_path):
    files = {f"{alias.upper()}/ai/{i}.png": i for i, alias in enumerate(genimage.GENERATORS)}
    rows = rows_of(genimage, write_tree(tmp_path / "data", files))
    assert rows["generator"].tolist() == [
        genimage.GENERATORS[path.split("/")[0].lower()] for path in rows.index
    ]
    assert rows["generator"].nunique() == 8
    assert sum(genimage.SOURCE.published.values()) == 1_331_167 + 1_350_000


UFD = {
    "CNN_synth_testset/progan/train/0_real/5.png": 0,
    "CNN_synth_testset/progan/train/1_fake/5.png": 1,
    "CNN_synth_testset/deepfake/0_real/5.png": 2,
    "CNN_synth_testset/deepfake/1_fake/5.png": 3,
    "CNN_synth_testset/crn/0_real/5.png": 4,
    "CNN_synth_testset/imle/0_real/5.png": 4,
    "CNN_synth_testset/stylegan2/car/1_fake/5.png": 5,
    "diffusion_datasets/imagenet/0_real/5.png": 6,
    "diffusion_datasets/laion/0_real/5.png": 7,
    "diffusion_datasets/laion/6.png": 8,
    "diffusion_datasets/guided/1_fake/5.png": 9,
    "diffusion_datasets/ldm_200_cfg/5.png": 10,
    "diffusion_datasets/dalle/1_fake/5.png": 11,
}
LAION_SETS = ";".join(universalfakedetect.LAION_SETS)


@pytest.mark.parametrize("kind", KINDS)
def test_universalfakedetect_has_shared_photographs_once_with_the_sets_that_they_serve(tmp_path, kind):
    rows = rows_of(universalfakedetect, write_tree(tmp_path / "data", UFD, kind))
    found = {
        path.partition("/")[2]: value
        for path, value in cells(rows, "label", "generator", "class", "group", "protocol_sets").items()
    }
    assert found == {
        "progan/train/0_real/5.png": (0, "", "train", "progan/train/5", "progan"),
        "progan/train/1_fake/5.png": (1, "progan", "train", "progan/train/5", "progan"),
        "deepfake/0_real/5.png": (0, "", "", "deepfake/5", "deepfake"),
        "deepfake/1_fake/5.png": (1, "deepfake", "", "deepfake/5", "deepfake"),
        "crn/0_real/5.png": (0, "", "", "crn/5", "crn;imle"),
        "stylegan2/car/1_fake/5.png": (1, "stylegan2", "car", "stylegan2/car/5", ""),
        "imagenet/0_real/5.png": (0, "", "", "imagenet/5", "guided"),
        "laion/0_real/5.png": (0, "", "", "laion/5", LAION_SETS),
        "laion/6.png": (0, "", "", "laion/6", LAION_SETS),
        "guided/1_fake/5.png": (1, "guided", "", "imagenet/5", "guided"),
        "ldm_200_cfg/5.png": (1, "ldm_200_cfg", "", "laion/5", "ldm_200_cfg"),
        "dalle/1_fake/5.png": (1, "dalle", "", "laion/5", "dalle"),
    }
    by_set = dict(zip(rows.index, rows["licence"], strict=True))
    assert by_set["CNN_synth_testset/crn/0_real/5.png"] == "non-commercial or academic use only"
    assert by_set["diffusion_datasets/laion/6.png"] == UNKNOWN


def test_the_protocol_has_19_sets(tmp_path):
    named = {*universalfakedetect.FORENSYNTHS, *universalfakedetect.REALS_OF}
    assert len(named) == 19 and len(universalfakedetect.LAION_SETS) == 7
    assert {name for name, label in universalfakedetect.SOURCE.published if label} == named


@pytest.mark.parametrize("kind", KINDS)
def test_aigcdetect_has_an_optional_class_level_and_the_field_s_names(tmp_path, kind):
    files = {
        "test/ProGAN/airplane/0_real/1.png": 0,
        "test/progan/airplane/1_fake/1.png": 1,
        "test/ADM/0_real/2.png": 2,
        "test/Glide/0_real/2.png": 2,
        "test/Glide/1_fake/2.png": 3,
        "test/wukong/1_fake/2.png": 4,
        "test/DALLE2/1_fake/2.png": 5,
    }
    rows = rows_of(aigcdetect, write_tree(tmp_path / "data", files, kind))
    assert cells(rows, "label", "generator", "class", "group", "protocol_sets") == {
        "test/ProGAN/airplane/0_real/1.png": (0, "", "airplane", "progan/airplane/1", "progan"),
        "test/progan/airplane/1_fake/1.png": (1, "progan", "airplane", "progan/airplane/1", "progan"),
        "test/ADM/0_real/2.png": (0, "", "", rows.loc["test/Glide/1_fake/2.png", "group"], "ADM;glide"),
        "test/Glide/1_fake/2.png": (1, "glide", "", rows.loc["test/ADM/0_real/2.png", "group"], "glide"),
        "test/wukong/1_fake/2.png": (1, "wukong", "", "wukong/2", "wukong"),
        "test/DALLE2/1_fake/2.png": (1, "DALLE2", "", "DALLE2/2", "DALLE2"),
    }


@pytest.mark.parametrize("front", ["", "Chameleon/test/"])
def test_chameleon_is_a_preset(tmp_path, front):
    root = write_tree(tmp_path / "data", {f"{front}0_real/a.jpg": 0, f"{front}1_Fake/b.jpg": 1})
    rows = rows_of(aigcdetect, root, "--preset", "chameleon")
    assert cells(rows, "label", "generator", "source", "protocol_sets", "licence") == {
        f"{front}0_real/a.jpg": (0, "", "chameleon", "chameleon", "non-commercial or academic use only"),
        f"{front}1_Fake/b.jpg": (1, "", "chameleon", "chameleon", "non-commercial or academic use only"),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_diffface_edit_takes_its_photographs_apart_and_leaves_the_masks_out(tmp_path, kind):
    files = {"Fake/InstructPix2Pix/00012.png": 0, "swap/7/a.png": 1, "region/x.png": 2}
    files |= {"fake/InstructPix2Pix/masks/00012.png": 3}
    root = write_tree(tmp_path / "data", files, kind)
    celeba = {"CelebA-HQ-img/12.jpg": 4, "CelebA-HQ-img/7.jpg": 5, "CelebAMask-HQ-mask-anno/0/12_hair.png": 6}
    reals = write_tree(tmp_path / "CelebAMask-HQ", celeba, kind)
    flags = ["--preset", "diffface-edit", "--reals", str(reals), "--map", "swap=ai", "Region=SKIP"]
    rows = rows_of(diffface, root, *flags).set_index("group")
    assert rows["label"].groupby(level=0).agg(list).to_dict() == {"face 12": [1, 0], "face 7": [1, 0]}
    ai, real = rows[rows["label"] == 1], rows[rows["label"] == 0]
    assert ai["generator"].to_dict() == {"face 12": "InstructPix2Pix", "face 7": "swap"}
    assert set(ai["source"]) == {"diffface-edit"} and set(ai["licence"]) == {UNKNOWN}
    assert set(real["source"]) == {"celebamask-hq"}
    assert set(real["licence"]) == {"non-commercial research use only"}


def test_an_edit_and_a_photograph_of_one_file_name_get_two_names(tmp_path):
    root = write_tree(tmp_path / "data", {"fake/12.jpg": 0})
    reals = write_tree(tmp_path / "reals", {"CelebA-HQ-img/12.jpg": 1, "CelebA-HQ-img/13.jpg": 2})
    rows = rows_of(diffface, root, "--preset", "diffface-edit", "--reals", str(reals))
    assert rows["name"].tolist() == ["fake/12.jpg", "celebamask-hq/CelebA-HQ-img/12.jpg", "13.jpg"]


def test_diffusionface_knows_its_methods_and_says_when_there_are_no_photographs(tmp_path, capsys):
    root = write_tree(tmp_path / "data", {"Part1/DDIM/3_out.png": 0, "fake/LDM/sd15_00004.png": 1})
    rows = rows_of(diffface, root, "--preset", "diffusionface")
    assert cells(rows, "label", "generator", "group", "licence") == {
        "Part1/DDIM/3_out.png": (1, "DDIM", "face 3", "academic use only"),
        "fake/LDM/sd15_00004.png": (1, "LDM", "face 4", "academic use only"),
    }
    assert "warning: there are no real images; add CelebAMask-HQ with --reals" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--preset diffface-edit or diffusionface is required"),
        (["--preset", "difface-edit"], "unknown preset 'difface-edit' (did you mean diffface-edit?)"),
        (["--preset", "diffface-edit", "--map", "a=fake"], "--map accepts FOLDER=real"),
        (["--preset", "diffface-edit", "--map", "a=ai", "A=real"], "--map contradicts itself about A"),
        (["--preset", "diffface-edit", "--map", "DDIM=skip"], "all images are in folders that are skipped"),
        (["--preset", "diffface-edit"], "folder 'DDIM' has images, but no folder on its path"),
        (["--preset", "diffface-edit"], "use --map FOLDER=real"),
    ],
)
def test_diffface_asks_for_what_it_cannot_know(tmp_path, flags, message):
    root = write_tree(tmp_path / "data", {"DDIM/1.png": 0})
    with pytest.raises(UserError, match=re.escape(message)):
        rows_of(diffface, root, *flags)


@pytest.mark.parametrize(
    ("module", "files", "folder"),
    [
        (ditfake, {"test1/SDXL/1_fake/a.png"}, "test1/SDXL/1_fake"),
        (ditfake, {f"test1/{FLUX}/fake/a.png"}, f"test1/{FLUX}/fake"),
        (ditfake, {f"test1/{FLUX}/1_fake/masks/a.png"}, f"test1/{FLUX}/1_fake/masks"),
        (ditfake, {f"{FLUX}/{SD3}/1_fake/a.png"}, f"{FLUX}/{SD3}/1_fake"),
        (deepfake60k, {"0/a.png", "1/a.png"}, "0"),
        (deepfake60k, {"Real/a.png", "Fake/Real/b.png"}, "Fake/Real"),
        (deepfake60k, {"Real/a.png", "b.png"}, "."),
        (deepfake60k, {"Real/Unsure/a.png"}, "Real/Unsure"),
        (genimage, {"Midjourney/val/ai_old/a.png"}, "Midjourney/val/ai_old"),
        (genimage, {"Midjourney/imagenet_glide/val/ai/a.png"}, "Midjourney/imagenet_glide/val/ai"),
        (genimage, {"Midjourney/train/val/ai/a.png"}, "Midjourney/train/val/ai"),
        (genimage, {"ai/nature/adm/a.png"}, "ai/nature/adm"),
        (genimage, {"DALLE3/val/ai/a.png"}, "DALLE3/val/ai"),
        (universalfakedetect, {"diffusion_datasets/laion/1_fake/a.png"}, "diffusion_datasets/laion/1_fake"),
        (universalfakedetect, {"dalle/0_real/a.png"}, "dalle/0_real"),
        (universalfakedetect, {"dalle/cat/a.png"}, "dalle/cat"),
        (universalfakedetect, {"progan/a/b/0_real/a.png"}, "progan/a/b/0_real"),
        (universalfakedetect, {"0_real/progan/a.png"}, "0_real/progan"),
        (universalfakedetect, {"sdxl/1_fake/a.png"}, "sdxl/1_fake"),
        (universalfakedetect, {"crn/0_real/imle/a.png"}, "crn/0_real/imle"),
        (aigcdetect, {"ADM/2_other/a.png"}, "ADM/2_other"),
        (aigcdetect, {"Mystery/1_fake/a.png"}, "Mystery/1_fake"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_or_mixed_folder_is_an_error_that_names_it(tmp_path, module, files, folder, kind):
    root = write_tree(tmp_path / "data", {file: i for i, file in enumerate(sorted(files))}, kind)
    with pytest.raises(UserError, match=re.escape(f"folder '{folder}'")):
        rows_of(module, root)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_images_with_two_labels_are_an_error_that_names_both(tmp_path, kind):
    root = write_tree(tmp_path / "data", {"Real/a.png": 0, "Fake/b.png": 0}, kind)
    with pytest.raises(UserError, match=r"Fake/b\.png and .*Real/a\.png have equal bytes"):
        rows_of(deepfake60k, root)
