"""The recipes of the challenge's teams: what was published, their size, and tiny runs of the same keys."""

import dataclasses
import os
import signal
from functools import cache

import pytest
import yaml
from conftest import set_maker
from training_runs import last_line

import predict
import train
from featdistill import __main__ as tools
from featdistill.command_line import UserError
from featdistill.inference.fusion import parse_weights
from featdistill.models import backbones
from featdistill.models.expert import load_expert, read_card
from featdistill.recipe_groups import Architecture, Augmentation, Finetuning, values_of
from featdistill.training import recipe as recipes
from featdistill.training.memory import estimate
from featdistill.training.recipe import DistillRecipe, Recipe
from featdistill.training.recipe_list import plan, recipe_table, show
from featdistill.training.tasks import ClassifyTask

# Rank and robust AUC, the mean of public and private test, in the challenge's report (arXiv 2604.11487).
PUBLISHED = {
    "teams/micv": (1, 0.9723),
    "teams/ant_international": (2, 0.9721),
    "teams/teleai": (3, 0.9251),
    "teams/intsig": (4, 0.9130),
    "teams/vincentlc": (5, 0.8730),
    "teams/uestc": (6, 0.8679),
    "teams/reagvis": (7, 0.8603),
    "teams/psu": (8, 0.8408),
    "teams/shallow_real": (9, 0.8336),
}
EXPERTS = [line.split()[1] for team in PUBLISHED for line in plan([team]) if line.startswith("expert")]
STRONG = [line.split()[1] for line in plan(["strong_committee"]) if line.startswith("expert")]
# Millions of parameters of the image encoder, and who states them.
PARAMETERS = {
    "dinov3_7b": 6716,  # model card of DINOv3
    "dinov3_h_plus": 840,  # model card of DINOv3
    "dinov3_l": 300,  # model card of DINOv3
    "siglip2_giant": 1163,  # big_vision, siglip2: g-opt/16, image tower
    "siglip_so400m": 428,  # So400M paper (arXiv 2305.13035), table 1: 428 M
    "clip_l14": 304,  # open_clip, model profile: ViT-L-14, image 303.97 M
    "timm:vit_large_patch14_clip_quickgelu_336.openai": 304,  # open_clip: ViT-L-14-336, image 304.29 M
    "clip_b16": 86,  # open_clip, model profile: ViT-B-16, image 86.19 M
    "eva02_l": 304,  # EVA-02 paper (arXiv 2303.11331), table 1: 304 M
    "eva02_clip_l": 304,  # EVA-CLIP paper (arXiv 2303.15389): EVA-02-CLIP-L/14+, image 304 M
    "metaclip2_giant": 1845,  # open_clip, model profile: ViT-bigG-14, image 1844.91 M
    "timm:vit_large_patch16_siglip_384.webli": 316,  # open_clip: ViT-L-16-SigLIP-384, image 316.28 M
    "timm:vit_large_patch16_siglip_384.v2_webli": 316,  # the same architecture
    "timm:vit_large_patch14_dinov2.lvd142m": 304,  # timm: 304.37 M; model card of DINOv2: 300 M
    "timm:convnext_large.fb_in22k_ft_in1k": 198,  # ConvNeXt paper (arXiv 2201.03545), with a classifier
    "timm:tf_efficientnetv2_l.in21k_ft_in1k": 119,  # timm: 118.52 M, with a classifier
}


def resolve(name: str, kind: type[Recipe] = Recipe) -> Recipe:
    return recipes.from_values(kind, recipes.settings([name]) | {"name": name})


@pytest.mark.parametrize("team", PUBLISHED)
def test_a_team_has_its_published_place_and_says_what_is_whose(team):
    rank, auc = PUBLISHED[team]
    experts = [line.split()[1] for line in plan([team]) if line.startswith("expert")]
    files = [(recipes.RECIPE_FOLDER / f"{name}.yaml").read_text() for name in (team, *experts)]
    assert f"rank {rank}, robust AUC {auc:.4f}".replace("0.", ".") in " ".join(files[0].split())
    text = "".join(files).lower()
    assert all(word in text for word in ("the team's:", "ours", "unknown", "not yet", "hardware:"))
    for name in (team, *(name for name in experts if name.startswith("teams/"))):
        about = recipes.about(name)
        assert (about.rank, about.robust_auc) == (rank, auc)
        assert about.committee or about.stages == 1


