"""The charts of the report: lines are where the data are."""

import numpy as np
import pytest
from report_inputs import heat_map_cells, read_page

from featdistill.evaluation.metrics import roc_curve
from featdistill.report.axes import round_ticks
from featdistill.report.charts import SHADES, heat_map, histogram_chart, roc_chart


def points(drawing, name):
    """Return (N, 2) places of a line, as shares of the axes' rectangle, from its lower left corner."""
    box = {
        key: float(value)
        for key, value in drawing.all("rect", class_="frame")[0].attributes.items()
        if key != "class"
    }
    path = next(one for one in drawing.all("path") if set(name.split()) <= set(one["class"].split()))
    found = np.array([[float(part) for part in pair.split(",")] for pair in path["d"][1:].split("L")])
    found[:, 0] = (found[:, 0] - box["x"]) / box["width"]
    found[:, 1] = 1 - (found[:, 1] - box["y"]) / box["height"]
    return found


def parsed(markup, tmp_path):
    (tmp_path / "part.html").write_text(markup, encoding="utf-8")
    return read_page(tmp_path / "part.html")


def test_shades_go_from_dark_to_light_with_the_value(tmp_path):
    values = [[0.3, 0.5, 0.75, 0.9999, 1.0, None]]
    found = heat_map_cells(parsed(heat_map("h", "t", ["row"], list("abcdef"), values, (0.5, 1.0)), tmp_path))
    assert [found[0, column][1] for column in range(5)] == [0, 0, SHADES // 2, SHADES - 1, SHADES - 1]
    assert len(found) == 5


def test_a_known_roc_curve_passes_through_its_points(tmp_path):
    fpr, tpr, _ = roc_curve(np.array([1, 0, 1, 0]), np.array([0.9, 0.7, 0.4, 0.2]))
    page = parsed(roc_chart("r", "t", {"robust": (fpr, tpr)}), tmp_path)
    expected = [[0, 0], [0, 0.5], [0.5, 0.5], [0.5, 1], [1, 1]]
    np.testing.assert_allclose(points(page, "line robust"), expected, atol=0.002)
    np.testing.assert_allclose(points(page, "chance"), [[0, 0], [1, 1]], atol=0.002)


def test_a_logarithmic_axis_bends_straight_lines_and_starts_at_its_lowest_rate(tmp_path):
    fpr, tpr, _ = roc_curve(np.array([1, 0, 1, 0]), np.array([0.9, 0.7, 0.4, 0.2]))
    page = parsed(roc_chart("r", "t", {"robust": (fpr, tpr)}, 0.01), tmp_path)
    half = np.log10(0.5 / 0.01) / 2
    expected = [[0, 0], [0, 0.5], [half, 0.5], [half, 1], [1, 1]]
    np.testing.assert_allclose(points(page, "line robust"), expected, atol=0.002)
    # Where the axis says a hundredth and a tenth, chance finds as many.
    bent = points(page, "chance")
    np.testing.assert_allclose(np.interp([0.5, 1], *bent.T), [0.1, 1], atol=0.005)


def test_a_curve_of_many_images_is_short_but_accurate(tmp_path):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 12_500)
    fpr, tpr, _ = roc_curve(label, rng.normal(label * 1.5, 1))
    found = points(parsed(roc_chart("r", "t", {"robust": (fpr, tpr)}), tmp_path), "line robust")
    assert len(found) < 1500 < len(fpr)
    # Each point of the curve lies within a unit of the drawing, some 280 wide, of the line.
    inside = (fpr > 0.02) & (fpr < 0.98)
    assert np.abs(np.interp(fpr[inside], *found.T) - tpr[inside]).max() < 0.02


def test_histograms_are_as_high_as_the_shares_they_show(tmp_path):
    edges, shares = (
        np.linspace(0, 1, 5),
        {"real": np.array([0.5, 0.25, 0.25, 0]), "ai": np.array([0, 0, 0, 1.0])},
    )
    page = parsed(histogram_chart("h", "t", edges, shares), tmp_path)
    found = points(page, "area real")
    # The axis ends a twentieth above the highest bar.
    np.testing.assert_allclose(sorted(set(np.round(found[:, 1] * 1.05, 2))), [0, 0.25, 0.5], atol=0.005)
    assert points(page, "area ai")[:, 1].max() == pytest.approx(1 / 1.05, abs=0.003)


@pytest.mark.parametrize("low, high, expected", [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    (0.7, 1, [0.7, 0.8, 0.9, 1]),
    (0, 0.021, [0, 0.005, 0.01, 0.015, 0.02]),
    (-3, 14, [0, 5, 10]),
])  # fmt: skip
def test_ticks_are_round_numbers(low, high, expected):
    assert round_ticks(low, high) == expected
