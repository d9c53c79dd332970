"""What a training step computes: modules whose forward returns `{"loss": ..., "logit": ..., parts}`.

One engine serves both stages, because all that differs between them is here. Besides its forward a task has

| member | is |
|---|---|
| `expert` | the student, which is trained |
| `evaluated` | what is scored and saved: the weights' average where there is one, else the student |
| `views`, `keeps_layout_only` | what the data set must add, and whether pixels must keep their place |
| `extra_parameters()` | what is trained beside the expert |
| `after_step()`, `after_skip()` | called after an optimiser step was taken, or was not |
| `checkpoint()`, `load_checkpoint()` | all of the task's tensors that a killed run needs |
"""

from typing import Any

from torch import Tensor, nn, no_grad

from featdistill.models.expert import Expert
from featdistill.models.masking import PatchMasking
from featdistill.models.token_dropping import tokens_at
from featdistill.training.contrastive import ContrastiveDistillation
from featdistill.training.objectives import binary_cross_entropy, consistency, layers_alignment, token_cosine
from featdistill.training.teachers import FrozenTeacher, WeightAverage, momentum_at

OBJECTIVES = ("dense", "crd", "dense+crd")
TEACHER_VIEWS = ("clean", "same", "other")


def needed_views(teacher_view: str = "same", consistency_weight: float = 0.0) -> tuple[str, ...]:
    """Return which views of an image a batch needs beside `images`, out of `clean` and `other`."""
    views = {teacher_view} | ({"clean"} if consistency_weight else set())
    return tuple(view for view in ("clean", "other") if view in views)