def test_the_plan_of_a_team_is_what_it_published():
    *experts, scored = plan(["teams/intsig"])
    weights = scored.partition("--weights ")[2]
    names = [line.split()[1].rpartition("/")[2] for line in experts]
    assert list(parse_weights(weights, names).values()) == [0.3675, 0.0735, 0.0490, 0.2100, 0.3000]
    assert "--fusion logit_mean" in scored and all(line.endswith(" 1") for line in experts)
    assert list(plan(["teams/uestc"])) == [
        "expert clip_l14_a 2",
        "expert clip_l14_b 2",
        "expert siglip_so400m_a 2",
        "expert siglip_so400m_b 2",
        "predict --fusion probability_mean",
    ]
    assert list(plan(["teams/psu"]))[-1] == "weights_by robust_auc"
    assert list(plan(["teams/vincentlc"])) == ["expert teams/vincentlc 1", "predict"]
    # Recipes on top can add a second stage, or another fusion.
    assert next(plan(["teams/vincentlc"], ["featdistill_crd"])) == "expert teams/vincentlc 2"
    assert list(plan(["demo_clip_a"], ["strong"])) == ["expert demo_clip_a 2", "predict --fusion logit_mean"]
    # They change flags one by one.
    assert [*plan(["teams/intsig"], ["strong"])][-1] == scored
    *_, last, measured = plan(["teams/psu"], ["strong"])
    assert (last, measured) == ("predict --fusion logit_mean --tta hflip", "weights_by robust_auc")


@pytest.mark.parametrize(
    ("names", "on_top", "message"),
    [
        (["teams/intsig", "clip_l14_a"], [], "teams/intsig has weights for its own experts; name it alone"),
        (["teams/uestc", "strong_clip_l14"], [], "scored in different ways.*probability_mean.*logit_mean"),
        (["teams/intsi"], [], r"unknown recipe 'teams/intsi' \(did you mean teams/intsig\?\)"),
        (
            ["clip_l14_a"],
            ["teams/intsig"],
            "teams/intsig is a committee; train each of teams/intsig_huge_a",
        ),
        (["teams/shallow_real"], ["featdistill_crd"], "finetune lora does not change"),
    ],
)
def test_a_plan_that_cannot_work_is_one_clear_error(names, on_top, message):
    with pytest.raises(UserError, match=message):
        list(plan(names, on_top))


def test_a_recipe_is_shown_as_a_file_that_says_the_same(tmp_path, capsys):
    tools.main(["recipes", "--show", "clip_l14_a", "strong"])
    config = tmp_path / "shown.yaml"
    config.write_text(text := capsys.readouterr().out)
    assert text.startswith("# clip_l14_a+strong\n")
    for section, kind in (("stage1", Recipe), ("stage2", DistillRecipe)):
        wanted = recipes.from_values(kind, recipes.settings(["clip_l14_a", "strong"], section))
        read = recipes._read_yaml(config, section)
        assert recipes.from_values(kind, read) == wanted
    assert yaml.safe_load(show(["teams/micv"]))["committee"].split()[0] == "teams/micv_a"
    with pytest.raises(UserError, match="--on-top is for --plan"):
        tools.main(["recipes", "--list", "--on-top", "strong"])


@cache
def estimated(name: str):
    return estimate(resolve(name))


@pytest.mark.parametrize("backbone", PARAMETERS)
def test_full_size_models_are_as_large_as_published(backbone):
    names = [name for name in (*EXPERTS, *STRONG) if resolve(name).backbone == backbone]
    found = estimated(names[0])
    head = resolve(names[0]).head_hidden and 1.1e6
    assert found.parameters == pytest.approx(PARAMETERS[backbone] * 1e6, rel=0.02, abs=head)
    assert found.training_gib > found.parameters * 6 / 2**30


