"""One image at a time: read what was handed in, distort it, score it, and say it as a table."""

import html
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from featdistill.command_line import UserError, one_of
from featdistill.data.preprocessing import InputKey, prepare
from featdistill.distortions.libraries import LIBRARIES
from featdistill.distortions.operation import LEVELS, Operation
from featdistill.distortions.plan import Step, apply_plan
from featdistill.images.reading import BrokenImage, decode
from featdistill.inference.fusion import probabilities
from featdistill.inference.predictor import Predictor
from featdistill.inference.scoring import score_dataset


@dataclass(frozen=True)
class Scores:
    """P(AI-generated) of one image: fused, and by each expert's name."""

    fused: float
    experts: dict[str, float]


class OneImage(Dataset):
    """A decoded image, fitted to every input that the experts need; an item is as of `ScoreDataset`."""

    def __init__(self, image: np.ndarray, keys: list[InputKey]) -> None:
        self.image, self.keys = image, list(dict.fromkeys(keys))

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index, "images": {key: prepare(self.image, *key) for key in self.keys}}


def open_image(data: bytes, most_bytes: int) -> np.ndarray:
    """Decode what was handed in to (H, W, 3) uint8 RGB.

    Raises:
        BrokenImage: more bytes or pixels than are allowed, or no image.
    """
    if len(data) > most_bytes:
        raise BrokenImage(f"it has more than {most_bytes / 2**20:g} MB")
    if not data:
        raise BrokenImage("the file is empty")
    return decode(data)


@cache
def operation_names() -> tuple[str, ...]:
    """Return `library/operation` of all that can be applied on this machine, in the libraries' order."""
    return tuple(
        f"{library}/{name}"
        for library, operations in LIBRARIES.items()
        for name, operation in operations.items()
        if not operation.missing()
    )


def describe(name: str, level: int) -> str:
    """Return in a line what an operation of `operation_names` does at a level."""
    operation = _operation(name)
    text = (operation.apply.__doc__ or "").split("\n")[0]
    return f"{text} At level {level}: {operation.scales[level - 1]:g}."


def distort(image: np.ndarray, name: str, level: int, seed: int = 0) -> np.ndarray:
    """Apply an operation.

    Args:
        image: (H, W, 3) uint8 RGB; it is not changed.
        name: of `operation_names`.
        level: 1 to 5.

    Raises:
        UserError: the operation or the level is unknown.
        BrokenImage: the image is too small.
    """
    operation = _operation(name)
    if level not in LEVELS:
        raise UserError(f"the level must be 1 to 5, not {level}")
    return apply_plan(image, (Step(name.partition("/")[0], operation.name, int(level), seed),))


def score(predictor: Predictor, image: np.ndarray) -> Scores:
    """Return what an ensemble says of an image (H, W, 3) uint8 RGB."""
    dataset = OneImage(image, [expert.preprocessing.key for expert in predictor.experts.values()])
    models = predictor.models(predictor.precision, 1)
    settings = predictor.settings() | {"workers": 0, "batch_size": 1}
    (batch,) = score_dataset(models, dataset, **settings)
    fused = predictor.fusion.apply(batch.logits, predictor.names)
    single = probabilities(batch.logits)[:, 0].tolist()
    return Scores(float(fused[0]), dict(zip(predictor.names, single, strict=True)))


def score_table(clean: Scores, distorted: Scores | None = None) -> str:
    """Return an HTML table: a row for the fused score, then one an expert."""
    header = ["P(AI)", "as it is", *(["distorted", "change"] if distorted else [])]
    before = [clean.fused, *clean.experts.values()]
    rows = [[name, shown(own)] for name, own in zip(["fused", *clean.experts], before, strict=True)]
    if distorted:
        after = [distorted.fused, *distorted.experts.values()]
        for row, old, new in zip(rows, before, after, strict=True):
            row += [shown(new), _signed(new - old)]
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    )
    return f'<table class="scores"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def shown(probability: float) -> str:
    """Return a probability with three digits; rounding makes a certainty of none."""
    return f"{min(max(probability, 0.001), 0.999):.3f}" if 0 < probability < 1 else f"{probability:.3f}"


def _signed(change: float) -> str:
    text = f"{change:+.3f}"
    return "0.000" if float(text) == 0 else text


def _operation(name: str) -> Operation:
    one_of("operation", name, operation_names())
    library, _, operation = name.partition("/")
    return LIBRARIES[library][operation]
