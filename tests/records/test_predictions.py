"""The predictions file, its sidecar and its list of unreadable images."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featdistill.command_line import UserError
from featdistill.images.formats import without_extension
from featdistill.records import predictions

NAMES = ["0a.jpg", "NA", 'b,"c".png', "d d.v2"]
SIDECAR = {"experts": {"clip": "a" * 64}, "preprocessing": {"size": 224}, "fusion": "logit mean"}


def write(path, score=(0.1, 0.2, 0.3, 0.4), sidecar=SIDECAR, errors=()):
    score = np.array(score)
    predictions.write_predictions(path, NAMES, score, {"clip": score**2}, sidecar, errors)


def test_what_is_written_reads_back_exactly(tmp_path):
    path = tmp_path / "val.csv"
    score = np.array([1 / 3, 1 - 2**-53, 1e-300, 0.1 + 0.2])
    write(path, score, errors=[("x.jpg", "OSError: truncated, badly")])
    frame = predictions.read_predictions(path)
    assert frame.columns.tolist() == ["name", "score", "clip"]
    assert frame["name"].tolist() == NAMES
    assert np.array_equal(frame["score"].to_numpy(), score)
    assert np.array_equal(frame["clip"].to_numpy(), score**2)
    assert predictions.read_sidecar(path) == SIDECAR
    assert predictions.read_errors(path) == [("x.jpg", "OSError: truncated, badly")]
    assert b"\r" not in path.read_bytes()


@given(st.lists(st.floats(0, 1), min_size=1, unique=True))
def test_scores_that_differ_still_differ_in_the_file(tmp_path_factory, score):
    path = tmp_path_factory.mktemp("scores") / "val.csv"
    names = [f"{number}.jpg" for number in range(len(score))]
    predictions.write_predictions(path, names, np.array(score), {}, SIDECAR)
    assert predictions.read_predictions(path)["score"].tolist() == score


def test_the_same_predictions_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "val.csv", errors=[("x", "y")])
    for file in ("val.csv", "val.csv.json", "val.errors.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_list_of_errors_goes_when_there_are_none(tmp_path):
    path = tmp_path / "val.csv"
    write(path, errors=[("x", "y")])
    assert (tmp_path / "val.errors.csv").is_file()
    write(path)
    assert not (tmp_path / "val.errors.csv").exists()
    assert predictions.read_errors(path) == []


def test_a_run_killed_while_writing_leaves_no_sidecar_of_other_scores(tmp_path, monkeypatch):
    path = tmp_path / "val.csv"
    write(path)

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(predictions.csv, "writer", killed)
    with pytest.raises(KeyboardInterrupt):
        write(path, sidecar={**SIDECAR, "fusion": "mean"})
    assert predictions.read_sidecar(path) is None
    assert predictions.read_predictions(path)["score"].tolist() == [0.1, 0.2, 0.3, 0.4]


def test_a_score_that_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(UserError, match="score is not a finite number for NA"):
        write(tmp_path / "val.csv", (0.1, np.nan, 0.2, 0.3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "experts"),
    [
        (["a", "a"], {}),
        (["a"], {}),
        (["a", "b"], {"name": np.zeros(2)}),
        (["a", "b"], {"score": np.zeros(2)}),
    ],
)
def test_columns_that_do_not_fit_are_not_written(tmp_path, names, experts):
    with pytest.raises(ValueError):
        predictions.write_predictions(tmp_path / "val.csv", names, np.array([0.1, 0.2]), experts, {})


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("score_column", ["score", "pred"])
@pytest.mark.parametrize("index", [None, "", "Unnamed: 0"])
def test_a_submission_of_either_convention_is_read(tmp_path, mark, line_end, score_column, index):
    rows = [["image_name", score_column], ["0a", "0.25"], ["0b", "1"]]
    if index is not None:
        rows = [[first, *row] for first, row in zip([index, "0", "1"], rows, strict=True)]
    path = tmp_path / "submission.csv"
    path.write_bytes((mark + line_end.join(",".join(row) for row in rows) + line_end).encode())
    frame = predictions.read_predictions(path)
    assert frame.columns.tolist() == ["name", "score"]
    assert frame["name"].tolist() == ["0a", "0b"]
    assert frame["score"].tolist() == [0.25, 1.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (
            b"image_name,label\na,1\n",
            "needs one score column, score or pred; its columns are image_name,label",
        ),
        (b"image,score\na,1\n", "needs one name column"),
        (b"name,image_name,score\na,a,1\n", "needs one name column"),
        (b"image_name,score,clip\na,1,1\n", "not 'clip' as well"),
        (b"name,score\na,0.1\na,0.2\n", r"repeated names \(1\): a"),
        (b"name,score\na,high\n", "column score contains 'high'"),
        (b"name,score\na,\n", "column score contains ''"),
        (b"name,score\na,nan\n", "column score contains 'nan'"),
        (b"name,score\na,inf\n", "column score contains 'inf'"),
        (b"name,score\na,1_0\n", "column score contains '1_0'"),
        (b"name,score,clip\na,0.1,x\n", "column clip contains 'x'"),
        (b"name,score\na,0.1,0.2\n", "row 1 has 3 fields"),
        (b"name,score,score\na,0.1,0.2\n", "a column appears twice"),
        (b"\xff\xfen\x00a\x00", "not a readable CSV"),
        (b'name,score\n"a,0.1\n', "not a readable CSV"),
    ],
)
def test_anything_else_is_refused_with_the_reason(tmp_path, content, message):
    path = tmp_path / "val.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        predictions.read_predictions(path)


def test_a_missing_file_and_a_broken_sidecar_are_users_errors(tmp_path):
    with pytest.raises(UserError, match="do not exist"):
        predictions.read_predictions(tmp_path / "val.csv")
    assert predictions.read_sidecar(tmp_path / "val.csv") is None
    for content in ("{", "[1]"):
        (tmp_path / "val.csv.json").write_text(content)
        with pytest.raises(UserError, match=r"val\.csv\.json"):
            predictions.read_sidecar(tmp_path / "val.csv")


@pytest.mark.parametrize(("place", "relative"), [("manifest.csv", True), ("../elsewhere.csv", False)])
def test_the_manifest_is_found_again_and_a_changed_one_refused(tmp_path, place, relative):
    path = tmp_path / "out" / "val.csv"
    path.parent.mkdir()
    manifest = path.parent / place
    manifest.write_text("image,name\na.jpg,a.jpg\n")
    entry = predictions.manifest_entry(manifest, path)
    assert entry["path"] == (place if relative else str((tmp_path / "elsewhere.csv").absolute()))
    write(path, sidecar={"manifest": entry})
    assert predictions.manifest_of(path).samefile(manifest)
    manifest.write_text("image,name\nb.jpg,b.jpg\n")
    with pytest.raises(UserError, match="has changed"):
        predictions.manifest_of(path)
    manifest.unlink()
    with pytest.raises(UserError, match="does not exist"):
        predictions.manifest_of(path)


def test_names_match_with_and_without_extension():
    known = ["a.jpg", "b", "c.jpg", "c.png", "d.v2"]
    names = ["a", "a.jpg", "b.JPG", "c.png", "c", "d.v2", "d", "e"]
    assert predictions.match_names(names, known).tolist() == [0, 0, 1, 3, -1, 4, -1, -1]
    assert predictions.match_names([], known).tolist() == []


def test_only_image_extensions_are_taken_off():
    assert [without_extension(name) for name in ("a.b.jpg", "a.v2", ".jpg", "a", "A.PNG")] == [
        "a.b",
        "a.v2",
        ".jpg",
        "a",
        "A",
    ]
