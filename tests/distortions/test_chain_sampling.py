"""Subsets of random size: that items and sizes come up as often as asked, and what cannot be."""

from itertools import combinations

import numpy as np
import pytest

from featdistill.distortions.chain_sampling import SubsetSampler

SHARES, SIZES = np.array([0.7, 0.5, 0.3, 0.2]), np.array([4.0, 5.0, 1.0])


def test_the_fitted_odds_give_the_shares_when_all_subsets_are_counted():
    sampler = SubsetSampler(SHARES, SIZES)
    found = np.zeros(4)
    for size, weight in enumerate(SIZES / SIZES.sum(), start=1):
        subsets = [list(subset) for subset in combinations(range(4), size)]
        products = np.array([sampler.odds[subset].prod() for subset in subsets])
        for subset, probability in zip(subsets, products / products.sum(), strict=True):
            found[subset] += weight * probability
    np.testing.assert_allclose(found, SHARES, rtol=1e-6)


def test_drawn_subsets_have_the_shares_the_sizes_and_no_item_twice():
    sampler, rng, drawn = SubsetSampler(SHARES, SIZES), np.random.default_rng(0), 6000
    items, sizes = np.zeros(4), np.zeros(4)
    for _ in range(drawn):
        subset = sampler.draw(rng)
        assert len(set(subset)) == len(subset)
        items[subset] += 1
        sizes[len(subset)] += 1
    np.testing.assert_allclose(items / drawn, SHARES, atol=4.5 * 0.5 / drawn**0.5)
    np.testing.assert_allclose(sizes / drawn, [0, 0.4, 0.5, 0.1], atol=4.5 * 0.5 / drawn**0.5)


def test_given_its_size_a_subset_is_as_likely_as_the_product_of_its_odds():
    sampler, rng = SubsetSampler(SHARES, SIZES), np.random.default_rng(1)
    pairs = [tuple(subset) for subset in (sampler.draw(rng) for _ in range(12000)) if len(subset) == 2]
    products = {pair: sampler.odds[list(pair)].prod() for pair in combinations(range(4), 2)}
    for pair, product in products.items():
        expected = product / sum(products.values())
        assert pairs.count(pair) / len(pairs) == pytest.approx(expected, abs=4.5 * 0.5 / len(pairs) ** 0.5)


@pytest.mark.parametrize(
    "shares,sizes,message",
    [
        ([0.5, 0.5], [1.0], None),
        ([0.5, 0.4], [1.0], "sum to 0.9"),
        ([1.0, 0.5, 0.5], [0.0, 1.0], "between 0 and 1"),
        ([0.0, 0.5, 0.5], [1.0], "between 0 and 1"),
    ],
)
def test_impossible_shares_are_refused(shares, sizes, message):
    if message is None:
        np.testing.assert_allclose(
            np.ptp(SubsetSampler(np.array(shares), np.array(sizes)).odds), 0, atol=1e-9
        )
    else:
        with pytest.raises(ValueError, match=message):
            SubsetSampler(np.array(shares), np.array(sizes))
