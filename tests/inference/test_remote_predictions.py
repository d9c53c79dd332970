"""Images, archives and manifests in a bucket, and predictions into it, against a local S3 server."""

import io
import json
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from archive_files import write_tar
from object_storage import Relay, endpoint, s3_server

import predict
from featdistill import remote_files
from featdistill.command_line import UserError
from featdistill.images.reading import encode_jpeg
from featdistill.models.expert import create_expert, save_expert
from featdistill.records.parts import part_name, table_bytes
from featdistill.records.predictions import read_predictions
from featdistill.storage import Folder

COUNT = 10


@pytest.fixture(scope="module")
def server():
    with s3_server() as port, endpoint(port):
        remote_files._open_system("s3://bucket")[0].mkdir("bucket")
        yield port


@pytest.fixture(scope="module")
def images() -> dict[str, bytes]:
    # Noise, so that a file is larger than what a broken connection lets pass.
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (160, 160, 3), np.uint8) for _ in range(COUNT)]
    return {f"{number:02}.jpg": encode_jpeg(picture, 95) for number, picture in enumerate(pictures)}


@pytest.fixture(scope="module")
def expert(tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "alpha" / "expert"
    save_expert(create_expert("tiny_clip", "random", input_size=48).eval(), folder, {})
    return str(folder)


@pytest.fixture(scope="module")
def local(images, expert, tmp_path_factory) -> list[float]:
    """The scores of the images, read from a folder."""
    folder = tmp_path_factory.mktemp("local")
    for name, data in images.items():
        (folder / name).write_bytes(data)
    scored(expert, "--images", str(folder), "--out", str(folder / "out.csv"))
    return read_predictions(folder / "out.csv")["score"].tolist()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def scored(expert: str, *arguments: str, workers: int = 0) -> int:
    settings = ["--workers", str(workers), "--batch-size", "4", "--device", "cpu"]
    return predict.main([*arguments, "--experts", expert, *settings])


def manifest_of(images, prefix: str) -> bytes:
    return "".join(["image,name\n", *(f"{prefix}{name},{name}\n" for name in images)]).encode()


def scores_at(address: str, tmp_path) -> list[float]:
    (tmp_path / "read.csv").write_bytes(remote_files.read(address))
    return read_predictions(tmp_path / "read.csv")["score"].tolist()


def test_images_of_a_zip_in_a_bucket_are_scored_into_the_bucket(
    server, images, expert, local, tmp_path, cache
):
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in images.items():
                archive.writestr(f"in/{name}", data)
        remote_files.write("s3://bucket/data/images.zip", file.getvalue())
    # An image that is missing, too.
    manifest = manifest_of(images, "../data/images.zip::in/") + b"../data/images.zip::in/none.jpg,none\n"
    remote_files.write("s3://bucket/manifests/val.csv", manifest)
    out = "s3://bucket/results/val.csv"
    arguments = ["--manifest", "s3://bucket/manifests/val.csv", "--out", out]
    # The manifest is read before the workers are forked.
    assert scored(expert, *arguments, workers=2) == 1
    assert scores_at(out, tmp_path) == local
    errors = remote_files.read("s3://bucket/results/val.errors.csv").decode().splitlines()
    assert errors[1:] == ["none,no member in/none.jpg in s3://bucket/data/images.zip"]
    sidecar = json.loads(remote_files.read(f"{out}.json"))
    assert sidecar["manifest"]["path"] == "s3://bucket/manifests/val.csv"
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_second_run_does_nothing_and_a_changed_manifest_is_refused(server, images, expert, capsys):
    for name, data in images.items():
        remote_files.write(f"s3://bucket/loose/{name}", data)
    remote_files.write("s3://bucket/loose/val.csv", manifest_of(images, ""))
    arguments = ["--manifest", "s3://bucket/loose/val.csv", "--out", "s3://bucket/twice/"]
    assert scored(expert, *arguments) == 0
    before = remote_files.read("s3://bucket/twice/val.csv")
    capsys.readouterr()
    assert scored(expert, *arguments) == 0
    assert "s3://bucket/twice/val.csv: finished; nothing to do" in capsys.readouterr().out
    assert remote_files.read("s3://bucket/twice/val.csv") == before
    remote_files.write("s3://bucket/loose/val.csv", manifest_of(images, "") + b"00.jpg,again\n")
    with pytest.raises(UserError, match=r"was produced with different settings: manifest\.sha256"):
        scored(expert, *arguments)


def test_a_connection_that_breaks_within_an_object_costs_nothing(
    server, images, expert, local, tmp_path, monkeypatch
):
    monkeypatch.setattr(remote_files, "WAITS_S", (0.01,) * 3)
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in images.items():
                archive.writestr(name, data)
        remote_files.write("s3://bucket/broken.zip", file.getvalue())
    (tmp_path / "val.csv").write_bytes(manifest_of(images, "s3://bucket/broken.zip::"))
    relay = Relay(server, breaks=5)
    with endpoint(relay.port):
        assert (
            scored(expert, "--manifest", str(tmp_path / "val.csv"), "--out", str(tmp_path / "out.csv")) == 0
        )
    relay.close()
    assert relay.broken == 5
    assert read_predictions(tmp_path / "out.csv")["score"].tolist() == local


def test_a_folder_of_a_bucket_and_single_addresses_are_scored(
    server, images, expert, local, tmp_path, capsys
):
    for name, data in images.items():
        remote_files.write(f"s3://bucket/photos/{name}", data)
    remote_files.write("s3://bucket/photos/notes.txt", b"text")
    assert scored(expert, "--images", "s3://bucket/photos", "--out", "s3://bucket/folder.csv") == 0
    assert scores_at("s3://bucket/folder.csv", tmp_path) == local
    assert b"s3://bucket/photos/00.jpg,00.jpg" in remote_files.read("s3://bucket/folder.manifest.csv")
    capsys.readouterr()
    assert scored(expert, "s3://bucket/photos/00.jpg", "s3://bucket/photos/none.jpg") == 1
    shown = capsys.readouterr().out
    assert f"{local[0]:.4f}" in shown
    assert "FileNotFoundError: s3://bucket/photos/none.jpg does not exist" in shown


def test_members_of_a_tar_in_a_bucket_are_read(server, images, tmp_path):
    from featdistill.images.reading import read_bytes

    write_tar(tmp_path / "images.tar", images)
    remote_files.write("s3://bucket/images.tar", (tmp_path / "images.tar").read_bytes())
    assert all(read_bytes(f"s3://bucket/images.tar::{name}") == data for name, data in images.items())


def test_a_manifest_in_parts_in_a_bucket_is_scored_into_the_bucket(server, images, expert, local, capsys):
    for name, data in images.items():
        remote_files.write(f"s3://bucket/parted/images/{name}", data)
    names = list(images)
    for number, part in enumerate((names[:4], names[4:])):
        table = table_bytes({"image": [f"../images/{name}" for name in part], "name": part})
        remote_files.write(f"s3://bucket/parted/manifest/{part_name(number)}", table)
    arguments = ["--manifest", "s3://bucket/parted/manifest/", "--out", "s3://bucket/parted/scores/"]
    assert scored(expert, *arguments) == 0
    scores = Folder("s3://bucket/parted/scores")
    assert scores.names(".parquet") == [part_name(0), part_name(1)]
    frames = [pyarrow.parquet.read_table(scores.open(name)).to_pandas() for name in scores.names(".parquet")]
    np.testing.assert_allclose([score for frame in frames for score in frame["score"]], local, atol=1e-6)
    capsys.readouterr()
    assert scored(expert, *arguments) == 0 and "finished; 10 images" in capsys.readouterr().out


def test_of_several_that_create_a_file_in_a_bucket_one_does(server):
    folder = Folder("s3://bucket/leases")
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda number: folder.create("part", str(number).encode()), range(16)))
    assert created.count(True) == 1 and folder.read("part") == str(created.index(True)).encode()


def test_wrong_credentials_and_a_missing_bucket_are_one_line_at_the_start(
    server, images, expert, tmp_path, monkeypatch
):
    import moto.settings

    remote_files.write("s3://bucket/secret/00.jpg", images["00.jpg"])
    (tmp_path / "val.csv").write_bytes(manifest_of(["00.jpg"], "s3://bucket/secret/"))
    arguments = ["--manifest", str(tmp_path / "val.csv"), "--out", str(tmp_path / "out.csv")]
    monkeypatch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)
    with endpoint(server, key="wrong"), pytest.raises(UserError, match="refuses the credentials") as caught:
        scored(expert, *arguments)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "val.csv").write_bytes(manifest_of(["00.jpg"], "s3://no-such-bucket/"))
    with pytest.raises(UserError, match=r"s3://no-such-bucket/00\.jpg: the bucket does not exist"):
        scored(expert, *arguments)
    assert not os.path.exists(tmp_path / "out.csv")
    with pytest.raises(UserError, match=r"manifest s3://bucket/none\.csv does not exist"):
        scored(expert, "--manifest", "s3://bucket/none.csv", "--out", "s3://bucket/none.csv")
