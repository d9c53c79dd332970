"""The model card of an expert on the Hub: what is known about it, for whoever considers using it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from featdistill import __version__
from featdistill.calibration import Calibrator
from featdistill.calibration.calibrator import share
from featdistill.command_line import UserError, counted
from featdistill.evaluation import tables
from featdistill.hub import training_data
from featdistill.hub.training_data import Part
from featdistill.models.backbones import license_of
from featdistill.models.encoders import BackboneSpec
from featdistill.models.expert import Expert
from featdistill.models.weights import FILE_WEIGHTS
from featdistill.records.provenance import read_record
from featdistill.text_tables import number, table, with_interval

_TAGS = ["featdistill", "ai-generated-image-detection", "synthetic-image-detection", "image-forensics"]
_RESIZE = {
    "shorter": "the shorter side is resized to that, and the middle cropped",
    "squash": "both sides are resized to that",
    "crop": "the middle is cropped without resizing; smaller images are tiled",
}
_MAX_GENERATORS = 30


def write(
    repository: str,
    expert: Expert,
    card: dict[str, Any],
    parts: Sequence[Part],
    license_id: str,
    metrics: Sequence[dict[str, Any]] = (),
    calibrator: Calibrator | None = None,
) -> str:
    """Return the text of README.md.

    Args:
        repository: `OWNER/NAME`.
        card: the content of `expert.json`, without paths of this machine.
        parts: see `training_data.read_parts`.
        license_id: of the weights, as the Hub abbreviates it.
        metrics: see `read_metrics`.
        calibrator: what is uploaded with the expert as `calibrator.json`.
    """
    from huggingface_hub import ModelCardData

    has_pretrained, spec = card.get("recipe", {}).get("weights") == "hub", expert.spec
    data = ModelCardData(
        license=license_id,
        library_name="featdistill",
        pipeline_tag="image-classification",
        tags=_TAGS,
        base_model=base_model(spec) if has_pretrained else None,
    )
    sections = {
        "Use": _use(repository, calibrator),
        "What it is": _facts(expert, card, has_pretrained),
        "Training data": training_data.described(list(parts)),
        "Recipe": _recipe(card),
        "Metrics": _metrics(card, metrics),
        "Calibration": _calibration(calibrator),
        "Limits": _limits(card, parts, has_metrics=bool(metrics)),
        "License": _license(spec, parts, license_id, has_pretrained),
    }
    head = (
        "A detector of AI-generated images: one picture in, the probability that it is AI-generated out. It "
        f"is an expert of FeatDistill {__version__}, whose command `push` wrote this page from what the "
        "expert's card (`expert.json`) and the files named there record."
    )
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"---\n{data.to_yaml()}\n---\n\n# {repository.partition('/')[2]}\n\n{head}\n\n{body}\n"


def is_own(readme: Path) -> bool:
    """Return whether a README.md is one that `write` made."""
    parts = readme.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    return len(parts) == 3 and not parts[0] and "library_name: featdistill" in parts[1].splitlines()


def base_model(spec: BackboneSpec) -> str | None:
    """Return the Hub's name of a backbone's pretrained weights, if they are there."""
    if spec.library == "timm" and spec.tag not in FILE_WEIGHTS:
        import timm

        config = timm.get_pretrained_cfg(spec.full_name, allow_unregistered=True)
        place = (config.hf_hub_id if config else None) or ""
        return f"{place}{config.architecture}.{config.tag}" if place.endswith("/") else place or None
    if spec.library == "open_clip":
        import open_clip

        return open_clip.get_pretrained_cfg(spec.name, spec.tag).get("hf_hub", "").strip("/") or None
    return None


def read_metrics(path: str) -> dict[str, Any]:
    """Return what `evaluate.py` wrote as `metrics.json` for one expert.

    Raises:
        UserError: it is something else, or for several experts together.
    """
    remedy = "use the metrics.json that evaluate.py wrote for predictions of this expert alone"
    result = read_record(path, remedy)
    if result is None:
        raise UserError(f"metrics {path} do not exist; {remedy}")
    try:
        several = max(len(split["experts"]["experts"]) for split in result["splits"].values())
        # The place in the challenge's table is of an ensemble's run, not of a model.
        tables.summary(result | {"leaderboard": None})
        share(result["intervals"]["confidence"]), result["intervals"]["method"]
        made_by(result)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not hold metrics that this version can read; {remedy}") from error
    if several > 1:
        raise UserError(f"{path} has the metrics of {several} experts together; {remedy}")
    return result | {"leaderboard": None}


def made_by(metrics: dict[str, Any]) -> set[str | None]:
    """Return the SHA-256 of the weights that metrics were measured with; with None if a split names none."""
    made_from = [split.get("made_from") or {"": None} for split in metrics["splits"].values()]
    return {sha256 for experts in made_from for sha256 in experts.values()}


def _use(repository: str, calibrator: Calibrator | None) -> str:
    more, imports, answer = "", "", "score)  # P(AI-generated), from 0 to 1"
    if calibrator:
        imports = "from huggingface_hub import hf_hub_download\n"
        made_for = calibrator.made_for or {}
        settings = {"fusion": "probability_mean", "tta": "none"}
        settings = {name: made_for[name] for name in settings if made_for.get(name, "") != settings[name]}
        more = f',\n    calibrator=hf_hub_download("{repository}", "calibrator.json"),\n'
        more += "".join(f"    {name}={value!r},\n" for name, value in settings.items() if value)
        answer = "verdict)  # real, unsure or AI"
    load = f'"hub:{repository}"' if not more else f'\n    "hub:{repository}"{more}'
    return f"""In a checkout of FeatDistill, `pip install .` installs it. Then:

