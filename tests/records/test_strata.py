"""Strata: text as it is, numbers in bins of equal counts, and one line for what has none."""

import numpy as np
import pandas as pd
import pytest

from featdistill.command_line import UserError
from featdistill.records.strata import column_strata, strata


def test_numbers_are_put_in_five_bins_of_equal_counts():
    numbers = np.random.default_rng(0).permutation(1000) / 1000
    found = strata(pd.Series([str(number) for number in numbers]))
    assert found.value_counts(sort=False).to_dict() == {
        "0 to 0.199": 200,
        "0.2 to 0.399": 200,
        "0.4 to 0.599": 200,
        "0.6 to 0.799": 200,
        "0.8 to 0.999": 200,
    }
    assert (found.cat.codes == np.floor(numbers * 5)).all()
    # Text and numbers agree, and so does every order of the rows.
    assert (strata(pd.Series(numbers)) == found).all()
    order = np.random.default_rng(1).permutation(1000)
    assert (strata(pd.Series(numbers[order])).to_numpy() == found.to_numpy()[order]).all()


def test_equal_numbers_are_never_divided():
    found = strata(pd.Series([1.0] * 90 + list(np.linspace(2.5, 9.5, 10))))
    assert (found[:90] == found[0]).all() and found.iloc[0] == "1"
    assert found.cat.categories.tolist() == ["1", "2.5 to 9.5"]


@pytest.mark.parametrize(
    ("cells", "names"),
    [
        (["0.5", "1", "0.5", "0.25"], ["0.25", "0.5", "1"]),
        ([str(fold) for fold in range(10)] * 3, [str(fold) for fold in range(10)]),
        (["b", "a", " b "], ["a", "b"]),
        (["x1", "2", "x3"], ["2", "x1", "x3"]),
        (["0.123456", "0.123457", "0.123458"], ["0.123456", "0.123457", "0.123458"]),
    ],
)
def test_few_values_and_text_are_strata_as_they_are(cells, names):
    found = strata(pd.Series(cells))
    assert found.cat.categories.tolist() == names


def test_what_is_unknown_has_no_stratum():
    found = strata(pd.Series(["1", "", "2", None], index=[7, 8, 9, 3]))
    assert found.isna().tolist() == [False, True, False, True]
    assert found.index.tolist() == [7, 8, 9, 3]
    assert strata(pd.Series([1.0, np.nan])).isna().tolist() == [False, True]
    assert strata(pd.Series([1, None], dtype="Int8")).isna().tolist() == [False, True]


def test_what_has_no_strata_is_one_line():
    rows = pd.DataFrame({"name": ["a", "b", "c"], "scale": ["1", "2", "n/a"], "empty": ""})
    with pytest.raises(
        UserError, match=r"no column 'scales' in val\.csv \(did you mean scale\?\); the columns are name"
    ):
        column_strata(rows, "scales", "val.csv")
    with pytest.raises(UserError, match=r"column empty of val\.csv: all cells are empty"):
        column_strata(rows, "empty", "val.csv")
    with pytest.raises(UserError, match=r"'n/a' is not a number \(1 of 3 cells, "):
        column_strata(rows, "scale", "val.csv")
