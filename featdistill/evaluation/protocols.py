"""The protocols of GenImage and UniversalFakeDetect: one row per generator, and their mean.

Each set is the AI-generated images of one generator and the real images that belong to it, as the manifest's
column `protocol_sets` says; a real image in several sets counts in each. An AI-generated image without an
entry belongs to the set of its `generator`. Case and punctuation of the names of sets do not matter. Training
images (column `split`) are left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from featdistill.command_line import UserError, counted, one_of
from featdistill.evaluation.metrics import THRESHOLD, headline
from featdistill.evaluation.splits import label_sources
from featdistill.records.labels import label_rows
from featdistill.records.manifest import read_manifest
from featdistill.records.predictions import match_names, name_list, read_errors, read_predictions
from featdistill.text_tables import number, table

METRICS = ("accuracy", "average_precision", "real_accuracy", "ai_accuracy", "auc")
CSV_HEADER = ("kind", "name", "real", "ai", "unreadable", *METRICS, "note")
PUBLISHED_NOTE = "published by the paper, not reproduced here"
_TABLE_HEADER = ("set", "real", "AI", "acc@0.5", "AP", "real acc", "AI acc", "AUC")
# Separates the sets in a cell of `protocol_sets`.
_SEPARATOR = ";"


@dataclass(frozen=True)
class Protocol:
    """The sets of a benchmark.

    Attributes:
        title: the benchmark's usual name.
        sets: name of each set, in the order of the benchmark's tables -> its other names.
        published: (method, mean accuracy over all sets, source) of papers.
    """

    title: str
    sets: dict[str, tuple[str, ...]]
    published: tuple[tuple[str, float, str], ...]


PROTOCOLS = {
    # Order of the table of GenImage, arXiv 2306.08571.
    "genimage": Protocol(
        "GenImage",
        {
            "Midjourney": (),
            "SD v1.4": ("stable_diffusion_v_1_4", "stable_diffusion_1_4", "sd_1_4", "sdv4"),
            "SD v1.5": ("stable_diffusion_v_1_5", "stable_diffusion_1_5", "sd_1_5", "sdv5"),
            **dict.fromkeys(("ADM", "GLIDE", "Wukong", "VQDM", "BigGAN"), ()),
        },
        (("MPFT", 0.982, "arXiv 2601.03586"),),
    ),
    # The sets of ForenSynths, arXiv 1912.11035, and the diffusion sets of arXiv 2302.10174.
    "universalfakedetect": Protocol(
        "UniversalFakeDetect",
        dict.fromkeys(
            (
                *("progan", "cyclegan", "biggan", "stylegan", "gaugan", "stargan", "deepfake", "seeingdark"),
                *("san", "crn", "imle", "guided", "ldm_200", "ldm_200_cfg", "ldm_100", "glide_100_27"),
                *("glide_50_27", "glide_100_10", "dalle"),
            ),
            (),
        ),
        (("MPFT", 0.946, "arXiv 2601.03586"),),
    ),
}


def score(name: str, predictions: list[str], labels: list[str] | None = None) -> dict:
    """Score predictions by a protocol.

    Args:
        name: one of `PROTOCOLS`.
        predictions: files that together contain the sets, divided in any way.
        labels: manifests, see `splits.label_sources`.

    Returns:
        `protocol`, `title`, `threshold`; `sets`: in the protocol's order `name`, `real` and `ai` (images with
        a score), `unreadable`, `METRICS`, and `missing`, why the set has no metrics, or None; `mean`:
        `sets` (how many it is taken over), `of`, and `METRICS`, each None where a set has none; `published`:
        `method`, `accuracy`, `source`, `note`. Numbers of images: `images` in the sets that have metrics and
        `unreadable` in all sets, each image counted once; `training` and `unlabeled`, which are left out;
        and `left_out`: each name that is not a set of the protocol -> images ("" for real images without a
        name).

    Raises:
        UserError: the protocol is unknown, a manifest does not name the sets, an image of a set has neither a
            score nor a reason why, or has two scores, or no set has scores of both classes.
    """
    one_of("protocol", name, PROTOCOLS)
    protocol = PROTOCOLS[name]
    images = _read(predictions, labels)
    training = (images["split"].str.casefold() == "train").to_numpy()
    unlabeled = (images["label"] == -1).to_numpy() & ~training
    eligible = ~training & ~unlabeled
    scored, unreadable = np.isfinite(images["score"].to_numpy()), images["unreadable"].to_numpy()
    members, left_out = _members(images, protocol, eligible & scored)
    rows = [_score_set(title, images[rows & eligible]) for title, rows in members.items()]
    complete = [row for row in rows if not row["missing"]]
    in_complete = np.logical_or.reduce([members[row["name"]] for row in complete])
    absent = in_complete & eligible & ~scored & ~unreadable
    if absent.any():
        names = images["name"].to_numpy(dtype=object)[absent]
        raise UserError(
            f"{', '.join(predictions)}: images without a prediction ({len(names)}): {name_list(names)}"
        )
    if not complete:
        raise UserError(
            f"no set of {protocol.title} has scores of real and of AI-generated images"
            + (f"; the labels name {name_list(filter(None, left_out))}" if any(left_out) else "")
        )
    in_any = np.logical_or.reduce(list(members.values()))
    return {
        "protocol": name,
        "title": protocol.title,
        "threshold": THRESHOLD,
        "sets": rows,
        "mean": {"sets": len(complete), "of": len(rows), **{key: _mean(complete, key) for key in METRICS}},
        "published": [
            {"method": method, "accuracy": accuracy, "source": source, "note": PUBLISHED_NOTE}
            for method, accuracy, source in protocol.published
        ],
        "images": int(images["image"][in_complete & eligible & scored].nunique()),
        "unreadable": int(images["image"][in_any & eligible & unreadable].nunique()),
        "training": int((training & scored).sum()),
        "unlabeled": int((unlabeled & scored).sum()),
        "left_out": left_out,
    }


def markdown(result: dict) -> str:
    """Return the table of `score` with its notes."""
    mean = result["mean"]
    lines = []
    for row in result["sets"]:
        shown = ("missing", "", "", "", "") if row["missing"] else (number(row[key]) for key in METRICS)
        lines.append((row["name"], f"{row['real']:,}", f"{row['ai']:,}", *shown))
    title = f"mean of {mean['sets']} of {mean['of']} sets"
    lines.append((title, "", "", *(number(mean[key]) for key in METRICS)))
    for one in result["published"]:
        lines.append((f"{one['method']} ({one['note']})", "", "", f"{one['accuracy']:g}", "", "", "", ""))
    notes = "\n".join(f"- {note}" for note in _notes(result))
    return f"# {result['title']} protocol\n\n{table(_TABLE_HEADER, lines)}\n\n{notes}\n"


def csv_rows(result: dict) -> Iterator[tuple]:
    """Yield the rows of `CSV_HEADER`; `kind` is `set`, `mean` or `published`."""
    for row in result["sets"]:
        counts = (row[key] for key in ("real", "ai", "unreadable"))
        note = f"missing: {row['missing']}" if row["missing"] else ""
        yield "set", row["name"], *counts, *(row[key] for key in METRICS), note
    mean = result["mean"]
    note = f"{mean['sets']} of {mean['of']} sets"
    yield "mean", "mean", None, None, None, *(mean[key] for key in METRICS), note
    for one in result["published"]:
        shown = (one["accuracy"] if key == "accuracy" else None for key in METRICS)
        yield "published", one["method"], None, None, None, *shown, f"{one['note']}: {one['source']}"


def match_set(name: str, protocol: Protocol) -> str | None:
    """Return the protocol's set of that name, ignoring case and punctuation; None where there is none."""
    known = {_plain(other): title for title, names in protocol.sets.items() for other in (title, *names)}
    return known.get(_plain(name))


