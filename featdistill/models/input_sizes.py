"""Which sizes of input a backbone's patches allow."""

from torch import nn

from featdistill.command_line import UserError


def patch_px(model: nn.Module) -> int:
    """Return the side of a timm model's patch in px; 1 for a model that does not cut images into patches."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None) or 1
    return patch[0] if isinstance(patch, tuple) else patch


def check_multiple(what: str, size_px: int, patch: int) -> None:
    """Raise a `UserError` that begins with `what` where a size is no multiple of the patch, both in px."""
    if size_px % patch:
        below = size_px // patch * patch
        choices = f"{below} or {below + patch}" if below else f"{patch}"
        raise UserError(f"{what}: it is no multiple of the patch of {patch} px; give {choices}")
