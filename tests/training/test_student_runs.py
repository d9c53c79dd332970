"""`distill.py --teachers`: from experts, or from their predictions, to an ordinary expert."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from processes import fork, needs_fork, statuses
from quoted_commands import ROOT
from training_runs import SMALL, SMALL_STAGE_2, lines, losses, weights

import distill
import predict
import train
from featdistill import __main__ as tools
from featdistill.command_line import UserError
from featdistill.models.expert import load_expert, read_card
from featdistill.records.manifest import read_manifest, write_manifest
from featdistill.training import stages
from featdistill.training.recipe import StudentRecipe
from featdistill.training.run_folder import RunFolder
from featdistill.training.trainer import Trainer

# Three forward passes of a tiny transformer without BatchNorm and dropout.
STUDENT = [*SMALL, "--student", "timm:test_vit", "--resize", "squash", "--head-dropout", "0"]


@pytest.fixture(scope="module")
def teachers(sets, tmp_path_factory) -> list[str]:
    """Two experts of one epoch, with inputs of different sizes."""
    runs = tmp_path_factory.mktemp("teachers")
    for name, recipe, size in (("a", "demo_clip_a", "32"), ("b", "demo_siglip_a", "48")):
        flags = ["--recipe", recipe, *SMALL[2:], "--epochs", "1", "--resize", "squash"]
        train.main([*flags, *sets, "--input-size", size, "--out", str(runs / name)])
    return [str(runs / name / "expert") for name in "ab"]


@pytest.fixture
def student(sets, teachers, tmp_path):
    """Return a function that trains a student of both experts and gives its run."""

    experts = ("--teachers", *teachers)

    def run(name: str, *flags: str, data: list[str] = sets, taught: tuple[str, ...] = experts) -> Path:
        assert distill.main([*STUDENT, *data, *taught, *flags, "--out", str(tmp_path / name)]) == 0
        return tmp_path / name

    return run


def test_a_student_of_experts_is_an_ordinary_expert_in_an_ordinary_run(student, teachers, sets, tmp_path):
    run = student("run", "--token-weight", "0.5", "--fusion-weights", "a=1,b=3")
    first = lines(run)[0]
    names = {"bce", "distill", "distill_clean", "tokens", "tokens_clean"}
    assert names <= first.keys()
    loss = first["bce"] + (first["distill"] + first["distill_clean"]) / 2
    loss += 0.5 * (first["tokens"] + first["tokens_clean"]) / 2
    assert first["loss"] == pytest.approx(loss, rel=1e-5)
    assert [line["epoch"] for line in lines(run) if "holdout_robust_auc" in line] == [1, 2]
    card = read_card(run / "expert-last")
    assert card["backbone"]["name"] == "test_vit" and card["recipe"]["backbone"] == "timm:test_vit"
    recorded = card["teacher"]
    assert recorded["fusion"] == {
        "method": "logit_mean",
        "weights": {"a": 0.25, "b": 0.75},
        "temperature": None,
    }
    hashes = [read_card(teacher)["weights_sha256"] for teacher in teachers]
    assert [recorded["experts"][name]["sha256"] for name in "ab"] == hashes
    expert = load_expert(run / "expert")
    assert not [name for name in expert.state_dict() if "project" in name]
    scored = ["--manifest", sets[3], "--experts", str(run / "expert"), "--workers", "0"]
    assert predict.main([*scored, "--out", str(tmp_path / "scores.csv")]) == 0
    with pytest.raises(UserError, match=r"different settings: teacher\.fusion\.weights.*a"):
        student("run", "--token-weight", "0.5")


def test_images_without_labels_are_added_and_labels_in_them_do_not_count(student, make_set, capsys):
    more = make_set("more", 16, first=3000)
    text = more.read_text()
    unknown = more.with_name("unknown.csv")
    unknown.write_text(text.replace(",0,", ",,").replace(",1,", ",,"))
    labeled = student("labeled", "--unlabelled", str(more))
    assert "16 labels of" in capsys.readouterr().out
    unlabeled = student("unlabeled", "--unlabeled", str(unknown))
    assert "labels of" not in capsys.readouterr().out
    assert weights(labeled) == weights(unlabeled)
    assert len(losses(labeled)) == 2 * (40 + 16) // 8
    data = json.loads((labeled / "run.json").read_text())["data"]
    assert [len(data[name]) for name in ("train", "val", "unlabeled")] == [1, 1, 1]


def test_an_image_that_is_listed_twice_is_told(student, make_set, sets, capsys):
    student("once", "--epochs", "1", "--unlabeled", str(make_set("more", 8, first=3000)))
    assert "name an image again" not in capsys.readouterr().err
    student("twice", "--epochs", "1", "--unlabeled", sets[1])
    assert "warning: 40 of 80 training rows name an image again" in capsys.readouterr().err


def test_the_same_teacher_twice_is_refused(student, teachers, tmp_path):
    copied = shutil.copytree(teachers[0], tmp_path / "copy")
    with pytest.raises(UserError, match=r"a/expert and .*copy have the same weights; name each teacher once"):
        student("run", taught=("--teachers", *teachers, str(copied)))
    assert not (tmp_path / "run").exists()


def test_balance_and_limit_are_for_labeled_rows(make_set, tmp_path):
    rows = read_manifest(make_set("some", 12)).assign(weight="")
    labeled, unlabeled = rows.iloc[[0, 1, 2, 4, 6, 8]], rows.iloc[9:].assign(weight=["", "3", ""])
    manifests = {}
    for name, frame in {"train": labeled, "unlabeled": unlabeled}.items():
        write_manifest(frame, tmp_path / f"{name}.csv")
        manifests[name] = [read_manifest(tmp_path / f"{name}.csv")]
    found, weights = stages._training_rows(manifests, StudentRecipe(balance="class"))
    # One of six is AI-generated: it appears three times.
    assert weights.tolist() == pytest.approx([0.6, 3, *[0.6] * 4, 1, 3, 1])
    assert found["label"].isna().tolist() == [False] * 6 + [True] * 3
    found, weights = stages._training_rows(manifests, StudentRecipe(limit_per_class=1))
    assert len(found) == 2 + 3 and weights.tolist() == [1, 1, 1, 3, 1]
    manifests = {"train": [manifests["train"][0].drop(columns="weight")]}
    assert stages._training_rows(manifests, StudentRecipe())[1] is None


def test_a_student_needs_no_labels_at_all(student, make_set, sets):
    more = make_set("more", 16, first=3000)
    run = student("run", "--unlabeled", str(more), data=sets[2:])
    assert {line["bce"] for line in lines(run) if "bce" in line} == {0}
    assert len(losses(run)) == 4
    with pytest.raises(UserError, match="so nothing would be learned"):
        student("none", "--unlabeled", str(more), "--distill-weight", "0", data=sets[2:])
    with pytest.raises(UserError, match="no part of the loss has a weight above 0"):
        student("none", "--distill-weight", "0", "--bce-weight", "0")


def test_a_student_that_dies_ends_like_an_undisturbed_one(student, make_set, monkeypatch):
    flags = ["--unlabeled", str(make_set("more", 8, first=3000)), "--token-weight", "1", "--ema", "0.9"]
    flags += ["--checkpoint-every-s", "0", "--log-every", "3"]
    whole = student("whole", *flags)

    class Killed(BaseException):
        """Stands for SIGKILL."""

    take_step = Trainer._step

    def step(trainer, stream):
        take_step(trainer, stream)
        if trainer.step == 8:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", step)
        with pytest.raises(Killed):
            student("run", *flags)
    assert RunFolder(whole.parent / "run").load_state()["step"] == 7
    run = student("run", *flags)
    assert weights(run) == weights(whole) and losses(run) == losses(whole)


def test_a_student_with_inputs_of_several_sizes_learns_from_teachers_with_one(student):
    sizes = ["--input-size", "none", "--input-sizes", "32,48,64", "--epochs", "1"]
    run = student("run", *sizes)
    assert all(line["distill"] > 0 for line in lines(run) if "distill" in line)
    assert load_expert(run / "expert").preprocessing.sizes == (32, 48, 64)
    with pytest.raises(UserError, match="token_weight needs inputs of one size"):
        student("tokens", *sizes, "--token-weight", "1")
    with pytest.raises(
        UserError, match="teacher run of a student with other inputs needs inputs of one size"
    ):
        student("other", taught=("--teachers", str(run / "expert")))


@needs_fork
def test_two_processes_take_the_steps_of_one(student, teachers, sets, tmp_path):
    flags = ["--epochs", "1", "--token-weight", "1"]
    one = student("one", *flags)
    command = [*STUDENT, *sets, "--teachers", *teachers, *flags, "--out", str(tmp_path / "two")]
    assert statuses(fork(lambda: distill.main(command), world=2)) == [0, 0]
    found, wanted = ([loss for _, loss in losses(run)] for run in (tmp_path / "two", one))
    assert found == pytest.approx(wanted, rel=1e-4)


@pytest.fixture(scope="module")
def scored(sets, teachers, tmp_path_factory) -> Path:
    """Predictions of both experts for the training images."""
    out = tmp_path_factory.mktemp("scored") / "train.csv"
    command = ["--manifest", sets[1], "--experts", *teachers, "--workers", "0", "--out", str(out)]
    assert predict.main(command) == 0
    return out


def test_stored_scores_teach_what_the_experts_would(student, scored):
    """Without crop and flip, the clean image in training is that of the predictions."""
    still = ["--flip", "0", "--crop", "center", "--epochs", "1", "--distill-temperature", "2"]
    stored = student("stored", *still, taught=("--predictions", str(scored)))
    live = student("live", *still, "--distill-target", "clean")
    for one, two in zip(lines(stored)[:-1], lines(live)[:-1], strict=True):
        for name in ("loss", "distill", "distill_clean"):
            assert one[name] == pytest.approx(two[name], rel=1e-4)
    recorded = json.loads((stored / "run.json").read_text())["teacher"]
    assert recorded["experts"] == json.loads((scored.parent / "train.csv.json").read_text())["experts"]
    assert recorded["predictions"][0]["path"] == str(scored)


def test_scores_that_do_not_fit_the_images_are_refused(student, scored, make_set, tmp_path):
    def refused(*flags: str) -> str:
        with pytest.raises(UserError) as error:
            student("run", *flags[1:], taught=("--predictions", *flags[0].split()))
        assert not (tmp_path / "run").exists()
        return str(error.value)

    more = ["--unlabeled", str(make_set("more", 8, first=3000))]
    assert "1 files for 2 manifests" in refused(str(scored), *more)
    assert "has no score for 8 of 8 images" in refused(f"{scored} {scored}", *more)
    other = tmp_path / "other.csv"
    other.write_text(scored.read_text().replace("name,score,a,b", "name,score,a,c", 1))
    assert "not from the same experts" in refused(f"{scored} {other}", *more)
    assert "--fusion-weights has no weight for expert b" in refused(str(scored), "--fusion-weights", "a=1")
    assert "come without tokens" in refused(str(scored), "--token-weight", "1")
    assert "needs the teachers themselves" in refused(str(scored), "--distill-target", "view")
    logits = pd.read_csv(scored).assign(a=1.7)
    logits.to_csv(other, index=False)
    assert "scores must be probabilities in [0, 1]" in refused(str(other))


def test_an_image_that_could_not_be_scored_has_no_target(student, scored, tmp_path):
    head, first, *rest = scored.read_text().splitlines()
    partial, name = tmp_path / "partial.csv", first.split(",")[0]
    partial.write_text("\n".join([head, *rest]) + "\n")
    with pytest.raises(UserError, match=f"has no score for 1 of 40 images .*: {name}"):
        student("run", taught=("--predictions", str(partial)))
    (tmp_path / "partial.errors.csv").write_text(f"name,reason\n{name},damaged\n")
    run = student("run", taught=("--predictions", str(partial)))
    assert all(line["distill"] > 0 for line in lines(run) if "distill" in line)


# Draws of a bank and of a student that agree.
DRAWN = ["--distortions", "official,probability=0.8", "--flip", "0.5", "--seed", "3"]


@pytest.fixture(scope="module")
def banks(sets, teachers, tmp_path_factory) -> list[str]:
    """Two distorted views of the training images, for each teacher."""
    out = tmp_path_factory.mktemp("banks")
    for name, teacher in zip("ab", teachers, strict=True):
        flags = ["--manifest", sets[1], "--expert", teacher, "--views", "3", *DRAWN, "--dtype", "float32"]
        flags += ["--features", read_card(teacher)["backbone"]["feature"], "--workers", "0"]
        tools.main(["embed", *flags, "--out", str(out / name)])
    return [str(out / name) for name in "ab"]


def test_banks_teach_what_the_experts_would_on_the_same_distorted_images(student, teachers, banks):
    flags = [*DRAWN, "--distill-views", "distorted", "--epochs", "2"]
    kept = student("kept", *flags, taught=("--teachers", *teachers, "--banks", *reversed(banks)))
    live = student("live", *flags)
    assert [loss for _, loss in losses(kept)] == pytest.approx([loss for _, loss in losses(live)], rel=1e-3)
    assert {Path(bank["path"]).name for bank in read_card(kept / "expert")["teacher"]["banks"]} == {"a", "b"}


def test_views_of_a_bank_come_again_after_the_last_one(student, teachers, banks, monkeypatch):
    seen = {}
    take = Trainer._next_batch

    def keep(trainer, stream):
        batch = take(trainer, stream)
        for epoch, index, image in zip(batch["epoch"], batch["index"], batch["images"], strict=True):
            seen[int(epoch), int(index)] = image
        return batch

    monkeypatch.setattr(Trainer, "_next_batch", keep)
    student("run", *DRAWN, "--epochs", "3", taught=("--teachers", *teachers, "--banks", *banks))
    for index in range(40):
        assert seen[0, index].equal(seen[2, index])
    assert any(not seen[0, index].equal(seen[1, index]) for index in range(40))


def test_the_clean_view_of_a_bank_is_that_of_the_predictions(student, teachers, banks, scored):
    still = ["--distill-target", "clean", "--epochs", "1", "--distortions", "none", "--seed", "8"]
    kept = student("kept", *still, taught=("--teachers", *teachers, "--banks", *banks))
    stored = student("stored", *still, taught=("--predictions", str(scored)))
    for one, two in zip(lines(kept)[:-1], lines(stored)[:-1], strict=True):
        assert one["distill"] == pytest.approx(two["distill"], rel=1e-3)


def test_banks_that_do_not_fit_are_refused(student, teachers, banks, make_set, tmp_path):
    def refused(*flags: str, banks: list[str] = banks) -> str:
        with pytest.raises(UserError) as error:
            student("run", *flags, taught=("--teachers", *teachers, "--banks", *banks))
        assert not (tmp_path / "run").exists()
        return str(error.value)

    drawn_otherwise = refused(*DRAWN, "--seed", "4")
    assert "was drawn with seed 3 (the recipe has 4), so its distorted views are not" in drawn_otherwise
    assert "has no augmix" in refused(*DRAWN, "--augmix", "0.5")
    missing = refused(*DRAWN, banks=banks[:1])
    assert "holds the features of teacher b; make one with python -m featdistill embed" in missing
    more = ["--unlabeled", str(make_set("more", 8, first=3000))]
    assert "does not hold 8 of 48 training images" in refused(*DRAWN, *more)
    assert "come in another order" in refused(*DRAWN, "--limit-per-class", "10")
    assert "come without tokens" in refused(*DRAWN, "--token-weight", "1")
    with pytest.raises(UserError, match="name the experts whose they are with --teachers"):
        student("run", taught=("--predictions", "scores.csv", "--banks", *banks))


TAUGHT = ["--train", "t.csv", "--val", "v.csv", "--out", "run"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--teacher", "e", "--backbone", "tiny_clip"], r"--backbone: no effect with --teacher, since"),
        (
            ["--teacher", "e", "--weights", "random", "--input-size", "32"],
            "--weights, --input-size: no effect",
        ),
        (
            ["--teacher", "e", "--resize", "squash", "--head-hidden", "0"],
            "--resize, --head-hidden: no effect",
        ),
        (["--teacher", "e", "--head-dropout", "0"], "--head-dropout: no effect with --teacher"),
        (["--teacher", "e", "--token-weight", "1"], "--token-weight: no effect with --teacher; they are for"),
        (
            ["--teacher", "e", "--student", "tiny_clip"],
            "--student has no effect with --teacher; did you mean",
        ),
        (["--teacher", "e", "--fusion", "logit_mean"], "--fusion has no effect with --teacher"),
        (["--teachers", "e", "--dense-weight", "2"], "--dense-weight: no effect on a student of several"),
        (["--teachers", "e", "--student", "a", "--backbone", "b"], "--student and --backbone are the same"),
        (["--teachers", "e", "--teacher", "f"], "not allowed with argument"),
        ([], "one of the arguments --teacher --teachers --predictions is required"),
    ],
)
def test_flags_without_effect_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        distill.main(["--recipe", "demo_clip_a", *TAUGHT, *flags])


def test_what_is_missing_is_named(teachers, sets, tmp_path):
    with pytest.raises(UserError, match="the following arguments are required: --recipe"):
        distill.main(["--teacher", teachers[0], *TAUGHT])
    with pytest.raises(UserError, match="the following arguments are required: --train"):
        distill.main([*SMALL_STAGE_2, "--teacher", teachers[0], *TAUGHT[2:]])
    with pytest.raises(UserError, match="no training images; use --train, --unlabeled, or both"):
        distill.main(["--teachers", *teachers, *TAUGHT[2:]])
    run = Path(teachers[0]).parent
    with pytest.raises(
        UserError, match=f"is not an expert: it has no expert.json; did you mean {teachers[0]}"
    ):
        distill.main(["--teachers", str(run), *sets, "--out", str(tmp_path / "run")])


def test_a_missing_teacher_is_told_before_pytorch_is_loaded(sets, tmp_path):
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    command = ["distill.py", "--teachers", "/none", *sets, "--out", str(tmp_path / "run")]
    ended = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and "/none is not an expert" in ended.stderr
    assert ended.stdout.splitlines()[-1] == "False"
