"""`evaluate.py protocol` on trees in the layouts of both benchmarks, against values counted by hand."""

import csv
import json
import re

import pytest
from image_trees import rows_of, write_tree
from sklearn.metrics import average_precision_score

import evaluate
from data_prep import genimage, universalfakedetect
from data_prep.duplicates.keep_once import SET_SEPARATOR
from featdistill.command_line import UserError
from featdistill.evaluation import protocols
from featdistill.records.manifest import make_manifest, write_manifest
from featdistill.records.predictions import manifest_entry, write_predictions

INNER = {
    "Midjourney": "imagenet_midjourney",
    "stable_diffusion_v_1_4": "imagenet_ai_0419_sdv4",
    "stable_diffusion_v_1_5": "imagenet_ai_0424_sdv5",
    "ADM": "imagenet_ai_0508_adm",
    "glide": "imagenet_glide",
    "wukong": "imagenet_ai_0424_wukong",
    "VQDM": "imagenet_ai_0419_vqdm",
    "BigGAN": "imagenet_ai_0419_biggan",
}
GENIMAGE_ORDER = ["Midjourney", "SD v1.4", "SD v1.5", "ADM", "GLIDE", "Wukong", "VQDM", "BigGAN"]
UFD_ORDER = [
    *("progan", "cyclegan", "biggan", "stylegan", "gaugan", "stargan", "deepfake", "seeingdark", "san"),
    *("crn", "imle", "guided", "ldm_200", "ldm_200_cfg", "ldm_100", "glide_100_27", "glide_50_27"),
    *("glide_100_10", "dalle"),
]
# Two real images right, two AI-generated ones of which one is missed and ranks between the real ones.
REAL, AI = (0.4, 0.2), (0.9, 0.3)
# By descending score the AI-generated ones stand at places 1 and 3.
AP = (1 / 1 + 2 / 3) / 2


def genimage_scores(generators=INNER, part="val"):
    """Return the score of each image by its path."""
    return {
        f"{name}/{INNER[name]}/{part}/{folder}/{name}_{place}.png": value
        for name in generators
        for folder, values in (("nature", REAL), ("ai", AI))
        for place, value in enumerate(values)
    }


def prepare(folder, module, scores):
    """Write a tree and its manifest; return the manifest's path and the names of the images by path."""
    rows = rows_of(module, write_tree(folder / "data", {path: i for i, path in enumerate(scores)}))
    return folder / "out" / "m.csv", dict(zip(rows.index, rows["name"], strict=True))


def predict(path, manifest, scores, errors=()):
    """Write predictions, with the manifest in the sidecar."""
    sidecar = {"manifest": manifest_entry(manifest, path)}
    write_predictions(path, list(scores), list(scores.values()), {}, sidecar, errors)
    return str(path)


def evaluate_protocol(out, name, *predictions, labels=()):
    flags = ["--labels", *map(str, labels)] if labels else []
    arguments = ["protocol", name, "--predictions", *predictions, *flags, "--out", str(out)]
    assert evaluate.main(arguments) == 0
    return json.loads((out / "protocol.json").read_text())


@pytest.fixture
def whole(tmp_path):
    """GenImage with all eight generators, its scores by path, and predictions of it."""
    scores = genimage_scores()
    # A generator that is told apart without a fault, and one whose real images are all flagged.
    for path in scores:
        if path.startswith("ADM"):
            scores[path] = 0.8 if "/ai/" in path else 0.1
        elif path.startswith("BigGAN") and "/nature/" in path:
            scores[path] = 0.95
    manifest, names = prepare(tmp_path, genimage, scores)
    by_name = {names[path]: value for path, value in scores.items()}
    return manifest, by_name, predict(tmp_path / "p.csv", manifest, by_name)


def test_genimage_is_a_row_a_generator_against_its_own_photographs_in_the_table_s_order(tmp_path, whole):
    found = evaluate_protocol(tmp_path / "scores", "genimage", whole[2])
    assert [row["name"] for row in found["sets"]] == GENIMAGE_ORDER
    rows = {row.pop("name"): row for row in found["sets"]}
    common = {"real": 2, "ai": 2, "unreadable": 0, "missing": None}
    usual = {
        **{"accuracy": 0.75, "real_accuracy": 1.0, "ai_accuracy": 0.5},
        **{"average_precision": pytest.approx(AP), "auc": 0.75, **common},
    }
    perfect = dict.fromkeys(protocols.METRICS, 1.0) | common
    # All flagged: the AI-generated images rank 3rd and 4th.
    flagged = {
        **{"accuracy": 0.25, "real_accuracy": 0.0, "ai_accuracy": 0.5},
        **{"average_precision": pytest.approx((1 / 3 + 2 / 4) / 2), "auc": 0.0, **common},
    }
    special = {"ADM": perfect, "BigGAN": flagged}
    assert rows == {name: special.get(name, usual) for name in GENIMAGE_ORDER}
    assert found["mean"] == {
        **{"sets": 8, "of": 8},
        "accuracy": pytest.approx((6 * 0.75 + 1 + 0.25) / 8),
        "average_precision": pytest.approx((6 * AP + 1 + 5 / 12) / 8),
        "real_accuracy": pytest.approx(7 / 8),
        "ai_accuracy": pytest.approx((7 * 0.5 + 1) / 8),
        "auc": pytest.approx((6 * 0.75 + 1) / 8),
    }
    assert (found["images"], found["left_out"], found["threshold"]) == (32, {}, 0.5)


