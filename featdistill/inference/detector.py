"""One call from pictures to scores, for a program: paths, bytes, Pillow images or arrays, one or many.

    detector = Detector.load("runs/paper/stage2/clip_l14_a/expert")
    detector("photo.jpg").score
    [row.score for row in detector([data, image, pixels])]

`predict.py` for a few images, and the page of `app.py`, are built on it.
"""

import contextlib
import dataclasses
import logging
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from featdistill.data.loading import Broken
from featdistill.data.preprocessing import InputKey
from featdistill.data.views import View, cut_views
from featdistill.images.reading import BrokenImage, decode, from_pillow, read_image
from featdistill.inference.compute import DEFAULT_BATCH_SIZE, full_memory_is_an_error
from featdistill.inference.predictor import Predictor, load_ensemble
from featdistill.inference.scoring import score_all
from featdistill.records.logits import logits_of, probabilities

_log = logging.getLogger(__name__)

Picture = str | os.PathLike | bytes | Image.Image | np.ndarray
# Worker processes take longer to start than these few images take to decode.
_WITHOUT_WORKERS = 16


@dataclass(frozen=True)
class Detection:
    """What is known about one picture.

    Attributes:
        name: the path, or `image N` for the Nth picture of a call that has none.
        score: P(AI-generated) of all experts together, in [0, 1]; None if the picture could not be read.
        logit: that of the score.
        experts: name -> P(AI-generated) by this expert alone.
        error: why the picture could not be read, or None.
    """

    name: str
    score: float | None = None
    logit: float | None = None
    experts: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return what is known as plain JSON."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value not in (None, {})}


class Detector:
    """Scores pictures; keeps nothing between calls, and any number of threads may call it at once.

    The last bits of a score depend on how many pictures are scored together; with `batch_size=1` they do not.

    Args:
        predictor: the experts. A batch size that is open becomes 32, and fp8, which has to be tried on the
            images of a run first, becomes bf16.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.precision, self.batch_size = predictor.precision, predictor.batch_size or DEFAULT_BATCH_SIZE
        if self.precision == "fp8":
            _log.warning("fp8 is for files of predictions (--out); scoring in bf16")
            self.precision = "bf16"
        self._models = predictor.models(self.precision, self.batch_size)
        # A GPU computes one batch at a time, and its choice of kernels is global.
        self._alone = threading.Lock() if predictor.device.type != "cpu" else contextlib.nullcontext()

    @classmethod
    def load(cls, *experts: str | Path, workers: int = 0, **settings: Any) -> "Detector":
        """Load experts.

        Args:
            experts: their folders.
            workers: processes that decode the pictures of a call with more than 16 of them.
            settings: those of `load_ensemble`, such as `fusion`, `tta`, `device` and `batch_size`.

        Raises:
            UserError: there is no expert, one cannot be loaded, or a value is out of range.
        """
        return cls(load_ensemble(experts, workers=workers, **settings))

    def __call__(self, pictures: Picture | Iterable[Picture]) -> Detection | list[Detection]:
        """Score one picture, or many.

        Args:
            pictures: a path (or `archive.zip::member`), the bytes of an image file, a Pillow image, a uint8
                array (H, W, 3) in RGB; or an iterable of them.

        Returns:
            A row for one picture, a list of rows for an iterable; a picture that cannot be read has a row
            with an `error`, and does not change the others.
        """
        if isinstance(pictures, Picture):
            return self.rows([pictures])[0]
        return self.rows(list(pictures))

    def rows(self, pictures: Sequence[Picture], names: Sequence[str] | None = None) -> list[Detection]:
        """Return a row for each picture, under these names."""
        names = [_name(*item) for item in enumerate(pictures, start=1)] if names is None else names
        logits, broken = self._logits(pictures)
        fused = self.predictor.fusion.apply(logits, self.predictor.names)
        fused_logits, single = logits_of(fused), probabilities(logits)
        rows = []
        for index, name in enumerate(names):
            if index in broken:
                rows.append(Detection(name, error=broken[index]))
            else:
                experts = dict(zip(self.predictor.names, single[:, index].tolist(), strict=True))
                rows.append(Detection(name, float(fused[index]), float(fused_logits[index]), experts))
        return rows

    def describe(self) -> dict[str, Any]:
        """Return what decides the scores, as plain JSON: the sidecar of a predictions file.

        `experts` is name -> `folder` (or file), `backbone` and `weights_sha256`.
        """
        experts = {
            name: {**source, "weights_sha256": self.predictor.hashes[name]}
            for name, source in self.predictor.sources.items()
        }
        settled = {"precision": self.precision, "batch_size": self.batch_size}
        return {**self.predictor.sidecar(), **settled, "experts": experts}

    def _logits(self, pictures: Sequence[Picture]) -> tuple[np.ndarray, dict[int, str]]:
        """Return logits (experts, N), NaN for a picture that cannot be read, and why."""
        settings = self.predictor.settings() | {"batch_size": self.batch_size}
        if len(pictures) <= _WITHOUT_WORKERS:
            settings["workers"] = 0
        keys = [expert.preprocessing.key for expert in self.predictor.experts.values()]
        dataset = _Pictures(pictures, keys, self.predictor.views)
        with self._alone, full_memory_is_an_error():
            return score_all(self._models, dataset, **settings)


class _Pictures(Dataset):
    """Pictures to score; the items are those of `ScoreDataset`."""

    def __init__(self, pictures: Sequence[Picture], keys: Sequence[InputKey], views: Sequence[View]) -> None:
        self.pictures, self.keys, self.views = pictures, keys, views

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any] | Broken:
        try:
            image = pixels_of(self.pictures[index])
        except BrokenImage as error:
            return Broken(index, str(error))
        return {"index": index, "images": cut_views(image, self.keys, self.views)}


def pixels_of(picture: Picture) -> np.ndarray:
    """Return a picture as (H, W, 3) uint8 RGB; whichever way it is given, the pixels are the same.

    Raises:
        BrokenImage: it cannot be read.
    """
    if isinstance(picture, (str, os.PathLike)):
        return read_image(os.fspath(picture))
    if isinstance(picture, bytes):
        return decode(picture)
    if isinstance(picture, Image.Image):
        return from_pillow(picture)
    if not isinstance(picture, np.ndarray):
        raise BrokenImage(f"a {type(picture).__name__} is not a picture")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        shape = f"{picture.shape} {picture.dtype}"
        raise BrokenImage(f"an array must be (H, W, 3) uint8 in RGB, not {shape}")
    return np.ascontiguousarray(picture)


def _name(number: int, picture: Picture) -> str:
    return os.fspath(picture) if isinstance(picture, (str, os.PathLike)) else f"image {number}"
