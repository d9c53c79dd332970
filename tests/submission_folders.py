"""Predictions, manifests and zips of a submission that tests write."""

import warnings
import zipfile

import numpy as np
import pytest

import make_submission
from featdistill.records.manifest import make_manifest, write_manifest
from featdistill.records.predictions import manifest_entry, write_predictions

ROWS = {"val": 12, "val_hard": 8, "test": 9}
# Stays next to the ledger, so that all processes lock the same file.
LOCK = ".submissions.csv.lock"


def names_of(slot):
    return [f"{slot.replace('_', '')}{number:04x}.jpg" for number in range(ROWS[slot])]


def scores_of(slot):
    return (np.arange(ROWS[slot]) + 0.5) / ROWS[slot]


@pytest.fixture(name="folder")
def submission_folder(tmp_path):
    """A folder with predictions and a manifest of each slot."""
    path = tmp_path / "submission"
    for slot in ROWS:
        names = names_of(slot)
        rows = make_manifest({"image": [f"{slot}/{name}" for name in names], "name": names})
        write_manifest(rows, path / f"{slot}_manifest.csv")
        rewrite(path, slot, names, scores_of(slot))
    return path


def rewrite(folder, slot, names, score, errors=(), **sidecar):
    path = folder / f"{slot}.csv"
    sidecar["manifest"] = manifest_entry(folder / f"{slot}_manifest.csv", path)
    write_predictions(path, names, np.asarray(score), {}, sidecar, errors)


def make(folder, profile, *flags, slots=(), out="submission.zip"):
    files = [text for slot in slots for text in (f"--{slot.replace('_', '-')}", str(folder / f"{slot}.csv"))]
    return make_submission.main(["--profile", profile, *files, "--out", str(folder / out), *map(str, flags)])


def content(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def as_csv(header, names, score):
    return (
        "\n".join([header, *(f"{name},{value!r}" for name, value in zip(names, score, strict=True))]) + "\n"
    )


def zipped(path, members, method=zipfile.ZIP_DEFLATED):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as archive:
        # Python warns of a name that is there twice.
        warnings.simplefilter("ignore")
        for name, text in members:
            archive.writestr(name, text)
    return path


GOOD = as_csv("image_name,score", names_of("val"), scores_of("val").tolist())
GOOD_HARD = as_csv("image_name,score", names_of("val_hard"), scores_of("val_hard").tolist())
