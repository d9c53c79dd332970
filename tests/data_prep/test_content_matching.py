"""Each AI image is paired with the real one that shows most nearly the same, and nothing else is kept."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data_prep import combine
from data_prep.content.matching import nearest_pairs
from featdistill.bank import embed
from featdistill.bank.embed import Settings
from featdistill.bank.views import ViewPlan
from featdistill.command_line import UserError
from featdistill.inference.processes import Processes
from featdistill.records.manifest import make_manifest, read_manifest, write_manifest

TINY = ["--backbone", "timm:test_vit", "--weights", "random", "--device", "cpu", "--workers", "1"]


def test_images_that_show_the_same_are_paired_whatever_their_order():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(40, 12))
    order = rng.permutation(40)[:25]
    pairs, distance = nearest_pairs(3 * real[order] + 0.01 * rng.normal(size=(25, 12)), real)
    assert pairs[:, 0].tolist() == list(range(25))
    assert pairs[:, 1].tolist() == order.tolist()
    assert distance.shape == (25,) and distance.max() < 0.7


@pytest.mark.parametrize(("count_ai", "count_real"), [(5, 5), (3, 6), (6, 3), (1, 4)])
def test_the_sum_of_distances_is_the_smallest_possible(count_ai, count_real):
    rng = np.random.default_rng(count_ai)
    ai, real = rng.normal(size=(count_ai, 4)), rng.normal(size=(count_real, 4)) + 1
    pairs, distance = nearest_pairs(ai, real)
    both = np.concatenate([ai, real]) - np.concatenate([ai, real]).mean(axis=0)
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    cost = np.linalg.norm(both[:count_ai, None] - both[None, count_ai:], axis=2)
    if count_ai > count_real:
        cost = cost.T
    possible = itertools.permutations(range(cost.shape[1]), cost.shape[0])
    least = min(sum(cost[row, column] for row, column in enumerate(columns)) for columns in possible)
    assert distance.sum() == pytest.approx(least) and len(pairs) == min(count_ai, count_real)
    assert len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == len(pairs)


@pytest.mark.parametrize(("count_ai", "count_real"), [(90, 90), (60, 140), (150, 40)])
def test_large_sets_are_paired_in_parts_without_loss(count_ai, count_real):
    rng = np.random.default_rng(count_ai)
    # The classes lie apart along one direction, so that parts have more of one class.
    ai, real = rng.normal(size=(count_ai, 6)), rng.normal(size=(count_real, 6))
    ai[:, 0] += 1.5
    pairs, distance = nearest_pairs(ai, real, max_part=16)
    assert len(pairs) == min(count_ai, count_real)
    assert len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == len(pairs)
    # Nearly as near as with all at once; unrelated directions are sqrt(2) apart.
    whole = nearest_pairs(ai, real)[1].mean()
    assert whole <= distance.mean() < 0.5 * (whole + 2**0.5)


def test_equal_features_are_paired_too():
    pairs, distance = nearest_pairs(np.ones((50, 3)), np.ones((50, 3)), max_part=8)
    assert len(set(pairs[:, 1])) == 50 and not distance.any()


@pytest.fixture
def scenes(tmp_path):
    """A manifest of scenes: 6 real ones, 4 of which are shown by AI images too, and 2 of the AI's own."""
    rows = {"image": [], "name": [], "label": [], "group": [], "fold": []}

    def add(scene: int, label: int, group: str) -> None:
        rng = np.random.default_rng(scene)
        coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        picture = np.array(coarse.resize((160, 160), Image.Resampling.BICUBIC)).astype(int)
        picture += np.random.default_rng(100 + scene + 50 * label).integers(-6, 7, picture.shape)
        name = f"{'ai' if label else 'real'}-{scene}.png"
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(tmp_path / name)
        values = (str(tmp_path / name), name, label, group, str(scene % 2))
        for column, value in zip(rows, values, strict=True):
            rows[column].append(value)

    for scene in range(6):
        add(scene, 0, "shared" if scene < 2 else "")
    for scene in (3, 1, 0, 2, 10, 11):
        add(scene, 1, f"g{scene}" if scene == 3 else "")
    write_manifest(make_manifest(rows), tmp_path / "scenes.csv")
    return str(tmp_path / "scenes.csv")


def combined(*flags: str, out: Path) -> pd.DataFrame:
    combine.main([*flags, "--out", str(out)])
    return read_manifest(out)


def scene_of(rows: pd.DataFrame) -> pd.Series:
    return rows["name"].str.extract(r"-(\d+)")[0]


