"""One training step of each stage: modules whose forward returns `{"loss": ..., "logit": ..., parts}`.

The trainer serves both stages, because all that differs between them is here. Besides its forward a task has

| member | is |
|---|---|
| `expert` | the student, which is trained |
| `evaluated` | what is scored and saved: the average of the weights, if any, or the student |
| `views`, `inputs` | what the data set must add, see `TrainDataset` |
| `keeps_layout_only` | whether pixels must stay in place |
| `extra_parameters()` | what is trained in addition to the expert |
| `after_step()`, `after_skip()` | called after an optimizer step, or after a step that was left out |
| `after_epoch()`, `stale_norms()` | called at the end of an epoch; BatchNorm layers to renew then |
| `checkpoint()`, `load_checkpoint()` | all of the task's tensors that a killed run needs |
"""

import copy
from typing import Any

from torch import Tensor, nn, no_grad

from featdistill.data.preprocessing import InputKey
from featdistill.models.encoders import tokens_at
from featdistill.models.expert import Encoded, Expert
from featdistill.models.masking import PatchMasking
from featdistill.recipe_groups import Distillation, Objective
from featdistill.training.averages import EqualAverage, WeightAverage
from featdistill.training.contrastive import ContrastiveDistillation, gather_batch, supervised_contrastive
from featdistill.training.extras import FeatureConsistency, LayerHeads
from featdistill.training.objectives import binary_cross_entropy, consistency, layers_alignment, token_cosine
from featdistill.training.teachers import FrozenTeacher, MomentumTeacher, momentum_at