def test_every_backbone_of_a_team_has_a_published_size():
    assert {resolve(name).backbone for name in (*EXPERTS, *STRONG)} == set(PARAMETERS)


@pytest.mark.parametrize(("backbone", "measured_gib"), [("clip_l14", 21.1), ("siglip_so400m", 54.1)])
def test_the_estimated_memory_is_near_the_measured_peak(backbone, measured_gib):
    """Peaks of `benchmarks/training.py` on an H200: stage 1, batch 64, bf16, eager."""
    recipe = Recipe(backbone=backbone, batch_size=64)
    assert estimate(recipe).training_gib == pytest.approx(measured_gib, rel=0.1)


def test_the_estimate_follows_what_a_recipe_trains_and_keeps():
    plain = Recipe(backbone="tiny_clip", weights="random", batch_size=64)
    total = estimate(plain).parameters

    def more_bytes(kind: type[Recipe] = Recipe, **changes) -> float:
        changed = kind(**dataclasses.asdict(plain) | changes)
        return (estimate(changed).training_gib - estimate(plain).training_gib) * 2**30

    assert more_bytes(ema=0.9) == pytest.approx(4 * total)
    assert more_bytes(sam_rho=0.1) == pytest.approx(4 * total)
    # A frozen teacher in bf16, and others.
    assert more_bytes(DistillRecipe) == pytest.approx(2 * total)
    assert more_bytes(DistillRecipe, teacher_kind="momentum") == pytest.approx(6 * total)
    assert more_bytes(DistillRecipe, precision="fp16") == pytest.approx(6 * total)
    assert more_bytes(finetune="frozen") < more_bytes(finetune="last_n", last_n=1) < -12 * total / 3
    per_image = more_bytes(batch_size=65)
    assert more_bytes(batch_size=96) == pytest.approx(32 * per_image)
    assert more_bytes(batch_size=128, accumulation=2) == pytest.approx(0)
    assert more_bytes(gradient_checkpointing=True) == pytest.approx(-0.9 * 64 * per_image)
    selective = more_bytes(gradient_checkpointing=True, checkpointing="selective")
    assert selective == pytest.approx(-0.45 * 64 * per_image)
    options = {"gradient_checkpointing": True, "checkpointing": "selective"}
    assert estimate(Recipe(backbone="siglip_so400m", batch_size=64, **options)).training_gib < 40


def test_the_table_has_teams_first_and_sums_up_committees():
    names = ["clip_l14_a", "demo_clip_a", "strong", "teams/uestc", "teams/vincentlc"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in recipe_table(names).splitlines()[2:]]
    assert [row[0] for row in rows] == [
        "teams/vincentlc",
        "teams/uestc",
        "clip_l14_a",
        "demo_clip_a",
        "strong",
    ]
    assert rows[0][1:7] == ["vincentlc", "5", "0.8730", "siglip2_giant", "1163.7", "384"]
    assert rows[1][1:7] == ["UESTC", "6", "0.8679", "4 experts", "1465.4", "-"]
    assert rows[4][1:] == ["-", "-", "-", "on top of others", "-", "-", "-"]
    # The teacher of stage 2, and twice the images of the measured runs.
    assert float(rows[2][7]) == pytest.approx(2 * 19.3 - 4, abs=1)
    assert rows[3][7] == "< 1" and float(rows[1][7]) > 100


# Runs of a few steps. Recipes that differ from another one in seed or size alone are left out.
_LIKE_ANOTHER = {"teams/micv_b", "teams/micv_c", "teams/micv_d", "teams/micv_f", "teams/intsig_huge_448"}
_LIKE_ANOTHER |= {"teams/intsig_huge_c", "teams/reagvis_clip_b", "teams/reagvis_eva02_b"}
RUNS = [name for name in EXPERTS if name.startswith("teams/") and name not in _LIKE_ANOTHER]
SMALL = ["--backbone", "stand_in", "--weights", "random", "--epochs", "2", "--batch-size", "4"]
SMALL += ["--accumulation", "2", "--workers", "0", "--score-batch-size", "4", "--log-every", "1"]


