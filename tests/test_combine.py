import pytest

from data_prep import combine
from featdistill.command_line import UserError
from featdistill.manifest import make_manifest, read_manifest, write_manifest


@pytest.fixture
def manifests(tmp_path):
    paths = []
    for name, part in (("one", ["train", "val", "train"]), ("two", ["train", "val"])):
        rows = {
            "image": [f"/photos/{name}{place}.jpg" for place in range(len(part))],
            "name": [f"{name}{place}.jpg" for place in range(len(part))],
            "label": [place % 2 for place in range(len(part))],
            "split": part,
        }
        write_manifest(make_manifest(rows), tmp_path / f"{name}.csv")
        paths.append(str(tmp_path / f"{name}.csv"))
    return paths


def test_rows_of_all_manifests_are_there_in_order_with_all_columns(manifests, tmp_path):
    out = tmp_path / "all.csv"
    assert combine.main([*manifests, "--out", str(out)]) == 0
    found = read_manifest(out)
    assert found["name"].tolist() == ["one0.jpg", "one1.jpg", "one2.jpg", "two0.jpg", "two1.jpg"]
    assert found["image"].tolist()[3] == "/photos/two0.jpg"
    assert found["split"].tolist() == ["train", "val", "train", "train", "val"]


def test_where_keeps_the_rows_that_meet_every_condition(manifests, tmp_path):
    out = tmp_path / "some.csv"
    combine.main([*manifests, "--where", "split=train", "label=0", "--out", str(out)])
    assert read_manifest(out)["name"].tolist() == ["one0.jpg", "one2.jpg", "two0.jpg"]


def test_names_that_repeat_get_the_name_of_their_manifest_in_front(manifests, tmp_path):
    out = tmp_path / "twice.csv"
    (tmp_path / "again.csv").write_text((tmp_path / "two.csv").read_text())
    combine.main([manifests[1], str(tmp_path / "again.csv"), "--out", str(out)])
    assert read_manifest(out)["name"].tolist() == [
        "two/two0.jpg",
        "two/two1.jpg",
        "again/two0.jpg",
        "again/two1.jpg",
    ]


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("splt=train", r"no manifest has a column splt \(did you mean split\?\)"),
        ("split=test", r"no row of .* is left with split=test"),
        ("split", "--where takes COLUMN=VALUE, not split"),
    ],
)
def test_a_condition_that_cannot_be_met_is_an_error(manifests, tmp_path, condition, message):
    with pytest.raises(UserError, match=message):
        combine.main([*manifests, "--where", condition, "--out", str(tmp_path / "x.csv")])
    assert not (tmp_path / "x.csv").exists()
