"""How a submission differs from the previous one: figures calculated by hand, and which one that is."""

import shutil

import numpy as np
import pytest
from submission_folders import ROWS, make, names_of, rewrite, scores_of, submission_folder, zipped

import make_submission
from featdistill.atomic import sha256_of
from featdistill.submission.check import CheckedFile, check_submission
from featdistill.submission.difference import differences
from featdistill.submission.profiles import PROFILES

folder = submission_folder
NO_SUBMISSION = "0" * 64


def checked(slot, names, score):
    return CheckedFile("any.csv", slot, list(names), np.array(score, dtype=float), "")


def submit(folder, score, out="submission.zip", profile="test", slot="test"):
    rewrite(folder, slot, names_of(slot), score)
    make(folder, profile, "--date", "2026-03-01", slots=(slot,), out=out)


def compare(folder, *files, sha256=NO_SUBMISSION):
    """Return the rows of `differences` in a folder's ledger."""
    return list(differences(folder / "submissions.csv", files, sha256).itertuples())


def last_of(folder, slot="test", score=None):
    return compare(folder, checked(slot, names_of(slot), scores_of(slot) if score is None else score))


def test_the_figures_equal_those_calculated_by_hand(folder):
    submit(folder, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    # Ranks 1 .. 9 with the first two exchanged: 1 - 6 * 2 / (9 * 80). At 0.5 an image is not above it.
    (found,) = last_of(folder, score=[0.2, 0.1, 0.3, 0.4, 0.55, 0.6, 0.7, 0.8, 0.9])
    assert found.rank_correlation == pytest.approx(1 - 12 / 720, abs=1e-12)
    assert found.mean_absolute == pytest.approx(0.25 / 9, abs=1e-12)
    assert found.changed_sides == pytest.approx(1 / 9, abs=1e-12)
    assert (found.slot, found.images) == ("test", 9)
    assert (found.file, found.date) == ("submission.zip", "2026-03-01T00:00:00Z")


def test_ties_share_their_mean_rank(folder):
    def ranks(values):
        return [
            sum(other < one for other in values) + sum(other == one for other in values) / 2 for one in values
        ]

    old, new = np.random.default_rng(0).integers(0, 4, (2, ROWS["test"])) / 4
    submit(folder, old)
    (found,) = last_of(folder, score=new)
    first, second = (np.array(ranks(score.tolist())) for score in (new, old))
    centred = first - first.mean(), second - second.mean()
    expected = (centred[0] * centred[1]).sum() / np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    assert found.rank_correlation == pytest.approx(expected, abs=1e-12)


def test_scores_are_matched_by_name_whatever_the_order_and_extension(folder):
    submit(folder, scores_of("test"), profile="test-card")
    names, score = names_of("test")[::-1], scores_of("test")[::-1]
    (found,) = compare(folder, checked("test", names, score))
    assert found.mean_absolute == 0 and found.rank_correlation == pytest.approx(1)


def test_only_shared_images_are_compared(folder):
    submit(folder, scores_of("test"))
    names, score = names_of("test"), scores_of("test")
    some = checked("test", ["new.jpg", *names[:4]], [0.5, *score[:4]])
    (found,) = compare(folder, some)
    assert found.images == 4 and found.mean_absolute == 0
    other = checked("test", ["x.jpg", "y.jpg"], [0.1, 0.2])
    assert compare(folder, other) == []


def test_a_constant_has_no_rank_correlation(folder):
    submit(folder, scores_of("test"))
    same = checked("test", names_of("test")[:2], [0.5, 0.5])
    (found,) = compare(folder, same)
    assert np.isnan(found.rank_correlation)


def test_the_previous_submission_is_the_latest_of_the_slot_with_an_unchanged_zip(folder):
    submit(folder, scores_of("test"), "a.zip")
    submit(folder, scores_of("test") ** 2, "b.zip")
    submit(folder, scores_of("test") ** 3, "c.zip")
    make(folder, "val", slots=("val", "val_hard"), out="d.zip")
    assert [found.file for found in last_of(folder)] == ["c.zip"]
    assert [found.file for found in last_of(folder, "val")] == ["d.zip"]
    (folder / "c.zip").unlink()
    assert [found.file for found in last_of(folder)] == ["b.zip"]
    shutil.copy(folder / "d.zip", folder / "b.zip")
    assert [found.file for found in last_of(folder)] == ["a.zip"]


def test_each_slot_is_compared_with_its_own_previous_submission(folder):
    make(folder, "val", slots=("val", "val_hard"), out="a.zip")
    submit(folder, scores_of("test"), "b.zip")
    files = [checked(slot, names_of(slot), scores_of(slot)) for slot in ("test", "val_hard", "val")]
    found = compare(folder, *files)
    assert [(one.slot, one.file) for one in found] == [
        ("test", "b.zip"),
        ("val_hard", "a.zip"),
        ("val", "a.zip"),
    ]


def test_a_submission_is_not_compared_with_itself(folder):
    submit(folder, scores_of("test"), "a.zip")
    submit(folder, scores_of("test") ** 2, "b.zip")
    files = check_submission(folder / "b.zip", PROFILES["test"])
    found = compare(folder, *files, sha256=sha256_of(folder / "b.zip"))
    assert [one.file for one in found] == ["a.zip"]


def test_the_comparison_includes_the_zip_that_is_overwritten(folder, capsys):
    submit(folder, scores_of("test"))
    assert "No other submission" in capsys.readouterr().out
    submit(folder, scores_of("test")[::-1])
    shown = capsys.readouterr().out
    row = "test 9 -1.0000 0.4938 88.9 % 2026-03-01T00:00:00Z submission.zip"
    assert row in " ".join(shown.split())


def test_a_check_compares_with_the_previous_submission_and_lists_nothing(folder, capsys):
    submit(folder, scores_of("test"))
    before = (folder / "submissions.csv").read_bytes()
    rows = "".join(
        f"{name},{1 - score}\n" for name, score in zip(names_of("test"), scores_of("test"), strict=True)
    )
    zipped(folder / "theirs.zip", [("submission_hard.csv", "image_name,score\n" + rows)])
    check = ["--check", str(folder / "theirs.zip"), "--profile", "test"]
    capsys.readouterr()
    assert make_submission.main(check) == 0
    assert "-1.0000" in capsys.readouterr().out
    assert make_submission.main([*check, "--no-ledger"]) == 0
    assert "previous submission" not in capsys.readouterr().out
    assert (folder / "submissions.csv").read_bytes() == before
    (folder / "submissions.csv").write_text("name,score\n")
    assert make_submission.main(check) == 0
    assert "warning: not compared with the previous submission: " in capsys.readouterr().err
