"""Policies that mix tiers: their shares, numbers of operations and levels, their text, and refusals."""

import copy
import dataclasses
import pickle
from collections import Counter

import numpy as np
import pytest

from featdistill.command_line import UserError
from featdistill.distortions.operation import LEVELS
from featdistill.distortions.policy import DistortionPolicy, Tier
from featdistill.distortions.presets import PRESETS, parse_policy
from featdistill.seeds import training_generator

DRAWS = 50_000


def draw_many(policy: DistortionPolicy, count: int) -> list:
    return [policy.draw(np.random.default_rng((7, index))) for index in range(count)]


def level_shares(mean: float, std: float) -> np.ndarray:
    weights = np.exp(-((np.array(LEVELS) - mean) ** 2) / (2 * std**2))
    return weights / weights.sum()


def assert_share(found: float, expected: float, total: int) -> None:
    assert found == pytest.approx(expected, abs=4.5 * np.sqrt(expected * (1 - expected) / total) + 1e-9)


def test_the_tiers_of_ant_international_have_their_operations_and_levels_over_50000_draws():
    plans = draw_many(PRESETS["ant_international"], DRAWS)
    lengths = Counter(map(len, plans))
    expected = np.zeros(7)
    expected[0] = 1 / 4
    expected[1:4] += 1 / 4 / 3
    expected[3:7] += 1 / 4 / 4
    expected[6] += 1 / 4
    for length, share in enumerate(expected):
        assert_share(lengths[length] / DRAWS, share, DRAWS)
    # Chains of 2 are all of the second tier, those of 5 of the third, and 4 in 5 of those of 6 of the fourth.
    mild, medium, strong = level_shares(1, 2.5), level_shares(3.5, 2), level_shares(4.5, 1)
    by_length = {2: mild, 3: (4 * mild + 3 * medium) / 7, 5: medium, 6: (medium + 4 * strong) / 5}
    for length, shares in by_length.items():
        levels = Counter(step.level for plan in plans if len(plan) == length for step in plan)
        for level, share in zip(LEVELS, shares, strict=True):
            # Levels of one chain share a tier, so an image counts once.
            assert_share(levels[level] / levels.total(), share, lengths[length])


def test_a_tier_draws_what_a_policy_with_its_settings_draws():
    tiers = (Tier(3, 2, 4, 4.0, 0.5), Tier(0, 1, 1), Tier(1, 0, 0))
    mixed = DistortionPolicy(libraries={"official": 1, "extended": 1}, tiers=tiers, exclude=("jpeg",))
    alone = dataclasses.replace(
        mixed, tiers=(), min_operations=2, max_operations=4, level_mean=4.0, level_std=0.5
    )
    clean = 0
    for index in range(2000):
        rng = np.random.default_rng(index)
        assert rng.random() < mixed.probability
        is_clean = rng.random() >= 3 / 4
        plan = mixed.draw(np.random.default_rng(index))
        assert plan == (() if is_clean else alone.draw(rng))
        clean += is_clean
    assert_share(clean / 2000, 1 / 4, 2000)


def test_tiers_serve_policies_of_counts_too():
    tiers = (Tier(1, 1, 1), Tier(1, 5, 5))
    policy = dataclasses.replace(PRESETS["test_public"], exclude=("downscale",), tiers=tiers)
    lengths = Counter(map(len, draw_many(policy, 2000)))
    assert set(lengths) == {1, 5}
    assert_share(lengths[1] / 2000, 1 / 2, 2000)


def test_tiers_are_distorted_with_the_probability_of_the_policy():
    policy = DistortionPolicy(probability=0.4, tiers=(Tier(1, 1, 1), Tier(1, 2, 2)))
    lengths = Counter(map(len, draw_many(policy, 4000)))
    for length, share in ((0, 0.6), (1, 0.2), (2, 0.2)):
        assert_share(lengths[length] / 4000, share, 4000)


def test_policies_with_tiers_can_be_copied_and_keep_patches_in_place():
    policy = PRESETS["ant_international"]
    draw = [policy.draw(training_generator(0, 1, 0, index)) for index in range(5)]
    for other in (pickle.loads(pickle.dumps(policy)), copy.deepcopy(policy), dataclasses.replace(policy)):
        assert other == policy
        assert [other.draw(training_generator(0, 1, 0, index)) for index in range(5)] == draw
    kept = draw_many(dataclasses.replace(policy, keeps_layout_only=True), 300)
    assert not {step.name for plan in kept for step in plan} & {"jitter", "colorshift"}


def test_tiers_are_written_like_other_weights():
    text = "official,tiers=1:0+1:1-3:1:2.5+1:3-6:3.5:2+1:6:4.5:1"
    assert parse_policy(text) == PRESETS["ant_international"]
    assert parse_policy("strong, tiers = 2:1-2:3:inf").tiers == (Tier(2.0, 1, 2, 3.0, float("inf")),)
    assert parse_policy("ant_international,tiers=") == PRESETS["official"]
    assert parse_policy("ant_international,tiers=,level_mean=2") == DistortionPolicy(level_mean=2)


@pytest.mark.parametrize(
    "text,message",
    [
        ("official,tiers=1", "'1' is not a valid value of tiers; write WEIGHT:OPERATIONS:MEAN:STD"),
        ("official,tiers=1:3", "not a valid value of tiers"),
        ("official,tiers=1:3:2", "not a valid value of tiers"),
        ("official,tiers=1:0:2:1", "not a valid value of tiers"),
        ("official,tiers=1:1-3:2:nan", "not a valid value of tiers"),
        ("official,tiers=1:a-3:2:1", "not a valid value of tiers"),
        ("official,tiers=-1:0+1:1-3:2:1", "weights of 0 or more"),
        ("official,tiers=0:0+0:1:2:1", "not all 0"),
        (
            "official,tiers=1:0+1:13-20:9:1",
            r"13 operations or more are requested, and at most \d of lib",
        ),
        ("official,tiers=1:0-3:2:1", "1 <= min_operations <= max_operations must hold, not 0 and 3"),
        ("official,tiers=1:4-3:2:1", "must hold, not 4 and 3"),
        ("official,tiers=1:1:2:0", "level_std must be above 0"),
        ("official,tiers=1:1:inf:1", "level_mean must be a finite number"),
        ("official,include=jpeg,exclude=jpeg,tiers=1:1:1:1", "no operation of library official is left"),
        ("ant_international,level_mean=2", "leave out level_mean, or write tiers="),
        ("official,max_operations=2,lengths=1,tiers=1:0", "leave out lengths, max_operations"),
    ],
)
def test_tiers_that_cannot_be_followed_are_refused_with_the_reason(text, message):
    with pytest.raises(UserError, match=message):
        parse_policy(text)
