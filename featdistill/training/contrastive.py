"""Contrastive losses: supervised, and the distillation of section 5.1 of the paper (reading B).

Supervised: features of images of one class should be nearer to each other than to those of the other class
(Khosla et al. 2020).

Distillation: the student's feature of one view of an image should be nearer to the teacher's feature of
another view of it than to the teacher's features of other images (Tian et al. 2020, with InfoNCE instead of
their estimator, and the queue of MoCo, He et al. 2020, instead of their memory bank).
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy, normalize

from featdistill.recipe_groups import Distillation
from featdistill.training.teachers import follow

_EMPTY = -1


def info_nce_logits(
    query: Tensor, key: Tensor, negatives: Tensor, counts: Tensor, temperature: float
) -> Tensor:
    """Return (q . k, q . n_1, ..., q . n_K) / temperature for each image; the positive is column 0.

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


def supervised_contrastive(feature: Tensor, label: Tensor, temperature: float) -> Tensor:
    """Khosla et al. 2020, eq. 2: the mean over images i and the others p of i's class of
    -log(exp(z_i . z_p / t) / sum over all others a of exp(z_i . z_a / t)), z = feature / ||feature||.

    Images without another one of their class do not count; without any, the loss is 0. Nor do images whose
    label is NaN, unknown, not even as others.

    Args:
        feature: (N, D), computed in float32.
        label: (N,).
        temperature: t.
    """
    with torch.autocast(feature.device.type, enabled=False):
        unit = normalize(feature.float(), dim=1)
        logits = unit @ unit.T / temperature
    itself = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    # Not minus infinity, so that the gradient is finite for a single image.
    others = logits.masked_fill(itself | label.isnan(), torch.finfo(logits.dtype).min)
    log_shares = logits - others.logsumexp(dim=1, keepdim=True)
    is_positive = (label == label[:, None]) & ~itself
    counts = is_positive.sum(dim=1)
    losses = -torch.where(is_positive, log_shares, 0).sum(dim=1) / counts.clamp(min=1)
    return losses.sum() / (counts > 0).sum().clamp(min=1)


