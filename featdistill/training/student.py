"""One training step of a student of several experts: labels, the teachers' fused logit, and their tokens.

The teachers run along with the student, on the same distorted pixels, each at its own input; or their logits
come with the batch, computed beforehand. They never change, so a checkpoint does not hold them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, logsigmoid

from featdistill.command_line import UserError
from featdistill.data.preprocessing import InputKey
from featdistill.data.train_dataset import input_name
from featdistill.inference.fusion import Fusion
from featdistill.models.backbones import facts
from featdistill.models.encoders import tokens_at
from featdistill.models.expert import Expert
from featdistill.models.masking import PatchMasking
from featdistill.recipe_groups import Student
from featdistill.training.objectives import dense_alignment, distillation
from featdistill.training.tasks import ClassifyTask
from featdistill.training.teachers import FrozenTeacher

# The views on which the student is compared with its teachers, by the value of `distill_views`.
_VIEWS = {"both": ("images", "images_clean"), "distorted": ("images",), "clean": ("images_clean",)}


def fused_logit(logits: Tensor, fusion: Fusion, names: Sequence[str]) -> Tensor:
    """Return the logit (B,) of `Fusion.apply`, from logits (experts, B) of experts in the order of `names`.

    The mean of probabilities is a sum of their logarithms' exponentials, so that it is finite for any logits.

    Raises:
        UserError: the fusion is for other experts.
    """
    fusion.check(names)

    def column(values: dict[str, float]) -> Tensor:
        return torch.tensor([[values[name]] for name in names], dtype=logits.dtype, device=logits.device)

    weights = column(fusion.weights or dict.fromkeys(names, 1 / len(names)))
    if fusion.temperature is not None:
        logits = logits / column(fusion.temperature)
    if fusion.method == "logit_mean":
        return (weights * logits).sum(0)
    if fusion.method != "probability_mean":
        raise UserError(f"a student cannot learn from the fusion {fusion.method}; use logit_mean")
    ai, real = (torch.logsumexp(weights.log() + logsigmoid(sign * logits), 0) for sign in (1, -1))
    return ai - real


class Teachers(nn.Module):
    """Frozen experts that are asked together.

    Args:
        experts: by name.
        fusion: how their logits become one.
    """

    def __init__(self, experts: dict[str, Expert], fusion: Fusion) -> None:
        super().__init__()
        fusion.check(list(experts))
        self.names, self.fusion = list(experts), fusion
        self.each = nn.ModuleList(map(FrozenTeacher, experts.values()))

    @property
    def experts(self) -> list[Expert]:
        return [teacher.expert for teacher in self.each]

    @torch.no_grad()
    def forward(self, images: Sequence[Tensor], layers: int = 1) -> tuple[Tensor, list[Tensor]]:
        """Return the fused logit (B,) and each one's tokens (B, N, C), from each one's images.

        Args:
            layers: 0 where the tokens are not needed: there may be none.
        """
        encoded = [teacher(pixels, layers) for teacher, pixels in zip(self.each, images, strict=True)]
        logits = torch.stack([one.logit for one in encoded])
        return fused_logit(logits, self.fusion, self.names), [one.tokens[-1] for one in encoded if layers]


class StudentTask(ClassifyTask):
    """Cross-entropy on the labeled images, and the divergence from the teachers' fused logit on all.

    Both are sums over images, divided by the number of all images of the batch, labeled or not. With
    `token_weight`, tokens are compared as well, after a projection for each teacher.

    Args:
        expert: the student.
        teachers: None if their logits come with the batch.
        masking: see `ClassifyTask`; teachers see whole images.
        drawn: how many distorted views have stored logits, one for each epoch; they repeat after that.

    Raises:
        UserError: settings that need teachers without any, or tokens that cannot be compared.
    """

    def __init__(
        self,
        expert: Expert,
        options: Student,
        teachers: Teachers | None,
        masking: PatchMasking | None = None,
        drawn: int = 0,
    ) -> None:
        super().__init__(expert, options, masking)
        self.teachers, self.drawn, self.compared = teachers, drawn, _VIEWS[options.distill_views]
        target, sees_views = options.distill_target, teachers is not None or drawn > 0
        if target == "view" and not sees_views:
            raise UserError(
                "distill_target view needs the teachers themselves, or a bank with the views of this run: "
                "these scores are of clean images"
            )
        if options.token_weight and teachers is None:
            raise UserError("token_weight needs the teachers themselves: stored scores come without tokens")
        for name, teacher in zip(teachers.names, teachers.experts, strict=True) if teachers else ():
            if not self._is_own(teacher.preprocessing.key):
                teacher.preprocessing.require_one_size(f"teacher {name} of a student with other inputs")
        self.sees_clean = target == "clean" or not sees_views
        parts = [_part("distill", view) for view in self.compared]
        self.weights |= dict.fromkeys(parts, options.distill_weight / len(parts))
        if options.token_weight:
            parts = [_part("tokens", view) for view in self.compared]
            self.weights |= dict.fromkeys(parts, options.token_weight / len(parts))
            expert.preprocessing.require_one_size("token_weight")
            width, self.side = _token_map(expert)
            projections = self.extras["projections"] = nn.ModuleList()
            for name, teacher in zip(teachers.names, teachers.experts, strict=True):
                _check_same_area(expert, teacher, name)
                projections.append(nn.Linear(width, _token_map(teacher)[0]))

    @property
    def keeps_layout_only(self) -> bool:
        """Whether pixels must stay in place: tokens of a distorted image are compared with a clean one's."""
        return "projections" in self.extras and self.sees_clean

    @property
    def asked(self) -> tuple[str, ...]:
        """The views that the teachers look at."""
        if self.teachers is None:
            return ()
        return ("images_clean",) if self.sees_clean else self.compared

    @property
    def views(self) -> tuple[str, ...]:
        """See `ClassifyTask.views`."""
        is_clean = "images_clean" in (*self.asked, *self.compared)
        return ("clean",) if is_clean else super().views

    @property
    def inputs(self) -> dict[str, list[InputKey]]:
        """See `ClassifyTask.inputs`."""
        keys = [expert.preprocessing.key for expert in self.teachers.experts] if self.asked else []
        others = [key for key in dict.fromkeys(keys) if not self._is_own(key)]
        return dict.fromkeys(self.asked, others)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            batch: see `ClassifyTask.forward`; a label of NaN is unknown. The teachers' images are named as by
                `input_name`. Without teachers, `targets` holds their fused logit: (B,) of the clean image, or
                (B, 1 + drawn) of the clean image and the distorted views; NaN where there is none.
        """
        images, keep = self._student_input(batch)
        layers = 1 if "projections" in self.extras else 0
        encoded, parts = self._encode(images, layers, keep, batch)
        logit, seen = encoded.logit, {"images": (encoded, keep)}
        if "images_clean" in self.compared:
            # A pass of its own, so that BatchNorm never mixes both views.
            seen["images_clean"] = (self.expert.encode(batch["images_clean"], layers), None)
        taught = {view: self.teachers(self._images_of(view, batch), layers) for view in self.asked}
        for view in self.compared:
            student, kept = seen[view]
            if self.teachers is None:
                target, teacher_tokens = self._stored(view, batch), []
            else:
                target, teacher_tokens = taught["images_clean" if self.sees_clean else view]
            temperature = self.options.distill_temperature
            parts[_part("distill", view)] = distillation(target, student.logit, temperature)
            if layers:
                distance = self._token_distance(student.tokens[-1], teacher_tokens, kept)
                parts[_part("tokens", view)] = distance
        return self._output(logit, parts)

    def _stored(self, view: str, batch: dict[str, Tensor]) -> Tensor:
        """Return the stored logits (B,) of a view."""
        targets = batch["targets"].reshape(len(batch["label"]), -1)
        if self.sees_clean or view == "images_clean":
            return targets[:, 0]
        return targets.gather(1, 1 + batch["epoch"][:, None] % self.drawn)[:, 0]

    def _is_own(self, key: InputKey) -> bool:
        """Whether a teacher's input has the pixels of the student's."""
        own = self.expert.preprocessing
        return key in (own.key, (own.sides, own.resize))

    def _images_of(self, view: str, batch: dict[str, Tensor]) -> list[Tensor]:
        keys = [expert.preprocessing.key for expert in self.teachers.experts]
        return [batch[view if self._is_own(key) else input_name(view, key)] for key in keys]

    def _token_distance(self, tokens: Tensor, teachers: list[Tensor], keep: Tensor | None) -> Tensor:
        """Return the mean distance of the student's tokens (B, N, C) to those of the teachers."""
        distances = []
        for projection, wanted in zip(self.extras["projections"], teachers, strict=True):
            wanted = resize_tokens(wanted, self.side)
            wanted = wanted if keep is None else tokens_at(wanted, keep)
            distances.append(dense_alignment(projection(tokens), wanted, "layernorm_mse"))
        return torch.stack(distances).mean()


