"""How alike experts are, by two ways that must agree."""

import numpy as np
import pandas as pd

from featdistill.evaluation.experts import rank_correlations, rescues


def test_rank_correlations_are_spearmans_with_ties():
    rng = np.random.default_rng(0)
    scores = [np.round(rng.random(50), 1), np.round(rng.random(50), 2), np.full(50, 0.3)]
    found = rank_correlations(scores)
    expected = pd.DataFrame(np.stack(scores[:2], 1)).corr(method="spearman").to_numpy()
    np.testing.assert_allclose([row[:2] for row in found[:2]], expected, atol=1e-12)
    assert found[2] == [None] * 3 and [row[2] for row in found] == [None] * 3


def test_who_saves_whom_agrees_with_a_count_by_hand():
    label = np.array([0, 0, 1, 1, 1])
    scores = [
        np.array([0.9, 0.1, 0.2, 0.9, 0.4]),  # wrong at 0, 2, 4
        np.array([0.1, 0.9, 0.2, 0.9, 0.9]),  # wrong at 1, 2
        np.array([0.1, 0.1, 0.9, 0.9, 0.9]),  # never wrong
    ]
    mistakes, shares = rescues(label, scores)
    assert mistakes == [3, 2, 0]
    assert shares == [[None, 2 / 3, 1.0], [0.5, None, 1.0], [None, None, None]]
