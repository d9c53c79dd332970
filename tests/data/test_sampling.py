import numpy as np
import pandas as pd
import pytest

from featdistill.command_line import UserError
from featdistill.data.sampling import TrainBatches, balance_weights, limit_per_class


def indices(**options) -> list[list[tuple[int, int]]]:
    return list(TrainBatches(26, 8, 2, seed=5, **options))


def test_every_epoch_is_another_permutation_without_repeats():
    flat = [item for batch in indices() for item in batch]
    assert len(flat) == len(set(flat)) == 48
    epochs = [[index for epoch, index in flat if epoch == wanted] for wanted in (0, 1)]
    assert epochs[0] != epochs[1] and all(0 <= index < 26 for index in epochs[0])


def test_stage_2_has_another_order_in_every_epoch():
    one, two = (np.array(list(TrainBatches(800, 8, 3, seed=5, stage=stage))) for stage in (1, 2))
    assert one.shape == two.shape == (300, 8, 2)
    # Two independent permutations agree at one place on average.
    same = (one == two).all(axis=2).reshape(3, 800).sum(axis=1)
    assert same.max() < 8
    weights = np.full(800, 0.5)
    streams = (TrainBatches(800, 8, 1, seed=5, stage=stage, weights=weights) for stage in (1, 2))
    one, two = ({index for batch in stream for _, index in batch} for stream in streams)
    assert len(one) == len(two) == 400 and 150 < len(one & two) < 250


def test_a_step_sees_the_same_images_over_processes_and_accumulation():
    whole = indices()
    for world, accumulation in ((2, 1), (1, 4), (2, 2)):
        ranks = [indices(world=world, accumulation=accumulation, rank=rank) for rank in range(world)]
        for step, expected in enumerate(whole):
            parts = [
                item
                for part in range(step * accumulation, (step + 1) * accumulation)
                for rank in ranks
                for item in rank[part]
            ]
            assert parts == expected


def test_a_resumed_stream_is_the_rest_of_the_whole_one():
    assert indices(start=3) == indices()[3:]
    assert indices(start=2, accumulation=2) == indices(accumulation=2)[4:]


def test_batches_that_cannot_be_made_are_an_error():
    with pytest.raises(UserError, match="fewer than a batch of 8"):
        TrainBatches(7, 8, 1, 0)
    with pytest.raises(UserError, match="is not a multiple of 3 processes"):
        TrainBatches(70, 8, 1, 0, world=3)


def test_rows_come_up_as_often_as_their_weights_say_and_never_twice_the_same_way():
    weights = np.array([0.25, 0.5, 1, 1, 2, 3.25] * 8)
    stream = TrainBatches(48, 8, 40, seed=3, weights=weights)
    assert stream.steps_per_epoch == 8
    items = [item for batch in stream for item in batch]
    assert len(items) == len(set(items)) == 40 * 64
    counts = np.bincount([index for _, index in items], minlength=48).reshape(8, 6)
    np.testing.assert_allclose(counts.mean(axis=0) / 40, weights[:6], atol=0.1)
    one_epoch = np.bincount([index for batch in list(stream)[:8] for _, index in batch], minlength=48)
    assert np.all(one_epoch >= np.floor(weights)) and np.all(one_epoch <= np.ceil(weights))
    again = TrainBatches(48, 8, 40, seed=3, weights=weights, start=100)
    assert list(again) == list(stream)[100:]


def test_equal_weights_are_no_weights_but_for_the_order():
    items = [item for batch in TrainBatches(24, 8, 2, seed=0, weights=np.ones(24)) for item in batch]
    assert sorted(items) == [(epoch, index) for epoch in range(2) for index in range(24)]


def make_rows(counts: dict[tuple[int, str], int]) -> pd.DataFrame:
    """Rows with so many of each (label, source), in a mixed order, and an index of their own."""
    rows = pd.DataFrame(
        [pair for pair, count in counts.items() for _ in range(count)], columns=["label", "source"]
    ).astype({"label": "Int8"})
    rows["name"] = [f"{number}.jpg" for number in range(len(rows))]
    return rows.sample(frac=1, random_state=0)


COUNTS = {(0, "a"): 30, (0, "b"): 6, (1, "a"): 9, (1, "c"): 2, (1, "d"): 1}


def test_a_weight_is_what_the_manifests_column_says_and_1_where_it_is_empty():
    rows = make_rows({(0, "a"): 2, (1, "b"): 2})
    assert balance_weights(rows) is None
    assert balance_weights(rows.assign(weight=["2", "", "0.5", "1"])).tolist() == [2, 1, 0.5, 1]
    with pytest.raises(UserError, match=r"weight of .*jpg must be a number above 0, not '-1'"):
        balance_weights(rows.assign(weight=["1", "1", "-1", "1"]))


