import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import set_maker, smooth_picture
from torch import nn

from data_prep import hard_negatives
from data_prep.attacks import negatives
from data_prep.attacks.adversarial import Attack, attack, input_matrices, score, see
from data_prep.attacks.reconstructions import load_autoencoder, reconstruct
from featdistill.command_line import UserError
from featdistill.data.preprocessing import prepare
from featdistill.images.reading import limit_side, read_image
from featdistill.models.expert import create_expert, load_expert, save_expert
from featdistill.records import manifest
from featdistill.records.manifest import read_manifest, write_manifest

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
NAMES = ("images.zip", "manifest.csv", "hard_negatives.json")


@pytest.fixture(scope="module")
def expert_folder(tmp_path_factory) -> Path:
    """An expert that was trained for a moment to see the checkerboard of the AI images."""
    root = tmp_path_factory.mktemp("expert")
    rows = read_manifest(set_maker(root)("train", 32, first=500))
    torch.manual_seed(0)
    expert = create_expert("tiny_clip", "random", input_size=48, resize="crop", head_hidden=8)
    images = torch.stack([prepare(read_image(path), 48, "crop") for path in rows["image"]])
    labels = torch.tensor(rows["label"].tolist(), dtype=torch.float32)
    optimizer = torch.optim.AdamW(expert.parameters(), lr=2e-3)
    for _ in range(12):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(expert(images), labels).backward()
        optimizer.step()
    save_expert(expert.eval(), root / "expert")
    return root / "expert"


@pytest.fixture(scope="module")
def expert(expert_folder):
    return load_expert(expert_folder).requires_grad_(False)


def pictures(count: int = 4) -> list[np.ndarray]:
    """Pictures of several sizes, all of them smooth."""
    return [smooth_picture(seed, 60 + 7 * seed, 84 - 5 * seed) for seed in range(count)]


def generators(count: int = 4) -> list[np.random.Generator]:
    return [np.random.default_rng(seed) for seed in range(count)]


def logits(expert, images) -> np.ndarray:
    with torch.no_grad():
        squares = [prepare(image, *expert.preprocessing.key) for image in images]
        return expert(torch.stack(squares)).numpy()


def run(source, out, *flags: str) -> int:
    return hard_negatives.main([str(source), "--out", str(out), "--device", "cpu", *flags])


@pytest.mark.parametrize("resize", ["shorter", "squash", "crop"])
@pytest.mark.parametrize("size", [(72, 88), (100, 49), (48, 48), (30, 60), (20, 130)])
def test_the_attacked_path_is_the_one_that_images_are_prepared_by(resize, size):
    image = smooth_picture(5, *size)
    seen = see(torch.from_numpy(image).permute(2, 0, 1).float(), *input_matrices(*size, 48, resize))
    gap = (seen - prepare(image, 48, resize).float()).abs()
    # Two roundings to 8 bits lie between them, none where nothing is resized.
    assert gap.max() <= (0 if resize == "crop" else 1.5) and gap.mean() < 0.5


@pytest.mark.parametrize("method", hard_negatives.ATTACKS)
@pytest.mark.parametrize("epsilon", [1, 4])
def test_the_budget_is_kept_and_used_and_the_logit_goes_the_way_it_should(expert, method, epsilon):
    images, towards_ai = pictures(), [True, False, True, False]
    found = attack(expert, images, towards_ai, Attack(method, epsilon, 5), generators())
    for image, changed in zip(images, found, strict=True):
        assert changed.shape == image.shape and changed.dtype == np.uint8
        assert np.abs(changed.astype(int) - image).max() == epsilon
    moved = logits(expert, found) - logits(expert, images)
    assert np.all(np.where(towards_ai, moved, -moved) > 0.02)
    # Noise of the same size does not do it.
    noise = [
        np.clip(image.astype(int) + epsilon * rng.choice((-1, 1), image.shape), 0, 255).astype(np.uint8)
        for image, rng in zip(images, generators(), strict=True)
    ]
    by_noise = np.abs(logits(expert, noise) - logits(expert, images))
    assert np.all(np.abs(moved) > 2 * by_noise)