@torch.compiler.disable
def gather_batch(feature: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features (N, D) float32 and labels (N,) of a forward pass in all processes.

    A loss on them has the same value in all processes, and the gradient of the joint batch once the gradients
    of the processes are averaged: rows of this process carry theirs times the number of processes, the others
    none. Every process must call it.
    """
    feature = feature.float()
    if not (distributed.is_available() and distributed.is_initialized()):
        return feature, label
    rank, world = distributed.get_rank(), distributed.get_world_size()
    fixed = feature.detach()
    joint, labels, ranks = gather_parts([(fixed, label, torch.full_like(label, rank))])
    joint[ranks == rank] = fixed + world * (feature - fixed)
    return joint, labels


def gather_parts(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Join the rows of all passes of all processes, by pass and then by process, as in `TrainBatches`.

    Args:
        parts: columns (n, ...) of each forward pass of this process; equally many passes in all processes,
            but not equally many rows, since some images may be broken.

    Returns:
        The columns (N, ...) of all rows, equal in all processes.
    """
    columns = list(zip(*parts, strict=True))
    if not (distributed.is_available() and distributed.is_initialized()):
        return tuple(torch.cat(column) for column in columns)
    rows = torch.tensor([len(part[0]) for part in parts], device=parts[0][0].device)
    counts = torch.stack(_all_gather(rows)).tolist()
    order = [(part, rank) for part in range(len(parts)) for rank in range(len(counts))]
    joint = []
    for column in columns:
        # All processes must send the same shape.
        padded = column[0].new_zeros(len(parts), max(map(max, counts)), *column[0].shape[1:])
        for row, values in zip(padded, column, strict=True):
            row[: len(values)] = values
        gathered = _all_gather(padded)
        joint.append(torch.cat([gathered[rank][part, : counts[rank][part]] for part, rank in order]))
    return tuple(joint)


def _all_gather(values: Tensor) -> list[Tensor]:
    gathered = [torch.empty_like(values) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, values)
    return gathered


class KeyQueue(nn.Module):
    """The last K keys of past steps, with the ids and labels of their images, as a ring buffer.

    Forward passes stage their keys; after the step, the keys of all processes are enqueued together, so that
    accumulation and several processes are equivalent to one pass with the joint batch.

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
        # Always empty between two steps, so not part of a checkpoint.
        self._staged: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def filled(self) -> Tensor:
        """Number of slots that hold a key, as a 0-dim tensor."""
        return (self.ids != _EMPTY).sum()

    def counts(self, ids: Tensor, labels: Tensor, negatives: str = "all") -> Tensor:
        """Return (B, K) bool: which slots are negatives of which images.

        Empty slots and older keys of the image itself are not; with `other_label`, nor are keys of the
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
        """Discard the staged keys of a skipped step."""
        self._staged.clear()

    def enqueue_staged(self) -> None:
        """Enqueue what all processes have staged. Every process must call it."""
        if self._staged:
            self.enqueue(*gather_parts(self._staged))
            self._staged.clear()

    @torch.no_grad()
    def enqueue(self, keys: Tensor, ids: Tensor, labels: Tensor) -> None:
        """Overwrite the oldest with keys (N, D), ids (N,) and labels (N,); of more than K the last K stay."""
        slots = len(self.keys)
        keys, ids, labels = keys[-slots:], ids[-slots:], labels[-slots:]
        positions = (self.pointer + torch.arange(len(keys), device=self.keys.device)) % slots
        self.keys[positions], self.ids[positions] = keys, ids
        self.labels[positions] = labels.to(self.labels.dtype)
        self.pointer.copy_((self.pointer + len(keys)) % slots)


class ContrastiveDistillation(nn.Module):
    """InfoNCE of q = normalize(W_s f_student) against k = normalize(W_t f_teacher) and the queue.

    The positive is the image's own key; the negatives are the keys of the queue. Keys have no gradient, so
    the loss cannot train W_t: it starts as a copy of W_s and follows it with the momentum of eq. 5, like
    MoCo's key encoder, whether the teacher moves or is frozen. Neither projection is part of the expert.

    Args:
        feature_dim: width of the experts' features.
    """

    def __init__(self, feature_dim: int, options: Distillation) -> None:
        super().__init__()
        self.student_projection = nn.Linear(feature_dim, options.crd_dim, bias=False)
        self.teacher_projection = copy.deepcopy(self.student_projection).requires_grad_(False)
        self.queue = KeyQueue(options.crd_queue, options.crd_dim)
        self.options = options

    def forward(self, student: Tensor, teacher: Tensor, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compare features, in float32; in training, stage the keys.

        Args:
            student: (B, F); gradients flow here.
            teacher: (B, F) of the same images; no gradient.
            ids: (B,) int64, to identify the images.
            labels: (B,) float.

        Returns:
            InfoNCE, mean over the batch, and the share of images whose positive is above all negatives.
        """
        with torch.autocast(student.device.type, enabled=False):
            query = normalize(self.student_projection(student.float()), dim=1)
            key = normalize(self.teacher_projection(teacher.detach().float()), dim=1)
            counts = self.queue.counts(ids, labels, self.options.crd_negatives)
            logits = info_nce_logits(query, key, self.queue.keys, counts, self.options.crd_temperature)
            loss = cross_entropy(logits, torch.zeros_like(ids))
        if self.training:
            self.queue.stage(key, ids, labels)
        return loss, (logits.detach()[:, 0] > logits.detach()[:, 1:].amax(dim=1)).float().mean()

    def after_step(self, momentum: float) -> None:
        """Enqueue the staged keys and let W_t follow W_s."""
        self.queue.enqueue_staged()
        follow(self.teacher_projection, self.student_projection, momentum)