@pytest.mark.parametrize(
    ("balance", "columns", "expected"),
    [
        ("class", ["label"], {0: 24, 1: 24}),
        ("source", ["source"], {"a": 12, "b": 12, "c": 12, "d": 12}),
        (
            "class_source",
            ["label", "source"],
            {(0, "a"): 12, (0, "b"): 12, (1, "a"): 8, (1, "c"): 8, (1, "d"): 8},
        ),
    ],
)
def test_what_is_balanced_comes_up_equally_often_in_an_epoch_of_the_same_length(balance, columns, expected):
    rows = make_rows(COUNTS)
    weights = balance_weights(rows, balance)
    sums = pd.Series(weights, index=rows.index).groupby([rows[name] for name in columns]).sum()
    assert sums.to_dict() == pytest.approx(expected)
    stream = TrainBatches(48, 8, 25, seed=1, weights=weights)
    assert stream.steps_per_epoch == 6
    drawn = rows.iloc[[index for batch in stream for _, index in batch]]
    counts = drawn.groupby(columns).size() / 25
    assert counts.to_dict() == pytest.approx(expected, abs=0.7)


def test_two_balanced_classes_have_half_of_the_images_of_every_epoch_each():
    rows = make_rows({(0, "a"): 37, (1, "a"): 11})
    stream = TrainBatches(48, 8, 20, seed=2, weights=balance_weights(rows, "class"))
    labels = rows["label"].to_numpy()[[index for batch in stream for _, index in batch]]
    assert labels.reshape(20, 48).sum(axis=1).tolist() == [24] * 20


def test_the_column_weighs_rows_within_what_is_balanced_and_sets_the_length():
    rows = make_rows(COUNTS)
    own = np.where(rows["source"] == "d", 5.0, np.where(rows["label"] == 0, 0.5, 1.0))
    weights = balance_weights(rows.assign(weight=own.astype(str)), "class")
    assert weights.sum() == pytest.approx(own.sum())
    is_ai = (rows["label"] == 1).to_numpy()
    assert weights[is_ai].sum() == pytest.approx(own.sum() / 2)
    for part in (is_ai, ~is_ai):
        np.testing.assert_allclose(weights[part] / own[part], (weights[part] / own[part])[0])


def test_class_scale_balances_the_classes_among_images_of_similar_scale():
    rng = np.random.default_rng(0)
    rows = make_rows({(0, "a"): 300, (1, "a"): 200})
    # Real images are mostly reduced less, so that the scale alone tells the classes apart.
    scale = np.where(rows["label"] == 0, rng.beta(3, 2, len(rows)), rng.beta(2, 3, len(rows)))
    rows = rows.assign(scale=scale.astype(str))
    weights = balance_weights(rows, "class_scale")
    assert weights.sum() == pytest.approx(500) and (weights > 0).all()
    bins = pd.Series(np.searchsorted(np.sort(scale)[99:400:100], scale), index=rows.index)
    sums = pd.Series(weights, index=rows.index).groupby([bins, rows["label"]]).sum()
    assert sums.tolist() == pytest.approx([50] * 10)
    own = balance_weights(rows.assign(weight="3"), "class_scale")
    np.testing.assert_allclose(own, 3 * weights)
    # One stratum: the classes of all images.
    np.testing.assert_allclose(
        balance_weights(rows.assign(scale="1"), "class_scale"), balance_weights(rows, "class")
    )
    # Text is a stratum as it is.
    text = rows.assign(scale=np.where(scale < 0.5, "small", "large"))
    small = (scale < 0.5) & (rows["label"] == 1).to_numpy()
    assert balance_weights(text, "class_scale")[small].sum() == pytest.approx((scale < 0.5).sum() / 2)


def test_class_scale_needs_scales_and_both_classes():
    rows = make_rows({(0, "a"): 3, (1, "a"): 2})
    with pytest.raises(UserError, match=r"there is no column 'scale' in the 5 training rows"):
        balance_weights(rows, "class_scale")
    scale = rows["label"].map({0: "0.5", 1: "1"})
    with pytest.raises(UserError, match=r"all training rows with scale 0\.5 are of one class"):
        balance_weights(rows.assign(scale=scale), "class_scale")
    with pytest.raises(UserError, match=r"2 of the 5 training rows have no scale"):
        balance_weights(rows.assign(scale=scale.replace("1", "")), "class_scale")


def test_sources_that_are_not_known_cannot_be_balanced():
    rows = make_rows({(0, "a"): 3, (1, ""): 2})
    assert len(balance_weights(rows, "class")) == 5
    for balance in ("source", "class_source"):
        with pytest.raises(UserError, match=r"2 of 5 training rows have no source, [34]\.jpg among them"):
            balance_weights(rows, balance)
    with pytest.raises(UserError, match=r"did you mean class"):
        balance_weights(rows, "classes")


def test_a_limit_takes_as_many_rows_of_each_class_wherever_they_stand():
    rows = pd.DataFrame({"name": [f"{row}.jpg" for row in range(60)], "label": [0.0] * 40 + [1.0] * 20})
    few = limit_per_class(rows, 12, seed=3)
    assert few["label"].value_counts().to_dict() == {0.0: 12, 1.0: 12}
    assert few["name"].tolist() == [name for name in rows["name"] if name in set(few["name"])]
    shuffled = limit_per_class(rows.sample(frac=1, random_state=1), 12, seed=3)
    assert set(shuffled["name"]) == set(few["name"]) and list(shuffled.index) == list(range(24))
    assert set(few["name"]) != set(limit_per_class(rows, 12, seed=4)["name"])
    assert set(few["name"]) < set(limit_per_class(rows, 30, seed=3)["name"])
    assert limit_per_class(rows, 30, seed=3)["label"].value_counts().to_dict() == {0.0: 30, 1.0: 20}
    assert limit_per_class(rows, None, seed=3) is rows
