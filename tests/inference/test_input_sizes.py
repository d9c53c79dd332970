"""Experts whose inputs have the size of the image: logits do not depend on what else a batch holds."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import smooth_picture
from PIL import Image
from torch import nn

import predict
from featdistill.command_line import UserError
from featdistill.data.loading import ScoreDataset
from featdistill.data.preprocessing import prepare
from featdistill.data.views import cut_view, parse_tta
from featdistill.images.reading import read_image
from featdistill.inference.detector import Detector
from featdistill.inference.predictor import load_ensemble
from featdistill.inference.scoring import score, score_dataset
from featdistill.interactive.explain import explain
from featdistill.models.backbones import build, with_any_size
from featdistill.models.encoders import BackboneSpec
from featdistill.models.expert import Expert, create_expert, load_expert, read_card, save_expert
from featdistill.records.manifest import make_manifest

SIZES, SIDES = "64,96,160", (64, 96, 160)
SHAPES = [(70, 90), (400, 300), (64, 64), (100, 99), (30, 50), (130, 220), (96, 500), (161, 160), (66, 300)]
# DINOv3's architecture, small.
DINOV3 = BackboneSpec(
    "timm", "vit_small_patch16_dinov3", options={"embed_dim": 48, "depth": 6, "num_heads": 3}
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> pd.DataFrame:
    root, images = tmp_path_factory.mktemp("images"), []
    for number, shape in enumerate(SHAPES):
        path = root / f"{number}.png"
        Image.fromarray(smooth_picture(number, *shape)).save(path)
        images.append(str(path))
    labels = [number % 2 for number in range(len(SHAPES))]
    return make_manifest({"image": images, "name": [f"{n}.png" for n in range(len(SHAPES))], "label": labels})


def made(backbone: str, feature: str | None = None, sizes: str | None = SIZES) -> nn.Module:
    torch.manual_seed(1)
    expert = create_expert(backbone, "random", feature=feature, input_sizes=sizes, head_hidden=8).eval()
    with torch.no_grad():
        expert.head[-1].weight.mul_(40)
    return expert


@pytest.fixture(scope="module")
def experts() -> list[nn.Module]:
    return [made("tiny_clip"), made("timm:test_vit", "class+mean"), made("timm:test_efficientnet")]


def all_logits(experts, rows, **settings) -> np.ndarray:
    """(experts, N) in the order of the rows, which may be in any order in the batches."""
    found = np.full((len(experts), len(rows)), np.nan)
    for batch in score(experts, rows, **settings):
        found[:, batch.rows] = batch.logits
    return found


def test_the_same_image_gets_the_same_logit_whatever_its_batch_holds(experts, rows):
    alone = np.array(
        [
            [expert(prepare(read_image(path), SIDES, "shorter")[None]).item() for path in rows["image"]]
            for expert in experts
        ]
    )
    assert all(len(np.unique(logits.round(4))) == len(rows) for logits in alone)
    for batch_size in (1, 2, 4, 32):
        np.testing.assert_allclose(all_logits(experts, rows, batch_size=batch_size), alone, atol=2e-5)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(rows))
        shuffled = rows.iloc[order].reset_index(drop=True)
        np.testing.assert_allclose(all_logits(experts, shuffled, batch_size=5), alone[:, order], atol=2e-5)


def test_images_that_cannot_be_read_change_nothing(experts, rows, tmp_path):
    alone = all_logits(experts, rows, batch_size=1)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    broken = rows.assign(image=[str(bad) if n in (0, 4, 5) else path for n, path in enumerate(rows["image"])])
    found = all_logits(experts, broken, batch_size=4)
    assert np.isnan(found).any(axis=0).nonzero()[0].tolist() == [0, 4, 5]
    kept = [1, 2, 3, 6, 7, 8]
    np.testing.assert_allclose(found[:, kept], alone[:, kept], atol=2e-5)


class Recorder(nn.Module):
    """Stands for an expert: records the numbers and the sides of the images it is called with."""

    def __init__(self, expert: nn.Module) -> None:
        super().__init__()
        self.preprocessing, self.mean, self.shapes = expert.preprocessing, expert.mean, []

    def forward(self, images):
        self.shapes.append((len(images), images.shape[-1]))
        return images.float().mean(dim=(1, 2, 3))


def test_a_forward_pass_has_at_most_as_many_pixels_as_a_batch_of_the_smallest_side(experts, rows):
    recorder = Recorder(experts[0])
    dataset = ScoreDataset(rows, [recorder.preprocessing.key])
    (batch,) = score_dataset([recorder], dataset, batch_size=9)
    assert sorted(recorder.shapes) == [(1, 160), (1, 160), (3, 96), (4, 64)]
    expected = [prepare(read_image(path), SIDES, "shorter").float().mean() for path in rows["image"]]
    np.testing.assert_allclose(batch.logits[0], expected, rtol=1e-5)


def test_views_are_averaged_at_the_size_of_the_image(experts, rows):
    views = parse_tta("hflip+scales+jpeg")[1]
    keys = [expert.preprocessing.key for expert in experts]
    dataset, found = ScoreDataset(rows, keys, views=views), np.full((len(experts), len(rows)), np.nan)
    for batch in score_dataset(experts, dataset, batch_size=4, views=views):
        found[:, batch.rows] = batch.logits
    for expert, logits in zip(experts, found, strict=True):
        for path, logit in zip(rows["image"], logits, strict=True):
            cuts = [cut_view(read_image(path), SIDES, "shorter", view=view) for view in views]
            cuts = [cut.flip(-1) if view.mirrored else cut for cut, view in zip(cuts, views, strict=True)]
            with torch.inference_mode():
                assert logit == pytest.approx(expert(torch.stack(cuts)).mean().item(), abs=2e-5)


@pytest.mark.parametrize("feature", ["pool", "class+registers+mean", "class:3,6"])
def test_rotary_positions_follow_the_size_and_features_agree_with_the_library(feature):
    spec = with_any_size(dataclasses.replace(DINOV3, feature=feature), SIDES)
    expert = Expert(build(spec), spec, sizes=SIDES).eval()
    for side in SIDES:
        images = torch.stack([prepare(smooth_picture(seed, side, side), SIDES, "shorter") for seed in (0, 1)])
        assert images.shape[-1] == side
        model = expert.backbone.timm_model
        with torch.inference_mode():
            normalized = expert.normalized(images)
            features = model.forward_features(normalized)
            if feature == "pool":
                expected = model.forward_head(features, pre_logits=True)
            elif feature == "class:3,6":
                third = model.forward_intermediates(
                    normalized, indices=[2], norm=False, return_prefix_tokens=True, intermediates_only=True
                )[0][1][:, 0]
                expected = torch.cat([third, features[:, 0]], dim=1)
            else:
                parts = [features[:, 0], features[:, 1:5].flatten(1), features[:, 5:].mean(dim=1)]
                expected = torch.cat(parts, dim=1)
            torch.testing.assert_close(expert.encode(images).feature, expected, atol=1e-5, rtol=1e-4)


def test_an_expert_keeps_its_sizes_when_it_is_saved(experts, rows, tmp_path):
    for number, expert in enumerate(experts):
        save_expert(expert, tmp_path / str(number))
        loaded = load_expert(tmp_path / str(number))
        assert loaded.preprocessing == expert.preprocessing and loaded.preprocessing.sizes == SIDES
        assert read_card(tmp_path / str(number))["preprocessing"]["sizes"] == list(SIDES)
        assert np.array_equal(
            all_logits([loaded], rows, batch_size=4), all_logits([expert], rows, batch_size=4)
        )
    plain = made("tiny_clip", sizes=None)
    save_expert(plain, tmp_path / "plain")
    assert "sizes" not in read_card(tmp_path / "plain")["preprocessing"]


def test_predict_and_the_app_score_it_next_to_an_expert_of_one_size(experts, rows, tmp_path):
    folders = [tmp_path / "several" / "expert", tmp_path / "one" / "expert"]
    plain = made("tiny_siglip", sizes=None)
    for expert, folder in zip((experts[0], plain), folders, strict=True):
        save_expert(expert, folder)
    out, names = tmp_path / "scores.csv", list(map(str, folders))
    images = str(tmp_path / "images.csv")
    pd.DataFrame({"image": rows["image"], "name": rows["name"]}).to_csv(images, index=False)
    settings = ["--device", "cpu", "--workers", "0", "--batch-size", "4"]
    assert predict.main(["--manifest", images, "--experts", *names, "--out", str(out), *settings]) == 0
    scores, expected = pd.read_csv(out), all_logits([experts[0], plain], rows, batch_size=1)
    for name, logits in zip(("several", "one"), expected, strict=True):
        np.testing.assert_allclose(scores[name], 1 / (1 + np.exp(-logits)), atol=1e-5)
    sidecar = json.loads((tmp_path / "scores.csv.json").read_text())
    assert sidecar["preprocessing"]["several"]["sizes"] == list(SIDES)
    predictor = load_ensemble(names, device="cpu", batch_size=1, workers=0)
    assert "64 to 160 px" in predictor.sources["several"]["backbone"]
    with open(rows["image"][1], "rb") as opened:
        shown = Detector(predictor)(opened.read())
    assert shown.score == pytest.approx(scores["score"][1], abs=1e-5)
    with pytest.raises(UserError, match="--compile needs inputs of one size"):
        load_ensemble(names, device="cpu", compiled=True)


def test_maps_are_drawn_at_the_size_of_the_image(experts):
    for shape, side in (((70, 90), 64), ((400, 300), 160)):
        maps = explain(experts[0], smooth_picture(1, *shape))
        assert maps["image"].shape == (side, side, 3) and maps["map"].shape == (side // 16,) * 2


@pytest.mark.parametrize(
    "backbone,sizes,message",
    [
        ("timm:vit_tiny_patch16_224", "64,90", "does not accept inputs of 64, 90 px: Input height"),
        ("tiny_clip", "64,50", "input size 50 px of tiny_clip is not a multiple of 16 px"),
        ("timm:beit_base_patch16_224", "64,96", "does not accept inputs of 64, 96 px"),
        ("open_clip:ViT-B-16", "224,448", "for input_sizes, use a backbone of timm"),
        ("tiny_clip", "64-96", "must be sides in px, such as 384,768,1152"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(backbone, sizes, message):
    with pytest.raises(UserError, match=message):
        create_expert(backbone, "random", input_sizes=sizes)


def test_a_feature_of_named_tokens_needs_one_grid():
    with pytest.raises(UserError, match="names tokens of one grid"):
        create_expert("timm:test_vit", "random", feature="top_tokens:3", input_sizes=SIZES)
