"""Where in an image an expert looks: one number per patch token, which depends on how the backbone pools.

| pooling | number of a token |
|---|---|
| class token (CLIP, DINO, DINOv2) | attention it gets from the class token in the last block, mean of heads |
| attention pooling (SigLIP, CoCa) | attention it gets from the pooling, mean of heads |
| mean of tokens or of the map (BEiT, Swin, ConvNeXt, DINOv3) | the logit if every token were like it |
| any other (CLIP's ResNets) | its norm |
"""

from typing import NamedTuple

import torch
from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from featdistill.models.encoders import Backbone
from featdistill.models.expert import Expert
from featdistill.models.timm_encoders import TimmBackbone

CLASS_TOKEN = "attention of the class token, last block"
POOLING = "attention of the pooling"
LOGIT = "logit if every token were like this one"
NORM = "norm of the token"


class TokenMap(NamedTuple):
    """The map of one image: values (rows, columns) float32 on the CPU, their kind, and the image's logit."""

    values: Tensor
    kind: str
    logit: float


@torch.inference_mode()
def token_map(expert: Expert, image: Tensor) -> TokenMap:
    """Return the map of one image (3, S, S) uint8; the expert is in evaluation mode."""
    inputs: list[tuple[Tensor, ...]] = []
    kind, attention = _attention_of(expert.backbone)
    handle = attention and attention.register_forward_pre_hook(lambda _, call: inputs.append(call))
    try:
        encoded = expert.encode(image[None].to(expert.mean.device))
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
    side = round(len(tokens) ** 0.5)
    return TokenMap(values.float().cpu().view(side, -1), kind, encoded.logit.item())


def _attention_of(backbone: Backbone) -> tuple[str, nn.Module | None]:
    """Return the kind of a backbone's map, and for the first two kinds the attention that it is read from."""
    if not isinstance(backbone, TimmBackbone):
        visual = backbone.visual
        if not hasattr(visual, "transformer"):  # a ResNet
            return NORM, None
        if visual.attn_pool is not None:
            return POOLING, visual.attn_pool.attn
        last = visual.transformer.resblocks[-1].attn
        is_supported = visual.pool_type == "tok" and isinstance(last, nn.MultiheadAttention)
        return (CLASS_TOKEN, last) if is_supported else (NORM, None)
    model = backbone.timm_model
    pool = getattr(model, "global_pool", "avg")
    if isinstance(model, VisionTransformer):
        if isinstance(model.attn_pool, AttentionPoolLatent):
            return POOLING, model.attn_pool
        last = getattr(model.blocks[-1], "attn", None)
        if pool == "token" and isinstance(last, Attention):
            return CLASS_TOKEN, last
    is_mean = not isinstance(pool, str) or pool == "avg"
    return LOGIT if is_mean else NORM, None


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
