"""Where in an image an expert looks: one number per patch token, which depends on the expert's feature.

| feature | number of a token |
|---|---|
| with `mean` or `top_tokens` | the logit if every token were like it; other parts are those of the image |
| class tokens (CLIP, DINO, DINOv2) | attention it gets from the class token, mean of heads, last block read |
| attention pooling (SigLIP, CoCa) | attention it gets from the pooling, mean of heads |
| pooling by the mean (BEiT, Swin, ConvNeXt, DINOv3) | the logit if every token were like it |
| any other (CLIP's ResNets) | its norm |
"""

from typing import NamedTuple

import torch
from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from featdistill.models import features
from featdistill.models.encoders import Backbone
from featdistill.models.expert import Expert
from featdistill.models.timm_encoders import TimmBackbone

CLASS_TOKEN = "attention of the class token, last block"
POOLING = "attention of the pooling"
LOGIT = "logit if every token were like this one"
NORM = "norm of the token"
# Atoms that average tokens.
_MEANS = ("mean", "tokens")


class TokenMap(NamedTuple):
    """The map of one image: values (rows, columns) float32 on the CPU, their kind, and the image's logit."""

    values: Tensor
    kind: str
    logit: float


@torch.inference_mode()
def token_map(expert: Expert, image: Tensor) -> TokenMap:
    """Return the map of one image (3, S, S) uint8; the expert is in evaluation mode."""
    images = image[None].to(expert.mean.device)
    if any(atom.kind in _MEANS for atom in expert.feature.atoms):
        values, logit = _mean_logits(expert, images)
        return TokenMap(_as_map(values), LOGIT, logit)
    inputs: list[tuple[Tensor, ...]] = []
    kind, attention = _attention_of(expert)
    handle = attention and attention.register_forward_pre_hook(lambda _, call: inputs.append(call))
    try:
        encoded = expert.encode(images)
    finally:
        if handle:
            handle.remove()
    tokens = encoded.tokens[-1][0]
    if attention:
        # Class and register tokens come first.
        values = _weights(attention, inputs[0])[-len(tokens) :]
    elif kind == LOGIT:
        values = _token_logits(expert, tokens)
    else:
        values = tokens.norm(dim=1)
    return TokenMap(_as_map(values), kind, encoded.logit.item())


def _as_map(values: Tensor) -> Tensor:
    return values.float().cpu().view(round(len(values) ** 0.5), -1)


def _mean_logits(expert: Expert, images: Tensor) -> tuple[Tensor, float]:
    """Return (N,), the logit if every token of an image were like each of its N tokens, and the image's.

    Of a network whose layers have different numbers of tokens, those of the last layer with a mean are
    varied. With a linear head on a mean of all tokens, the mean of the logits is the image's.
    """
    feature = expert.feature
    means = {atom: features.Atom("tokens", atom.layer) for atom in feature.atoms if atom.kind in _MEANS}
    atoms = [*dict.fromkeys([*feature.atoms, *means.values()])]
    values = features.read_atoms(expert.backbone, expert.normalized(images), atoms)
    count = max((atom.layer, values[atom].shape[1]) for atom in means.values())[1]
    varied = {}
    for atom in feature.atoms:
        tokens = values[means[atom]][0] if atom in means else ()
        if len(tokens) != count:
            varied[atom] = values[atom].expand(count, *values[atom].shape[1:])
        else:
            varied[atom] = tokens if atom.kind == "mean" else tokens[:, None].expand(-1, count, -1)
    dtype = expert.head[-1].weight.dtype
    logits, logit = (expert.head(feature.combine(part).to(dtype))[:, 0] for part in (varied, values))
    return logits, logit.item()


def _attention_of(expert: Expert) -> tuple[str, nn.Module | None]:
    """Return the kind of an expert's map, and for attention the module that it is read from."""
    backbone = expert.backbone
    if not any(atom.kind in features.POOLED for atom in expert.feature.atoms):
        layers = [atom.layer for atom in expert.feature.atoms if atom.kind == "class"]
        attention = _block_attention(backbone, max(layers)) if layers else None
        return (CLASS_TOKEN, attention) if attention else (NORM, None)
    if not isinstance(backbone, TimmBackbone):
        visual = backbone.visual
        if not hasattr(visual, "transformer"):  # a ResNet
            return NORM, None
        if visual.attn_pool is not None:
            return POOLING, visual.attn_pool.attn
        last = _block_attention(backbone, backbone.depth) if visual.pool_type == "tok" else None
        return (CLASS_TOKEN, last) if last else (NORM, None)
    model = backbone.timm_model
    pool = getattr(model, "global_pool", "avg")
    if isinstance(model, VisionTransformer):
        if isinstance(model.attn_pool, AttentionPoolLatent):
            return POOLING, model.attn_pool
        last = _block_attention(backbone, backbone.depth)
        if pool == "token" and last:
            return CLASS_TOKEN, last
    is_mean = expert.spec.feature == backbone.kind and (not isinstance(pool, str) or pool == "avg")
    return LOGIT if is_mean else NORM, None


def _block_attention(backbone: Backbone, layer: int) -> nn.Module | None:
    """Return the attention of a transformer's block, if its weights can be read."""
    if isinstance(backbone, TimmBackbone):
        blocks, kind = getattr(backbone.timm_model, "blocks", ()), Attention
    else:
        blocks, kind = backbone.visual.transformer.resblocks, nn.MultiheadAttention
    attention = getattr(blocks[layer - 1], "attn", None) if len(blocks) >= layer else None
    return attention if isinstance(attention, kind) else None


def _weights(attention: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return (tokens,): the attention weights of the first query, mean of heads."""
    if isinstance(attention, nn.MultiheadAttention):
        return attention(*inputs, need_weights=True)[1][0, 0]
    hidden = inputs[0]
    heads = (attention.num_heads, attention.head_dim)
    if isinstance(attention, AttentionPoolLatent):
        query = attention.q(attention.latent)[0, :1].unflatten(1, heads)
        key = attention.kv(hidden)[0].unflatten(1, (2, *heads))[:, 0]
    else:
        query, key, _ = attention.qkv(hidden)[0].unflatten(1, (3, *heads)).unbind(1)
        query = query[:1]
    query, key = attention.q_norm(query.transpose(0, 1)), attention.k_norm(key.transpose(0, 1))
    scores = attention.scale * query @ key.transpose(1, 2)
    return scores.softmax(dim=2).mean(dim=0)[0]


def _token_logits(expert: Expert, tokens: Tensor) -> Tensor:
    """Return (N,): for each of the tokens (N, C) the logit of an image whose tokens are all equal to it."""
    model = expert.backbone.timm_model
    prefix = getattr(model, "num_prefix_tokens", None)
    if prefix is not None:
        features = tokens[:, None].expand(-1, prefix + 1, -1)
    elif getattr(model, "output_fmt", "NCHW") == "NHWC":
        features = tokens[:, None, None]
    else:
        features = tokens[:, :, None, None]
    return expert.head(expert.backbone.pool(features))[:, 0]
