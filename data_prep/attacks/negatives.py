"""Hard negatives, batch by batch: attacked or reconstructed, stored, and scored as they are stored."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch

from data_prep.attacks import adversarial
from data_prep.attacks.reconstructions import Autoencoder, reconstruct
from data_prep.writing.copies import ImageCopy
from featdistill import atomic
from featdistill.command_line import progress
from featdistill.images.reading import BrokenImage, decode, encode_jpeg, limit_side, read_image
from featdistill.models.expert import Expert
from featdistill.seeds import evaluation_generator


@dataclass
class Maker:
    """Makes the images of one batch."""

    expert: Expert | None  # None if reconstructions are not scored
    attack: adversarial.Attack | None  # None if images are reconstructed
    autoencoder: Autoencoder | None  # None if images are attacked
    device: torch.device
    seed: int
    file_format: str
    quality_0_100: int
    max_side_px: int

    def make(self, rows: pd.DataFrame, paths: list[Path]) -> dict[str, Any]:
        """Write the images of some rows to their paths.

        Returns:
            `scores`: for each readable row [before, after], or [] without an expert; `errors`: reasons for
            the other rows. The keys are the rows' index labels as text.
        """
        images: dict[int, np.ndarray] = {}
        record: dict[str, Any] = {"scores": {}, "errors": {}}
        for position, location in enumerate(rows["image"]):
            try:
                images[position] = limit_side(read_image(location), self.max_side_px)
            except BrokenImage as error:
                record["errors"][str(rows.index[position])] = str(error)
        if not images:
            return record
        originals = list(images.values())
        written = [self._encode(image) for image in self._change(rows.iloc[list(images)], originals)]
        for position, data in zip(images, written, strict=True):
            with atomic.replace_file(paths[position]) as temporary:
                temporary.write_bytes(data)
        keys = [str(rows.index[position]) for position in images]
        if self.expert is None:
            return record | {"scores": {key: [] for key in keys}}
        before = adversarial.score(self.expert, originals).tolist()
        after = adversarial.score(self.expert, [decode(data) for data in written]).tolist()
        scores = {key: list(pair) for key, *pair in zip(keys, before, after, strict=True)}
        return record | {"scores": scores}

    def _change(self, rows: pd.DataFrame, images: list[np.ndarray]) -> list[np.ndarray]:
        if self.autoencoder is not None:
            return reconstruct(self.autoencoder, images, self.device)
        generators = [evaluation_generator(self.seed, name) for name in rows["name"]]
        towards_ai = (rows["label"] == 0).tolist()
        return adversarial.attack(self.expert, images, towards_ai, self.attack, generators)

    def _encode(self, image: np.ndarray) -> bytes:
        if self.file_format == "jpeg":
            return encode_jpeg(image, self.quality_0_100)
        return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def make_batches(
    maker: Maker, rows: pd.DataFrame, copy: ImageCopy, batch_size: int
) -> tuple[dict[int, list[float]], dict[int, str]]:
    """Make all batches that do not exist yet; return the scores and the errors by row."""
    copy.start()
    scores: dict[int, list[float]] = {}
    errors: dict[int, str] = {}
    with progress(len(rows), "hard negatives") as bar:
        for first in range(0, len(rows), batch_size):
            batch = rows.iloc[first : first + batch_size]
            # Written after the images of the batch, so that they exist if it does.
            path = copy.work / f"batch-{first}.json"
            if path.is_file():
                record = json.loads(path.read_text(encoding="utf-8"))
            else:
                record = maker.make(batch, [copy.path(row) for row in batch.index])
                atomic.write_json(path, record)
            scores |= {int(row): pair for row, pair in record["scores"].items()}
            errors |= {int(row): reason for row, reason in record["errors"].items()}
            bar.update(len(batch))
    return scores, errors


def describe(
    rows: pd.DataFrame, scores: list[list[float]], attack: adversarial.Attack | None, generator: str
) -> pd.DataFrame:
    """Return the rows of what was made from `rows`; `name` and `image` are still the originals'.

    `scores` are [before, after] of each row, or []; `generator` is that of reconstructions.
    """
    made = rows.assign(original=rows["name"], method=attack.method if attack else "reconstruct")
    made["group"] = made["group"].where(made["group"] != "", "name:" + made["name"])
    made["epsilon"], made["steps"] = (attack.epsilon, attack.steps) if attack else ("", "")
    if not attack:
        made["label"], made["generator"] = 1, generator
    for position, column in enumerate(("score_before", "score_after")):
        made[column] = [str(pair[position]) if pair else "" for pair in scores]
    made["survives"] = [
        str(int((pair[1] >= 0.5) != (label == 1))) if pair else ""
        for pair, label in zip(scores, made["label"], strict=True)
    ]
    return made
