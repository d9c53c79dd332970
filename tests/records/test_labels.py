"""Labels of either kind, and predictions joined to them."""

import numpy as np
import pytest

from featdistill.command_line import UserError
from featdistill.records.labels import labeled, read_labels, source_of
from featdistill.records.manifest import make_manifest, write_manifest
from featdistill.records.predictions import manifest_entry, write_predictions

CHAIN = '[["jpeg", 24], ["downscale", 0.61]]'


def manifest(tmp_path):
    path = tmp_path / "manifest.csv"
    columns = {
        "image": ["a.jpg", "b.jpg", "c.jpg"],
        "name": ["a.jpg", "b.jpg", "c.jpg"],
        "label": [0, 1, None],
        "generator": ["", "flux", ""],
        "source": ["camera", "crawl", ""],
        "is_distorted": [1, 0, None],
        "distortions": [CHAIN, "[]", "[]"],
        "width": ["640", "512", ""],
        "height": ["480", "512", ""],
    }
    write_manifest(make_manifest(columns), path)
    return path


def test_a_manifest_gives_all_that_is_known_of_its_images(tmp_path):
    found = read_labels(manifest(tmp_path))
    assert found["label"].tolist() == [0, 1, -1] and found["is_distorted"].tolist() == [1, 0, -1]
    assert found["label"].dtype == np.int8
    assert found["chain"].tolist() == [(("jpeg", 24), ("downscale", 0.61)), (), ()]
    assert found["generator"].tolist() == ["", "flux", ""]
    assert found["source"].tolist() == ["camera", "crawl", ""]
    assert found["image"][0] == str(tmp_path / "a.jpg")
    assert found["width"].tolist()[:2] == [640, 512] and np.isnan(found["width"][2])
    assert found.attrs["path"] == str(tmp_path / "manifest.csv")


def test_an_official_file_gives_the_same_columns(tmp_path):
    path = tmp_path / "val_labels.csv"
    path.write_text(
        "image_name,label,distortions,distortion_scales,is_distorted\n"
        "a.jpg,0,\"['jpeg', 'downscale']\",\"[24, 0.61]\",1\n"
        "b.jpg,1,[],[],0\n"
    )
    found, other = read_labels(path), read_labels(manifest(tmp_path))
    assert list(found) == list(other)
    same = ["name", "label", "is_distorted", "chain"]
    assert found[same].equals(other[same].iloc[:2])
    assert found["image"].tolist() == found["generator"].tolist() == ["", ""]
    assert found["height"].isna().all()


def test_a_scale_that_is_no_number_is_not_known(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text('image,name,label,distortions\na,a,1,"[[""jpeg"", [1]], [""blur"", ""x""]]"\n')
    assert read_labels(path)["chain"][0] == (("jpeg", None), ("blur", None))


def test_predictions_are_joined_to_their_labels_by_name(tmp_path):
    labels, path = manifest(tmp_path), tmp_path / "val.csv"
    sidecar = {"manifest": manifest_entry(labels, path)}
    experts = {"label": np.array([0.1, 0.2, 0.3])}
    write_predictions(path, ["c", "b", "a"], np.array([0.3, 0.2, 0.1]), experts, sidecar)
    assert source_of(path) == labels
    found = labeled(path)
    assert found["name"].tolist() == ["b.jpg", "a.jpg"] and found["label"].tolist() == [1, 0]
    assert found["score"].tolist() == [0.2, 0.1] and found["expert label"].tolist() == [0.2, 0.3]
    assert found.attrs["experts"] == ["label"]
    only_c = tmp_path / "c.csv"
    only_c.write_text("name,score\nc.jpg,0.5\n")
    with pytest.raises(UserError, match="no image has a label"):
        labeled(only_c, labels)
    with pytest.raises(UserError, match="no sidecar"):
        labeled(only_c)
    with pytest.raises(UserError, match=r"no\.csv do not exist"):
        source_of(tmp_path / "no.csv")
    only_c.write_text("name,score\nd.jpg,0.5\n")
    with pytest.raises(UserError, match=r"not in .* \(1\): d\.jpg"):
        labeled(only_c, labels)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a readable CSV"),
        ("image_name,label\na,\xe9\n", "UTF-8"),
        ("image_name,score\na,1\n", "neither a manifest"),
        ("image_name,label\na,2\n", "label is '2'"),
        ("image_name,label\na,1\na,0\n", "names image a more than once"),
        ("image_name,label,distortions,distortion_scales\na,1,jpeg,[]\n", "'jpeg' is not a list"),
        ("image_name,label,distortions,distortion_scales\na,1,__import__('os'),[]\n", "is not a list"),
        ("image_name,label,distortions,distortion_scales\na,1,[3],[1]\n", "are not all names"),
        ("image_name,label,is_distorted\na,1,maybe\n", "is_distorted is 'maybe'"),
        ("image,name,label,distortions\na,a,1,jpeg\n", "not a JSON list"),
        ("image,name,label\na,a,real\n", "label of a is 'real'"),
    ],
)
def test_labels_that_cannot_be_read_are_refused(tmp_path, content, message):
    path = tmp_path / "labels.csv"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        read_labels(path)
    with pytest.raises(UserError, match="do not exist"):
        read_labels(tmp_path / "none.csv")