def test_a_larger_budget_moves_the_logit_further(expert):
    images, towards_ai = pictures(), [True] * 4
    found = [
        logits(expert, attack(expert, images, towards_ai, Attack("pgd", epsilon, 5), generators()))
        for epsilon in (1, 3, 9)
    ]
    assert np.all(np.diff(found, axis=0) > 0)


def test_one_step_of_momentum_is_the_sign_of_the_gradient(expert):
    image = smooth_picture(7, 48, 48)
    pixels = torch.from_numpy(image).permute(2, 0, 1).float().requires_grad_()
    expert(pixels[None] / 255).sum().backward()
    step = 3 * pixels.grad.sign().permute(1, 2, 0).numpy()
    expected = np.clip(image + step, 0, 255).astype(np.uint8)
    (found,) = attack(expert, [image], [True], Attack("mi-pgd", 3, 1), generators(1))
    np.testing.assert_array_equal(found, expected)


def test_steps_of_a_part_of_a_level_are_rounded_to_the_nearest_level(expert):
    image = np.clip(smooth_picture(7, 48, 48), 5, 250)
    found = []
    for size in (0.7, 1.0, 1.4):
        (changed,) = attack(expert, [image], [True], Attack("mi-pgd", 3, 1, size), generators(1))
        found.append(changed.astype(int) - image)
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[1], found[2])
    assert 0.3 < (found[0] > 0).mean() < 0.7 and set(np.unique(found[0])) <= {-1, 0, 1}


def test_momentum_matters_from_the_second_step_on(expert):
    images = pictures(2)
    made = [
        attack(expert, images, [True] * 2, Attack("mi-pgd", 6, 4, momentum=momentum), generators(2))
        for momentum in (0.0, 1.0)
    ]
    plain = attack(expert, images, [True] * 2, Attack("pgd", 6, 4), generators(2))
    assert not np.array_equal(made[0][0], made[1][0]) and not np.array_equal(plain[0], made[1][0])


def test_an_attack_is_a_function_of_its_seeds(expert):
    images = pictures(2)
    one, two = (attack(expert, images, [True] * 2, Attack(steps=2), generators(2)) for _ in range(2))
    other = attack(expert, images, [True] * 2, Attack(steps=2), generators(4)[2:])
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one[0], other[0])


def test_pixels_outside_the_experts_crop_are_left_alone_by_momentum(expert):
    image = smooth_picture(1, 48, 100)
    (found,) = attack(expert, [image], [True], Attack("mi-pgd"), generators(1))
    changed = (found != image).any(axis=(0, 2))
    assert changed[26:74].any() and not changed[:26].any() and not changed[74:].any()


def test_the_set_is_what_its_manifest_says(make_set, expert_folder, expert, tmp_path):
    source, out = make_set("train", 10), tmp_path / "hard"
    flags = ("--expert", str(expert_folder), "--method", "pgd", "--steps", "8", "--epsilon", "20")
    assert run(source, out, *flags) == 0
    before, rows = read_manifest(source), read_manifest(out / "manifest.csv")
    assert rows["name"].tolist() == [f"{name[:5]}_pgd.png" for name in before["name"]]
    assert rows["original"].tolist() == before["name"].tolist()
    assert rows["label"].tolist() == before["label"].tolist()
    assert {*rows["epsilon"]} == {"20"} and {*rows["steps"]} == {"8"} and {*rows["method"]} == {"pgd"}
    originals = [read_image(image) for image in before["image"]]
    stored = [read_image(image) for image in rows["image"]]
    gaps = [np.abs(a.astype(int) - b).max() for a, b in zip(originals, stored, strict=True)]
    assert gaps == [20] * 10
    for column, images in (("score_before", originals), ("score_after", stored)):
        expected = 1 / (1 + np.exp(-logits(expert, images).astype(float)))
        np.testing.assert_allclose(rows[column].astype(float), expected, atol=1e-5)
    labels = rows["label"].to_numpy(int)
    after = rows["score_after"].to_numpy(float)
    assert rows["survives"].astype(int).tolist() == ((after >= 0.5) != (labels == 1)).astype(int).tolist()
    # The expert knew the classes before, and is turned round on most.
    was_right = (rows["score_before"].to_numpy(float) >= 0.5) == (labels == 1)
    assert was_right.mean() >= 0.8 and (rows["survives"] == "1").mean() >= 0.6