def test_the_published_average_is_marked_as_not_ours(tmp_path, capsys, whole):
    capsys.readouterr()
    found = evaluate_protocol(tmp_path / "scores", "genimage", whole[2])
    note = "published by the paper, not reproduced here"
    assert found["published"] == [
        {"method": "MPFT", "accuracy": 0.982, "source": "arXiv 2601.03586", "note": note}
    ]
    text = capsys.readouterr().out
    assert text == (tmp_path / "scores" / "protocol.md").read_text()
    assert re.search(rf"\| MPFT \({note}\) .*\| +0\.982 \|", text)
    assert re.search(r"\| mean of 8 of 8 sets .*\| +0\.7188 \|", text)
    rows = list(csv.DictReader((tmp_path / "scores" / "protocol.csv").open()))
    assert [row["name"] for row in rows] == [*GENIMAGE_ORDER, "mean", "MPFT"]
    assert [row["kind"] for row in rows] == [*["set"] * 8, "mean", "published"]
    assert (rows[-1]["accuracy"], rows[-1]["auc"]) == ("0.982", "") and note in rows[-1]["note"]
    assert float(rows[0]["average_precision"]) == pytest.approx(AP)
    assert protocols.PROTOCOLS["universalfakedetect"].published[0][1] == 0.946


def test_repetition_gives_the_same_bytes(tmp_path, whole):
    for out in ("a", "b"):
        evaluate_protocol(tmp_path / out, "genimage", whole[2])
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["protocol.csv", "protocol.json", "protocol.md"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_set_without_predictions_is_missing_and_not_in_the_mean(tmp_path, capsys, whole):
    manifest, scores, _ = whole
    kept = {
        name: value
        for name, value in scores.items()
        if not name.startswith("VQDM") and (not name.startswith("wukong") or value in AI)
    }
    found = evaluate_protocol(tmp_path / "scores", "genimage", predict(tmp_path / "q.csv", manifest, kept))
    missing = {row["name"]: row["missing"] for row in found["sets"] if row["missing"]}
    assert missing == {
        "Wukong": "no scores of real images",
        "VQDM": "no scores of real and AI-generated images",
    }
    assert (found["mean"]["sets"], found["mean"]["of"]) == (6, 8)
    assert found["mean"]["accuracy"] == pytest.approx((4 * 0.75 + 1 + 0.25) / 6)
    text = capsys.readouterr().out
    assert re.search(r"\| VQDM +\| +0 \| +0 \| missing \|", text) and "mean of 6 of 8 sets" in text
    assert "- missing, no scores of real images: Wukong\n" in text
    assert "its mean is over the whole benchmark, this run's over 6" in text


def test_a_set_of_which_some_images_have_no_prediction_is_refused(tmp_path, whole):
    manifest, scores, _ = whole
    lost = next(name for name in scores if name.startswith("glide"))
    kept = {name: value for name, value in scores.items() if name != lost}
    path = predict(tmp_path / "q.csv", manifest, kept)
    with pytest.raises(UserError, match=re.escape(f"images without a prediction (1): {lost}")):
        evaluate_protocol(tmp_path / "scores", "genimage", path)


def test_unreadable_images_are_counted(tmp_path, capsys, whole):
    manifest, scores, _ = whole
    lost = next(name for name, value in scores.items() if name.startswith("glide") and value == 0.3)
    kept = {name: value for name, value in scores.items() if name != lost}
    path = predict(tmp_path / "q.csv", manifest, kept, errors=[(lost, "truncated")])
    found = evaluate_protocol(tmp_path / "scores", "genimage", path)
    row = found["sets"][GENIMAGE_ORDER.index("GLIDE")]
    assert (row["ai"], row["unreadable"], row["accuracy"], found["unreadable"]) == (1, 1, 1.0, 1)
    assert "unreadable images, left out: 1 (GLIDE 1)" in capsys.readouterr().out


def test_predictions_may_come_in_several_files_but_each_image_once(tmp_path, whole):
    manifest, scores, together = whole
    parts = [
        predict(
            tmp_path / f"{state}.csv", manifest, {n: v for n, v in scores.items() if ("/ai/" in n) == state}
        )
        for state in (True, False)
    ]
    whole_result = evaluate_protocol(tmp_path / "a", "genimage", together)
    assert evaluate_protocol(tmp_path / "b", "genimage", *parts, labels=[manifest]) == whole_result
    with pytest.raises(UserError, match=r"images that another file has scores of \(\d+\)"):
        evaluate_protocol(tmp_path / "c", "genimage", together, parts[0])
    again = tmp_path / "out" / "again.csv"
    again.write_bytes(manifest.read_bytes())
    with pytest.raises(UserError, match=r"Midjourney: image .* has two scores, from two manifests"):
        evaluate_protocol(tmp_path / "d", "genimage", together, predict(tmp_path / "q.csv", again, scores))


def test_genimage_s_training_images_are_left_out(tmp_path, capsys):
    scores = genimage_scores(["glide"]) | dict.fromkeys(genimage_scores(["glide", "ADM"], "train"), 0.5)
    manifest, names = prepare(tmp_path, genimage, scores)
    path = predict(tmp_path / "p.csv", manifest, {names[path]: value for path, value in scores.items()})
    found = evaluate_protocol(tmp_path / "scores", "genimage", path)
    assert (found["training"], found["images"], found["mean"]["sets"]) == (8, 4, 1)
    assert found["mean"]["accuracy"] == 0.75
    assert "training images, left out: 8" in capsys.readouterr().out


UFD = {
    "CNN_synth_testset/progan/train/0_real/5.png": 0.1,
    "CNN_synth_testset/progan/train/1_fake/5.png": 0.6,
    "CNN_synth_testset/progan/cat/0_real/6.png": 0.7,
    "CNN_synth_testset/crn/0_real/5.png": 0.2,
    "CNN_synth_testset/crn/1_fake/5.png": 0.9,
    "CNN_synth_testset/imle/1_fake/5.png": 0.1,
    "CNN_synth_testset/stylegan2/car/1_fake/5.png": 0.9,
    "CNN_synth_testset/stylegan2/car/0_real/5.png": 0.9,
    "diffusion_datasets/imagenet/0_real/5.png": 0.8,
    "diffusion_datasets/guided/1_fake/5.png": 0.7,
    "diffusion_datasets/laion/0_real/5.png": 0.3,
    "diffusion_datasets/laion/6.png": 0.6,
    "diffusion_datasets/ldm_200_cfg/5.png": 0.7,
    "diffusion_datasets/dalle/1_fake/5.png": 0.4,
    "diffusion_datasets/dalle/1_fake/6.png": 0.2,
}


def test_universalfakedetect_s_shared_photographs_count_in_every_set_that_they_serve(tmp_path, capsys):
    folder = tmp_path / "data"
    # IMLE's photographs are those of CRN, byte for byte; the manifest has them once.
    files = {path: i for i, path in enumerate(UFD)}
    files["CNN_synth_testset/imle/0_real/5.png"] = files["CNN_synth_testset/crn/0_real/5.png"]
    rows = rows_of(universalfakedetect, write_tree(folder, files))
    assert len(rows) == len(UFD)
    scores = {name: UFD[path] for path, name in zip(rows.index, rows["name"], strict=True)}
    path = predict(tmp_path / "p.csv", tmp_path / "out" / "m.csv", scores)
    found = evaluate_protocol(tmp_path / "scores", "universalfakedetect", path)
    assert [row["name"] for row in found["sets"]] == UFD_ORDER
    there = {row["name"]: row for row in found["sets"] if not row["missing"]}
    # real, AI, accuracy, real accuracy, AI accuracy, AUC
    expected = {
        "progan": (2, 1, 2 / 3, 0.5, 1.0, 0.5),
        "crn": (1, 1, 1.0, 1.0, 1.0, 1.0),
        "imle": (1, 1, 0.5, 1.0, 0.0, 0.0),
        "guided": (1, 1, 0.5, 0.0, 1.0, 0.0),
        "ldm_200_cfg": (2, 1, 2 / 3, 0.5, 1.0, 1.0),
        "dalle": (2, 2, 1 / 4, 0.5, 0.0, 0.25),
    }
    keys = ("real", "ai", "accuracy", "real_accuracy", "ai_accuracy", "auc")
    assert {name: tuple(row[key] for key in keys) for name, row in there.items()} == {
        name: pytest.approx(values) for name, values in expected.items()
    }
    dalle = average_precision_score([0, 0, 1, 1], [0.3, 0.6, 0.4, 0.2])
    assert there["dalle"]["average_precision"] == pytest.approx(dalle)
    assert {row["missing"] for row in found["sets"] if row["name"] in ("ldm_200", "glide_50_27")} == {
        "no scores of AI-generated images"
    }
    assert (found["mean"]["sets"], found["mean"]["of"], found["images"]) == (6, 19, 13)
    assert found["mean"]["accuracy"] == pytest.approx(sum(row[2] for row in expected.values()) / 6)
    # ForenSynths' further sets are not of the 19.
    assert found["left_out"] == {"": 1, "stylegan2": 1}
    assert "left out: images of (no name) 1, stylegan2 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("protocol", "names"),
    [
        ("genimage", [*genimage.ALIASES, *(alias for own in genimage.ALIASES.values() for alias in own)]),
        ("universalfakedetect", [*universalfakedetect.FORENSYNTHS, *universalfakedetect.REALS_OF]),
    ],
)
def test_every_name_that_the_manifests_have_is_a_set_s_name_in_any_case_and_punctuation(protocol, names):
    known = protocols.PROTOCOLS[protocol]
    names = [name for name in names if not name.startswith("imagenet_")]
    matched = {name: protocols.match_set(name, known) for name in names}
    assert set(matched.values()) == set(known.sets)
    assert protocols._SEPARATOR == SET_SEPARATOR
    for name, title in matched.items():
        if protocol == "genimage":
            own = genimage.GENERATORS[name.casefold()]
            assert title == GENIMAGE_ORDER[list(INNER).index(own)]
        else:
            assert title == name
        assert protocols.match_set(f" {name.upper().replace('_', '-')}. ", known) == title
    assert protocols.match_set("DALL-E 3", known) is None
    assert protocols.match_set("", known) is None