def test_the_nearest_pairs_are_kept_and_numbered(scenes, tmp_path, capsys):
    flags = [scenes, "--match", "content", "--match-share", "0.67", *TINY]
    rows = combined(*flags, out=tmp_path / "matched.csv")
    assert sorted(rows["name"]) == sorted(
        f"{kind}-{scene}.png" for kind in ("ai", "real") for scene in range(4)
    )
    assert rows.groupby("pair")["label"].sum().tolist() == [1] * 4
    assert scene_of(rows).groupby(rows["pair"]).nunique().max() == 1
    assert sorted(set(rows["pair"])) == list("1234")
    # In the order of the AI images: scenes 3, 1, 0, 2.
    assert rows[rows["label"] == 1]["pair"].tolist() == list("1234")
    groups = rows.groupby("pair")["group"].nunique()
    assert groups.tolist() == [1] * 4 and (rows["group"] != "").all()
    # Scenes 0 and 1 were related before, and still are; so their AI images are related as well.
    assert rows["group"].nunique() == 3
    dropped = pd.read_csv(tmp_path / "matched.dropped.csv", keep_default_na=False)
    assert len(dropped) == 4 and set(dropped["reason"]) == {"no match"}
    assert "4 pairs of 6 AI and 6 real images by pool of view control of" in capsys.readouterr().out
    # The bank that was made is used again, and another share does not need another one.
    bank = tmp_path / "matched.content"
    before = (bank / "pool.npy").stat().st_mtime_ns
    again = combined(*flags[:3], "--match-share", "0.34", "--bank", str(bank), out=tmp_path / "two.csv")
    assert len(again) == 4 and (bank / "pool.npy").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="the manifests have a column pair already"):
        combined(str(tmp_path / "two.csv"), "--match", "content", *TINY, out=tmp_path / "three.csv")


def test_pairs_stay_within_a_column_and_a_side_of_the_hold_out(scenes, tmp_path):
    flags = [scenes, "--match", "content", "--match-within", "fold", *TINY]
    rows = combined(*flags, out=tmp_path / "folds.csv")
    assert len(rows) == 12 and rows.groupby("pair")["fold"].nunique().max() == 1
    flags = [scenes, "--match", "content", "--holdout", "0.34", "--bank", str(tmp_path / "folds.content")]
    train = combined(*flags, out=tmp_path / "split.csv")
    held = read_manifest(tmp_path / "split.holdout.csv")
    for side in (train, held):
        assert side.groupby("pair")["label"].sum().tolist() == [1] * side["pair"].nunique()
    assert not set(train["name"]) & set(held["name"])


def test_an_image_that_cannot_be_read_is_listed(scenes, tmp_path):
    bank = tmp_path / "bank"
    rows = read_manifest(scenes)
    settings = Settings(
        backbone="timm:test_vit", weights="random", views=ViewPlan(control_side=28), workers=0, device="cpu"
    )
    (tmp_path / "ai-2.png").rename(tmp_path / "aside.png")
    assert embed.embed(settings, [scenes], bank, Processes()) == 1
    (tmp_path / "aside.png").rename(tmp_path / "ai-2.png")
    status = combine.main(
        [scenes, "--match", "content", "--bank", str(bank), "--out", str(tmp_path / "out.csv")]
    )
    errors = pd.read_csv(tmp_path / "out.errors.csv")
    assert status == 1 and errors["name"].tolist() == ["ai-2.png"]
    assert len(read_manifest(tmp_path / "out.csv")) == 10
    write_manifest(rows.assign(name=["new-" + name for name in rows["name"]]), tmp_path / "renamed.csv")
    assert len(combined(str(tmp_path / "renamed.csv"), "--match", "content", "--bank", str(bank),
                        out=tmp_path / "again.csv")) == 10  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--match-share", "0.5"], "--match-share has an effect with --match content only"),
        (["--content-side", "20"], "--content-side has an effect with --match content only"),
        (["--match", "content", "--balance", "source"], "would tear the pairs of --match apart"),
        (
            ["--match", "content", "--bank", "b", "--weights", "hub"],
            "with --match content without --bank only",
        ),
        (["--match", "content", "--bank", "nowhere"], r"nowhere is not a bank: it has no bank\.json"),
        (["--match", "content", "--where", "label=0", *TINY], "all rows have the same label"),
        (
            ["--match", "content", "--match-within", "folds", *TINY],
            "there is no column folds .did you mean fold",
        ),
        (["--match", "content", "--match-share", "0", *TINY], "leaves no pair; use a larger --match-share"),
    ],
)
def test_what_cannot_be_matched_is_refused(scenes, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        combined(scenes, *flags, out=tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_rows_without_label_and_images_that_are_not_in_the_bank_are_refused(scenes, tmp_path):
    rows = read_manifest(scenes)
    write_manifest(rows.assign(label=[None, *rows["label"][1:]]), tmp_path / "some.csv")
    with pytest.raises(UserError, match=r"1 rows have none, real-0\.png among them"):
        combined(str(tmp_path / "some.csv"), "--match", "content", *TINY, out=tmp_path / "out.csv")
    combined(scenes, "--where", "fold=0", "--match", "content", *TINY, out=tmp_path / "half.csv")
    flags = ["--match", "content", "--bank", str(tmp_path / "half.content")]
    with pytest.raises(
        UserError, match=r"6 images are not in the bank .*half\.content, real-1\.png among them"
    ):
        combined(scenes, *flags, out=tmp_path / "out.csv")
