"""The report: one HTML file that needs no network, script or other file.

The same input always produces the same page: it contains no date, time or name of a machine.
"""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from markupsafe import Markup

from featdistill import __version__, atomic
from featdistill.command_line import UserError
from featdistill.evaluation.audits import content_meaning, pixel_free_meaning
from featdistill.evaluation.splits import Split
from featdistill.records.parts import content_sha256
from featdistill.records.predictions import read_sidecar
from featdistill.records.provenance import read_record
from featdistill.report.charts import axis_start, heat_map
from featdistill.report.gallery import Explainer
from featdistill.report.markup import CONTENT_COLUMNS, integer, interval, number, render
from featdistill.report.split import Chart, split_section

# Pictures of errors per class and split.
GALLERY = 8


def read_sweep(path: str | Path) -> dict | None:
    """Return the result of a robustness sweep, or None if the file does not exist.

    Raises:
        UserError: the file is not the result of a sweep.
    """
    sweep = read_record(path, "run the sweep again, or remove it")
    try:
        for cell in sweep["cells"] if sweep is not None else ():
            cell["auc"], _ = None if cell["auc"] is None else float(cell["auc"]), int(cell["level"])
            cell["operation"], cell["library"] = str(cell["operation"]), str(cell["library"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the result of a sweep; run the sweep again, or remove it") from error
    return sweep


def write_report(
    path: str | Path,
    result: dict,
    splits: Sequence[Split],
    *,
    sweep: dict | None = None,
    gallery: int = GALLERY,
    explainer: Explainer | None = None,
) -> list[str]:
    """Write the page.

    Args:
        result: what `evaluate.py` writes as `metrics.json`, or for a sweep alone `{"splits": {}}`.
        splits: the splits of `result`, in any order; others are ignored.
        sweep: as returned by `read_sweep`.
        gallery: number of errors per class and split that are shown as pictures; 0 for none.
        explainer: returns an expert's map that is shown below each of these pictures; None for no maps.

    Returns:
        A line for each picture that could not be shown.
    """
    by_name = {split.name: split for split in splits}
    sections, lost = [], []
    for position, (name, metrics) in enumerate(result["splits"].items(), start=1):
        section, reasons = split_section(f"split-{position}", by_name[name], metrics, gallery, explainer)
        sections.append(section)
        lost += [f"{name}: {reason}" for reason in reasons]
    versions = {"featdistill": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in ("numpy", "pandas", "scikit-learn")}
    page = render(
        "page.html",
        splits=sections,
        pixel_free=_pixel_free(result),
        content=_content(result),
        content_columns=CONTENT_COLUMNS,
        leaderboard=_leaderboard(result),
        sweep=sweep if sweep and sweep["cells"] else None,
        sweep_charts=_sweep_charts(sweep["cells"]) if sweep else [],
        **_what_was_run([by_name[name] for name in result["splits"]], sweep),
        settings=[[f"interval {key}", str(value)] for key, value in result.get("intervals", {}).items()]
        + _content_settings(result)
        + [[f"version of {name}", text] for name, text in versions.items()],
    )
    atomic.write_text(path, page)
    return lost


def _pixel_free(result: dict) -> dict | None:
    baseline = result.get("pixel_free")
    if not baseline or baseline["auc"] is None:
        return None
    return baseline | {"meaning": pixel_free_meaning(baseline)}


def _content(result: dict) -> dict | None:
    facts = result.get("content")
    return {"meaning": content_meaning(facts)} if facts else None


def _content_settings(result: dict) -> list[list[str]]:
    facts = result.get("content") or {}
    shown = ("side", "backbone", "feature", "folds")
    return [[f"content control: {key}", _shown(facts[key])] for key in shown if key in facts]


def _leaderboard(result: dict) -> dict | None:
    board = result.get("leaderboard")
    if not board:
        return None
    rows = []
    for row in board["challenge"]:
        place = "local" if row["place"] is None else str(row["place"])
        rows.append([row["name"], place, number(row["clean_auc"]), number(row["robust_auc"])])
    return {"note": board["note"], "rows": rows}


def _sweep_charts(cells: list[dict]) -> list[Chart]:
    charts, scale = [], (axis_start(cell["auc"] for cell in cells), 1.0)
    for library in dict.fromkeys(cell["library"] for cell in cells):
        of_library = [cell for cell in cells if cell["library"] == library]
        levels = sorted({int(cell["level"]) for cell in of_library})
        names = list(dict.fromkeys(cell["operation"] for cell in of_library))
        aucs = {(cell["operation"], int(cell["level"])): cell["auc"] for cell in of_library}
        values = [[aucs.get((name, level)) for level in levels] for name in names]
        title = f"AUC for each operation and level of the library {library}"
        rows = []
        for cell in of_library:
            auc, bounds = number(cell["auc"]), interval(cell.get("low"), cell.get("high"))
            rows.append([cell["operation"], str(cell["level"]), auc, bounds, integer(cell.get("n", 0))])
        svg = heat_map(f"sweep-{len(charts) + 1}", title, names, list(map(str, levels)), values, scale)
        header = ["operation", "level", "AUC", "95 % interval", "images"]
        charts.append(Chart(Markup("Library <bdi>{}</bdi>").format(library), svg, (title, header, rows)))
    return charts


def _what_was_run(splits: Sequence[Split], sweep: dict | None) -> dict[str, list]:
    """Return the files that were read, and what made the predictions, once for all splits that share it."""
    files: list[list[str]] = []
    runs: dict[str, tuple[dict, list[str]]] = {}

    def add(name: str, sidecar: dict, known_sha256: str = "") -> None:
        # Without what differs between the splits of one run.
        common = {key: value for key, value in sidecar.items() if key not in ("manifest", "sweep")}
        manifest = sidecar.get("manifest")
        if isinstance(manifest, dict):
            path, sha256 = (str(manifest.get(key, "")) for key in ("path", "sha256"))
            if sha256 != known_sha256:
                files.append([f"images of {name}", path, _code(sha256)])
        if common:
            runs.setdefault(json.dumps(common, sort_keys=True), (common, []))[1].append(name)

    for split in splits:
        for what, path in (("predictions", split.predictions), ("labels", split.labels)):
            files.append([f"{what} of {split.name}", str(path), _code(content_sha256(path))])
        add(split.name, read_sidecar(split.predictions) or {}, content_sha256(split.labels))
    if sweep is not None and isinstance(sweep.get("made_by"), dict):
        add("the sweep", sweep["made_by"])
    return {"files": files, "runs": [_run(sidecar, ", ".join(names)) for sidecar, names in runs.values()]}


def _run(sidecar: dict, splits: str) -> dict:
    """Return the values of a sidecar for the page: one row per expert, then the settings of all experts."""
    hashes = sidecar.get("experts")
    hashes = hashes if isinstance(hashes, dict) else {}
    # A setting whose keys are all experts has a value for each of them.
    per_expert = [
        key
        for key, value in sorted(sidecar.items())
        if key != "experts" and isinstance(value, dict) and value and value.keys() <= hashes.keys()
    ]
    return {
        "splits": splits,
        "header": ["expert", *per_expert, "SHA-256 of the weights"],
        "experts": [
            [name, *(_shown(sidecar[key].get(name, "")) for key in per_expert), _code(str(sha256))]
            for name, sha256 in sorted(hashes.items())
        ],
        "settings": [
            [key, _shown(value)]
            for key, value in sorted(sidecar.items())
            if key not in ("experts", *per_expert)
        ],
    }


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(inner)}" for key, inner in sorted(value.items()))
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _code(text: str) -> Markup:
    return Markup("<code>{}</code>").format(text)
