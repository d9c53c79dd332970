"""Whether an output is new, unfinished, finished, or of other settings."""

import pytest

from featdistill.command_line import UserError
from featdistill.records.provenance import Claim, claim, differences, read_record

MADE_FROM = {"experts": {"clip": "a" * 64}, "preprocessing": {"size": 224}, "sizes": [1, 2]}


def test_an_output_is_new_unfinished_or_finished():
    assert claim("val.csv", None, MADE_FROM) is Claim.NEW
    assert claim("val.csv", MADE_FROM, MADE_FROM, finished=False) is Claim.UNFINISHED
    assert claim("val.csv", MADE_FROM, {**MADE_FROM, "sizes": (1, 2)}) is Claim.FINISHED
    other = {**MADE_FROM, "preprocessing": {"size": 336}}
    assert claim("val.csv", MADE_FROM, other, ignore=["preprocessing.size"]) is Claim.FINISHED


def test_an_output_of_other_settings_or_of_someone_else_is_refused():
    new = {"experts": {"dino": "b" * 64}, "preprocessing": {"size": 336}, "sizes": [1, 2]}
    with pytest.raises(UserError) as refused:
        claim("val.csv", MADE_FROM, new)
    assert str(refused.value) == (
        'val.csv was produced with different settings: experts.clip was "aaaaaaaaaaaa...", is absent; '
        'preprocessing.size was 224, is 336; experts.dino was absent, is "bbbbbbbbbbbb..."; '
        "choose another --out, or remove it"
    )
    with pytest.raises(UserError, match="2 was absent, is 2; and 2 more; rename it"):
        claim("x", {"0": 0}, {str(key): key for key in range(1, 5)} | {"0": 9}, remedy="rename it")
    with pytest.raises(UserError, match="already exists and was not written by this command"):
        claim("val.csv", None, MADE_FROM, occupied=True)


def test_a_moved_file_is_the_same_and_a_changed_one_is_not():
    old = {"data": [{"path": "a.csv", "sha256": "1"}], "manifest": {"path": "a.csv", "sha256": "1"}}
    moved = {"data": [{"path": "b.csv", "sha256": "1"}], "manifest": {"path": "b.csv", "sha256": "1"}}
    assert differences(old, moved) == []
    changed = {"data": [{"path": "a.csv", "sha256": "2"}], "manifest": {"path": "b.csv", "sha256": "1"}}
    assert differences(old, changed) == ['data.0.sha256 was "1", is "2"']


def test_a_record_is_a_json_object(tmp_path):
    path = tmp_path / "record.json"
    assert read_record(path) is None
    path.write_text('{"a": 1}')
    assert read_record(path) == {"a": 1}
    for content in ("{", "[1]"):
        path.write_text(content)
        with pytest.raises(UserError, match=r"record\.json .* remove it and run the command again"):
            read_record(path)
