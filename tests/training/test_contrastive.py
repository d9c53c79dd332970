import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from featdistill.recipe_groups import Distillation
from featdistill.training.contrastive import (
    ContrastiveDistillation,
    KeyQueue,
    gather_batch,
    gather_parts,
    info_nce_logits,
    supervised_contrastive,
)


def unit(rows: int, seed: int, dim: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(rows, dim, generator=generator), dim=1)


def contrast(slots: int = 8, **options) -> ContrastiveDistillation:
    torch.manual_seed(0)
    return ContrastiveDistillation(10, Distillation(crd_dim=6, crd_queue=slots, **options))


def features(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, 10, generator=torch.Generator().manual_seed(seed))


IDS, LABELS = torch.arange(4), torch.tensor([0.0, 1, 1, 0])


def test_info_nce_equals_its_formula():
    query, key, negatives = (unit(rows, seed).double() for rows, seed in ((4, 0), (4, 1), (5, 2)))
    counts = torch.rand(4, 5, generator=torch.Generator().manual_seed(3)) < 0.6
    logits = info_nce_logits(query, key, negatives, counts, 0.07)
    found = torch.nn.functional.cross_entropy(logits, torch.zeros(4, dtype=torch.long))
    q, k, n = query.numpy(), key.numpy(), negatives.numpy()
    losses = []
    for row in range(4):
        positive = np.exp(q[row] @ k[row] / 0.07)
        others = sum(np.exp(q[row] @ n[slot] / 0.07) for slot in range(5) if counts[row, slot])
        losses.append(-np.log(positive / (positive + others)))
    assert found.item() == pytest.approx(np.mean(losses), rel=1e-9)


def test_the_module_projects_and_normalizes_both_sides():
    crd = contrast(crd_temperature=0.2)
    crd.teacher_projection.weight.data.mul_(2).add_(0.3)
    crd.queue.enqueue(unit(5, 9), torch.arange(100, 105), torch.zeros(5))
    student, teacher = features(4, 1), features(4, 2)
    loss, accuracy = crd(student, teacher, IDS, LABELS)
    q = student.numpy() @ crd.student_projection.weight.detach().numpy().T
    k = teacher.numpy() @ crd.teacher_projection.weight.numpy().T
    q, k = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, k))
    logits = np.column_stack([(q * k).sum(1), q @ unit(5, 9).numpy().T]) / 0.2
    expected = np.mean(np.log(np.exp(logits).sum(1)) - logits[:, 0])
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert accuracy.item() == np.mean(logits.argmax(1) == 0)


