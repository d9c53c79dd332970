"""One call from pictures to verdicts, for a program: paths, bytes, Pillow images or arrays, one or many.

    detector = Detector.load("runs/paper/stage2/clip_l14_a/expert", calibrator="calibrator.json")
    detector("photo.jpg").verdict
    [row.score for row in detector([data, image, pixels])]

`predict.py` for a few images, and the page of `app.py`, are built on it.
"""

import contextlib
import dataclasses
import io
import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from featdistill.calibration import Calibrator
from featdistill.calibration.stability import (
    PRESET,
    SEED,
    Request,
    Stability,
    check_request,
    copy_names,
    is_near,
    parse_request,
    stability_of,
)
from featdistill.command_line import UserError
from featdistill.data.gpu_decoding import GPU
from featdistill.data.loading import Broken
from featdistill.data.preprocessing import InputKey
from featdistill.data.views import View, cut_views
from featdistill.distortions.plan import apply_plan
from featdistill.distortions.presets import PRESETS
from featdistill.images.credentials import Credentials, read_credentials, require_credentials
from featdistill.images.reading import MAX_PIXELS, BrokenImage, decode, from_pillow, read_bytes, read_image
from featdistill.inference.compute import DEFAULT_BATCH_SIZE, full_memory_is_an_error
from featdistill.inference.predictor import Predictor, load_ensemble
from featdistill.inference.scoring import score_all
from featdistill.records.logits import logits_of, probabilities
from featdistill.seeds import evaluation_generator

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A picture as the experts of one detector need it: small, and without what only its file tells.

    Attributes:
        images: `View.key` of `Preprocessing.key` -> (3, S, S) uint8.
    """

    images: dict[Any, Tensor]


Picture = str | os.PathLike | bytes | bytearray | memoryview | io.IOBase | Image.Image | np.ndarray | Prepared
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
        verdict: `real`, `unsure` or `AI`; like the next three, None without a calibrator.
        probability: calibrated P(AI-generated), in [0, 1].
        thresholds: `AI` is the logit above which a picture is called so, `real` that below which (or None).
        promise: what the verdicts keep.
        stability: what becomes of the score when the picture is delivered again, if requested.
        credentials: what the file's Content Credentials state, if requested and there is a file; they
            do not change the score.
        error: why the picture could not be read, or None.
    """

    name: str
    score: float | None = None
    logit: float | None = None
    experts: dict[str, float] = field(default_factory=dict)
    verdict: str | None = None
    probability: float | None = None
    thresholds: dict[str, float | None] | None = None
    promise: str | None = None
    stability: Stability | None = None
    credentials: Credentials | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return what is known as plain JSON."""
        return dataclasses.asdict(self, dict_factory=_known)


class Detector:
    """Scores pictures; keeps nothing between calls, and any number of threads may call it at once.

    The last bits of a score depend on how many pictures are scored together; with `batch_size=1` they do not.

    Args:
        predictor: the experts. A batch size that is open becomes 32, and fp8, which has to be tried on the
            images of a run first, becomes bf16.
        calibrator: makes verdicts of scores; without one there are scores alone.
        stability: asks for the `stability` of each picture, or of near scores.
        credentials: whether to read the Content Credentials of files.

    Raises:
        UserError: the calibrator was fitted for other scores, or is missing where near scores are requested;
            a package is missing; or images are to be decoded on the GPU.
    """

    def __init__(
        self,
        predictor: Predictor,
        calibrator: Calibrator | None = None,
        stability: Request | None = None,
        credentials: bool = False,
    ) -> None:
        self.predictor, self.calibrator, self.stability = predictor, calibrator, stability
        self.credentials = credentials
        if credentials:
            require_credentials()
        if predictor.decode == GPU:
            raise UserError("--decode gpu is for files of predictions; leave it out, or use --out")
        if calibrator:
            calibrator.check(predictor.sidecar(), "these experts")
        check_request(stability, calibrator)
        self.precision, self.batch_size = predictor.precision, predictor.batch_size or DEFAULT_BATCH_SIZE
        if self.precision == "fp8":
            _log.warning("fp8 is for files of predictions (--out); scoring in bf16")
            self.precision = "bf16"
        self._models = predictor.models(self.precision, self.batch_size)
        self._keys = [expert.preprocessing.key for expert in predictor.experts.values()]
        # A GPU computes one batch at a time, and its choice of kernels is global.
        self._alone = threading.Lock() if predictor.device.type != "cpu" else contextlib.nullcontext()

    @classmethod
    def load(
        cls,
        *experts: str | Path,
        calibrator: str | Path | Calibrator | None = None,
        stability: int | str | None = None,
        credentials: bool = False,
        workers: int = 0,
        **settings: Any,
    ) -> "Detector":
        """Load experts.

        Args:
            experts: their folders, `hub:OWNER/NAME`, `onnx:DIR` or `published:NAME`; see `load_ensemble`.
            calibrator: the file that `python -m featdistill calibrate` wrote for them.
            stability: number of copies of each picture, or `near`; see `predict.py --stability`.
            credentials: whether to read what Content Credentials state; needs c2pa-python.
            workers: processes that decode the pictures of a call with more than 16 of them.
            settings: those of `load_ensemble`, such as `fusion`, `tta`, `device` and `batch_size`.

        Raises:
            UserError: there is no expert, one cannot be loaded, or a value is out of range.
        """
        if calibrator is not None and not isinstance(calibrator, Calibrator):
            calibrator = Calibrator.load(calibrator)
        request = None if stability is None else parse_request(str(stability))
        predictor = load_ensemble(experts, workers=workers, **settings)
        return cls(predictor, calibrator, request, credentials)

    def __call__(self, pictures: Picture | Iterable[Picture]) -> Detection | list[Detection]:
        """Score one picture, or many.

        Args:
            pictures: a path (or `archive.zip::member`), the bytes of an image file or a file opened in binary
                mode, a Pillow image, a uint8 array (H, W, 3) in RGB; or an iterable of them.

        Returns:
            A row for one picture, a list of rows for an iterable; a picture that cannot be read has a row
            with an `error`, and does not change the others.
        """
        if isinstance(pictures, Picture) or not isinstance(pictures, Iterable):
            return self.rows([pictures])[0]
        return self.rows(list(pictures))

    def rows(self, pictures: Sequence[Picture], names: Sequence[str] | None = None) -> list[Detection]:
        """Return a row for each picture, under these names."""
        pictures = [_plain(picture) for picture in pictures]
        names = [_name(*item) for item in enumerate(pictures, start=1)] if names is None else names
        logits, broken = self._logits([partial(_read, picture) for picture in pictures])
        fused = self.predictor.fusion.apply(logits, self.predictor.names)
        fused_logits, single = logits_of(fused), probabilities(logits)
        rows = []
        for index, name in enumerate(names):
            if index in broken:
                rows.append(Detection(name, error=broken[index]))
                continue
            experts = dict(zip(self.predictor.names, single[:, index].tolist(), strict=True))
            row = Detection(name, float(fused[index]), float(fused_logits[index]), experts)
            rows.append(self._judged(row, pictures[index]))
        return rows

    def prepare(self, data: bytes, max_pixels: int = MAX_PIXELS) -> Prepared:
        """Decode an image file's bytes to what `rows` needs of it, without stability and credentials.

        Raises:
            BrokenImage: they cannot be decoded; see `decode`.
        """
        return Prepared(cut_views(decode(data, max_pixels), self._keys, self.predictor.views))

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

    def _judged(self, row: Detection, picture: Picture) -> Detection:
        logit, calibrator = np.array([row.logit]), self.calibrator
        if calibrator:
            row = dataclasses.replace(
                row,
                verdict=str(calibrator.verdicts(logit)[0]),
                probability=float(calibrator.probability(logit)[0]),
                thresholds={"real": calibrator.real_threshold, "AI": calibrator.ai_threshold},
                promise=calibrator.promise(),
            )
        if self.stability and not (self.stability.near and not is_near(logit, calibrator)[0]):
            pixels = pixels_of(picture)
            names = copy_names(row.name, self.stability.copies)
            logits, broken = self._logits([partial(redelivered, pixels, name) for name in names])
            if not broken:  # too small to be distorted
                scores = self.predictor.fusion.apply(logits, self.predictor.names)
                row = dataclasses.replace(row, stability=stability_of(row.score, scores, calibrator))
        if self.credentials and isinstance(picture, (str, os.PathLike, bytes)):
            data = picture if isinstance(picture, bytes) else read_bytes(os.fspath(picture))
            row = dataclasses.replace(row, credentials=read_credentials(data))
        return row

    def _logits(
        self, reads: Sequence[Callable[[], np.ndarray | Prepared]]
    ) -> tuple[np.ndarray, dict[int, str]]:
        """Return logits (experts, N), NaN for a picture that cannot be read, and why."""
        settings = self.predictor.settings() | {"batch_size": self.batch_size}
        if len(reads) <= _WITHOUT_WORKERS:
            settings["workers"] = 0
        dataset = _Pictures(reads, self._keys, self.predictor.views)
        with self._alone, full_memory_is_an_error():
            return score_all(self._models, dataset, **settings)


class _Pictures(Dataset):
    """Pictures to score, each with a function that reads it; the items are those of `ScoreDataset`."""

    def __init__(
        self,
        reads: Sequence[Callable[[], np.ndarray | Prepared]],
        keys: Sequence[InputKey],
        views: Sequence[View],
    ) -> None:
        self.reads, self.keys, self.views = reads, keys, views

    def __len__(self) -> int:
        return len(self.reads)

    def __getitem__(self, index: int) -> dict[str, Any] | Broken:
        try:
            image = self.reads[index]()
        except BrokenImage as error:
            return Broken(index, str(error))
        is_prepared = isinstance(image, Prepared)
        views = image.images if is_prepared else cut_views(image, self.keys, self.views)
        return {"index": index, "images": views}


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
        raise BrokenImage(f"{type(picture).__name__} is not a picture")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        shape = f"{picture.shape} {picture.dtype}"
        raise BrokenImage(f"an array must be (H, W, 3) uint8 in RGB, not {shape}")
    return np.ascontiguousarray(picture)


def _read(picture: Picture) -> np.ndarray | Prepared:
    return picture if isinstance(picture, Prepared) else pixels_of(picture)


def redelivered(pixels: np.ndarray, name: str) -> np.ndarray:
    """Return the copy with this name of an image (H, W, 3) uint8."""
    return apply_plan(pixels, PRESETS[PRESET].draw(evaluation_generator(SEED, name)))


def _plain(picture: Picture) -> Picture:
    """Return the bytes of a buffer or of an open file, which can be read once only; all else as it is."""
    if isinstance(picture, (io.RawIOBase, io.BufferedIOBase)) and not picture.closed:
        return picture.read()
    return bytes(picture) if isinstance(picture, (bytearray, memoryview)) else picture


def _known(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in items if value is not None and value != {}}


def _name(number: int, picture: Picture) -> str:
    return os.fspath(picture) if isinstance(picture, (str, os.PathLike)) else f"image {number}"
