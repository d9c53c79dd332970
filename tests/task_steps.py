"""Synthetic batches, and plain gradient steps on them as the trainer would take them."""

from contextlib import nullcontext

import torch

READING_B = {"objective": "crd", "teacher_view": "other", "crd_dim": 16, "crd_queue": 24}
MOMENTUM_B = READING_B | {"teacher_kind": "momentum"}


def make_batch(images: int, seed: int) -> dict[str, torch.Tensor]:
    """Images with all views; their ids begin at 100 * seed."""
    generator = torch.Generator().manual_seed(seed)
    views = torch.randint(0, 256, (3, images, 3, 32, 32), generator=generator).to(torch.uint8)
    return {
        "images": views[0],
        "images_clean": views[1],
        "images_other": views[2],
        "label": torch.arange(images) % 3 % 2.0,
        "index": torch.arange(images) + 100 * seed,
    }


def take_steps(task, batches, *, parts=1, first=0, total=None, rank=0, world=1) -> dict[str, torch.Tensor]:
    """Take a step per batch; return the gradient of the first."""
    trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    wrapped = torch.nn.parallel.DistributedDataParallel(task) if world > 1 else task
    task.train()
    gradient = {}
    for step, batch in enumerate(batches, first):
        share = len(batch["label"]) // (parts * world)
        for part in range(parts):
            start = (part * world + rank) * share
            piece = {key: value[start : start + share] for key, value in batch.items()}
            with wrapped.no_sync() if world > 1 and part < parts - 1 else nullcontext():
                (wrapped(piece)["loss"] / parts).backward()
        gradient = gradient or {name: p.grad.clone() for name, p in trained.items()}
        optimizer.step()
        optimizer.zero_grad()
        task.after_step(step, total or len(batches))
    return gradient