```python
{imports}from featdistill import Detector
detector = Detector.load({load})
print(detector("photo.jpg").{answer}
```

Or `python predict.py photo.jpg --experts hub:{repository}`. `hub:{repository}@COMMIT` stays the same
when this repository changes."""


def _facts(expert: Expert, card: dict[str, Any], has_pretrained: bool) -> str:
    spec, fitted = expert.spec, expert.preprocessing
    resize = _RESIZE.get(fitted.resize, fitted.resize)
    limit = f"; images are first reduced to {fitted.max_side_px} px" if fitted.max_side_px else ""
    hidden = expert.head_config["hidden"]
    rows = [
        ("backbone", f"{spec.library}:{spec.full_name}" + (", pretrained" if has_pretrained else "")),
        ("parameters", f"{sum(parameter.numel() for parameter in expert.parameters()):,}"),
        ("feature", f"{spec.feature}, {expert.feature_dim} values"),
        ("head", f"one hidden layer of {hidden}" if hidden else "linear"),
        ("input", f"{fitted.span}, RGB: {resize}{limit}"),
        ("normalization", f"mean {_numbers(fitted.mean)}, std {_numbers(fitted.std)}"),
        ("trained with", ", ".join(f"{name} {version}" for name, version in card["versions"].items())),
        ("SHA-256 of the weights", card["weights_sha256"]),
    ]
    if "released" in card:
        rows.append(("converted from", f"{card['released'].get('file')} of the FeatDistill authors"))
    # Not aligned by `table`: a column of numbers would be to the right.
    lines = [f"| {name} | {' '.join(str(text).replace('|', chr(92) + '|').split())} |" for name, text in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _recipe(card: dict[str, Any]) -> str:
    settings = {key: card[key] for key in ("stage", "recipe", "probe", "teacher", "files") if card.get(key)}
    if not settings:
        return "The expert's card records no recipe."
    name = card.get("recipe", {}).get("name", "not named")
    epoch = f", epoch {card['epoch']}" if "epoch" in card else ""
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=100)
    return (
        f"Recipe `{name}`{epoch}. All settings:\n\n<details><summary>YAML</summary>\n\n```yaml\n{text}```\n\n"
        "</details>"
    )


def _metrics(card: dict[str, Any], measured: Sequence[dict[str, Any]]) -> str:
    texts = []
    rows = [[name, value] for name, value in _figures(card.get("metrics", {}))]
    if rows:
        texts.append("On the hold-out, as recorded in training, which also chose the epoch or settings:")
        texts.append(table(["figure", "value"], rows))
    for result in measured:
        text = tables.summary(result).strip().replace("## ", "### ").replace("### Splits\n\n", "", 1)
        how = result["intervals"]
        intervals = f"{share(how['confidence'])} intervals ({how['method']})"
        measured_with = f"Measured with `evaluate.py`, with {intervals}"
        if None in made_by(result):
            measured_with += "; the file does not name the weights that were measured"
        texts.append(f"{measured_with}:\n\n{text}")
    return "\n\n".join(texts) or "None are recorded."


def _figures(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the figures of nested metrics; an AUC with bounds is one."""
    if "auc" in values and "low" in values:
        yield prefix, with_interval(values["auc"], (values["low"], values["high"]))
        return
    for key, value in values.items():
        name = f"{prefix}, {key}" if prefix else key
        if isinstance(value, dict):
            yield from _figures(value, name)
        elif isinstance(value, int):
            yield name, f"{value:,}"
        elif value is None or isinstance(value, float):
            yield name, number(value)


