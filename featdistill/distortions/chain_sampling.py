"""Random subsets of random size in which every item has a given probability.

An evaluation split is described by how many of its chains contain each operation, and by how long the chains
are. Among all distributions over chains that agree with both, this samples the one of maximum entropy: given
its size, a subset has a probability proportional to the product of its items' odds ("conditional Poisson
sampling"; Chen, Dempster and Liu, Biometrika 1994, who also fit the odds by the iteration used here).
"""

from functools import cached_property

import numpy as np


class SubsetSampler:
    """Draws subsets of {0 .. n - 1}.

    Args:
        shares: (n,) probability of each item to be in a subset, strictly between 0 and 1; they sum to the
            mean size of a subset.
        sizes: weight of size 1, 2, ...; every size with a weight is below n.

    Raises:
        ValueError: there is no such distribution.
    """

    def __init__(self, shares: np.ndarray, sizes: np.ndarray) -> None:
        self.shares = np.asarray(shares, float)
        self.sizes = np.asarray(sizes, float) / np.sum(sizes)
        mean = float(self.sizes @ np.arange(1, len(self.sizes) + 1))
        if not np.isclose(self.shares.sum(), mean, rtol=1e-6):
            raise ValueError(f"the shares sum to {self.shares.sum():g}, but the mean size is {mean:g}")
        if not (np.all(self.shares > 0) and np.all(self.shares < 1)):
            raise ValueError(f"shares must be between 0 and 1, not from {min(shares):g} to {max(shares):g}")

    @cached_property
    def odds(self) -> np.ndarray:
        """The (n,) odds of the items, up to a common factor."""
        odds = self.shares / (1 - self.shares)
        for _ in range(2000):
            shares = self._shares_of(odds)
            if np.allclose(shares, self.shares, rtol=1e-9):
                return odds
            odds *= self.shares / shares
            odds /= odds.mean()
        raise ValueError("no distribution over subsets has these shares and sizes")

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Return the items of one subset, in ascending order."""
        left = int(np.searchsorted(np.cumsum(self.sizes), rng.random(), side="right")) + 1
        chosen = []
        for item, odds in enumerate(self.odds):
            # The share of subsets with this item among all of the size that is still to be filled.
            if left and rng.random() * self._tails[item][left] < odds * self._tails[item + 1][left - 1]:
                chosen.append(item)
                left -= 1
        return np.array(chosen)

    @cached_property
    def _tails(self) -> list[np.ndarray]:
        """By first item: summed products of odds over all subsets of the items from there on, by size."""
        tails = [np.eye(1, len(self.sizes) + 1)[0]]
        for odds in self.odds[::-1]:
            tails.append(tails[-1] + odds * np.append(0, tails[-1][:-1]))
        return tails[::-1]

    def _shares_of(self, odds: np.ndarray) -> np.ndarray:
        """Return the (n,) shares that result from odds."""
        products = np.eye(1, len(self.sizes) + 1)[0]
        for one in odds:
            products[1:] += one * products[:-1].copy()
        shares, without = np.zeros_like(odds), np.ones_like(odds)
        for size, weight in enumerate(self.sizes, start=1):
            shares += weight * odds * without / products[size]
            without = products[size] - odds * without
        return shares
