"""Averages of the student's weights, which are scored and saved instead of them.

None has a gradient, and all stay in evaluation mode. Teachers are in `teachers`: a momentum teacher has a
schedule of its own.
"""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from featdistill.models.expert import Expert
from featdistill.training import finetuning
from featdistill.training.teachers import Untrained, follow


def average_decay_at(step: int, decay: float) -> float:
    """Return min(decay, (1 + step) / (10 + step)), so that the initial weights are soon forgotten.

    This is the usual warm-up of a moving average (that of TensorFlow's `ExponentialMovingAverage`).
    """
    return min(decay, (1 + step) / (10 + step))


class WeightAverage(Untrained):
    """Exponential moving average over optimizer steps."""

    has_begun = True

    def __init__(self, student: Expert, decay: float) -> None:
        super().__init__(copy.deepcopy(student))
        self.decay = decay

    def after_step(self, student: Expert, step: int) -> None:
        """Include the weights after an optimizer step, counted from 0."""
        follow(self.expert, student, average_decay_at(step, self.decay))

    def after_epoch(self, student: Expert, epoch: int) -> None:
        """Leave it: each step counts."""

    def stale_norms(self, student: Expert) -> list[nn.Module]:
        """Return nothing: the statistics of BatchNorm are the student's."""
        return []


class EqualAverage(Untrained):
    """Equal average of the weights at the end of each epoch: SWA (Izmailov et al. 2018, arXiv 1803.05407).

    Args:
        start: first epoch that counts, from 1.
    """

    def __init__(self, student: Expert, start: int) -> None:
        super().__init__(copy.deepcopy(student))
        self.start = start
        self.register_buffer("count", torch.tensor(0))

    @property
    def has_begun(self) -> bool:
        return self.count.item() > 0

    def after_step(self, student: Expert, step: int) -> None:
        """Leave it: only the ends of epochs count."""

    def after_epoch(self, student: Expert, epoch: int) -> None:
        """Include the weights at the end of an epoch, counted from 1; those of adapters are merged."""
        if epoch >= self.start:
            count = self.count.item()
            follow(self.expert, finetuning.merged(student), count / (count + 1))
            # They may have been completed after the average was made.
            self.expert.preprocessing, self.expert.spec = student.preprocessing, student.spec
            self.expert.feature = student.feature
            self.count += 1

    def stale_norms(self, student: Expert) -> list[nn.Module]:
        """Return the BatchNorm layers whose statistics are not those of the averaged weights.

        They are those that training changes; those of frozen layers keep their pretrained statistics.
        """
        modes = {name: module.training for name, module in student.named_modules()}
        return [
            module
            for name, module in self.expert.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and modes[name]
        ]


@torch.no_grad()
def renew_statistics(
    expert: Expert, norms: list[nn.Module], batches: Iterable[Tensor], total: Callable[[Tensor], Tensor]
) -> None:
    """Set the statistics of BatchNorm layers to the means of those of each batch.

    As torch's `update_bn`, but for some layers, with everything else in evaluation mode, and over processes.

    Args:
        expert: contains the `norms`.
        batches: images (B, 3, S, S), on any device.
        total: sums a tensor over all processes.
    """
    expert.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
        norm.train()
    for images in batches:
        expert(images.to(expert.mean.device, non_blocking=True))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
        count = norm.num_batches_tracked.float()
        for statistic in (norm.running_mean, norm.running_var):
            statistic.copy_(total(statistic * count) / total(count))