def _calibration(calibrator: Calibrator | None) -> str:
    if calibrator is None:
        return (
            "None: scores rank images, but 0.5 is not a threshold with a known rate of errors. Fit one on "
            "your own images with `python -m featdistill calibrate`."
        )
    fitted_on = f"{counted(calibrator.real, 'real image')} and {calibrator.ai:,} AI-generated"
    return (
        f"`calibrator.json`: {calibrator.promise()} It was fitted on {fitted_on}. Images unlike those, or a "
        "different share of distorted ones, break the promise; fit your own where you can."
    )


def _limits(card: dict[str, Any], parts: Sequence[Part], *, has_metrics: bool) -> str:
    rows, limits = training_data.trained_rows(list(parts)), []
    if rows is None:
        limits.append("Which generators and sources it was trained on is not known in full.")
    else:
        generators = sorted({name for name in rows["generator"] if name})
        shown = ", ".join(generators[:_MAX_GENERATORS])
        shown += f" and {len(generators) - _MAX_GENERATORS} more" if len(generators) > _MAX_GENERATORS else ""
        limits.append(f"Generators of its training images: {shown or 'they are not named'}.")
        sources = sorted(set(rows["source"]))
        if len(sources) == 1:
            limits.append(f"All training images are from one source, {sources[0] or 'which is not named'}.")
    limits.append(
        "Images of other generators, newer ones above all, may be missed, however high the AUC above."
    )
    drawn = card.get("recipe", {}).get("distortions")
    trained = (
        f"Training drew the distortions `{drawn}`" if drawn else "Distortions of training are not recorded"
    )
    if drawn == "none":
        trained = "Training drew no distortions"
    limits += [
        f"{trained}. Resizing, recompression, screenshots, filters and deliberate attacks change scores.",
        "Edited photographs, drawings, scans and video frames are other kinds of images; it is not known to "
        "handle them unless the training data above name them.",
        "A score is not evidence on its own. Look at where an image comes from, and do not decide about a "
        "person by a score.",
    ]
    if not has_metrics:
        limits.append("No figures on other images than the hold-out are given here.")
    return "\n".join(f"- {limit}" for limit in limits)


def _license(spec: BackboneSpec, parts: Sequence[Part], license_id: str, has_pretrained: bool) -> str:
    texts = [f"Whoever published these weights offers them as `{license_id}`."]
    if license_id == "unknown":
        texts = ["Whoever published these weights states no license; ask before you use them."]
    if has_pretrained:
        texts.append(
            f"They started from published weights of the backbone; their license: {license_of(spec)}."
        )
    rows = training_data.trained_rows(list(parts))
    if rows is None:
        texts.append("The licenses of the training images are not known in full.")
        return " ".join(texts)
    count, unknown = f"{len(rows):,}", int((rows["licence"] == "").sum())
    if unknown:
        texts.append(f"Training images without a license on record: {unknown:,} of {count}.")
    if terms := training_data.restricted(rows):
        named = "; ".join(f"{text}: {images:,}" for text, images in terms.items())
        texts.append(
            f"**{sum(terms.values()):,} of {count} training images are under terms that exclude commercial "
            f"or other use ({named}).** Whether such terms reach weights that were trained on the images is "
            "not settled; they are named here so that you can decide."
        )
    return " ".join(texts)
