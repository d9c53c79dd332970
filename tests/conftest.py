"""Small images and manifests that the tests make themselves, and the reference folder where it is at hand."""

import os
import sys
from pathlib import Path

# Read once, when PyTorch is loaded. The tests share their cores with each other, and models this small only
# lose by threads that wait for one another; processes that the tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from featdistill import command_line
from featdistill.records.manifest import make_manifest, write_manifest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def messages():
    """Show what the package logs, as every command does, so that `capsys` captures it."""
    command_line.show_messages()


@pytest.fixture(autouse=True)
def precision():
    """Let each test choose the precision of its runs: accelerate has one per process."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state()


@pytest.fixture
def shared() -> Path:
    """The folder with reference outputs and real images next to the project; skips where it is missing."""
    if not SHARED.is_dir():
        pytest.skip("the folder shared/ with reference outputs is not next to the project")
    return SHARED


def smooth_picture(seed: int, height: int = 72, width: int = 88) -> np.ndarray:
    """A smooth picture with some grain, (H, W, 3) uint8: compresses like a photograph."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 7, 3)).astype(np.float32)
    picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(picture + rng.normal(0, 4, picture.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def make_set(tmp_path):
    """`set_maker` in the test's own folder."""
    return set_maker(tmp_path)


@pytest.fixture(scope="session")
def sets(tmp_path_factory) -> list[str]:
    """Arguments of `train.py`: a training manifest of 40 images and a hold-out of 12, made once."""
    make = set_maker(tmp_path_factory.mktemp("sets"))
    return ["--train", str(make("train", 40)), "--val", str(make("val", 12, first=1000))]


def set_maker(root: Path):
    """Return a function that writes a labeled set of JPEGs and its manifest, and gives the manifest's path.

    AI images carry a checkerboard of period 2, so that an expert can learn something.
    """

    def make(name: str, count: int, *, distorted: bool = False, first: int = 0) -> Path:
        folder = root / name
        folder.mkdir()
        rows = {"image": [], "name": [], "label": [], "is_distorted": []}
        for place in range(count):
            seed, label = first + place, place % 2
            picture = smooth_picture(seed)
            if label:
                checks = np.indices(picture.shape[:2]).sum(0) % 2
                picture = np.clip(picture.astype(int) + 24 * checks[..., None] - 12, 0, 255).astype(np.uint8)
            path = folder / f"{seed:05d}.jpg"
            Image.fromarray(picture).save(path, quality=95)
            rows["image"].append(str(path))
            rows["name"].append(path.name)
            rows["label"].append(label)
            rows["is_distorted"].append(int(distorted and place % 4 >= 2))
        write_manifest(make_manifest(rows), folder / "manifest.csv")
        return folder / "manifest.csv"

    return make


@pytest.fixture
def read_rows():
    """Return a function that reads a CSV as text columns."""
    return lambda path: pd.read_csv(path, dtype=str, keep_default_na=False)
