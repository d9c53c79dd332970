"""The report as a file: it shows the numbers of `metrics.json`, and names are never markup."""

import base64
import json
import re
from itertools import pairwise

import cv2
import numpy as np
import pytest
from jinja2 import UndefinedError
from report_inputs import EXPERTS, GENERATORS, heat_map_cells, make_split, make_sweep, read_page, table_rows

import evaluate
from featdistill.command_line import UserError
from featdistill.evaluation import splits as evaluation
from featdistill.images.reading import decode, limit_side, read_image
from featdistill.interactive.explain import explain, overlay
from featdistill.models.expert import create_expert, save_expert
from featdistill.report import page as report
from featdistill.report.markup import render

HOSTILE = "</title></style><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp; \x07\u202e"
HOSTILE += "{}{{ 7 * 7 }}{% raw %}"


def run(out, *predictions, more=()):
    assert evaluate.main(["--predictions", *map(str, predictions), *more, "--out", str(out)]) == 0
    return out / "report.html", json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder, page and metrics of a report of two splits."""
    folder = tmp_path_factory.mktemp("report")
    paths = [make_split(folder / "data", name, seed=seed) for seed, name in enumerate(("val", "val_hard"))]
    make_sweep(folder / "out" / "sweep.json")
    path, metrics = run(folder / "out", *paths)
    return folder, read_page(path), metrics


def card(page, title, identity="split-1"):
    section = page.all("section", id=identity)[0]
    return next(one for one in section.all("section", class_="card") if one.all("h3")[0].text() == title)


def titles(page, identity="split-1"):
    section = page.all("section", id=identity)[0]
    return [one.all("h3")[0].text() for one in section.all("section", class_="card")]


def test_the_summary_and_the_metrics_print_the_values_of_metrics_json(made):
    _, page, metrics = made
    rows = table_rows(page, "AUCs of each split")[1:]
    for row, (name, split) in zip(rows, metrics["splits"].items(), strict=True):
        expected = [name]
        for key in ("robust_auc", "clean_auc", "auc"):
            low, high = split["intervals"][key]
            expected.append(f"{split[key]:.4f}{low:.4f} to {high:.4f}")
        assert row == [*expected, f"{split['images']}", f"{100 * split['ai_share']:.1f} %"]
    split = metrics["splits"]["val"]
    values = {row[0]: row[1][:6] for row in table_rows(page, "All metrics of the split")[1:]}
    assert values["Robust AUC"] == f"{split['robust_auc']:.4f}"
    assert values["TPR at 5 % FPR"] == f"{split['tpr_at_fpr_5']:.4f}"
    assert values["Calibration error"] == f"{split['ece']:.4f}"
    assert values["Real accuracy at 0.5"] == f"{split['real_accuracy']:.4f}"


def test_each_breakdown_prints_the_values_of_metrics_json(made):
    _, page, metrics = made
    split = metrics["splits"]["val"]
    assert set(split["generators"]) == set(GENERATORS)
    for caption, found in (
        ("AUC by generator", split["generators"]),
        ("AUC by number of distortions", split["chain_lengths"]),
    ):
        rows = table_rows(page, caption)[1:]
        assert {row[0]: row[1] for row in rows} == {name: f"{own['auc']:.4f}" for name, own in found.items()}
        assert {row[0]: row[2] for row in rows} == {
            name: f"{own['low']:.4f} to {own['high']:.4f}" for name, own in found.items()
        }
    # The hardest first, in the drawing as in the table.
    drawn = [text.text() for text in card(page, "Generators").all("text") if text.text() in GENERATORS]
    assert drawn == sorted(GENERATORS, key=lambda name: split["generators"][name]["auc"])


def test_the_cells_of_the_heat_map_are_the_aucs_of_distortion_and_level(made):
    _, page, metrics = made
    split = metrics["splits"]["val"]
    rows = sorted(split["distortions"], key=lambda name: (split["distortions"][name]["auc"], name))
    levels = sorted({level for own in split["distortion_levels"].values() for level in own}, key=int)
    expected = {}
    for row, name in enumerate(rows):
        own = {"all": split["distortions"][name], **split["distortion_levels"].get(name, {})}
        for column, key in enumerate(["all", *levels]):
            if key in own:
                expected[row, column] = f"{own[key]['auc']:.3f}"
    found = heat_map_cells(card(page, "Distortions").all("svg")[0])
    assert {place: text for place, (text, _) in found.items()} == expected
    assert ["downscale, all", f"{split['distortions']['downscale']['auc']:.4f}"] in [
        row[:2] for row in table_rows(page, "AUC by distortion and level")
    ]


def test_the_histogram_table_counts_every_image_once(made):
    folder, page, _ = made
    split = evaluation.load_splits([str(folder / "data" / "val.csv")])[0]
    rows = table_rows(page, "Images by score")
    assert rows[0] == ["score", "real", "AI-generated"]
    for column, label in ((1, 0), (2, 1)):
        scores = split.frame["score"][split.frame["label"] == label]
        assert [int(row[column]) for row in rows[1:]] == np.histogram(scores, np.linspace(0, 1, 21))[
            0
        ].tolist()


def test_experts_are_compared_with_each_other(made):
    folder, page, metrics = made
    found = metrics["splits"]["val"]["experts"]["experts"]
    rows = {row[0]: row for row in table_rows(page, "AUC by expert")[1:]}
    assert list(rows) == [*EXPERTS, "mean of experts", "ensemble"]
    assert all(rows[name][1].startswith(f"{found[name]['robust_auc']:.4f}") for name in EXPERTS)
    frame = evaluation.load_splits([str(folder / "data" / "val.csv")])[0].frame
    columns = [f"expert {name}" for name in EXPERTS]
    correlation = frame[columns].corr(method="spearman").to_numpy()
    shown = heat_map_cells(card(page, "Experts").all("svg")[0])
    assert all(shown[place][0] == f"{value:.3f}" for place, value in np.ndenumerate(correlation))
    mistakes = ((frame[columns[0]] > 0.5) != (frame["label"] == 1)).sum()
    caption = "Share of each expert's errors that the others get right"
    assert table_rows(page, caption)[1][:3] == [EXPERTS[0], str(mistakes), "n/a"]


def pictures(page, identity="split-1"):
    """Return the pictures of both classes as lists of (name, score, picture or placeholder)."""
    return [
        [
            (
                one.all(class_="name")[0].text(),
                float(one.all("strong")[0].text()),
                one.all("figure")[0].all()[0],
            )
            for one in side.all("li")
        ]
        for side in card(page, "Most confident errors", identity).all("ul", class_="gallery")
    ]


def test_the_most_confident_errors_come_first_with_their_pictures(made):
    folder, page, _ = made
    frame = evaluation.load_splits([str(folder / "data" / "val.csv")])[0].frame
    wrong_real = frame[(frame["label"] == 0) & (frame["score"] > 0.5)].sort_values("score", ascending=False)
    wrong_ai = frame[(frame["label"] == 1) & (frame["score"] <= 0.5)].sort_values("score")
    for shown, expected in zip(pictures(page), (wrong_real, wrong_ai), strict=True):
        assert len(shown) == min(len(expected), report.GALLERY) > 2
        assert [name for name, _, _ in shown] == expected["name"].tolist()[: len(shown)]
        for (name, score, picture), truth in zip(shown, expected["score"], strict=False):
            assert score == pytest.approx(truth, abs=6e-4)
            assert name in picture["alt"] and f"{score:.3f}" in picture["alt"]
            prefix, _, data = picture["src"].partition(",")
            assert prefix == "data:image/jpeg;base64"
            height, width = decode(base64.b64decode(data)).shape[:2]
            assert max(height, width) == 160


def test_an_unreadable_picture_is_replaced_by_a_line(tmp_path, capsys):
    images = [str(tmp_path / "nowhere.jpg")] * 30 + [""] * 30
    path, _ = run(tmp_path / "out", make_split(tmp_path, "val", rows=60, changes={"image": images}))
    shown = [own for side in pictures(read_page(path)) for own in side]
    assert shown and all(own.text() == "not found or not readable" for _, _, own in shown)
    assert (
        f"{len(shown)} pictures of the report could not be shown; the first: val: " in capsys.readouterr().err
    )


def test_with_official_labels_pictures_come_from_the_predicted_manifest(tmp_path):
    predictions = make_split(tmp_path, "val", rows=60)
    frame = evaluation.load_splits([str(predictions)])[0].frame
    labels = tmp_path / "val_labels.csv"
    rows = (
        f"{name.removesuffix('.jpg')},{label}"
        for name, label in zip(frame["name"], frame["label"], strict=True)
    )
    labels.write_text("image_name,label\n" + "\n".join(rows) + "\n")
    path, _ = run(tmp_path / "out", predictions, more=["--labels", str(labels)])
    shown = [own for side in pictures(read_page(path)) for own in side]
    assert shown and all(own.tag == "img" for _, _, own in shown)


def test_the_gallery_can_be_smaller_or_left_out(tmp_path):
    predictions = make_split(tmp_path, "val", rows=60)
    path, _ = run(tmp_path / "out", predictions, more=["--gallery", "1"])
    assert [len(side) for side in pictures(read_page(path))] == [1, 1]
    path, _ = run(tmp_path / "out", predictions, more=["--gallery", "0"])
    assert "Most confident errors" not in titles(read_page(path)) and not read_page(path).all("img")
    with pytest.raises(UserError, match="--gallery"):
        run(tmp_path / "out", predictions, more=["--gallery", "-1"])


@pytest.mark.parametrize("backbone", ["tiny_clip", "timm:test_resnet"])
def test_the_map_of_an_expert_is_below_each_error(tmp_path, backbone):
    expert = create_expert(backbone, "random", input_size=96 if backbone == "tiny_clip" else None).eval()
    save_expert(expert, tmp_path / "expert", {"recipe": {"name": HOSTILE}})
    images = [str(tmp_path / "data" / f"picture_{row % 6}.jpg") for row in range(160)]
    images[::3] = [str(tmp_path / "nowhere.jpg")] * len(images[::3])
    predictions = make_split(tmp_path / "data", "val", changes={"image": images})
    frame = evaluation.load_splits([str(predictions)])[0].frame.set_index("name")
    plain = read_page(run(tmp_path / "plain", predictions)[0])
    more = ["--explain", str(tmp_path / "expert")]
    page = read_page(run(tmp_path / "out", predictions, more=more)[0])
    own, before = (card(one, "Most confident errors") for one in (page, plain))
    assert "where the expert looks" in own.text() and "where the expert looks" not in before.text()
    explained = 0
    for figure, without in zip(own.all("figure"), before.all("figure"), strict=True):
        found, name = figure.all("img"), figure.all(class_="name")[0].text()
        if not without.all("img"):
            assert not found and "nowhere" in frame.loc[name, "image"]
            continue
        assert found[0].attributes == without.all("img")[0].attributes
        wanted = explain(expert, read_image(frame.loc[name, "image"]))
        text = f"{wanted['probability']:.3f}"
        assert found[1]["alt"].startswith(f"Expert {HOSTILE}".replace("\x07", "\ufffd"))
        assert wanted["map_kind"] in found[1]["alt"] and found[1]["alt"].endswith(f"P(AI) {text}")
        shown = decode(base64.b64decode(found[1]["src"].partition(",")[2]))
        assert np.abs(shown.astype(int) - limit_side(overlay(wanted), 160)).mean() < 12
        assert figure.all("figcaption")[0].text().endswith(f": {text}")
        explained += 1
    assert 4 < explained < len(own.all("figure"))


def test_explain_needs_an_expert_and_a_page_with_pictures(tmp_path):
    predictions = make_split(tmp_path, "val", rows=20)
    flags = ["--explain", str(tmp_path / "none")]
    for more, message in (
        ([], "none is not an expert"),
        (["--no-report"], "leave out --no-report"),
        (["--gallery", "0"], "leave out --gallery 0"),
        (["--protocol", "genimage"], "unknown argument --explain"),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "out", predictions, more=[*flags, *more])
    assert not (tmp_path / "out").exists()


def test_intervals_are_mentioned_only_if_there_are_any(made, tmp_path):
    _, page, _ = made
    path, _ = run(tmp_path / "out", make_split(tmp_path, "val", rows=60, changes={"label": [1] * 60}))
    assert "95 % interval." in page.text() and "95 % interval." not in read_page(path).text()


def test_no_report_skips_the_page(tmp_path):
    path, _ = run(tmp_path / "out", make_split(tmp_path, "val", rows=20), more=["--no-report"])
    assert not path.exists()


def test_names_that_contain_markup_stay_text(tmp_path):
    rows = 60
    names = [f"{HOSTILE}{row}" for row in range(rows)]
    experts = [f"{HOSTILE} a", "b]]><svg onload=alert(3)>"]
    chain = json.dumps([["<b>jpeg</b>", 43]])
    distorted = ([0, 0, 1, 1] * rows)[:rows]
    changes = {
        "name": names,
        "generator": [f"{HOSTILE} generator"] * rows,
        "distortions": [chain if state else "[]" for state in distorted],
    }
    folder = tmp_path / "a <b> folder & more"
    predictions = make_split(folder, "val <i>", rows=rows, experts=experts, changes=changes)
    make_sweep(tmp_path / "out" / "sweep.json", HOSTILE)
    path, _ = run(tmp_path / "out", predictions)
    page = read_page(path)
    tags = {node.tag for node in page.all()}
    assert not tags & {"script", "b", "i", "iframe", "object", "embed", "use", "image", "foreignobject"}
    for node in page.all():
        assert not [key for key in node.attributes if key.startswith("on") or key == "style"]
        for key in ("src", "href"):
            assert node[key] is None or node[key].startswith(("#", "data:"))
        assert node.tag != "img" or node["src"].startswith("data:image/jpeg;base64,")
    text = page.text()
    # What HTML cannot hold is replaced, or escaped already in names of a manifest; the rest stays as it is.
    replaced, escaped = HOSTILE.replace("\x07", "\ufffd"), HOSTILE.replace("\x07", r"\x07")
    for shown in (f"{escaped} generator", f"{replaced} a", experts[1], "<b>jpeg</b>", "val <i>"):
        assert shown in text
    assert any(name.startswith(escaped) for side in pictures(page) for name, _, _ in side)


def test_values_are_escaped_and_the_result_of_another_template_is_not(tmp_path):
    (tmp_path / "inner.html").write_text("<b>{{ text }}</b>")
    (tmp_path / "outer.html").write_text('<p title="{{ title }}">{{ inner }}{{ text }}</p>')
    inner = render("inner.html", tmp_path, text="1 < 2\0\u0085a\ud800")
    outer = render("outer.html", tmp_path, inner=inner, title="\"'<", text="&")
    assert outer == '<p title="&#34;&#39;&lt;"><b>1 &lt; 2\ufffd\ufffda\ufffd</b>&amp;</p>'
    (tmp_path / "plain.md").write_text("{{ text }}")
    assert render("plain.md", tmp_path, text="1 < 2") == "1 < 2"
    with pytest.raises(UndefinedError, match="title"):
        render("outer.html", tmp_path, inner=inner, text="")


def test_the_page_forbids_loading_and_running_anything(made):
    _, page, _ = made
    policy = next(
        one["content"] for one in page.all("meta") if one["http-equiv"] == "Content-Security-Policy"
    )
    assert policy.split("; ")[0] == "default-src 'none'" and "script-src" not in policy
    style = page.all("style")[0].text()
    assert "url(" not in style and "@import" not in style


def test_the_same_input_produces_the_same_bytes(made):
    folder, _, _ = made
    make_sweep(folder / "again" / "sweep.json")
    names = ("val.csv", "val_hard.csv")
    path, _ = run(folder / "again", *(folder / "data" / name for name in names))
    assert path.read_bytes() == (folder / "out" / "report.html").read_bytes()


def test_the_page_lists_experts_hashes_and_files(made):
    folder, page, _ = made
    rows = table_rows(page, "Experts of val, val_hard")
    assert rows[0] == ["expert", "preprocessing", "SHA-256 of the weights"]
    assert rows[1] == [EXPERTS[0], "resize crop, size 224", f"{0:064x}"]
    assert ["fusion", "probability_mean"] in table_rows(page, "How val, val_hard was predicted")
    files = {row[0]: row[2] for row in table_rows(page, "Files that were read")[1:]}
    sidecar = json.loads((folder / "data" / "val.csv.json").read_text())
    assert files["labels of val"] == sidecar["manifest"]["sha256"]
    assert ["interval method", "DeLong"] in table_rows(page, "Settings and versions of the evaluation")


def test_threshold_leaderboard_and_audit_are_shown_on_request(tmp_path):
    predictions = make_split(tmp_path, "val", rows=60)
    other = make_split(tmp_path, "other", rows=60, seed=1)
    baseline = {"auc": 0.75, "low": 0.7, "high": 0.8, "verdict": "shortcut", "images": 60, "telling": []}
    audit = {"baseline": baseline | {"sources": []}, "manifests": ["train.csv"]}
    (tmp_path / "audit.json").write_text(json.dumps(audit))
    more = ["--threshold-from", str(other), "--leaderboard", "--audit", str(tmp_path)]
    path, metrics = run(tmp_path / "out", predictions, other, more=more)
    page = read_page(path)
    own = metrics["splits"]["val"]["threshold"]
    row = next(
        row
        for row in table_rows(page, "All metrics of the split")
        if row[0] == f"Real accuracy at {own['value']:.4g}"
    )
    assert row[1] == f"{own['real_accuracy']:.4f}" and str(other) in row[3]
    places = {row[0]: row[1:] for row in table_rows(page, "Published results and this run")}
    split = metrics["splits"]["other"]
    assert places["this run, other (local)"] == [
        "local",
        f"{split['clean_auc']:.4f}",
        f"{split['robust_auc']:.4f}",
    ]
    assert places["MICV"] == ["1", "0.9974", "0.9723"]
    assert "reach AUC 0.7500 on train.csv" in page.text()


def test_a_sweep_is_shown_as_a_heat_map(made):
    _, page, _ = made
    section = page.all("section", id="sweep")[0]
    found = {place: text for place, (text, _) in heat_map_cells(section.all("svg")[0]).items()}
    assert found == {(0, column): f"{1 - 0.1 * (column + 1):.3f}" for column in range(5)}
    assert "a drop of 0.2900" in section.text()


def test_a_sweep_alone_has_its_own_page(tmp_path):
    make_sweep(tmp_path / "sweep.json")
    sweep = report.read_sweep(tmp_path / "sweep.json")
    report.write_report(tmp_path / "sweep.html", {"splits": {}}, (), sweep=sweep)
    page = read_page(tmp_path / "sweep.html")
    assert [one.text() for one in page.all("h2")][1:] == ["Robustness sweep", "What was run"]
    assert len(page.all("svg")) == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"cells": [{"library": "a"}]}', '{"cells": [{"library": "a", '
                                  '"operation": "b", "level": 1, "auc": "c"}]}'])  # fmt: skip
def test_a_file_that_is_not_a_sweep_is_refused(tmp_path, text):
    assert report.read_sweep(tmp_path / "sweep.json") is None
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(
        UserError, match=r"sweep\.json (is not|must hold).*; run the sweep again, or remove it"
    ):
        report.read_sweep(tmp_path / "sweep.json")


def test_parts_without_data_are_left_out(tmp_path):
    rows = 40
    changes = {"generator": [""] * rows, "is_distorted": [None] * rows, "distortions": ["[]"] * rows}
    predictions = make_split(tmp_path, "val", rows=rows, experts=["only"], changes=changes)
    page = read_page(run(tmp_path / "out", predictions)[0])
    assert titles(page) == ["Metrics", "ROC curves", "Scores", "Reliability", "Most confident errors"]
    assert not page.all("section", id="sweep")
    assert {path["class"] for path in card(page, "ROC curves").all("path") if "line" in path["class"]} == {
        "line all"
    }


def test_with_one_class_or_logits_the_page_shows_what_is_defined(tmp_path):
    predictions = make_split(tmp_path, "val", rows=40, experts=["a", "b"], changes={"label": [1] * 40})
    page = read_page(run(tmp_path / "out", predictions)[0])
    assert titles(page) == ["Metrics", "Scores", "Reliability", "Experts", "Most confident errors"]
    assert "No errors at 0.5" in card(page, "Most confident errors").text()
    logits = tmp_path / "logits.csv"
    frame = evaluation.load_splits([str(make_split(tmp_path, "val", rows=40))])[0].frame
    lines = (f"{name},{8 * score - 4!r}" for name, score in zip(frame["name"], frame["score"], strict=True))
    logits.write_text("image_name,score\n" + "\n".join(lines) + "\n")
    page = read_page(run(tmp_path / "out", logits, more=["--labels", str(tmp_path / "val_manifest.csv")])[0])
    assert titles(page)[:2] == ["Metrics", "ROC curves"] and "Reliability" not in titles(page)
    assert "Most confident errors" not in titles(page) and "Generators" in titles(page)


def test_no_card_is_empty_and_no_heading_level_is_skipped(made):
    _, page, _ = made
    for one in page.all(class_="card"):
        assert one.all("table") or one.all("svg") or one.all("img")
    levels = [int(node.tag[1]) for node in page.all() if re.fullmatch("h[1-6]", node.tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_the_page_is_accessible_to_screen_readers(made):
    _, page, _ = made
    identities = [node["id"] for node in page.all() if node["id"]]
    assert len(identities) == len(set(identities))
    assert page.all("html")[0]["lang"] == "en" and page.all("title")[0].text() == "Evaluation: val, val_hard"
    by_identity = {node["id"]: node for node in page.all() if node["id"]}
    for link in page.all("a"):
        assert link["href"].removeprefix("#") in by_identity
    drawings = page.all("svg")
    assert len(drawings) > 15
    for drawing in drawings:
        assert drawing["role"] == "img"
        title, description = (by_identity[own] for own in drawing["aria-labelledby"].split())
        assert (title.tag, description.tag) == ("title", "desc") and title.text() and description.text()
    assert all(image["alt"] for image in page.all("img"))
    for table in page.all("table"):
        assert table.all("caption")[0].text() and all(cell["scope"] for cell in table.all("th"))
    regions = page.all("div", class_="scroll")
    assert len(regions) == len(page.all("table"))
    assert all(one["tabindex"] == "0" and one["aria-label"] and one["role"] == "region" for one in regions)
    for box in page.all("input"):
        assert any(label["for"] == box["id"] for label in page.all("label"))
    # A drawing has its data as a table in its own card.
    for one in page.all(class_="card"):
        assert len(one.all("details")) >= min(len(one.all("svg")), 1)


def test_a_large_split_with_pictures_stays_below_6_mb(tmp_path):
    rows = 12_500
    images = []
    for place in range(4):
        # Noise is what a JPEG can least make small.
        noise = np.random.default_rng(place).integers(0, 256, (300, 300, 3), dtype=np.uint8)
        images.append(str(tmp_path / f"noise_{place}.png"))
        cv2.imwrite(images[-1], noise)
    changes = {"image": [images[row % 4] for row in range(rows)]}
    predictions = make_split(tmp_path, "val", rows=rows, changes=changes)
    splits = evaluation.load_splits([str(predictions)])
    found = evaluation.score_split(splits[0])
    lost = report.write_report(tmp_path / "report.html", {"splits": {"val": found}}, splits, gallery=50)
    assert not lost
    assert len(read_page(tmp_path / "report.html").all("img")) == 100
    assert (tmp_path / "report.html").stat().st_size < 6_000_000
