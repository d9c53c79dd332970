"""What was measured as one page for people: a single HTML file without network, script or other file.

The page holds nothing that changes from run to run of the same input: no date, no time, no name of a machine.
"""

import json
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import sklearn

from featdistill import __version__, atomic
from featdistill.command_line import UserError
from featdistill.evaluation.splits import Split
from featdistill.records.predictions import read_sidecar
from featdistill.report.charts import heat_map, tenth_below
from featdistill.report.gallery import Explainer
from featdistill.report.markup import (
    Content,
    Html,
    bounds,
    data_table,
    element,
    interval_note,
    measured,
    number,
    share,
    table,
)
from featdistill.report.split import split_section

# Pictures of mistakes of each class and split.
GALLERY = 8
_STYLE = Path(__file__).with_name("report.css")
# Nothing is loaded and nothing runs, whatever a name may hold.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_CAUTION = (
    "A score is an ensemble's estimate that an image is AI-generated. It is no proof, neither of a forgery "
    "nor of a real photograph, and nobody should be accused on the ground of one.",
    "An AUC is the chance that an AI-generated image gets a higher score than a real one: 0.5 is guessing, 1 "
    "is without a mistake. It says nothing of where a threshold should lie. Even at a false positive rate of "
    "1 %, ten of a thousand real images are called AI-generated.",
    "All figures hold for images like those measured here: these generators, these sources, these "
    "distortions. A newer generator or other processing can do far worse.",
    "An interval says how far another sample of the same kind of images could move a figure by chance, and "
    "nothing of other kinds. Of many cells a few look good or bad by chance, those over few images most of "
    "all.",
)


