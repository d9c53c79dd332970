"""Rooms in one order: imports go to earlier rooms, and no file of the package imports a script."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A room may import earlier rooms, the ground (modules directly in featdistill/), and nothing else of ours.
ORDER = ["images", "distortions", "records", "evaluation", "calibration", "report", "submission", "data"]
ORDER += ["models", "runtimes", "hub", "published", "inference", "bank", "training", "sweep", "interactive"]
ORDER += ["cluster", "export", "service"]
WITHOUT_TORCH = ORDER[: ORDER.index("data")]
HEAVY = {"torch", "timm", "open_clip", "accelerate", "safetensors"}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} | {"data_prep", "benchmarks", "studies"}
GROUND = {path.stem for path in (ROOT / "featdistill").glob("*.py")} | {"__version__"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "featdistill":
            yield from (f"featdistill.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("room", ["", *ORDER])
def test_a_room_imports_only_the_ground_and_rooms_before_it(room):
    allowed = GROUND | set(ORDER[: ORDER.index(room) + 1] if room else ())
    folder = ROOT / "featdistill" / room
    for path in folder.rglob("*.py") if room else set(folder.glob("*.py")) - {folder / "__main__.py"}:
        for name in imported(path):
            top, _, rest = name.partition(".")
            assert top not in SCRIPTS, f"{path} imports the script {name}"
            assert top != "featdistill" or rest.split(".")[0] in allowed, f"{path} imports {name}"
            assert room not in WITHOUT_TORCH or top not in HEAVY, f"{path} imports {name}"
