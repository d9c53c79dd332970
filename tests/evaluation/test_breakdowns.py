"""Breakdowns of a small table whose values can be counted, and against scikit-learn."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from featdistill.evaluation.breakdowns import breakdowns, level_of
from featdistill.evaluation.intervals import auc_interval

ROWS = [
    # label, score, is_distorted, generator, source, chain, width, height
    (0, 0.1, 0, "", "camera", (), 400, 300),
    (0, 0.6, 1, "", "camera", (("jpeg", 24), ("gausblur", 5.0)), 800, 600),
    (0, 0.4, 1, "", "mixed", (("jpeg", 43),), 1024, 1024),
    (0, 0.2, 1, "", "mixed", (), 300, 1025),
    (1, 0.4, 0, "flux", "mixed", (), 5000, 10),
    (1, 0.7, 1, "flux", "mixed", (("jpeg", 24), ("jpeg", 24)), 512, 512),
    (1, 0.3, 1, "sdxl", "crawl", (("watermark", 3), ("jpeg", 4)), np.nan, 10),
    (1, 0.9, -1, "", "crawl", (), 2048, 10),
]
COLUMNS = ("label", "score", "is_distorted", "generator", "source", "chain", "width", "height")


@pytest.fixture(scope="module")
def found():
    return breakdowns(pd.DataFrame(dict(zip(COLUMNS, map(list, zip(*ROWS, strict=True)), strict=True))))


def counts(table):
    return {name: (row["real"], row["ai"], row["auc"]) for name, row in table.items()}


def test_each_generator_is_set_against_all_real_images(found):
    found = found["generators"]
    # flux: 0.4 beats 0.1 and 0.2 and ties 0.4, 0.7 beats all; sdxl: 0.3 beats two of four.
    assert counts(found) == {"flux": (4, 2, 6.5 / 8), "sdxl": (4, 1, 0.5)}
    assert found["flux"]["n"] == 2 and found["flux"]["ai_accuracy"] == 0.5
    assert (found["flux"]["accuracy"], found["flux"]["real_accuracy"]) == (4 / 6, 3 / 4)


def test_each_distortion_has_the_rows_whose_chain_contains_it(found):
    found = found["distortions"]
    assert counts(found) == {"gausblur": (1, 0, None), "jpeg": (2, 2, 0.5), "watermark": (0, 1, None)}
    assert found["jpeg"]["n"] == 4 and found["gausblur"]["low"] is None
    assert found["watermark"]["real_accuracy"] is None and found["watermark"]["ai_accuracy"] == 0


def test_levels_come_from_the_scales_of_the_libraries(found):
    assert counts(found["levels"]) == {"1": (1, 0, None), "3": (0, 1, None), "5": (1, 1, 0.0)}
    cells = found["distortion_levels"]
    assert {name: {level: row["n"] for level, row in row.items()} for name, row in cells.items()} == {
        "gausblur": {"5": 1},
        "jpeg": {"1": 1, "3": 2, "5": 1},
    }


@pytest.mark.parametrize(
    ("name", "scale", "level"),
    [
        ("jpeg", 43, 1),
        ("jpeg", 4.0, 5),
        ("jpeg", 50, None),
        ("gausblur", 0.1, 1),
        # Drawn from 0.3 to 0.8.
        ("downscale", 0.61, 2),
        ("downscale", 0.8, 1),
        ("downscale", 0.3, 5),
        ("downscale", 0.9, None),
        # The challenge's own table comes first, that of the extended library counts as well.
        ("jpeg2000", 45, 3),
        ("jpeg2000", 90, 4),
        ("isonoise", 4, None),
        ("watermark", 3, None),
        ("jpeg", None, None),
    ],
)
def test_a_scale_has_the_level_at_which_an_operation_has_it(name, scale, level):
    assert level_of(name, scale) == level


def test_chain_lengths_leave_out_those_that_are_not_known(found):
    assert counts(found["chain_lengths"]) == {"0": (1, 1, 1.0), "1": (1, 0, None), "2": (1, 2, 0.5)}


def test_a_source_of_one_class_is_set_against_all_images_of_the_other(found):
    found = found["sources"]
    assert {name: row["against"] for name, row in found.items()} == {
        "camera": "all AI",
        "crawl": "all real",
        "mixed": "itself",
    }
    # camera: 0.1 loses to all four, 0.6 to two; mixed: 0.4 and 0.7 against 0.4 and 0.2.
    assert counts(found) == {"camera": (2, 4, 6 / 8), "crawl": (4, 2, 6 / 8), "mixed": (2, 2, 3.5 / 4)}


def test_sizes_are_by_the_longer_side_where_both_are_known(found):
    assert {name: (row["real"], row["ai"]) for name, row in found["sizes"].items()} == {
        "1 to 512 px": (1, 1),
        "513 to 1024 px": (2, 0),
        "1025 to 2048 px": (1, 1),
        "from 2049 px": (0, 1),
    }


def made_up(rows=400):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, rows)
    names = np.array(["jpeg", "downscale", "gausblur"])
    return pd.DataFrame(
        {
            "label": label,
            "score": np.round(0.3 * label + 0.7 * rng.random(rows), 2),
            "is_distorted": rng.integers(0, 2, rows),
            "generator": np.where(label == 1, rng.choice(["flux", "sdxl", ""], rows), ""),
            "source": "one",
            "chain": [tuple((name, 1.0) for name in rng.choice(names, rng.integers(0, 4))) for _ in label],
            "width": np.nan,
            "height": np.nan,
        }
    )


def test_aucs_and_intervals_are_those_of_the_rows_alone():
    frame = made_up()
    label, score = frame["label"].to_numpy(), frame["score"].to_numpy()
    found = breakdowns(frame)
    chains = [dict(chain) for chain in frame["chain"]]
    expected = {
        ("generators", name): ((frame["generator"] == name) | (label == 0)).to_numpy()
        for name in ("flux", "sdxl")
    } | {
        ("distortions", name): np.array([name in chain for chain in chains])
        for name in ("jpeg", "downscale", "gausblur")
    }
    assert {(key, name) for key in ("generators", "distortions") for name in found[key]} == set(expected)
    for (key, name), rows in expected.items():
        row = found[key][name]
        assert row["auc"] == pytest.approx(roc_auc_score(label[rows], score[rows]), abs=1e-12)
        bounds = auc_interval(label[rows], score[rows])[1:]
        assert (row["low"], row["high"]) == pytest.approx(bounds, abs=1e-12)
        assert row["low"] < row["auc"] < row["high"]
    assert found["sizes"] == {} and set(found["sources"]) == {"one"}


def test_scores_that_are_not_probabilities_have_no_accuracy():
    frame = made_up()
    frame["score"] *= 9
    row = breakdowns(frame)["generators"]["flux"]
    assert row["accuracy"] is row["ai_accuracy"] is None and row["auc"] > 0.5
