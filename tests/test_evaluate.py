"""`evaluate.py` from files to tables: matching of names, official metrics, label files of every kind."""

import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import evaluate
from featdistill.command_line import UserError
from featdistill.manifest import make_manifest, write_manifest
from featdistill.predictions import manifest_entry, write_predictions

ROWS = 40


class Split:
    """A made-up split: predictions of two experts, its labels as a manifest and as an official file."""

    def __init__(self, folder, name, seed=0):
        rng = np.random.default_rng(seed)
        self.folder, self.name = folder, name
        self.names = [f"{seed:x}{number:019x}.jpg" for number in range(ROWS)]
        self.label = rng.permutation(np.arange(ROWS) % 2)
        self.is_distorted = np.arange(ROWS) % 4 // 2
        self.score = np.round(0.4 * self.label + 0.6 * rng.random(ROWS), 3)
        pool = np.array(["jpeg", "downscale", "gausblur"])
        self.chains = [
            rng.permutation(pool)[: rng.integers(1, 4)].tolist() if state else []
            for state in self.is_distorted
        ]
        self.generator = [
            "" if not ai else ("flux", "sdxl")[row % 3 == 0] for row, ai in enumerate(self.label)
        ]
        self.path, self.manifest = folder / f"{name}.csv", folder / f"{name}_manifest.csv"
        self.write_manifest()
        self.write_predictions()

    def write_manifest(self, **changes):
        columns = {
            "image": self.names,
            "name": self.names,
            "label": self.label.tolist(),
            "generator": self.generator,
            "is_distorted": self.is_distorted.tolist(),
            "distortions": [json.dumps([[name, 2.0] for name in chain]) for chain in self.chains],
        }
        write_manifest(make_manifest({**columns, **changes}), self.manifest)

    def write_predictions(self, keep=slice(None), errors=()):
        names = np.array(self.names, dtype=object)[keep].tolist()
        experts = {"clip": self.score[keep] ** 2, "dino": np.roll(self.score, 1)[keep]}
        sidecar = {"manifest": manifest_entry(self.manifest, self.path)}
        write_predictions(self.path, names, self.score[keep], experts, sidecar, errors)

    def official_labels(self, mark="", index=False, extension=True, columns=5):
        header = ["image_name", "label", "distortions", "distortion_scales", "is_distorted"][:columns]
        lines = [([""] if index else []) + header]
        for row, name in enumerate(self.names):
            chain = self.chains[row]
            cells = [
                name if extension else name.removesuffix(".jpg"),
                str(self.label[row]),
                f'"{chain}"' if chain else ("", "[]")[row % 2],
                f'"{[2] * len(chain)}"' if chain else "",
                str(self.is_distorted[row]),
            ][:columns]
            lines.append(([str(row)] if index else []) + cells)
        path = self.folder / f"{self.name}_labels.csv"
        path.write_bytes((mark + "\r\n".join(",".join(line) for line in lines) + "\r\n").encode())
        return path

    def auc(self, rows):
        return roc_auc_score(self.label[rows], self.score[rows])


@pytest.fixture
def val(tmp_path):
    return Split(tmp_path, "val")


@pytest.fixture
def val_hard(tmp_path):
    return Split(tmp_path, "val_hard", seed=1)


def run(out, *splits, labels=()):
    flags = ["--labels", *map(str, labels)] if labels else []
    assert (
        evaluate.main(["--predictions", *(str(split.path) for split in splits), *flags, "--out", str(out)])
        == 0
    )
    return json.loads((out / "metrics.json").read_text())


def test_the_challenges_metrics_stand_at_the_top_by_their_names(tmp_path, val, val_hard):
    found = run(tmp_path / "out", val, val_hard)
    assert list(found) == ["clean_auc", "robust_auc", "clean_hard_auc", "robust_hard_auc", "splits"]
    assert found["clean_auc"] == val.auc(val.is_distorted == 0)
    assert found["robust_auc"] == val.auc(val.is_distorted == 1)
    assert found["clean_hard_auc"] == val_hard.auc(val_hard.is_distorted == 0)
    assert found["robust_hard_auc"] == val_hard.auc(val_hard.is_distorted == 1)


