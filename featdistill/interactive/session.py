"""One image at a time: decode an upload, distort it, and show the scores as a table."""

from functools import cache
from pathlib import Path

import numpy as np

from featdistill.calibration import AI, REAL, UNSURE
from featdistill.command_line import UserError, one_of
from featdistill.distortions.libraries import LIBRARIES
from featdistill.distortions.operation import LEVELS, Operation
from featdistill.distortions.plan import Step, apply_plan
from featdistill.images.credentials import INSTALL
from featdistill.images.reading import BrokenImage, decode
from featdistill.inference.detector import Detection
from featdistill.report.markup import render

_VERDICTS = {
    AI: ("Verdict: AI-generated", "The score is above the threshold for calling an image AI-generated."),
    REAL: ("Verdict: real", "The score is below the threshold for calling an image real."),
    UNSURE: ("Verdict: unsure", "The score is between the thresholds: the experts cannot tell this image."),
}


def open_image(data: bytes, max_bytes: int) -> np.ndarray:
    """Decode an uploaded file to (H, W, 3) uint8 RGB.

    Raises:
        BrokenImage: the file has too many bytes or pixels, or is not an image.
    """
    if len(data) > max_bytes:
        raise BrokenImage(f"it is larger than {max_bytes / 2**20:g} MB")
    if not data:
        raise BrokenImage("the file is empty")
    return decode(data)


@cache
def operation_names() -> tuple[str, ...]:
    """Return `library/operation` for each operation that works on this machine, in the libraries' order."""
    return tuple(
        f"{library}/{name}"
        for library, operations in LIBRARIES.items()
        for name, operation in operations.items()
        if not operation.missing()
    )


def describe(name: str, level: int) -> str:
    """Return a line on what an operation of `operation_names` does at a level."""
    operation = _operation(name)
    text = (operation.apply.__doc__ or "").split("\n")[0]
    return f"{text} At level {level}: {operation.scales[level - 1]:g}."


def distort(image: np.ndarray, name: str, level: int, seed: int = 0) -> np.ndarray:
    """Return an image (H, W, 3) uint8 RGB under an operation of `operation_names` at level 1 to 5.

    Raises:
        UserError: the operation or the level is unknown.
        BrokenImage: the image is too small.
    """
    operation = _operation(name)
    if level not in LEVELS:
        raise UserError(f"the level must be 1 to 5, not {level}")
    return apply_plan(image, (Step(name.partition("/")[0], operation.name, int(level), seed),))


def judgment(row: Detection) -> str:
    """Return HTML with the verdict and its promise, if there is one, and with the Content Credentials."""
    headline, meaning = _VERDICTS.get(row.verdict, ("", ""))
    credentials = row.credentials.sentence() if row.credentials else f"{INSTALL}."
    return render(
        "judgment.html",
        Path(__file__).parent,
        headline=headline,
        meaning=meaning,
        promise=row.promise,
        credentials=credentials,
    )


def score_table(clean: Detection, distorted: Detection | None = None) -> str:
    """Return an HTML table with a row for all experts together, then one per expert."""
    rows = []
    for name in (None, *clean.experts):
        scores = [one.experts[name] if name else one.score for one in (clean, distorted) if one]
        cells = [shown(score) for score in scores]
        if distorted:
            change = f"{scores[1] - scores[0]:+.3f}"
            cells.append("0.000" if float(change) == 0 else change)
        rows.append((name or "all experts", cells))
    columns = ["original", *(["distorted", "change"] if distorted else [])]
    return render("scores.html", Path(__file__).parent, columns=columns, rows=rows)


def shown(probability: float) -> str:
    """Return a probability with three digits; only certainties are shown as 0 and 1."""
    return f"{min(max(probability, 0.001), 0.999):.3f}" if 0 < probability < 1 else f"{probability:.3f}"


def _operation(name: str) -> Operation:
    one_of("operation", name, operation_names())
    library, _, operation = name.partition("/")
    return LIBRARIES[library][operation]
