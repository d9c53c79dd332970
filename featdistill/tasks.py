"""What a training step computes: modules whose forward returns `{"loss": ..., "logit": ..., parts}`.

One engine serves both stages, because all that differs between them is here.
"""

from typing import Any

from torch import Tensor, nn

from featdistill.experts import Expert
from featdistill.objectives import binary_cross_entropy, dense_alignment, token_cosine
from featdistill.teachers import FrozenTeacher


class ClassifyTask(nn.Module):
    """Stage 1: binary cross-entropy (paper, eq. 1)."""

    def __init__(self, expert: Expert) -> None:
        super().__init__()
        self.expert = expert

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take `images` (B, 3, S, S) and `label` (B,); return `loss` and `logit`."""
        logit = self.expert(batch["images"])
        return {"loss": binary_cross_entropy(logit, batch["label"]), "logit": logit}

    def checkpoint(self) -> dict[str, Any]:
        """Return all of the task's tensors that a killed run needs."""
        return {"expert": self.expert.state_dict()}

    def load_checkpoint(self, state: dict[str, Any]) -> None:
        """Take up what `checkpoint` returned."""
        self.expert.load_state_dict(state["expert"], strict=True)


class DistillTask(ClassifyTask):
    """Stage 2, reading A: cross-entropy and dense alignment with a frozen teacher (paper, eq. 2).

    The teacher is not in the checkpoint: it never changes, and is read again from its own folder.
    """

    def __init__(
        self,
        expert: Expert,
        teacher: FrozenTeacher,
        *,
        metric: str = "layernorm_mse",
        dense_weight: float = 1.0,
        bce_weight: float = 1.0,
    ) -> None:
        super().__init__(expert)
        self.teacher = teacher
        self.metric, self.dense_weight, self.bce_weight = metric, dense_weight, bce_weight

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take `images`, `teacher_images` (B, 3, S, S), `label` (B,); return `loss`, `logit` and parts."""
        logit, _, (tokens,) = self.expert.encode(batch["images"])
        wanted = self.teacher(batch["teacher_images"])
        bce = binary_cross_entropy(logit, batch["label"])
        dense = dense_alignment(tokens, wanted, self.metric)
        return {
            "loss": self.bce_weight * bce + self.dense_weight * dense,
            "logit": logit,
            "bce": bce,
            "dense": dense,
            "token_cosine": token_cosine(tokens, wanted),
        }