def stand_in(backbone: str) -> backbones.BackboneSpec:
    """The recipe's own architecture with four narrow blocks; for a convolutional one, timm's test model."""
    spec = backbones.resolve_spec(backbone)
    for family in ("convnext", "efficientnet"):
        if family in spec.name:
            return backbones.BackboneSpec("timm", f"test_{family}")
    narrow = {"embed_dim": 32, "depth": 4, "num_heads": 2}
    return dataclasses.replace(spec, options=spec.options | narrow)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function that trains an expert in two parts, once, and returns its run and a manifest."""
    root = tmp_path_factory.mktemp("teams")
    make = set_maker(root)
    sets = ["--train", str(make("train", 8)), "--val", str(make("val", 4, first=100))]

    @cache
    def run(name: str):
        recipe = resolve(name)
        size = 28 if "patch14" in backbones.resolve_spec(recipe.backbone).name else 32
        arguments = ["--recipe", name, *SMALL, *sets, "--out", str(root / name)]
        if recipe.input_sizes:
            arguments += ["--input-sizes", f"{size},{2 * size}", "--auxiliary-features", "layers:1,2,3,4"]
        else:
            arguments += ["--input-size", str(size)]
        if recipe.swa_start:
            arguments += ["--swa-start", "2"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(backbones.BACKBONES, "stand_in", stand_in(recipe.backbone))
            after_step = ClassifyTask.after_step

            def stop(task, step, total):
                after_step(task, step, total)
                os.kill(os.getpid(), signal.SIGTERM)

            with pytest.MonkeyPatch.context() as stopped:
                stopped.setattr(ClassifyTask, "after_step", stop)
                assert train.main(arguments) == 0
            assert not (root / name / "expert").exists()
            assert train.main(arguments) == 0
        return root / name, sets[3]

    return run


@pytest.mark.parametrize("name", RUNS)
def test_a_tiny_expert_trains_continues_and_is_saved(name, trained):
    if resolve(name).finetune == "lora":
        pytest.importorskip("peft")
    run, _ = trained(name)
    recipe, card = resolve(name), read_card(run / "expert-last")
    assert card["epoch"] == 2 and last_line(run)["step"] == 4
    changed = {"backbone", "weights", "input_size", "input_sizes"}
    kept = values_of(Architecture, recipe) | values_of(Augmentation, recipe) | values_of(Finetuning, recipe)
    assert all(card["recipe"][key] == kept[key] for key in kept.keys() - changed)
    assert load_expert(run / "expert").preprocessing.resize == recipe.resize


@pytest.mark.parametrize("team", ["micv", "intsig", "reagvis", "psu", "shallow_real"])
def test_tiny_experts_are_scored_as_their_team_does(team, trained, tmp_path):
    pytest.importorskip("peft")
    lines = [line.split() for line in plan([f"teams/{team}"])]
    experts = [words[1] for words in lines if words[0] == "expert" and words[1] in RUNS]
    flags = next(words[1:] for words in lines if words[0] == "predict")
    runs = [trained(name) for name in experts]
    if "--weights" in flags:
        # Experts that were left out have none.
        place = flags.index("--weights") + 1
        names = {name.rpartition("/")[2] for name in experts}
        flags[place] = ",".join(part for part in flags[place].split(",") if part.split("=")[0] in names)
    arguments = ["--manifest", runs[0][1], "--experts", *(str(run / "expert") for run, _ in runs), *flags]
    assert predict.main([*arguments, "--out", str(tmp_path / "scores.csv"), "--workers", "0"]) == 0
    rows = (tmp_path / "scores.csv").read_text().splitlines()
    assert len(rows) == 5 and rows[0].split(",")[2:] == [name.rpartition("/")[2] for name in experts]


@pytest.mark.parametrize("name", [*PUBLISHED, "strong_committee"])
def test_the_head_of_a_recipe_says_how_to_train_on_the_real_data(name):
    text = (recipes.RECIPE_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"\n#   PROFILE=paper DATA=archives EXPERTS={name} bash run_all.sh" in text