def test_where_pgd_starts_depends_on_the_seed_and_the_name(make_set, expert_folder, tmp_path):
    source = make_set("train", 2)
    frame = read_manifest(source)
    frame["image"], frame["label"] = frame["image"][0], 0
    write_manifest(frame, source)
    made = {}
    for method, seed in (("pgd", "0"), ("pgd", "1"), ("mi-pgd", "0")):
        out = tmp_path / f"{method}{seed}"
        run(source, out, "--expert", str(expert_folder), "--method", method, "--seed", seed, "--steps", "2")
        made[method + seed] = [read_image(image) for image in read_manifest(out / "manifest.csv")["image"]]
    assert not np.array_equal(made["pgd0"][0], made["pgd0"][1])
    assert not np.array_equal(made["pgd0"][0], made["pgd1"][0])
    assert np.array_equal(made["mi-pgd0"][0], made["mi-pgd0"][1])


def test_a_jpeg_is_scored_as_it_is_stored(make_set, expert_folder, expert, tmp_path):
    source, out = make_set("train", 8), tmp_path / "hard"
    flags = ("--expert", str(expert_folder), "--method", "mi-pgd", "--format", "jpeg", "--quality", "30")
    run(source, out, *flags)
    run(source, tmp_path / "lossless", *flags[:4])
    rows, lossless = (read_manifest(tmp_path / name / "manifest.csv") for name in ("hard", "lossless"))
    stored = [read_image(image) for image in rows["image"]]
    np.testing.assert_allclose(rows["score_after"].astype(float), score(expert, stored), atol=1e-6)
    assert rows["name"][0].endswith("_mi-pgd.jpg")
    # So strong a compression undoes some of it, and the column says so.
    assert (rows["survives"] == "1").sum() < (lossless["survives"] == "1").sum()
    wrong = (rows["score_after"].astype(float) >= 0.5) != (rows["label"] == 1)
    assert (rows["survives"] == "1").tolist() == wrong.tolist()


def test_a_negative_stays_on_its_originals_side_of_a_holdout(make_set, expert_folder, tmp_path):
    source = make_set("train", 12)
    frame = read_manifest(source)
    frame.loc[:5, "group"] = [f"g{row // 2}" for row in range(6)]
    write_manifest(frame, source)
    run(source, tmp_path / "hard", "--expert", str(expert_folder), "--method", "pgd", "--steps", "1")
    both = manifest.read_manifests([source, tmp_path / "hard" / "manifest.csv"])
    sides = manifest.split_holdout(both, 0.5)
    for side in sides:
        names = side["name"].tolist()
        own = {name for name in names if "_pgd" not in name}
        assert own and own == {f"{name[:5]}.jpg" for name in names if "_pgd" in name}


def test_an_image_that_is_too_long_is_reduced_first(make_set, expert_folder, tmp_path):
    source, out = make_set("train", 2), tmp_path / "hard"
    flags = ("--expert", str(expert_folder), "--method", "mi-pgd", "--steps", "2", "--epsilon", "2")
    run(source, out, *flags, "--max-side", "60")
    before, rows = read_manifest(source), read_manifest(out / "manifest.csv")
    for original, made in zip(before["image"], rows["image"], strict=True):
        reduced = limit_side(read_image(original), 60)
        found = read_image(made)
        assert max(found.shape) == 60 and np.abs(found.astype(int) - reduced).max() == 2


