"""Texture-aware masking: hide parts of the student's training images, chosen by their texture.

Our reading of MPFT (arXiv 2601.03586), of which we know only the idea: textured areas, which carry the
patterns of the generators seen in training, are masked, so that the model learns how an image deviates from
real ones. The measure of texture, the share that is masked, and the method are ours. `smooth` and `random`
are its controls.

Only the student's forward pass in training is masked: teachers, the clean view of the consistency loss, and
experts that are evaluated see whole images.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from featdistill.command_line import UserError
from featdistill.models.expert import Expert
from featdistill.recipe_groups import Masking

# Side of a patch for networks that do not cut the image into patches: that of most transformers.
_PATCH_PX = 16
_32_BITS = 0xFFFFFFFF


def texture_scores(images: Tensor, patch_px: int, score: str = "differences") -> Tensor:
    """Measure the texture of each patch in integers, which are equal on every device.

    | score | sum over the pixels and the three channels of a patch |
    |---|---|
    | `differences` | absolute differences of neighbors: horizontal, vertical and both diagonals |
    | `sobel` | squares of both Sobel derivatives, for pixels that have eight neighbors in the patch |
    | `variance` | variance times the square of the number of pixels |

    `differences` is PatchCraft's measure (arXiv 2311.12397). Pixels outside the patch do not count.

    Args:
        images: (B, 3, S, S) uint8.
        patch_px: side of a patch; the margin at the right and the bottom belongs to none.

    Returns:
        (B, N) int64, row by row, N = (S // patch_px) ** 2.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"texture is measured on uint8 images, not on {images.dtype}")
    grid = images.shape[-1] // patch_px
    whole = images[..., : grid * patch_px, : grid * patch_px]
    patches = whole.unflatten(3, (grid, patch_px)).unflatten(2, (grid, patch_px))
    # (B, 3, rows, y, columns, x) -> (3, y, x, B, rows, columns): long inner loops for any size of patch.
    patches = patches.permute(1, 3, 5, 0, 2, 4).int().contiguous()
    return SCORES[score](patches).flatten(1)


def uniforms(seed: int, epoch: Tensor, index: Tensor, count: int) -> Tensor:
    """Draw numbers that depend on (seed, epoch, index) alone, not on the device or the batch.

    A 32-bit hash in integer arithmetic, which needs no generator and can be compiled. Its multipliers are
    those of an integer hash found by search (github.com/skeeto/hash-prospector); both are below 2^31, so that
    no product overflows.

    Args:
        epoch, index: (B,) int64, at least 0.

    Returns:
        (B, count) float64 in (0, 1).
    """
    state = torch.full_like(index, seed & _32_BITS)
    for value in (epoch, index):
        state = _hash((_hash(state) + value) & _32_BITS)
    # Multiples of the golden ratio in 32 bits, which are far apart.
    steps = torch.arange(count, device=index.device) * 0x9E3779B9
    return (_hash((state[:, None] + steps) & _32_BITS).double() + 0.5) / 2**32


def masked_count(kind: str, ratio: float, patches: int) -> int:
    """Return how many of an image's patches are masked; at least one is not.

    `smooth` masks those that `texture` leaves at 1 - `ratio`, so that at 0.5 they are complements even for an
    odd number of patches.
    """
    share = 1 - ratio if kind == "smooth" else ratio
    count = int(share * patches + 0.5)
    return min(patches - count if kind == "smooth" else count, patches - 1)


def patch_order(scores: Tensor | None, draws: Tensor | None) -> Tensor:
    """Return (B, N) int64: the positions of the patches in the order in which they are masked.

    Args:
        scores: (B, N) texture scores; None for random order.
        draws: (B, N) in (0, 1), to draw in proportion to the scores, without replacement; patches without
            texture come last. None to sort by descending score, equal ones from the top left.
    """
    if draws is None:
        return torch.argsort(scores, dim=1, descending=True, stable=True)
    # Of exponential clocks, each rings first with a probability proportional to its rate.
    rates = 1.0 if scores is None else scores.double().clamp(min=1e-9)
    return torch.argsort(-torch.log(draws) / rates, dim=1, stable=True)


def fill_patches(images: Tensor, mask: Tensor, patch_px: int, color: Tensor) -> Tensor:
    """Fill the masked patches with a color.

    Args:
        images: (B, 3, S, S) uint8.
        mask: (B, N) bool, row by row.
        color: (3, 1, 1) uint8.
    """
    grid, size = images.shape[-1] // patch_px, images.shape[-1]
    painted = mask.unflatten(1, (grid, grid)).repeat_interleave(patch_px, 1).repeat_interleave(patch_px, 2)
    rest = size - grid * patch_px
    return torch.where(pad(painted, (0, rest, 0, rest))[:, None], color, images)


class PatchMasking(nn.Module):
    """Masks patches of a training batch; does nothing in evaluation mode.

    Labels are ignored. The mask of an image depends on (seed, epoch, index) alone.

    Pixels are filled with the color that the expert normalizes to 0, rounded to 8 bits. At the token level,
    tokens are removed before the transformer's blocks, which is faster: the others keep their position
    embeddings, and class and register tokens stay. There, the probability applies to a whole batch, by
    torch's random state, because all images of a batch need equally many tokens.

    Args:
        expert: the student. Patches are those of its transformer, or of 16 px for other networks.
        options: what to mask; its kind is not `none`.
        seed: the run's seed.

    Raises:
        UserError: the backbone cannot leave tokens out.
    """

    def __init__(self, expert: Expert, options: Masking, seed: int = 0) -> None:
        super().__init__()
        self.kind, self.ratio, self.level = options.mask, options.mask_ratio, options.mask_level
        self.score, self.probability, self.seed = options.mask_score, options.mask_prob, seed
        self.is_drawn = options.mask == "random" or options.mask_select == "sample"
        backbone = expert.backbone
        if self.level == "token" and not backbone.drops_tokens:
            raise UserError(
                f"{expert.spec.name} cannot leave tokens out before its blocks; use --mask-level pixel"
            )
        if self.level == "token" and expert.feature.top_count:
            raise UserError(
                f"feature {expert.spec.feature} needs tokens that masking may drop; use --mask-level pixel"
            )
        size = backbone.input_size
        self.patch_px = size // backbone.grid if backbone.grid else min(_PATCH_PX, size)
        self.patches = (size // self.patch_px) ** 2
        color = (torch.tensor(backbone.mean) * 255).round().to(torch.uint8)
        self.register_buffer("color", color.view(3, 1, 1), persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return the images that the student sees, and the tokens that it keeps.

        Args:
            batch: `images` (B, 3, S, S) uint8, or tokens (B, T, C); for random masks also `epoch` and `index`
                (B,) int64.

        Returns:
            Images or tokens, and the positions (B, K) int64 of the tokens to keep, ascending, or
            None for all.
        """
        images = batch["images"]
        if not self.training:
            return images, None
        if self.level == "token" and self.probability < 1 and torch.rand(()) >= self.probability:
            return images, None
        mask = self.mask(images, batch.get("epoch"), batch.get("index"))
        if self.level == "pixel":
            return fill_patches(images, mask, self.patch_px, self.color), None
        kept = mask.shape[1] - masked_count(self.kind, self.ratio, mask.shape[1])
        return images, torch.argsort(mask.byte(), dim=1, stable=True)[:, :kept]

    def mask(self, images: Tensor, epoch: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """Return (B, N) bool: which patches are masked.

        Args:
            images: (B, 3, S, S) uint8, or tokens of a random mask.
        """
        patches = self.patches if images.ndim == 3 else (images.shape[-1] // self.patch_px) ** 2
        is_chance = self.level == "pixel" and self.probability < 1
        draws = None
        if self.is_drawn or is_chance:
            draws = uniforms(self.seed, epoch, index, 1 + patches)
        scores = None if self.kind == "random" else texture_scores(images, self.patch_px, self.score)
        order = patch_order(scores, draws[:, 1:] if self.is_drawn else None)
        count = masked_count(self.kind, self.ratio, patches)
        chosen = order[:, patches - count :] if self.kind == "smooth" else order[:, :count]
        mask = torch.zeros_like(order, dtype=torch.bool).scatter(1, chosen, True)
        return mask & (draws[:, :1] < self.probability) if is_chance else mask


def make_masking(expert: Expert, options: Masking, seed: int) -> PatchMasking | None:
    """Return the masking of a recipe; None for `none`."""
    return None if options.mask == "none" else PatchMasking(expert, options, seed)


def _differences(patches: Tensor) -> Tensor:
    """Sum |a - b| over four directions: (3, P, P, B, rows, columns) int32 to (B, rows, columns)."""
    pairs = (
        (patches[:, :, 1:], patches[:, :, :-1]),
        (patches[:, 1:], patches[:, :-1]),
        (patches[:, 1:, 1:], patches[:, :-1, :-1]),
        (patches[:, 1:, :-1], patches[:, :-1, 1:]),
    )
    return sum((one - other).abs().sum(dim=(0, 1, 2)) for one, other in pairs)


def _sobel(patches: Tensor) -> Tensor:
    energy = 0
    for along, across in ((1, 2), (2, 1)):
        first, _, last = _shifted(patches, along)
        one, two, three = _shifted(last - first, across)
        energy += (one + 2 * two + three).square().sum(dim=(0, 1, 2))
    return energy


def _shifted(values: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the values along a side, starting at the first, second and third, each two shorter."""
    length = values.shape[dim] - 2
    return tuple(values.narrow(dim, first, length) for first in range(3))


def _variance(patches: Tensor) -> Tensor:
    pixels = patches.shape[1] * patches.shape[2]
    squares, sums = patches.square().sum(dim=(1, 2)), patches.sum(dim=(1, 2))
    return (pixels * squares - sums.square()).sum(dim=0)


SCORES = {"differences": _differences, "sobel": _sobel, "variance": _variance}


def _hash(state: Tensor) -> Tensor:
    """Mix the bits of numbers in [0, 2^32)."""
    state = ((state ^ (state >> 16)) * 0x21F0AAAD) & _32_BITS
    state = ((state ^ (state >> 15)) * 0x735A2D97) & _32_BITS
    return state ^ (state >> 15)