def _read(predictions: list[str], labels: list[str] | None) -> pd.DataFrame:
    """Return the rows of all manifests: `label` (-1 unknown), `score` (NaN without), `unreadable`."""
    sources = label_sources(predictions, labels)
    parts = []
    for source in dict.fromkeys(sources):
        rows = read_manifest(source)
        if "protocol_sets" not in rows:
            raise UserError(
                f"{source} has no column protocol_sets, which names the sets that an image belongs to; "
                "make the manifest with data_prep.genimage or data_prep.universalfakedetect"
            )
        scores, listed = np.full(len(rows), np.nan), np.zeros(len(rows), dtype=bool)
        for path in (path for path, other in zip(predictions, sources, strict=True) if other == source):
            frame = read_predictions(path)
            positions = label_rows(frame, rows)
            twice = frame["name"].to_numpy(dtype=object)[np.isfinite(scores[positions])]
            if len(twice):
                raise UserError(
                    f"{path}: images that another file has scores of ({len(twice)}): {name_list(twice)}"
                )
            scores[positions] = frame["score"]
            broken = match_names([name for name, _ in read_errors(path)], rows["name"].tolist())
            listed[broken[broken >= 0]] = True
        rows["label"] = rows["label"].fillna(-1).astype("int8")
        rows["score"], rows["unreadable"] = scores, listed & np.isnan(scores)
        rows["split"] = rows.get("split", "")
        parts.append(rows)
    return pd.concat(parts, ignore_index=True)