def test_a_killed_run_continues_to_the_same_bytes(expert_folder, tmp_path):
    source = set_maker(tmp_path)("train", 60)
    flags = ["--expert", str(expert_folder), "--method", "pgd", "--steps", "3", "--batch-size", "4"]
    run(source, tmp_path / "whole", *flags)
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "data_prep.hard_negatives", str(source), "--out", str(out), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([*command, "--device", "cpu"], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list(out.glob(".work-*/batch-*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (out / "images.zip").exists()
    work = next(out.glob(".work-*"))
    done = {path: path.stat().st_mtime_ns for path in work.glob("batch-*.json")}
    assert 3 <= len(done) < 15
    assert run(source, out, *flags) == 0
    for name in NAMES:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not work.exists()


def test_batches_that_are_there_are_not_made_again(make_set, expert_folder, tmp_path, monkeypatch):
    source, out = make_set("train", 8), tmp_path / "hard"
    flags = ("--expert", str(expert_folder), "--method", "pgd", "--steps", "1", "--batch-size", "2")
    original, calls = negatives.Maker.make, []

    def make(self, rows, paths):
        calls.append(rows.index[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, rows, paths)

    monkeypatch.setattr(negatives.Maker, "make", make)
    with pytest.raises(KeyboardInterrupt):
        run(source, out, *flags)
    assert run(source, out, *flags) == 0
    assert calls == [0, 2, 4, 4, 6]
    assert run(source, out, *flags) == 0 and len(calls) == 5
    with pytest.raises(UserError, match="was produced with different settings: seed was 0, is 1"):
        run(source, out, *flags, "--seed", "1")


def test_an_unreadable_image_is_named_and_left_out(make_set, expert_folder, tmp_path):
    source, out = make_set("train", 5), tmp_path / "hard"
    for name in ("00001.jpg", "00004.jpg"):
        (source.parent / name).write_bytes(b"no image")
    flags = ("--expert", str(expert_folder), "--method", "pgd", "--steps", "1", "--batch-size", "2")
    assert run(source, out, *flags) == 1 and run(source, out, *flags) == 1
    lines = (out / "errors.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["name", "00001.jpg", "00004.jpg"]
    assert read_manifest(out / "manifest.csv")["original"].tolist() == ["00000.jpg", "00002.jpg", "00003.jpg"]


class Blur(nn.Module):
    """A small convolutional autoencoder: a mean over 2 x 2 pixels, drawn out again."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.AvgPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear")

    def forward(self, images):
        assert all(side % 32 == 0 for side in images.shape[-2:])
        assert images.min() >= 0 and images.max() <= 1
        return self.decoder(self.encoder(images)) * 1.01


blur = Blur()


def wrong_shape(images):
    return images[:, :1]


def test_reconstructions_are_ai_generated_images_of_the_real_ones(
    make_set, expert_folder, expert, tmp_path, monkeypatch
):
    source, out = make_set("train", 8), tmp_path / "hard"
    name = f"{__name__}:blur"
    flags = ("--method", "reconstruct", "--autoencoder", name, "--expert", str(expert_folder))
    assert run(source, out, *flags, "--batch-size", "3") == 0
    before, rows = read_manifest(source), read_manifest(out / "manifest.csv")
    assert rows["original"].tolist() == before["name"][before["label"] == 0].tolist()
    assert rows["label"].tolist() == [1] * 4 and {*rows["generator"]} == {name} and {*rows["epsilon"]} == {""}
    stored = [read_image(image) for image in rows["image"]]
    np.testing.assert_allclose(rows["score_after"].astype(float), score(expert, stored), atol=1e-6)
    assert (rows["survives"] == "1").tolist() == (rows["score_after"].astype(float) < 0.5).tolist()
    for made, original in zip(stored, before["image"][before["label"] == 0], strict=True):
        small = cv2.resize(read_image(original)[:64, :64], (32, 32), interpolation=cv2.INTER_AREA)
        again = cv2.resize(made[:64, :64], (32, 32), interpolation=cv2.INTER_AREA)
        assert made.shape == (72, 88, 3) and np.abs(small.astype(int) - again).mean() < 4
    assert run(source, tmp_path / "plain", *flags[:4], "--label", "both") == 0
    plain = read_manifest(tmp_path / "plain" / "manifest.csv")
    assert len(plain) == 8 and {*plain["survives"]} == {""} and {*plain["score_after"]} == {""}


def test_an_autoencoder_that_changes_nothing_gives_the_images_back():
    images = [smooth_picture(1, 40, 50), smooth_picture(2, 17, 90), smooth_picture(3, 40, 50)]
    found = reconstruct(lambda batch: batch, images, CPU)
    for image, same in zip(images, found, strict=True):
        np.testing.assert_array_equal(image, same)
    np.testing.assert_array_equal(
        reconstruct(lambda batch: batch, [np.full((1, 3, 3), 9, np.uint8)], CPU)[0], 9
    )


def test_an_autoencoder_that_cannot_be_had_is_one_clear_error(monkeypatch):
    for name, message in (
        ("nothing", "must be module:function or diffusers:REPO"),
        ("no_such_module:function", "cannot be loaded: No module named"),
        (f"{__name__}:no_such_function", "cannot be loaded"),
        (f"{__name__}:ROOT", "is not callable"),
    ):
        with pytest.raises(UserError, match=message):
            load_autoencoder(name, CPU)
    with pytest.raises(UserError, match=r"turns \(1, 3, 64, 64\) into \(1, 1, 64, 64\)"):
        reconstruct(wrong_shape, [smooth_picture(0, 64, 64)], CPU)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="needs the package diffusers: pip install it"):
        load_autoencoder("diffusers:owner/name", CPU)


@pytest.mark.parametrize(
    ("name", "repository", "options"),
    [("owner/name", "owner/name", {}), ("owner/name/vae", "owner/name", {"subfolder": "vae"})],
)
def test_an_autoencoder_of_diffusers_is_called_as_it_wants_to_be(monkeypatch, name, repository, options):
    class AutoencoderKL(nn.Module):
        asked: tuple = ()

        @classmethod
        def from_pretrained(cls, given, **kwargs):
            cls.asked = (given, kwargs)
            return cls()

        def encode(self, images):
            assert images.min() >= -1 and images.min() < 0
            return types.SimpleNamespace(latent_dist=types.SimpleNamespace(mode=lambda: images * 3))

        def decode(self, latent):
            return types.SimpleNamespace(sample=latent / 3)

    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoencoderKL=AutoencoderKL))
    image = smooth_picture(4, 40, 40)
    (found,) = reconstruct(load_autoencoder(f"diffusers:{name}", CPU), [image], CPU)
    np.testing.assert_array_equal(found, image)
    assert AutoencoderKL.asked == (repository, {"use_safetensors": True, **options})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--method", "pdg"), r"unknown --method 'pdg' \(did you mean pgd\?\)"),
        (("--method", "pgd"), "--method pgd needs --expert"),
        (("--method", "reconstruct"), "needs --autoencoder"),
        (
            ("--method", "pgd", "--expert", "x", "--epsilon", "0"),
            "argument --epsilon: must be from 1 to 255, not 0",
        ),
        (
            ("--method", "pgd", "--expert", "x", "--step-size", "0"),
            "argument --step-size: must be more than 0",
        ),
        (("--method", "pgd", "--expert", "x", "--autoencoder", "a:b"), "is for --method reconstruct"),
        (("--method", "pgd", "--expert", "nowhere"), r"nowhere is not an expert: it has no expert\.json"),
    ],
)
def test_flags_that_make_no_sense_are_one_clear_error(make_set, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        run(make_set("train", 2), tmp_path / "hard", *flags)
    assert not (tmp_path / "hard").exists()
