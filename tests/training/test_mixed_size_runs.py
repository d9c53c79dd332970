"""Training on inputs whose size depends on the image: losses, gradients, runs and refusals."""

import numpy as np
import pytest
import torch
from conftest import smooth_picture
from PIL import Image
from processes import fork, needs_fork, statuses
from torch.nn.functional import binary_cross_entropy_with_logits
from training_runs import SMALL, SMALL_STAGE_2, last_line, lines, losses, weights

import distill
import train
from featdistill.command_line import UserError
from featdistill.data.preprocessing import prepare, side_of
from featdistill.data.sampling import TrainBatches
from featdistill.images.reading import read_image
from featdistill.models.expert import load_expert, read_card
from featdistill.records.manifest import make_manifest, read_manifest, write_manifest
from featdistill.training import processes
from featdistill.training.recipe import DistillRecipe, Recipe
from featdistill.training.run_folder import RunFolder
from featdistill.training.trainer import Trainer

SIZES = ["--input-sizes", "32,48,96", "--resize", "shorter"]
PLAIN = ["--distortions", "none", "--crop", "center", "--flip", "0", "--head-dropout", "0"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> list[str]:
    """Arguments of `train.py`: 16 training images and 12 of a hold-out, of all three sides."""
    root, arguments = tmp_path_factory.mktemp("sets"), []
    for flag, count, first in (("train", 16, 0), ("val", 12, 100)):
        rows = {"image": [], "name": [], "label": []}
        for number in range(first, first + count):
            height, width = np.random.default_rng(number).choice([36, 52, 70, 110], 2)
            path = root / f"{number}.png"
            Image.fromarray(smooth_picture(number, height, width)).save(path)
            for key, value in (("image", str(path)), ("name", path.name), ("label", number % 2)):
                rows[key].append(value)
        write_manifest(make_manifest(rows), root / f"{flag}.csv")
        arguments += [f"--{flag}", str(root / f"{flag}.csv")]
    return arguments


def test_the_loss_of_a_batch_is_the_mean_over_its_images(sets, tmp_path):
    # Without a learning rate, the expert stays as it was built.
    still = ["--learning-rate", "0", "--backbone", "timm:test_vit"]
    train.main([*SMALL, *sets, *SIZES, *PLAIN, *still, "--out", str(tmp_path / "run")])
    expert, rows = load_expert(tmp_path / "run" / "expert-last"), read_manifest(sets[1])
    assert expert.preprocessing.sizes == (32, 48, 96)
    assert len({side_of(read_image(path), (32, 48, 96)) for path in rows["image"]}) == 3
    pixels = [prepare(read_image(path), *expert.preprocessing.key)[None] for path in rows["image"]]
    with torch.inference_mode():
        logit = torch.cat([expert(one) for one in pixels])
    label = torch.tensor(rows["label"].to_numpy(np.float32))
    each = binary_cross_entropy_with_logits(logit, label, reduction="none").numpy()
    batches = TrainBatches(16, 8, 2, 1, stage=1)
    expected = [np.mean([each[index] for _, index in batch]) for batch in batches]
    assert [loss for _, loss in losses(tmp_path / "run")] == pytest.approx(expected, rel=1e-4)


def test_the_gradient_is_that_of_the_mean_over_the_images(sets, tmp_path, monkeypatch):
    """Of one batch with three sizes: against passes of one image each."""
    seen = {}
    step = Trainer._add_gradient

    def recorded(self, batch, part):
        sizes = self.dataset.preprocessing
        assert type(batch["images"]).__name__ == "MixedSizes"
        means = step(self, batch, part)
        gradients = [p.grad.clone() for p in self.task.parameters() if p.grad is not None]
        self.optimizer.zero_grad(set_to_none=True)
        images = {}
        for stack, positions in zip(*batch["images"], strict=True):
            images |= dict(zip(positions, stack, strict=True))
        for position, label in enumerate(batch["label"]):
            piece = {"images": images[position][None], "label": label[None]}
            (self.task(piece)["loss"] / len(batch["label"])).backward()
        again = [p.grad.clone() for p in self.task.parameters() if p.grad is not None]
        seen["pairs"], seen["sizes"] = list(zip(gradients, again, strict=True)), sizes.sizes
        return means

    monkeypatch.setattr(Trainer, "_add_gradient", recorded)
    own = ["--backbone", "timm:test_vit", "--epochs", "1", "--batch-size", "16", "--precision", "fp32"]
    train.main([*SMALL, *sets, *SIZES, *PLAIN, *own, "--out", str(tmp_path / "run")])
    assert seen["sizes"] == (32, 48, 96) and len(seen["pairs"]) > 10
    for one, other in seen["pairs"]:
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_a_run_of_both_stages_is_repeated_bit_for_bit(sets, tmp_path):
    own = [*SIZES, "--epochs", "1", "--cutmix", "0.5", "--consistency-weight", "0.5"]
    own += ["--supcon-weight", "0.2"]
    for name in ("one", "two"):
        train.main([*SMALL, *sets, *own, "--out", str(tmp_path / name)])
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    card = read_card(tmp_path / "one" / "expert")
    assert card["preprocessing"]["sizes"] == [32, 48, 96] and card["recipe"]["input_sizes"] == "32,48,96"
    teacher = ["--teacher", str(tmp_path / "one" / "expert-last"), "--objective", "dense"]
    distill.main([*SMALL_STAGE_2, *sets, "--epochs", "1", *teacher, "--out", str(tmp_path / "stage2")])
    assert {"bce", "dense", "token_cosine"} <= lines(tmp_path / "stage2")[0].keys()
    assert load_expert(tmp_path / "stage2" / "expert").preprocessing.sizes == (32, 48, 96)
    assert last_line(tmp_path / "stage2")["holdout_images"] == 12


def test_several_processes_do_not_wait_for_each_other_in_a_loss_over_all_images(tmp_path, monkeypatch):
    monkeypatch.setattr(processes.Accelerator, "num_processes", 2)
    for values in ({"input_sizes": "32,48"}, {"supcon_weight": 0.2}):
        processes.make_accelerator(Recipe(precision="fp32", **values), RunFolder(tmp_path / "run"))
    with pytest.raises(UserError, match="use one process, or input_size"):
        recipe = Recipe(precision="fp32", input_sizes="32,48", supcon_weight=0.2)
        processes.make_accelerator(recipe, RunFolder(tmp_path / "run"))


@needs_fork
def test_further_objectives_and_averages_take_pieces_also_in_two_processes(sets, tmp_path):
    """Whose numbers of pieces differ."""
    own = ["--auxiliary-features", "layers:1,2", "--swa-start", "1"]
    arguments = [*SMALL, *sets, *SIZES, *own, "--out"]
    train.main([*arguments, str(tmp_path / "one"), "--supcon-weight", "0.2"])
    first = lines(tmp_path / "one")[0]
    wanted = first["bce"] + 0.2 * first["supcon"] + first["auxiliary"]
    assert first["loss"] == pytest.approx(wanted, rel=1e-5) and first["supcon"] > 0
    assert statuses(fork(lambda: train.main([*arguments, str(tmp_path / "two")]), world=2)) == [0, 0]


@pytest.mark.parametrize(
    "recipe,values,message",
    [
        (Recipe, {"mask": "texture"}, "mask needs inputs of one size"),
        (Recipe, {"cache": "folder", "compile": True}, "cache, compile needs inputs of one size"),
        (DistillRecipe, {"objective": "dense+crd"}, "objective crd needs inputs of one size"),
    ],
)
def test_what_needs_inputs_of_one_size_is_refused(recipe, values, message):
    with pytest.raises(UserError, match=message):
        recipe(input_sizes="32,48", **values)
    assert recipe(input_size=48, **values).input_size == 48
