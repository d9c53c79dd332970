"""Where in an image an expert looks: one number a token, by the way in which its backbone pools them.

| pooling | the number of a token |
|---|---|
| class token (CLIP, DINO, DINOv2) | attention that the class token pays it in the last block, mean of heads |
| attention pooling (SigLIP, CoCa) | attention that the pooling pays it, mean of heads |
| mean of tokens or of the map (BEiT, Swin, ConvNeXt, DINOv3) | the logit, were all tokens like this one |
| any other (CLIP's ResNets) | the norm of the token |
"""

from typing import NamedTuple

import torch
from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from featdistill.models.encoders import Backbone, TimmBackbone
from featdistill.models.expert import Expert

CLASS_TOKEN = "attention of the class token, last block"
POOLING = "attention of the pooling"
LOGIT = "logit, were all tokens like this one"
NORM = "norm of the token"


class TokenMap(NamedTuple):
    """What an expert makes of the parts of one image.

    Attributes:
        values: (rows, columns) float32 on the CPU.
        kind: what they are, one of the constants of this module.
        logit: of the whole image.
    """

    values: Tensor
    kind: str
    logit: float


@torch.inference_mode()
def token_map(expert: Expert, image: Tensor) -> TokenMap:
    """Return the map of one image (3, S, S) uint8; the expert is in evaluation mode."""
    backbone, seen = expert.backbone, []
    kind, attention = _attention_of(backbone)
    handle = attention and attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    try:
        encoded = expert.encode(image[None].to(expert.mean.device))
    finally:
        if handle:
            handle.remove()
    tokens = encoded.tokens[-1][0]
    if attention:
        # What the pooling and the class token pay to class and register tokens comes first.
        values = _weights(attention, seen[0])[-len(tokens) :]
    elif kind == LOGIT:
        values = _token_logits(expert, tokens)
    else:
        values = tokens.norm(dim=1)
    side = round(len(tokens) ** 0.5)
    return TokenMap(values.float().cpu().view(side, -1), kind, encoded.logit.item())


def _attention_of(backbone: Backbone) -> tuple[str, nn.Module | None]:
    """Return the kind of a backbone's map, and the attention that it is read from, if it is."""
    if not isinstance(backbone, TimmBackbone) and hasattr(backbone.visual, "transformer"):
        visual = backbone.visual
        if visual.attn_pool is not None:
            return POOLING, visual.attn_pool.attn
        last = visual.transformer.resblocks[-1].attn
        is_read = visual.pool_type == "tok" and isinstance(last, nn.MultiheadAttention)
        return (CLASS_TOKEN, last) if is_read else (NORM, None)
    model = _timm_model(backbone)
    pool = getattr(model, "global_pool", "avg")
    if isinstance(model, VisionTransformer):
        if isinstance(model.attn_pool, AttentionPoolLatent):
            return POOLING, model.attn_pool
        last = getattr(model.blocks[-1], "attn", None)
        if pool == "token" and isinstance(last, Attention):
            return CLASS_TOKEN, last
    is_mean = model is not None and (not isinstance(pool, str) or pool == "avg")
    return LOGIT if is_mean else NORM, None


def _timm_model(backbone: Backbone) -> nn.Module | None:
    if isinstance(backbone, TimmBackbone):
        return backbone.model
    return getattr(backbone.visual, "trunk", None)  # of an open_clip model on timm's


def _weights(attention: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return (tokens,): the attention that the first query pays to each token, mean of heads."""
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
    """Return (N,): the expert's logits of maps that hold nothing but one of the tokens (N, C)."""
    backbone = expert.backbone
    model = _timm_model(backbone)
    prefix = getattr(model, "num_prefix_tokens", None)
    if prefix is not None:
        features = tokens[:, None].expand(-1, prefix + 1, -1)
    elif getattr(model, "output_fmt", "NCHW") == "NHWC":
        features = tokens[:, None, None]
    else:
        features = tokens[:, :, None, None]
    if isinstance(backbone, TimmBackbone):
        pooled = model.forward_head(features, pre_logits=not backbone.projects)
    else:
        pooled = backbone.visual.head(model.forward_head(features))
    return expert.head(pooled)[:, 0]
