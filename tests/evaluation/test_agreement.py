"""Whether experts agree: correlations against SciPy, corrected errors against a count by hand."""

import numpy as np
from scipy.stats import spearmanr

from featdistill.evaluation.experts import corrected_errors, rank_correlations


def test_rank_correlations_are_spearmans_with_ties():
    rng = np.random.default_rng(0)
    scores = [np.round(rng.random(50), 1), np.round(rng.random(50), 2), np.full(50, 0.3)]
    found = rank_correlations(scores)
    expected = spearmanr(scores[0], scores[1]).statistic
    np.testing.assert_allclose([row[:2] for row in found[:2]], [[1, expected], [expected, 1]], atol=1e-12)
    assert found[2] == [None] * 3 and [row[2] for row in found] == [None] * 3


def test_corrected_errors_agree_with_a_count_by_hand():
    label = np.array([0, 0, 1, 1, 1])
    scores = [
        np.array([0.9, 0.1, 0.2, 0.9, 0.4]),  # wrong at 0, 2, 4
        np.array([0.1, 0.9, 0.2, 0.9, 0.9]),  # wrong at 1, 2
        np.array([0.1, 0.1, 0.9, 0.9, 0.9]),  # never wrong
    ]
    errors, shares = corrected_errors(label, scores)
    assert errors == [3, 2, 0]
    assert shares == [[None, 2 / 3, 1.0], [0.5, None, 1.0], [None, None, None]]
