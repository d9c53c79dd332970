"""Conventions of all files: length, required packages, recipes that say what they are, no pickles."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [*ROOT.glob("*.py"), *(ROOT / "featdistill").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py")]
# Imported only when needed, with a clear message if they are missing.
OPTIONAL = {"c2pa", "onnxruntime", "openvino", "fsspec", "peft", "ray", "gradio", "pillow_heif"}
OPTIONAL |= {"fastapi", "prometheus_client", "python_multipart", "starlette", "uvicorn"}
PACKAGES = {"cv2": "opencv-python-headless", "PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
PACKAGES |= {"open_clip": "open_clip_torch"}


def imported(path: Path) -> set[str]:
    """Return the top-level packages a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_no_file_is_longer_than_400_lines():
    files = [*SOURCES, *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "studies").glob("*.py")]
    assert not {path for path in files if len(path.read_text(encoding="utf-8").splitlines()) > 400}


def test_every_package_that_is_imported_is_in_the_requirements():
    text = (ROOT / "requirements.txt").read_text()
    required = {re.split(r"[<>=~! ]", line)[0].lower() for line in text.splitlines() if line}
    own = (
        {path.stem for path in ROOT.glob("*.py")}
        | {"featdistill", "data_prep"}
        | set(sys.stdlib_module_names)
    )
    used = {name for path in SOURCES for name in imported(path)} - own - OPTIONAL
    assert {PACKAGES.get(name, name).lower() for name in used} <= required


@pytest.mark.parametrize(
    "path", sorted((ROOT / "featdistill" / "recipes").rglob("*.yaml")), ids=lambda path: path.stem
)
def test_a_recipe_says_first_what_it_is(path):
    text = path.read_text()
    assert text.startswith("# ") and isinstance(yaml.safe_load(text), dict)


def test_recipes_and_pages_are_in_the_package():
    package = ROOT / "featdistill"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["featdistill"]
    included = {path for pattern in patterns for path in package.glob(pattern)}
    files = {path for path in package.rglob("*") if path.suffix in (".yaml", ".css", ".html", ".typed")}
    assert included == files and package / "recipes" / "teams" / "vincentlc.yaml" in files


def test_no_line_pickles_or_loads_more_than_weights():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert "import pickle" not in text, path.name
        assert not re.search(r"load_state_dict\([^)]*strict=False", text), path.name
        for call in re.findall(r"torch\.load\((.*)\)", text):
            assert "weights_only=True" in call, path.name
