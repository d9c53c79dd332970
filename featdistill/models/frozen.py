"""Hashes of a backbone's layers, to tell whether tokens that were kept come from the same frozen layers."""

import hashlib

import torch

from featdistill.models.encoders import Backbone


def layer_hashes(backbone: Backbone) -> list[str]:
    """Return the SHA-256 of the weights of each entry of `Backbone.layers`.

    Buffers, such as the statistics of BatchNorm, count with the layer of the module that holds them; those of
    modules without parameters count with the stem.
    """
    names = backbone.layers()
    layer_of = {name: number for number, group in enumerate(names) for name in group}
    layer_of_module = {name.rpartition(".")[0]: number for name, number in layer_of.items()}
    hashes = [hashlib.sha256() for _ in names]
    for name, value in sorted(backbone.state_dict().items()):
        number = layer_of.get(name, layer_of_module.get(name.rpartition(".")[0], 0))
        hashes[number].update(f"{name}:{value.dtype}:{tuple(value.shape)}\n".encode())
        hashes[number].update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return [hashed.hexdigest() for hashed in hashes]
