"""Contrastive representation distillation with a queue of past keys (paper, section 5.1: reading B).

The student's feature of one view of an image is to lie nearer to the teacher's feature of another view of it
than to the teacher's features of other images (Tian et al. 2020, with InfoNCE for their estimator and the
queue of MoCo, He et al. 2020, for their memory bank).
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy, normalize

from featdistill.training.teachers import follow

NEGATIVES = ("all", "other_label")
_EMPTY = -1


def info_nce_logits(
    query: Tensor, key: Tensor, negatives: Tensor, counts: Tensor, temperature: float
) -> Tensor:
    """Return (q . k, q . n_1, ..., q . n_K) / temperature of each image; the positive is column 0.

    Args:
        query: (B, D), unit length.
        key: (B, D), unit length, each image's positive.
        negatives: (K, D), unit length.
        counts: (B, K) bool; where False, the logit is minus infinity.

    Returns:
        (B, 1 + K). InfoNCE (van den Oord et al. 2018, eq. 4) is the cross-entropy of its rows with class 0.
    """
    positive = (query * key).sum(dim=1, keepdim=True)
    others = (query @ negatives.T).masked_fill(~counts, -torch.inf)
    return torch.cat([positive, others], dim=1) / temperature


def gather_parts(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Put the rows of several forward passes of all processes in the order of the joint batch.

    That order is by pass, then by process: that in which `TrainBatches` deals a batch out. So what comes back
    does not depend on how many passes and processes there are. A pass may have fewer rows in one process than
    in another (an image could not be read).

    Args:
        parts: columns (n, ...) of each forward pass of this process; equally many passes in all processes.

    Returns:
        The columns (N, ...) of all rows, equal in all processes.
    """
    columns = list(zip(*parts, strict=True))
    if not (distributed.is_available() and distributed.is_initialized()):
        return tuple(torch.cat(column) for column in columns)
    world = distributed.get_world_size()
    rows = torch.tensor([len(part[0]) for part in parts], device=parts[0][0].device)
    all_rows = [torch.empty_like(rows) for _ in range(world)]
    distributed.all_gather(all_rows, rows)
    counts = torch.stack(all_rows).tolist()
    order = [(part, rank) for part in range(len(parts)) for rank in range(world)]
    found = []
    for column in columns:
        # All processes must send the same shape.
        padded = column[0].new_zeros(len(parts), max(map(max, counts)), *column[0].shape[1:])
        for place, values in zip(padded, column, strict=True):
            place[: len(values)] = values
        gathered = [torch.empty_like(padded) for _ in range(world)]
        distributed.all_gather(gathered, padded)
        found.append(torch.cat([gathered[rank][part, : counts[rank][part]] for part, rank in order]))
    return tuple(found)