def test_nothing_is_counted_against_empty_slots():
    crd = contrast()
    student = features(4, 1).requires_grad_()
    loss, accuracy = crd(student, features(4, 2), IDS, LABELS)
    loss.backward()
    assert loss.item() == 0 and accuracy.item() == 1
    assert not student.grad.any() and torch.isfinite(crd.student_projection.weight.grad).all()
    # One key among empty slots counts as it would in a queue of one slot.
    losses = []
    for slots in (1, 8):
        crd = contrast(slots)
        crd.queue.enqueue(unit(1, 5), torch.tensor([77]), torch.zeros(1))
        losses.append(crd(features(4, 1), features(4, 2), IDS, LABELS)[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0] > 0


def test_the_queue_and_the_keys_never_get_a_gradient():
    crd = contrast()
    student, teacher = features(4, 1).requires_grad_(), features(4, 2).requires_grad_()
    for step in range(2):
        crd(student, teacher, IDS + 4 * step, LABELS)[0].backward()
        assert student.grad.any() == bool(step)
        crd.after_step(0.9)
    assert student.grad.any() and crd.student_projection.weight.grad.any()
    assert teacher.grad is None and crd.teacher_projection.weight.grad is None
    assert not any(buffer.requires_grad for buffer in crd.buffers())


def test_an_images_own_older_keys_are_no_negatives():
    queue = KeyQueue(6, 2)
    queue.enqueue(torch.zeros(4, 2), torch.tensor([3, 5, 3, 8]), torch.tensor([0.0, 1, 0, 1]))
    ids, labels = torch.tensor([3, 8, 9]), torch.tensor([0.0, 1, 1])
    counts = queue.counts(ids, labels).int().tolist()
    assert counts == [[0, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    others = queue.counts(ids, labels, "other_label").int().tolist()
    assert others == [[0, 1, 0, 1, 0, 0], [1, 0, 1, 0, 0, 0], [1, 0, 1, 0, 0, 0]]


def test_other_label_changes_the_loss_by_the_keys_of_the_own_label_only():
    losses = {}
    for negatives, keys_of in (("all", (1.0,)), ("all", (0.0, 1.0)), ("other_label", (0.0, 1.0))):
        crd = contrast(crd_negatives=negatives)
        for label in keys_of:
            crd.queue.enqueue(unit(3, int(label)), torch.arange(50, 53), torch.full((3,), label))
        loss, _ = crd(features(4, 1), features(4, 2), IDS, torch.zeros(4))
        losses[negatives, keys_of] = loss.item()
    alone, both, masked = losses.values()
    assert masked == pytest.approx(alone, rel=1e-6) and both > alone


def test_the_queue_wraps_round_and_keeps_the_last():
    queue = KeyQueue(5, 1)
    for first in (0, 3, 6):
        keys = torch.arange(first, first + 3.0)[:, None]
        queue.enqueue(keys, torch.arange(first, first + 3), torch.zeros(3))
    assert queue.ids.tolist() == [5, 6, 7, 8, 4] and queue.keys[:, 0].tolist() == [5, 6, 7, 8, 4]
    assert queue.pointer.item() == 4 and queue.filled.item() == 5
    queue.enqueue(torch.arange(20.0, 27)[:, None], torch.arange(20, 27), torch.zeros(7))
    assert sorted(queue.ids.tolist()) == [22, 23, 24, 25, 26]


def test_keys_are_enqueued_once_their_step_is_taken():
    crd = contrast()
    crd(features(4, 1), features(4, 2), IDS, LABELS)
    assert crd.queue.filled.item() == 0
    crd.queue.drop_staged()
    crd.after_step(0.9)
    assert crd.queue.filled.item() == 0
    crd(features(4, 1), features(4, 2), IDS, LABELS)
    crd.after_step(0.9)
    crd.after_step(0.9)
    assert crd.queue.ids.tolist() == [0, 1, 2, 3, -1, -1, -1, -1]
    assert crd.queue.labels.tolist()[:4] == LABELS.tolist()
    crd.eval()(features(4, 1), features(4, 2), IDS + 10, LABELS)
    crd.after_step(0.9)
    assert crd.queue.filled.item() == 4


def test_the_teachers_projection_starts_as_the_students_and_follows_it():
    crd = contrast()
    ours, theirs = crd.student_projection.weight, crd.teacher_projection.weight
    assert torch.equal(ours, theirs) and ours.requires_grad and not theirs.requires_grad
    before = theirs.clone()
    with torch.no_grad():
        ours.add_(1)
    crd.after_step(0.75)
    torch.testing.assert_close(theirs.detach(), before + 0.25)


def test_keys_are_of_unit_length_in_float32_under_autocast():
    crd = contrast()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = crd(features(4, 1).bfloat16(), features(4, 2).bfloat16(), IDS, LABELS)
    crd.after_step(0.9)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(crd.queue.keys[:4].norm(dim=1), torch.ones(4), rtol=0, atol=1e-6)


def test_passes_are_put_together_in_their_order():
    parts = [(unit(2, seed), torch.full((2,), seed)) for seed in (4, 1)]
    keys, ids = gather_parts(parts)
    assert ids.tolist() == [4, 4, 1, 1] and torch.equal(keys, torch.cat([unit(2, 4), unit(2, 1)]))


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_the_supervised_contrastive_loss_equals_its_formula(temperature):
    values, label = features(7, 4).double(), np.array([0, 1, 1, 0, 1, 0, 0])
    z = values.numpy() / np.linalg.norm(values.numpy(), axis=1, keepdims=True)
    losses = []
    for i in range(7):
        others = [a for a in range(7) if a != i]
        total = sum(np.exp(z[i] @ z[a] / temperature) for a in others)
        positives = [p for p in others if label[p] == label[i]]
        losses.append(np.mean([-np.log(np.exp(z[i] @ z[p] / temperature) / total) for p in positives]))
    found = supervised_contrastive(values, torch.tensor(label), temperature)
    assert found.item() == pytest.approx(np.mean(losses), rel=1e-5)
    # Images of no known class are not compared.
    more = torch.cat([values[:3], features(2, 9), values[3:]])
    unknown = torch.tensor([*label[:3], np.nan, np.nan, *label[3:]])
    assert supervised_contrastive(more, unknown, temperature).item() == pytest.approx(found.item(), rel=1e-5)
    # The length of a feature does not matter.
    assert supervised_contrastive(3 * values, torch.tensor(label), temperature).item() == pytest.approx(
        found.item(), rel=1e-5
    )


@pytest.mark.parametrize("labels", [[1.0], [0.0, 1.0], [0.0, 1.0, 1.0]])
def test_images_without_another_of_their_class_do_not_count(labels):
    values = features(len(labels), 5).requires_grad_()
    loss = supervised_contrastive(values, torch.tensor(labels), 0.1)
    loss.backward()
    assert torch.isfinite(values.grad).all()
    if len(labels) < 3:
        assert loss.item() == 0 and not values.grad.any()
        return
    z = normalize(values.detach(), dim=1)
    # Of the three, the last two have one positive each.
    shares = [torch.log_softmax(z[i] @ z[[j, 0]].T / 0.1, 0)[0].item() for i, j in ((1, 2), (2, 1))]
    assert loss.item() == pytest.approx(-np.mean(shares), rel=1e-5)


def test_one_process_has_the_whole_batch():
    values = features(4, 6).requires_grad_()
    joint, labels = gather_batch(values, LABELS)
    assert joint is values and labels is LABELS
