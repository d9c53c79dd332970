"""Every random choice is a function of a seed and of what it is drawn for, never of a worker or a process."""

import hashlib
from collections.abc import Iterable

import numpy as np


def training_generator(
    seed: int, stage: int, epoch: int, index: int, stream: int | None = None
) -> np.random.Generator:
    """Return the generator of the image at `index` in one epoch of a stage; all are 0 or more.

    Args:
        stream: a number for draws that are independent of the image's other ones.
    """
    return np.random.default_rng((seed, stage, epoch, index, *(() if stream is None else (stream,))))


def order_generator(seed: int, stage: int, epoch: int) -> np.random.Generator:
    """Return the generator of the order of batches; the spawn key keeps it apart from that of any image."""
    return np.random.default_rng(np.random.SeedSequence((seed, stage, epoch), spawn_key=(0,)))


def stage_seed(seed: int, stage: int) -> int:
    """Return a 64-bit seed that differs between the stages of a run."""
    return text_number(f"{seed}:{stage}")


def evaluation_generator(seed: int, name: str) -> np.random.Generator:
    """Return the generator of an image with this name in an evaluation split, wherever it is listed."""
    return np.random.default_rng((seed, int.from_bytes(digest(name)[:16], "little")))


def text_number(text: str) -> int:
    """Return a 64-bit hash of a text, the same in every process."""
    return int.from_bytes(digest(text)[:8], "little")


def hash_ranks(names: Iterable[str], seed: int) -> list[str]:
    """Return one sort key per name, which puts names in a random order that depends only on `seed`."""
    return [digest(f"{seed}:{name}").hex() for name in names]


def digest(text: str) -> bytes:
    """Return the SHA-256 of a text; unlike `hash`, it is the same in every process."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()