class KeyQueue(nn.Module):
    """The last K keys of past steps, with the ids and labels of their images; a ring that is written over.

    The forward passes of a step stage their keys; once the step is taken they are gathered over all processes
    and enqueued together. So all passes of a step see the same queue, and accumulation or several processes
    give what one pass with the joint batch gives.

    Args:
        slots: K.
        dim: width of a key.
    """

    def __init__(self, slots: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(slots, dim))
        self.register_buffer("ids", torch.full((slots,), _EMPTY))
        self.register_buffer("labels", torch.zeros(slots))
        self.register_buffer("pointer", torch.tensor(0))
        # Only ever filled between two steps, so no part of a checkpoint.
        self._staged: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def filled(self) -> Tensor:
        """Number of slots that hold a key, as a 0-dim tensor."""
        return (self.ids != _EMPTY).sum()

    def counts(self, ids: Tensor, labels: Tensor, negatives: str = "all") -> Tensor:
        """Return (B, K) bool: which slots are negatives of which images.

        An empty slot never is, nor an older key of the image itself; with `other_label`, nor is a key of the
        image's own class.
        """
        counts = (self.ids != _EMPTY) & (self.ids != ids[:, None])
        if negatives == "other_label":
            counts = counts & (self.labels != labels[:, None])
        return counts

    # A compiled forward would be compiled anew for every length of the list.
    @torch.compiler.disable
    def stage(self, keys: Tensor, ids: Tensor, labels: Tensor) -> None:
        """Set the keys (B, D) of a forward pass aside, with ids (B,) int64 and labels (B,)."""
        self._staged.append((keys.detach(), ids, labels))

    def drop_staged(self) -> None:
        """Forget what is staged: the step was not taken."""
        self._staged.clear()

    def enqueue_staged(self) -> None:
        """Enqueue what all processes have staged. Every process must call it."""
        if self._staged:
            self.enqueue(*gather_parts(self._staged))
            self._staged.clear()

    @torch.no_grad()
    def enqueue(self, keys: Tensor, ids: Tensor, labels: Tensor) -> None:
        """Write keys (N, D), ids (N,) and labels (N,) over the oldest; of more than K the last K stay."""
        slots = len(self.keys)
        keys, ids, labels = keys[-slots:], ids[-slots:], labels[-slots:]
        places = (self.pointer + torch.arange(len(keys), device=self.keys.device)) % slots
        self.keys[places], self.ids[places], self.labels[places] = keys, ids, labels.to(self.labels.dtype)
        self.pointer.copy_((self.pointer + len(keys)) % slots)


class ContrastiveDistillation(nn.Module):
    """InfoNCE of q = normalise(W_s f_student) against k = normalise(W_t f_teacher) and the queue.

    The positive is the image's own key, the negatives are the queue's keys alone. Keys carry no gradient, so
    W_t cannot be trained by the loss: it starts as a copy of W_s and follows it with the momentum of eq. 5,
    as MoCo's key encoder does, whether the teacher before it moves or is frozen. (A frozen teacher is where
    the student starts, so its keys and the queries share their coordinates.) Both projections belong to the
    training, not to the expert.

    Args:
        feature_dim: width of the experts' features.
        dim: width of the projections.
        slots: size of the queue.
        negatives: see `KeyQueue.counts`.
    """

    def __init__(
        self,
        feature_dim: int,
        *,
        dim: int = 128,
        temperature: float = 0.07,
        slots: int = 16384,
        negatives: str = "all",
    ) -> None:
        super().__init__()
        if negatives not in NEGATIVES:
            raise ValueError(f"unknown negatives {negatives}; known: {', '.join(NEGATIVES)}")
        self.student_projection = nn.Linear(feature_dim, dim, bias=False)
        self.teacher_projection = copy.deepcopy(self.student_projection).requires_grad_(False)
        self.queue = KeyQueue(slots, dim)
        self.temperature, self.negatives = temperature, negatives

    def forward(self, student: Tensor, teacher: Tensor, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compare features, in float32; in training, stage the keys.

        Args:
            student: (B, F); gradients flow here.
            teacher: (B, F) of the same images; no gradient.
            ids: (B,) int64, which images they are.
            labels: (B,) float.

        Returns:
            InfoNCE, mean over the batch, and the share of images whose positive is above all negatives.
        """
        with torch.autocast(student.device.type, enabled=False):
            query = normalize(self.student_projection(student.float()), dim=1)
            key = normalize(self.teacher_projection(teacher.detach().float()), dim=1)
            counts = self.queue.counts(ids, labels, self.negatives)
            logits = info_nce_logits(query, key, self.queue.keys, counts, self.temperature)
            loss = cross_entropy(logits, torch.zeros_like(ids))
        if self.training:
            self.queue.stage(key, ids, labels)
        return loss, (logits.detach()[:, 0] > logits.detach()[:, 1:].amax(dim=1)).float().mean()

    def after_step(self, momentum: float) -> None:
        """Enqueue the staged keys and let W_t follow W_s."""
        self.queue.enqueue_staged()
        follow(self.teacher_projection, self.student_projection, momentum)

    def after_skip(self) -> None:
        """Drop the staged keys."""
        self.queue.drop_staged()