def _members(
    images: pd.DataFrame, protocol: Protocol, counted: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Return which images belong to each set, (N,) bool, and the number of images of each other name.

    Args:
        counted: (N,) bool, the images that are counted under other names.
    """
    by_generator = (images["protocol_sets"] == "") & (images["label"] == 1)
    cells = images["protocol_sets"].where(~by_generator, images["generator"])
    members = {title: np.zeros(len(images), dtype=bool) for title in protocol.sets}
    others: dict[str, int] = {}
    codes, texts = pd.factorize(cells.to_numpy(dtype=object), sort=True)
    for code, text in enumerate(texts):
        has_text = codes == code
        for name in text.split(_SEPARATOR):
            title = match_set(name, protocol)
            if title is not None:
                members[title] |= has_text
            elif (has_text & counted).any():
                others[name.strip()] = others.get(name.strip(), 0) + int((has_text & counted).sum())
    return members, others


def _score_set(title: str, rows: pd.DataFrame) -> dict:
    """Return a row of `score`."""
    scored = rows[np.isfinite(rows["score"])]
    repeated = scored["image"][scored["image"].duplicated()]
    if len(repeated):
        raise UserError(
            f"{title}: image {repeated.iloc[0]} has two scores, from two manifests; pass only one"
        )
    label = scored["label"].to_numpy()
    real, ai = int((label == 0).sum()), int((label == 1).sum())
    lacking = [what for what, count in (("real", real), ("AI-generated", ai)) if not count]
    missing = f"no scores of {' and '.join(lacking)} images" if lacking else None
    metrics = dict.fromkeys(METRICS)
    if not missing:
        every = headline(label, scored["score"].to_numpy(), np.full(len(scored), -1))
        metrics = {key: every[key] for key in METRICS}
    unreadable = int(rows["unreadable"].sum())
    return {"name": title, "real": real, "ai": ai, "unreadable": unreadable, **metrics, "missing": missing}


def _mean(rows: list[dict], key: str) -> float | None:
    values = [row[key] for row in rows]
    return None if None in values else float(np.mean(values))


def _notes(result: dict) -> list[str]:
    mean = result["mean"]
    notes = [
        f"accuracies at {result['threshold']}; each set against its own real images, shared ones in each of "
        f"their sets; {counted(result['images'], 'image')}"
    ]
    reasons = dict.fromkeys(row["missing"] for row in result["sets"] if row["missing"])
    for reason in reasons:
        names = ", ".join(row["name"] for row in result["sets"] if row["missing"] == reason)
        notes.append(f"missing, {reason}: {names}")
    if any(row["accuracy"] is None and not row["missing"] for row in result["sets"]):
        notes.append("accuracies n/a: scores are outside [0, 1]")
    unreadable = [f"{row['name']} {row['unreadable']:,}" for row in result["sets"] if row["unreadable"]]
    if unreadable:
        notes.append(f"unreadable images, left out: {result['unreadable']:,} ({', '.join(unreadable)})")
    for state in ("training", "unlabeled"):
        if result[state]:
            notes.append(f"{state} images, left out: {result[state]:,}")
    if result["left_out"]:
        named = (f"{name or '(no name)'} {count:,}" for name, count in result["left_out"].items())
        notes.append(f"not in a set of {result['title']}, left out: images of {', '.join(named)}")
    partial = f", this run's over {mean['sets']}" if mean["sets"] < mean["of"] else ""
    for one in result["published"]:
        notes.append(
            f"{one['method']}: mean accuracy {one['note']} ({one['source']}); "
            f"its mean is over the whole benchmark{partial}"
        )
    return notes


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))
