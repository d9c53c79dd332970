"""Arrows go one way: the table of docs/architecture.md, held by a walk over all imports."""

import ast
import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("distortions_official", "distortions_evaluation", "distortions_extended", "distortions_extras")
# Packages below `featdistill`, each of which counts as one module.
PACKAGES_BELOW = ("extended", "extras")
# A module may import its own row and the rows above it, and the third-party packages named up to it.
ROWS: list[tuple[tuple[str, ...], set[str]]] = [
    (("command_line", "atomic", "operations"), {"numpy", "tqdm"}),
    (("manifest", "member_index", "parquet_images", "containers"), {"pandas", "pyarrow"}),
    (("image_io", "label_files"), {"cv2", "PIL", "simplejpeg"}),
    (
        (
            "equalise",
            "srgb",
            "working_memory",
            "noise_tables",
            "official_tables",
            "filters",
            "warps",
            "watermarks",
        ),
        set(),
    ),
    (("codecs", "distortion_adapters", "distortion_cli", *PACKAGES_BELOW, *LIBRARIES), set()),
    (("chain_sampling", "distortion_policy", "distortion_presets"), set()),
    (
        (
            *("metrics", "bootstrap", "calibration", "predictions", "labels", "fusion", "fusion_fit"),
            *("breakdowns", "evaluation", "comparison", "leaderboard", "score_tables", "plot_run"),
            *("agreement", "protocols", "markdown_table", "sweep_plan", "sweep_tables"),
            *("report", "report_split", "report_experts", "report_gallery"),
            *("report_charts", "report_drawing", "report_markup"),
            *("submission", "submission_profiles", "submission_check", "submission_difference", "ledger"),
        ),
        {"sklearn", "scipy", "matplotlib"},
    ),
    (
        ("preprocessing", "loading", "sampling", "amplitude_mixup", "image_cache", "dataset"),
        {"torch"},
    ),
    (
        (
            *("backbones", "encoders", "tiny_backbones", "backbone_weights", "open_clip_backbones"),
            *("input_sizes", "experts", "released_files", "released_weights"),
            *("token_dropping", "token_maps"),
        ),
        {"timm", "open_clip", "safetensors"},
    ),
    (("objectives", "contrastive", "masking", "teachers", "tasks"), set()),
    (("recipes", "run_folder"), {"yaml"}),
    (
        (
            *("ensemble", "predictor", "precision", "float8", "tuning", "tta", "processes"),
            *("partial_scores", "prediction_jobs", "predictor_setup", "single_images"),
            *("sweep", "explain", "interactive", "app_page"),
        ),
        {"gradio"},
    ),
    (
        (
            *("optimisation", "finetuning", "preemption", "sharding", "training_log", "holdout"),
            *("engine", "training"),
        ),
        {"accelerate", "peft"},
    ),
]
TORCH_FREE_ROWS = 7
# They attack an expert, or pass images through an autoencoder.
DATA_WITH_MODELS = {"hard_negatives.py", "adversarial.py", "reconstructions.py"}
SCRIPTS = ("train", "distill", "predict", "make_submission", "evaluate", "backbone_study", "app")
# Imported only where they are asked for, and missed with one clear line.
OPTIONAL = {"peft", "gradio"}
PACKAGES = {"cv2": "opencv-python-headless", "PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
PACKAGES |= {"open_clip": "open_clip_torch"}


def imports(path: Path) -> set[str]:
    """Return the modules a file imports: `featdistill.x` as `x`, all else by its top package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = whole if node.module in ("featdistill", "data_prep") else [node.module]
        for name in names:
            package, _, rest = name.partition(".")
            found.add(rest.partition(".")[0] if package == "featdistill" and rest else package)
    return found - set(sys.stdlib_module_names) - {"__version__", "featdistill"}


def module_paths(name: str) -> list[Path]:
    if name in PACKAGES_BELOW:
        return sorted((ROOT / "featdistill" / name).glob("*.py"))
    return [ROOT / f"{name}.py" if name in LIBRARIES else ROOT / "featdistill" / f"{name}.py"]


def test_every_module_has_a_row():
    listed = {name for names, _ in ROWS for name in names}
    there = {path.stem for path in (ROOT / "featdistill").glob("*.py")} - {"__init__"} | set(LIBRARIES)
    there |= {path.parent.name for path in (ROOT / "featdistill").glob("*/*.py")}
    assert listed == there


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_arrows_go_down_the_table_only(row):
    allowed = {name for names, packages in ROWS[: row + 1] for name in {*names, *packages}}
    for name in ROWS[row][0]:
        for path in module_paths(name):
            extra = imports(path) - allowed
            assert not extra, f"{path.name} may not import {sorted(extra)}"


def test_the_first_rows_and_what_needs_no_model_import_no_torch():
    heavy = {"torch", "timm", "open_clip", "accelerate", "safetensors"}
    heavy |= {name for names, _ in ROWS[TORCH_FREE_ROWS:] for name in names}
    light = [path for names, _ in ROWS[:TORCH_FREE_ROWS] for name in names for path in module_paths(name)]
    light += [ROOT / "make_submission.py"]
    light += [path for path in (ROOT / "data_prep").glob("*.py") if path.name not in DATA_WITH_MODELS]
    for path in light:
        assert not imports(path) & heavy, path.name
    # `--sweep` and `--explain` pass images through experts, and import what does so only then.
    assert imports(ROOT / "evaluate.py") & heavy == {"sweep", "explain"}


def test_nothing_imports_a_script():
    for path in [*(ROOT / "featdistill").rglob("*.py"), *(ROOT / "data_prep").glob("*.py")]:
        assert not imports(path) & {*SCRIPTS}, path.name


def test_every_package_that_is_imported_is_in_the_requirements():
    text = (ROOT / "requirements.txt").read_text()
    required = {re.split(r"[<>=~! ]", line)[0].lower() for line in text.splitlines() if line}
    files = [*ROOT.glob("*.py"), *(ROOT / "featdistill").rglob("*.py"), *(ROOT / "data_prep").glob("*.py")]
    own = {path.stem for path in files} | {"data_prep", *PACKAGES_BELOW}
    used = {name for path in files for name in imports(path)} - own - OPTIONAL
    assert {PACKAGES.get(name, name).lower() for name in used} <= required


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_says_first_what_it_is(path):
    text = path.read_text()
    assert text.startswith("# ") and isinstance(yaml.safe_load(text), dict)


def test_no_line_pickles_or_loads_more_than_weights():
    for path in [
        *ROOT.glob("*.py"),
        *(ROOT / "featdistill").rglob("*.py"),
        *(ROOT / "data_prep").glob("*.py"),
    ]:
        text = path.read_text(encoding="utf-8")
        assert "import pickle" not in text, path.name
        assert not re.search(r"load_state_dict\([^)]*strict=False", text), path.name
        for call in re.findall(r"torch\.load\((.*)\)", text):
            assert "weights_only=True" in call, path.name