class ClassifyTask(nn.Module):
    """Stage 1: binary cross-entropy (paper, eq. 1), optionally with consistency with the clean image.

    Args:
        expert: the student.
        masking: hides patches of the images from the student, but not those of the clean view.
    """

    keeps_layout_only = False
    teacher_view = "same"

    def __init__(self, expert: Expert, options: Objective, masking: PatchMasking | None = None) -> None:
        super().__init__()
        self.expert, self.options, self.masking = expert, options, masking
        self.average: WeightAverage | EqualAverage | None = None
        if options.ema:
            self.average = WeightAverage(expert, options.ema)
        elif options.swa_start:
            self.average = EqualAverage(expert, options.swa_start)
        self.weights = {"bce": options.bce_weight}
        self.extras = nn.ModuleDict()
        if options.consistency_weight:
            self.weights["consistency"] = options.consistency_weight
        if options.feature_consistency_weight:
            self.weights["feature_consistency"] = options.feature_consistency_weight
            hidden = options.feature_consistency_hidden
            self.extras["feature_consistency"] = FeatureConsistency(expert, hidden)
        if options.supcon_weight:
            self.weights["supcon"] = options.supcon_weight
        if options.auxiliary_features and options.auxiliary_weight:
            self.weights["auxiliary"] = options.auxiliary_weight
            self.extras["auxiliary"] = LayerHeads(expert, options.auxiliary_features)

    @property
    def evaluated(self) -> Expert:
        """The expert that is scored and saved."""
        return self.average.expert if self.average and self.average.has_begun else self.expert

    @property
    def views(self) -> tuple[str, ...]:
        """Which views of an image a batch needs besides `images`, out of `clean` and `other`."""
        seen = {self.teacher_view, "clean" if self._compares_with_clean else "same"}
        return tuple(view for view in ("clean", "other") if view in seen)

    @property
    def _compares_with_clean(self) -> bool:
        return not self.weights.keys().isdisjoint(("consistency", "feature_consistency"))

    @property
    def inputs(self) -> dict[str, list[InputKey]]:
        """Inputs of other networks that a batch needs of its views: `images` or `images_VIEW` -> keys."""
        return {}

    def extra_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are trained in addition to the expert's."""
        return list(self.extras.parameters())

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            batch: `images` (B, 3, S, S), `label` (B,) in [0, 1], and `images_clean` or `images_other` (B, 3,
                S, S) if in `views`; for masking, `epoch` and `index` (B,) int64.

        Returns:
            `loss`, `logit` (B,), and the parts of the loss, unweighted, as 0-dim tensors.
        """
        images, keep = self._student_input(batch)
        encoded, parts = self._encode(images, 0, keep, batch)
        return self._output(encoded.logit, parts)

    def after_step(self, step: int, total: int) -> None:
        """Account for an optimizer step that was taken, number `step` (from 0) of `total`."""
        if self.average:
            self.average.after_step(self.expert, step)

    def after_epoch(self, epoch: int) -> None:
        """Account for the end of an epoch, counted from 1."""
        if self.average:
            self.average.after_epoch(self.expert, epoch)

    def stale_norms(self) -> list[nn.Module]:
        """Return the BatchNorm layers of `evaluated` whose statistics have to be computed anew."""
        return self.average.stale_norms(self.expert) if self.average and self.average.has_begun else []

    def after_skip(self) -> None:
        """Discard what the forward passes of a skipped step have left."""

    def checkpoint(self) -> dict[str, Any]:
        """Return all of the task's tensors that a killed run needs."""
        return {name: module.state_dict() for name, module in self._changing().items()}

    def load_checkpoint(self, state: dict[str, Any]) -> None:
        """Restore what `checkpoint` returned."""
        for name, module in self._changing().items():
            module.load_state_dict(state[name], strict=True)

    def _changing(self) -> dict[str, nn.Module]:
        average = {"average": self.average} if self.average else {}
        return {"expert": self.expert, **average, **({"extras": self.extras} if self.extras else {})}

    def _student_input(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return the images as the student sees them, and the tokens to keep; None: all."""
        return self.masking(batch) if self.masking else (batch["images"], None)

    def _encode(
        self, images: Tensor, layers: int, keep: Tensor | None, batch: dict[str, Tensor]
    ) -> tuple[Encoded, dict[str, Tensor]]:
        """Encode images as the student sees them; return also the parts of the loss without a teacher."""
        label, parts = batch["label"], {}
        if "auxiliary" in self.weights:
            heads = self.extras["auxiliary"]
            encoded, values = self.expert.encode_with(images, heads.atoms, layers, keep)
            parts["auxiliary"] = heads(values, label, self.options)
        else:
            encoded = self.expert.encode(images, layers, keep)
        parts["bce"] = binary_cross_entropy(encoded.logit, label, self.options)
        if "supcon" in self.weights:
            joint = gather_batch(encoded.feature, label.round())
            parts["supcon"] = supervised_contrastive(*joint, self.options.supcon_temperature)
        if self._compares_with_clean:
            # A separate pass, in the student's mode, so that BatchNorm never mixes both views. It comes after
            # the pass with gradient, since autocast may cache weights that have none.
            with no_grad():
                clean = self.expert.encode(batch["images_clean"], 0)
            if "consistency" in self.weights:
                parts["consistency"] = consistency(clean.logit, encoded.logit)
            if "feature_consistency" in self.weights:
                match = self.extras["feature_consistency"]
                parts["feature_consistency"] = match(clean.feature, encoded.feature)
        return encoded, parts

    def _output(self, logit: Tensor, parts: dict[str, Tensor], **measures: Tensor) -> dict[str, Tensor]:
        loss = sum(self.weights[name] * part for name, part in parts.items())
        return {"loss": loss, "logit": logit, **parts, **measures}


class DistillTask(ClassifyTask):
    """Stage 2: cross-entropy and dense alignment (reading A, eq. 2), CRD (reading B, section 5.1), or both.

    The teacher starts as a copy of the student. A frozen one never changes, so it is not in the checkpoint.

    With masking, the teacher sees the whole image. Tokens that the student drops are not compared; those of
    patches that are painted over are, since the student has to infer what the teacher sees there.

    Args:
        expert: the student.
        masking: see `ClassifyTask`.
    """

    def __init__(self, expert: Expert, options: Distillation, masking: PatchMasking | None = None) -> None:
        super().__init__(expert, options, masking)
        teacher = {"frozen": FrozenTeacher, "momentum": MomentumTeacher}[options.teacher_kind]
        self.teacher, self.teacher_view = teacher(copy.deepcopy(expert)), options.teacher_view
        self.crd: ContrastiveDistillation | None = None
        objectives = options.objective.split("+")
        if "dense" in objectives:
            self.weights["dense"] = options.dense_weight
        if "crd" in objectives:
            self.weights["crd"] = options.crd_weight
            self.crd = ContrastiveDistillation(expert.feature_dim, options)

    @property
    def keeps_layout_only(self) -> bool:
        """Whether pixels must stay in place, because tokens are compared one by one."""
        return "dense" in self.weights

    def extra_parameters(self) -> list[nn.Parameter]:
        """Return those of stage 1, and the student's projection of CRD."""
        projection = list(self.crd.student_projection.parameters()) if self.crd else []
        return super().extra_parameters() + projection

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the loss of a batch; see `ClassifyTask.forward`.

        With CRD, `index` (B,) int64 identifies the images, and a mixed image counts as of the class of its
        larger part. The output also holds measures: `token_cosine` of
        student and teacher, and `crd_accuracy`, the share of images whose positive ranks first.
        """
        is_dense = "dense" in self.weights
        layers = self.options.dense_layers if is_dense else 1
        images, keep = self._student_input(batch)
        encoded, parts = self._encode(images, layers, keep, batch)
        view = "images" if self.teacher_view == "same" else f"images_{self.teacher_view}"
        _, teacher_feature, teacher_tokens = self.teacher(batch[view], layers)
        measures = {}
        if is_dense:
            if keep is not None:
                teacher_tokens = tuple(tokens_at(layer, keep) for layer in teacher_tokens)
            parts["dense"] = layers_alignment(encoded.tokens, teacher_tokens, self.options.metric)
            measures["token_cosine"] = token_cosine(encoded.tokens[-1], teacher_tokens[-1])
        if self.crd:
            parts["crd"], measures["crd_accuracy"] = self.crd(
                encoded.feature, teacher_feature, batch["index"], batch["label"].round()
            )
        return self._output(encoded.logit, parts, **measures)

    def after_step(self, step: int, total: int) -> None:
        """Update the moving average, the teacher and the queue of keys; see `ClassifyTask`."""
        super().after_step(step, total)
        momentum = momentum_at(step, total, self.options.momentum_base, self.options.momentum_max)
        self.teacher.follow(self.expert, momentum)
        if self.crd:
            self.crd.after_step(momentum)

    def after_skip(self) -> None:
        """Drop the keys of a skipped step."""
        if self.crd:
            self.crd.queue.drop_staged()

    def _changing(self) -> dict[str, nn.Module]:
        teacher = {"teacher": self.teacher.expert} if self.teacher.moves else {}
        return super()._changing() | teacher | ({"crd": self.crd} if self.crd else {})
