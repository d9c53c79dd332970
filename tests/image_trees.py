"""Trees of small images that tests write, as folders or as archives, and the manifests made of them."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from featdistill.records.manifest import read_manifest

KINDS = ("folder", "zip", "tar")


def picture(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind)
    return data.getvalue()


def write_tree(root: Path, files: dict[str, int | bytes], kind: str = "folder") -> Path:
    """Write images by path; a number is the seed of a picture. Return the folder, or the archive."""
    data = {name: picture(made) if isinstance(made, int) else made for name, made in files.items()}
    if kind == "folder":
        root.mkdir(parents=True, exist_ok=True)
        for name, content in data.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        return root
    path = root.with_name(f"{root.name}.{kind}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in data.items():
                archive.writestr(name, content)
        return path
    with tarfile.open(path, "w") as archive:
        for name, content in data.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def rows_of(module, root: Path, *flags: str) -> pd.DataFrame:
    """Run a source's command and return its manifest, by the path of the image below the root."""
    out = root.parent / "out" / "m.csv"
    assert module.main(["--root", str(root), "--out", str(out), *flags]) == 0
    rows = read_manifest(out)
    paths = [image.replace("::", "/").removeprefix(f"{root}/") for image in rows["image"]]
    return rows.set_index(pd.Index(paths))


def cells_of(table: str) -> list[list[str]]:
    """Return the cells of the rows of a Markdown table, the header first, without the line below it."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