def test_all_else_is_nested_by_split(tmp_path, val):
    found = run(tmp_path / "out", val)["splits"]["val"]
    assert found["images"] == ROWS and found["undefined"] == {}
    assert set(found["experts"]["experts"]) == {"clip", "dino"}
    # A monotone function of the score has the score's ranks.
    assert found["experts"]["experts"]["clip"] == found["experts"]["ensemble"]
    own = np.array([name == "flux" for name in val.generator])
    assert found["generators"]["flux"] == {"auc": val.auc(own | (val.label == 0)), "n": int(own.sum())}
    rows = np.array(["jpeg" in chain for chain in val.chains])
    assert found["distortions"]["jpeg"] == {"auc": val.auc(rows), "n": int(rows.sum())}
    assert found["chain_lengths"]["0"] == {"auc": val.auc(val.is_distorted == 0), "n": ROWS // 2}
    assert sum(group["n"] for group in found["chain_lengths"].values()) == ROWS


def test_repetition_gives_the_same_bytes(tmp_path, val, val_hard):
    for out in ("a", "b"):
        run(tmp_path / out, val, val_hard)
    for file in ("metrics.json", "metrics.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"metrics.json", "metrics.md"}


def test_what_is_printed_is_what_is_written(tmp_path, val, capsys):
    run(tmp_path / "out", val)
    shown = capsys.readouterr().out
    assert (tmp_path / "out" / "metrics.md").read_text() == f"# Metrics\n\n{shown}"
    lines = shown.splitlines()
    assert lines[2].split("|")[1].strip() == "split"
    assert f"{val.auc(val.is_distorted == 1):.4f}" in lines[4]
    titles = [line for line in lines if line.startswith("## ")]
    assert titles == [
        "## Splits",
        "## Experts",
        "## Generators",
        "## Distortions",
        "## Chain length",
        "## Metrics of the challenge",
    ]


def test_every_table_is_a_markdown_table_of_one_width(tmp_path, val, val_hard):
    run(tmp_path / "out", val, val_hard)
    blocks = (tmp_path / "out" / "metrics.md").read_text().split("\n\n")
    found = [block.splitlines() for block in blocks if block.startswith("|")]
    assert len(found) == 6
    for lines in found:
        assert len({(len(line), line.count("|")) for line in lines}) == 1


def test_a_split_without_generators_has_no_column_in_their_table(tmp_path, val, val_hard):
    val_hard.write_manifest(generator=[""] * ROWS)
    val_hard.write_predictions()
    run(tmp_path / "out", val, val_hard)
    text = (tmp_path / "out" / "metrics.md").read_text()
    table = text.split("## Generators\n\n")[1].split("\n\n")[0]
    assert "val AUC" in table and "val_hard AUC" not in table


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("extension", [False, True])
def test_official_label_files_give_what_the_manifest_gives(tmp_path, val, mark, index, extension):
    from_manifest = run(tmp_path / "a", val)["splits"]["val"]
    official = val.official_labels(mark, index, extension)
    from_labels = run(tmp_path / "b", val, labels=[official])["splits"]["val"]
    assert from_labels.pop("generators") == {}
    from_manifest.pop("generators")
    assert from_labels == from_manifest


def test_training_labels_know_no_distortions(tmp_path, val, capsys):
    found = run(tmp_path / "out", val, labels=[val.official_labels(index=True, columns=2)])
    assert found["clean_auc"] is None and found["robust_auc"] is None
    assert found["splits"]["val"]["auc"] == val.auc(val.label >= 0)
    shown = capsys.readouterr().out
    assert "- val: clean auc, robust auc n/a: the labels do not say which images are distorted" in shown
    assert "n/a" in shown.splitlines()[4]


@pytest.mark.parametrize(("score_column", "extension"), [("score", True), ("pred", False)])
def test_a_submission_of_either_convention_can_be_evaluated(tmp_path, val, score_column, extension):
    direct = run(tmp_path / "a", val)
    names = val.names if extension else [name.removesuffix(".jpg") for name in val.names]
    rows = [f"{name},{score}" for name, score in zip(names, val.score.tolist(), strict=True)]
    val.path.write_text("\n".join([f"image_name,{score_column}", *rows[::-1]]) + "\n")
    (tmp_path / "val.csv.json").unlink()
    found = run(tmp_path / "b", val, labels=[val.manifest])
    assert found["robust_auc"] == direct["robust_auc"]
    assert found["splits"]["val"]["generators"] == direct["splits"]["val"]["generators"]
    assert "no column of a single expert" in (tmp_path / "b" / "metrics.md").read_text()


def test_label_files_go_with_predictions_in_their_order(tmp_path, val, val_hard):
    expected = run(tmp_path / "a", val, val_hard)
    labels = [val.official_labels(), val_hard.official_labels()]
    found = run(tmp_path / "b", val, val_hard, labels=labels)
    assert found["robust_hard_auc"] == expected["robust_hard_auc"]
    with pytest.raises(UserError, match="are not in"):
        run(tmp_path / "c", val, val_hard, labels=labels[::-1])


def test_one_label_file_may_hold_several_splits(tmp_path, val, val_hard):
    expected = run(tmp_path / "a", val, val_hard)
    first, second = val.official_labels().read_text(), val_hard.official_labels().read_text()
    both = tmp_path / "both.csv"
    both.write_text(first + "".join(second.splitlines(True)[1:]))
    assert run(tmp_path / "b", val, val_hard, labels=[both])["robust_auc"] == expected["robust_auc"]
    with pytest.raises(UserError, match=r"without a prediction \(40\)"):
        run(tmp_path / "c", val, labels=[both])


def test_a_shared_label_file_does_not_hide_rows_that_one_of_two_models_lacks(tmp_path, val):
    other = Split(tmp_path, "other")
    other.write_predictions(keep=np.arange(ROWS) != 5)
    with pytest.raises(UserError, match=rf"other\.csv: images .* without a prediction \(1\): {val.names[5]}"):
        run(tmp_path / "out", val, other, labels=[val.manifest])


def test_predictions_and_labels_must_name_the_same_images(tmp_path, val):
    val.write_predictions(keep=np.arange(ROWS) >= 7)
    with pytest.raises(UserError, match=rf"without a prediction \(7\): {val.names[0]}.* and 2 more"):
        run(tmp_path / "out", val)
    val.write_predictions()
    labels = val.official_labels()
    labels.write_text("".join(labels.read_text().splitlines(True)[:-6]))
    with pytest.raises(UserError, match=rf"names that are not in .* \(6\): {val.names[-6]}.* and 1 more"):
        run(tmp_path / "out", val, labels=[labels])
    assert not (tmp_path / "out").exists()


def test_unreadable_images_are_counted_and_left_out(tmp_path, val, capsys):
    keep = ~np.isin(np.arange(ROWS), (3, 8))
    val.write_predictions(keep, errors=[(val.names[3], "truncated"), (val.names[8], "empty")])
    found = run(tmp_path / "out", val)
    assert found["robust_auc"] == val.auc(keep & (val.is_distorted == 1))
    assert found["splits"]["val"]["images"] == ROWS - 2 and found["splits"]["val"]["unreadable"] == 2
    assert "- val: unreadable images, left out: 2" in capsys.readouterr().out
    val.write_predictions(keep, errors=[(val.names[3], "truncated")])
    with pytest.raises(UserError, match=rf"without a prediction \(1\): {val.names[8]}"):
        run(tmp_path / "out", val)


def test_rows_without_a_label_are_counted_and_a_split_without_labels_is_an_error(tmp_path, val):
    val.write_manifest(label=[None, None, *val.label[2:].tolist()])
    val.write_predictions()
    found = run(tmp_path / "out", val)["splits"]["val"]
    assert found["unlabelled"] == 2 and found["images"] == ROWS - 2
    val.write_manifest(label=[None] * ROWS)
    val.write_predictions()
    with pytest.raises(UserError, match="no split has labels: val"):
        run(tmp_path / "out", val)


def test_a_split_without_labels_is_left_out_where_another_has_them(tmp_path, val, capsys):
    hard = Split(tmp_path, "val_hard", seed=3)
    hard.write_manifest(label=[None] * ROWS)
    hard.write_predictions()
    found = run(tmp_path / "out", val, hard)
    assert list(found["splits"]) == ["val"] and "val_hard is left out" in capsys.readouterr().out


def test_one_class_is_shown_as_not_defined_with_the_reason(tmp_path, val, capsys):
    val.write_manifest(label=[1] * ROWS)
    val.write_predictions()
    assert run(tmp_path / "out", val)["robust_auc"] is None
    shown = capsys.readouterr().out
    assert "n/a: all distorted images are AI-generated" in shown
    assert "0.5000" not in shown


def test_distorted_images_without_a_chain_have_no_chain_length(tmp_path, val):
    val.write_manifest(distortions=["[]"] * ROWS)
    val.write_predictions()
    assert list(run(tmp_path / "out", val)["splits"]["val"]["chain_lengths"]) == ["0"]


def test_two_splits_of_one_kind_leave_the_official_names_out(tmp_path, val, val_hard, capsys):
    others = [Split(tmp_path, name, seed) for seed, name in ((2, "public_test"), (3, "private_test"))]
    found = run(tmp_path / "out", val_hard, *others)
    assert list(found) == ["clean_hard_auc", "robust_hard_auc", "splits"]
    assert "not at the top of metrics.json: public_test, private_test" in capsys.readouterr().out
    found = run(tmp_path / "with_val", val, val_hard, *others)
    assert found["clean_auc"] == found["splits"]["val"]["clean_auc"]
    assert found["robust_hard_auc"] == found["splits"]["val_hard"]["robust_auc"]


def test_saturated_scores_keep_their_ranks(tmp_path, val):
    expected = run(tmp_path / "a", val)
    val.score = 1 - (1 - val.score) * 1e-12
    val.write_predictions()
    assert run(tmp_path / "b", val)["robust_auc"] == expected["robust_auc"]


def test_wrong_numbers_of_files_and_equal_names_are_users_errors(tmp_path, val, val_hard):
    with pytest.raises(UserError, match="2 label files for 1 predictions"):
        run(tmp_path / "out", val, labels=[val.manifest, val_hard.manifest])
    with pytest.raises(UserError, match="two predictions files are called val"):
        run(tmp_path / "out", val, val)
    (tmp_path / "val.csv.json").unlink()
    with pytest.raises(UserError, match="say with --labels"):
        run(tmp_path / "out", val)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image_name,score\na,1\n", "neither a manifest"),
        ("image_name,label\na,2\n", "label is '2'"),
        ("image_name,label\na,1\na,0\n", "names image a more than once"),
        ("image_name,label,distortions,distortion_scales\na,1,jpeg,[]\n", "'jpeg' is no list"),
        ("image_name,label,distortions,distortion_scales\na,1,__import__('os'),[]\n", "is no list"),
        ("image_name,label,distortions,distortion_scales\na,1,[3],[1]\n", "are not all names"),
        ("image_name,label,is_distorted\na,1,maybe\n", "is_distorted is 'maybe'"),
        ("image,name,label,distortions\na,a,1,jpeg\n", "no JSON list"),
        ("image,name,label\na,a,real\n", "label of a is 'real'"),
    ],
)
def test_labels_that_cannot_be_read_are_refused(tmp_path, content, message):
    path = tmp_path / "labels.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        evaluate.read_labels(path)
    with pytest.raises(UserError, match="do not exist"):
        evaluate.read_labels(tmp_path / "none.csv")