def read_sweep(path: str | Path) -> dict | None:
    """Return the result of a robustness sweep, or None where there is none.

    Raises:
        UserError: the file is no sweep.
    """
    path = Path(path)
    if not path.is_file():
        return None
    try:
        sweep = json.loads(path.read_text(encoding="utf-8"))
        for cell in sweep["cells"]:
            cell["auc"], _ = None if cell["auc"] is None else float(cell["auc"]), int(cell["level"])
            cell["operation"], cell["library"] = str(cell["operation"]), str(cell["library"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no result of a sweep; make it again, or remove it") from error
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
        splits: those of `result`, in any order; others are passed over.
        sweep: of `read_sweep`.
        gallery: pictures of mistakes of each class and split; 0 for none.
        explainer: gives an expert's map that is shown below each of these pictures; None for no maps.

    Returns:
        A line for each picture that could not be shown.
    """
    by_name = {split.name: split for split in splits}
    sections, lost, links = [], [], []
    for place, (name, found) in enumerate(result["splits"].items(), start=1):
        section, own = split_section(f"split-{place}", by_name[name], found, gallery, explainer)
        sections.append(section)
        lost += [f"{name}: {line}" for line in own]
        links.append((f"split-{place}", f"Split {name}"))
    if sweep is not None and sweep["cells"]:
        sections.append(_sweep_section(sweep))
        links.append(("sweep", "Sweep"))
    used = [by_name[name] for name in result["splits"]]
    parts = [_summary(result), _caution(), sections, _what_was_run(result, used, sweep)]
    links = [("summary", "Summary"), ("caution", "What the numbers mean"), *links, ("run", "What was run")]
    items = [element("li", element("a", text, href=f"#{identity}")) for identity, text in links]
    title = ", ".join(result["splits"]) or "robustness sweep"
    body = element(
        "body",
        element("a", "Skip to the results", href="#main", class_="skip"),
        element("header", element("h1", "FeatDistill: evaluation"), _subtitle(result)),
        element("nav", element("ul", items), aria_label="Contents"),
        element("main", parts, id="main", tabindex=-1),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name_="color-scheme", content="light dark"),
        element("title", f"Evaluation: {title}"),
        element("link", rel="icon", href="data:,"),
        element("style", Html(_STYLE.read_text(encoding="utf-8"))),
    )
    atomic.write_text(path, f"<!doctype html>\n{element('html', head, body, lang='en')}\n")
    return lost


def _subtitle(result: dict) -> Html:
    splits = result["splits"]
    images = sum(found["images"] for found in splits.values())
    text = f"{len(splits)} split{'s' * (len(splits) != 1)}, {images:,} labelled images"
    return element("p", text if splits else "A robustness sweep")


def _summary(result: dict) -> Html | None:
    splits = result["splits"]
    if not splits:
        return None
    rows = []
    for name, found in splits.items():
        aucs = (measured(found[key], *found["intervals"][key]) for key in ("robust_auc", "clean_auc", "auc"))
        rows.append([name, *aucs, f"{found['images']:,}", share(found["ai_share"])])
    header = ("split", "robust AUC", "clean AUC", "AUC", "images", "AI share")
    parts: list[Content] = [interval_note(splits.values()), table("AUCs of each split", header, rows)]
    baseline = result.get("pixel_free")
    if baseline and baseline["auc"] is not None:
        files = ", ".join(baseline["manifests"])
        text = f"Files alone, without a look at pixels, reach AUC {number(baseline['auc'])} on {files}: "
        parts.append(element("p", text, "an AUC near it says little of the pixels."))
    board = result.get("leaderboard")
    if board:
        lines = [
            [
                row["name"],
                "local" if row["place"] is None else str(row["place"]),
                number(row["clean_auc"]),
                number(row["robust_auc"]),
            ]
            for row in board["challenge"]
        ]
        parts += [
            element("h3", "Beside the published results"),
            element("p", f"This run is {board['note']}."),
            table("Published results and this run", ("team", "place", "clean AUC", "robust AUC"), lines),
        ]
    return element("section", element("h2", "Summary"), element("div", parts, class_="card"), id="summary")


def _caution() -> Html:
    lines = [element("li", line) for line in _CAUTION]
    head = element("h2", "What the numbers mean, and what they do not")
    return element("section", head, element("ul", lines), id="caution", class_="caution")


def _sweep_section(sweep: dict) -> Html:
    cells = sweep["cells"]
    scale = tenth_below(cell["auc"] for cell in cells), 1.0
    charts = []
    for library in dict.fromkeys(cell["library"] for cell in cells):
        own = [cell for cell in cells if cell["library"] == library]
        levels = sorted({int(cell["level"]) for cell in own})
        names = list(dict.fromkeys(cell["operation"] for cell in own))
        by_place = {(cell["operation"], int(cell["level"])): cell["auc"] for cell in own}
        values = [[by_place.get((name, level)) for level in levels] for name in names]
        title = f"AUC under each operation and level of the library {library}"
        rows = [
            [
                cell["operation"],
                str(cell["level"]),
                number(cell["auc"]),
                bounds(cell.get("low"), cell.get("high")),
                f"{cell.get('n', 0):,}",
            ]
            for cell in own
        ]
        header = ("operation", "level", "AUC", "95 % interval", "images")
        identity = f"sweep-{len(charts) + 1}"
        chart = heat_map(identity, title, names, [str(level) for level in levels], values, scale)
        head = element("h3", "Library ", element("bdi", library))
        charts.append(element("section", head, chart, data_table(title, header, rows), class_="card"))
    clean, robust = sweep.get("clean_auc"), sweep.get("mean_robust_auc")
    text = "Each operation at each level, laid on all of the sample's images; columns are levels."
    if clean is not None and robust is not None:
        text += f" Clean AUC {number(clean)}, mean over the cells {number(robust)}: "
        text += f"a drop of {number(clean - robust)}."
    head = element("h2", "Robustness sweep")
    return element("section", head, element("p", text), element("div", charts, class_="cards"), id="sweep")


def _what_was_run(result: dict, splits: Sequence[Split], sweep: dict | None) -> Html:
    files: list[list[Content]] = []
    runs: dict[str, tuple[dict, list[str]]] = {}

    def add(name: str, sidecar: dict, known: str = "") -> None:
        # What differs from split to split, so that one run is told once.
        own = {key: value for key, value in sidecar.items() if key not in ("manifest", "sweep")}
        manifest = sidecar.get("manifest")
        if isinstance(manifest, dict):
            path, sha256 = (str(manifest.get(key, "")) for key in ("path", "sha256"))
            if sha256 != known:
                files.append([f"images of {name}", path, _code(sha256)])
        if own:
            runs.setdefault(json.dumps(own, sort_keys=True), (own, []))[1].append(name)

    for split in splits:
        for what, path in (("predictions", split.predictions), ("labels", split.labels)):
            files.append([f"{what} of {split.name}", str(path), _code(atomic.sha256_of(path))])
        add(split.name, read_sidecar(split.predictions) or {}, known=atomic.sha256_of(split.labels))
    if sweep is not None and isinstance(sweep.get("made_by"), dict):
        add("the sweep", sweep["made_by"])
    parts: list[Content] = [part for own, names in runs.values() for part in _experts(own, names)]
    settings = [[f"bootstrap {key}", str(value)] for key, value in result.get("bootstrap", {}).items()]
    settings += [[f"version of {name}", version] for name, version in _versions().items()]
    if files:
        title = "Files that were read"
        parts += [element("h3", "Files"), table(title, ("what", "path", "SHA-256"), files, text=(1, 2))]
    title = "Settings and versions of the evaluation"
    parts += [element("h3", "Evaluation"), table(title, ("what", "value"), settings, text=(1,))]
    return element("section", element("h2", "What was run"), element("div", parts, class_="card"), id="run")


def _versions() -> dict[str, str]:
    libraries = {"numpy": np.__version__, "pandas": pd.__version__, "scikit-learn": sklearn.__version__}
    return {"featdistill": __version__, "python": platform.python_version(), **libraries}


def _experts(sidecar: dict, splits: list[str]) -> list[Content]:
    """Return what a sidecar says: a row an expert, then the settings of all."""
    hashes = sidecar.get("experts")
    hashes = hashes if isinstance(hashes, dict) else {}
    # What names only experts says something of each.
    each = [
        key
        for key, own in sorted(sidecar.items())
        if key != "experts" and isinstance(own, dict) and own and own.keys() <= hashes.keys()
    ]
    rows = [
        [name, *(_shown(sidecar[key].get(name, "")) for key in each), _code(str(sha256))]
        for name, sha256 in sorted(hashes.items())
    ]
    others = [[key, _shown(value)] for key, value in sorted(sidecar.items()) if key not in ("experts", *each)]
    where = ", ".join(splits)
    parts: list[Content] = [element("h3", f"Experts of {where}")]
    if rows:
        header = ("expert", *each, "SHA-256 of the weights")
        parts.append(table(f"Experts of {where}", header, rows, text=range(1, len(header))))
    if others:
        parts.append(table(f"How {where} was predicted", ("setting", "value"), others, text=(1,)))
    return parts


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(own)}" for key, own in sorted(value.items()))
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _code(text: str) -> Html:
    return element("code", text)