def table(folder, cells, **columns):
    """Write a manifest with these cells of `protocol_sets`, labels 0 and 1 in turn, and predictions."""
    names = [f"{i}.png" for i in range(len(cells))]
    label = [i % 2 for i in range(len(cells))]
    rows = {"image": names, "name": names, "label": label, "protocol_sets": cells, **columns}
    write_manifest(make_manifest(rows), folder / "m.csv")
    return predict(folder / "p.csv", folder / "m.csv", dict.fromkeys(names, 0.4))


def test_an_unknown_generator_is_named_and_an_image_without_a_cell_goes_by_its_generator(tmp_path):
    path = table(
        tmp_path,
        ["adm;DALLE2", "", "adm", "Mystery", "adm", "Sd-V1.4", ""],
        generator=["", "ADM", "", "", "", "", "Wukong"],
    )
    found = evaluate_protocol(tmp_path / "scores", "genimage", path)
    there = {row["name"]: (row["real"], row["ai"]) for row in found["sets"] if row["real"] + row["ai"]}
    assert there == {"ADM": (3, 1), "SD v1.4": (0, 1)}
    assert found["left_out"] == {"": 1, "Mystery": 1, "DALLE2": 1}
    assert (found["mean"]["sets"], found["mean"]["accuracy"], found["images"]) == (1, 0.75, 4)