def resize_tokens(tokens: Tensor, side: int) -> Tensor:
    """Interpolate the tokens of a square map (B, N, C) to (B, side * side, C); bilinear, antialiased."""
    batch, count, width = tokens.shape
    grid = math.isqrt(count)
    if grid == side:
        return tokens
    planes = tokens.float().transpose(1, 2).reshape(batch, width, grid, grid)
    planes = interpolate(planes, (side, side), mode="bilinear", antialias=True)
    return planes.flatten(2).transpose(1, 2)


def _part(name: str, view: str) -> str:
    return name if view == "images" else f"{name}_clean"


def _token_map(expert: Expert) -> tuple[int, int]:
    """Return the width of an expert's tokens, and the side of their square map."""
    measured = facts(expert.spec)
    side = math.isqrt(measured.tokens)
    if side * side != measured.tokens:
        raise UserError(f"token_weight: the {measured.tokens} tokens of {expert.spec.name} are not a square")
    return measured.width, side


def _check_same_area(student: Expert, teacher: Expert, name: str) -> None:
    """Refuse a teacher that sees another part of an image: its tokens are in other places."""
    ours, theirs = student.preprocessing, teacher.preprocessing
    if ours.resize != theirs.resize or (ours.resize == "crop" and ours.size != theirs.size):
        raise UserError(
            f"token_weight: teacher {name} sees another part of an image ({theirs.resize}, {theirs.size} px) "
            f"than the student ({ours.resize}, {ours.size} px); use --resize {theirs.resize}"
            + (f" --input-size {theirs.size}" if theirs.resize == "crop" else "")
        )