class ClassifyTask(nn.Module):
    """Stage 1: binary cross-entropy (paper, eq. 1), and consistency with the clean image as an option.

    Args:
        expert: the student.
        label_smoothing, focal_gamma, ai_weight: see `objectives.binary_cross_entropy`.
        bce_weight: weight of cross-entropy.
        consistency_weight: weight of `objectives.consistency`; above 0, the student sees the clean view too.
        ema: decay of a moving average of the weights; 0 for none.
        masking: hides patches of the images from the student; the clean view stays whole.
    """

    keeps_layout_only = False

    def __init__(
        self,
        expert: Expert,
        *,
        label_smoothing: float = 0.0,
        focal_gamma: float = 0.0,
        ai_weight: float = 1.0,
        bce_weight: float = 1.0,
        consistency_weight: float = 0.0,
        ema: float = 0.0,
        masking: PatchMasking | None = None,
    ) -> None:
        super().__init__()
        self.expert, self.masking = expert, masking
        self.average = WeightAverage(expert, ema) if ema else None
        self.label_options = {
            "label_smoothing": label_smoothing,
            "focal_gamma": focal_gamma,
            "ai_weight": ai_weight,
        }
        self.weights = {"bce": bce_weight}
        if consistency_weight:
            self.weights["consistency"] = consistency_weight

    @property
    def evaluated(self) -> Expert:
        """The expert that is scored and saved."""
        return self.average.expert if self.average else self.expert

    @property
    def views(self) -> tuple[str, ...]:
        """Which views of an image a batch needs beside `images`."""
        return needed_views(consistency_weight=self.weights.get("consistency", 0.0))

    def extra_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are trained beside the expert's."""
        return []

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            batch: `images` (B, 3, S, S), `label` (B,), and `images_clean` or `images_other` (B, 3, S, S) as
                `views` says; for masking, `epoch` and `index` (B,) int64.

        Returns:
            `loss`, `logit` (B,), and the parts of the loss, unweighted, as 0-dim tensors.
        """
        logit = self.expert(*self._seen(batch))
        return self._output(logit, self._label_parts(logit, batch))

    def after_step(self, step: int, total: int) -> None:
        """Take up the optimiser step just taken, the `step`th (from 0) of `total`."""
        if self.average:
            self.average.update(self.expert, step)

    def after_skip(self) -> None:
        """Forget what the forward passes of a step left that was not taken."""

    def checkpoint(self) -> dict[str, Any]:
        """Return all of the task's tensors that a killed run needs."""
        return {name: module.state_dict() for name, module in self._kept().items()}

    def load_checkpoint(self, state: dict[str, Any]) -> None:
        """Take up what `checkpoint` returned."""
        for name, module in self._kept().items():
            module.load_state_dict(state[name], strict=True)

    def _kept(self) -> dict[str, nn.Module]:
        average = {"average": self.average.expert} if self.average else {}
        return {"expert": self.expert, **average}

    def _seen(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return the images that the student sees, and which of their tokens it keeps; None: all."""
        return self.masking(batch) if self.masking else (batch["images"], None)

    def _label_parts(self, logit: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = {"bce": binary_cross_entropy(logit, batch["label"], **self.label_options)}
        if "consistency" in self.weights:
            # A pass of its own, in the student's mode, so that BatchNorm never mixes both views. It comes
            # after the one with gradient: the other way round, autocast may cache weights that have none.
            with no_grad():
                clean = self.expert(batch["images_clean"])
            parts["consistency"] = consistency(clean, logit)
        return parts

    def _output(self, logit: Tensor, parts: dict[str, Tensor], **measures: Tensor) -> dict[str, Tensor]:
        loss = sum(self.weights[name] * part for name, part in parts.items())
        return {"loss": loss, "logit": logit, **parts, **measures}


class DistillTask(ClassifyTask):
    """Stage 2: cross-entropy and dense alignment (reading A, eq. 2), CRD (reading B, section 5.1), or both.

    A frozen teacher is not in the checkpoint: it never changes, and is read again from its own folder.

    With masking, the teacher sees the whole image. Tokens that the student does without are not compared;
    those of patches that are painted over are: the student is to make up what the teacher sees there.

    Args:
        expert: the student.
        teacher: what it is held against.
        objective: `dense`, `crd` or `dense+crd`.
        teacher_view: what the teacher sees: the `clean` image, the `same` as the student, or an `other`
            distortion.
        metric: see `objectives.dense_alignment`.
        dense_layers: how many of the last layers are compared.
        crd_dim, crd_temperature, crd_queue, crd_negatives: see `contrastive.ContrastiveDistillation`.
        momentum_base, momentum_max: see `teachers.momentum_at`; for a momentum teacher and CRD's projections.
        options: see `ClassifyTask`.
    """

    def __init__(
        self,
        expert: Expert,
        teacher: FrozenTeacher,
        *,
        objective: str = "dense",
        teacher_view: str = "clean",
        metric: str = "layernorm_mse",
        dense_weight: float = 1.0,
        dense_layers: int = 1,
        crd_weight: float = 0.8,
        crd_dim: int = 128,
        crd_temperature: float = 0.07,
        crd_queue: int = 16384,
        crd_negatives: str = "all",
        momentum_base: float = 0.99,
        momentum_max: float = 0.9999,
        **options: Any,
    ) -> None:
        super().__init__(expert, **options)
        for what, value, known in (
            ("objective", objective, OBJECTIVES),
            ("teacher_view", teacher_view, TEACHER_VIEWS),
        ):
            if value not in known:
                raise ValueError(f"unknown {what} {value}; known: {', '.join(known)}")
        self.teacher, self.teacher_view = teacher, teacher_view
        self.metric, self.dense_layers = metric, dense_layers
        self.momentum = (momentum_base, momentum_max)
        self.crd: ContrastiveDistillation | None = None
        objectives = objective.split("+")
        if "dense" in objectives:
            self.weights["dense"] = dense_weight
        if "crd" in objectives:
            self.weights["crd"] = crd_weight
            self.crd = ContrastiveDistillation(
                expert.backbone.feature_dim,
                dim=crd_dim,
                temperature=crd_temperature,
                slots=crd_queue,
                negatives=crd_negatives,
            )

    @property
    def keeps_layout_only(self) -> bool:
        """Tokens are compared place by place, so pixels must not move."""
        return "dense" in self.weights

    @property
    def views(self) -> tuple[str, ...]:
        """Which views of an image a batch needs beside `images`."""
        return needed_views(self.teacher_view, self.weights.get("consistency", 0.0))

    def extra_parameters(self) -> list[nn.Parameter]:
        """Return the student's projection of CRD."""
        return list(self.crd.student_projection.parameters()) if self.crd else []

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the loss of a batch; see `ClassifyTask.forward`.

        With CRD, `index` (B,) int64 says which images they are. Measures come back beside the parts:
        `token_cosine` of student and teacher, `crd_accuracy`, the share of images whose positive is on top.
        """
        is_dense = "dense" in self.weights
        layers = self.dense_layers if is_dense else 1
        images, keep = self._seen(batch)
        logit, feature, tokens = self.expert.encode(images, layers, keep)
        seen = "images" if self.teacher_view == "same" else f"images_{self.teacher_view}"
        _, wanted_feature, wanted = self.teacher(batch[seen], layers)
        parts, measures = self._label_parts(logit, batch), {}
        if is_dense:
            wanted = wanted if keep is None else tuple(tokens_at(layer, keep) for layer in wanted)
            parts["dense"] = layers_alignment(tokens, wanted, self.metric)
            measures["token_cosine"] = token_cosine(tokens[-1], wanted[-1])
        if self.crd:
            parts["crd"], measures["crd_accuracy"] = self.crd(
                feature, wanted_feature, batch["index"], batch["label"]
            )
        return self._output(logit, parts, **measures)

    def after_step(self, step: int, total: int) -> None:
        """Move the teacher, enqueue the step's keys and average the weights; see `ClassifyTask`."""
        super().after_step(step, total)
        momentum = momentum_at(step, total, *self.momentum)
        self.teacher.follow(self.expert, momentum)
        if self.crd:
            self.crd.after_step(momentum)

    def after_skip(self) -> None:
        """Drop the keys of a step that was not taken."""
        if self.crd:
            self.crd.after_skip()

    def _kept(self) -> dict[str, nn.Module]:
        teacher = {"teacher": self.teacher.expert} if self.teacher.moves else {}
        return super()._kept() | teacher | ({"crd": self.crd} if self.crd else {})