def test_images_without_a_label_are_counted_and_left_out(tmp_path):
    path = table(tmp_path, ["ADM"] * 3, label=[0, 1, None])
    found = evaluate_protocol(tmp_path / "scores", "genimage", path)
    assert (found["unlabeled"], found["images"]) == (1, 2)


def test_scores_that_are_no_probabilities_have_no_accuracy(tmp_path, capsys):
    table(tmp_path, ["ADM"] * 4)
    scores = {f"{i}.png": value for i, value in enumerate((-3.0, 2.0, 1.0, 0.5))}
    path = predict(tmp_path / "p.csv", tmp_path / "m.csv", scores)
    found = evaluate_protocol(tmp_path / "scores", "genimage", path)
    assert (found["mean"]["accuracy"], found["mean"]["auc"]) == (None, 0.75)
    assert "accuracies n/a: scores are outside [0, 1]" in capsys.readouterr().out


def test_what_a_user_can_get_wrong_is_one_line(tmp_path):
    path = table(tmp_path, ["Mystery"] * 2)
    cases = [
        (
            ["--protocol", "genimages", "--predictions", path],
            "unknown protocol 'genimages' (did you mean genim",
        ),
        (["protocol", "genimage", "--predictions", path, "--leaderboard"], "unknown argument --leaderboard"),
        (["--protocol", "genimage", "--compare", path, path], "unknown argument --protocol"),
        (["protocol", "genimage", "--predictions", path], "the labels name Mystery"),
        (["protocol", "genimage", "--predictions", path, "--labels", "a", "b"], "2 label files for 1"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=re.escape(message)):
            evaluate.main([*arguments, "--out", str(tmp_path / "scores")])
    write_manifest(make_manifest({"image": ["a"], "name": ["0.png"], "label": [1]}), tmp_path / "m.csv")
    with pytest.raises(UserError, match="has no column protocol_sets"):
        evaluate_protocol(tmp_path / "scores", "genimage", path, labels=[tmp_path / "m.csv"])
    assert not (tmp_path / "scores").exists()
