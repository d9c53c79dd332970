"""Named policies, and the line of text that names or changes one.

The tag counts and chain lengths of the public test are the challenge's (1,250 distorted images); of the other
splits only the transformations are known. What cannot be built here is replaced: JPEG AI and Cheng2020 by
AVIF, JPEG with JPEG AI by JPEG with AVIF, the challenge's watermarks and WMForger by our two, and the
adversarial perturbations by the faint pattern of the spread-spectrum watermark (which is not adversarial).
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from featdistill.command_line import UserError, nearest, one_of
from featdistill.distortions.libraries import LIBRARIES
from featdistill.distortions.policy import DistortionPolicy, Tier

# Distorted images of the public test by the number of their operations, 1 to 5.
_LENGTHS = (61.0, 324.0, 397.0, 346.0, 122.0)
_DOWNSCALE = 926
_PUBLIC_TEST = {
    "official": {"brighten": 286, "lensblur": 266, "jpeg": 150, "impulsenoise": 80, "colorsat": 65},
    "evaluation": {
        "downscale": _DOWNSCALE,
        "jpeg2000": 142,
        "jpeg_recompression_2": 112,
        "randomaspectcrop": 105,
        "randomcrop": 104,
        "jpeg_recompression_1": 96,
        "shotnoise": 87,
        "isonoise": 85,
        "perspective": 82,
        "randomtonecurve": 72,
        "clahe": 68,
        "rgbshift": 58,
        "avif": 154 + 152,  # jpeg_ai, cheng2020
        "jpeg_avif": 86,  # jpeg_recompression_comb_jpegai
        "watermark_spread_spectrum": 90 + 89 + 224,  # adv_embed_resnet, adv_embed_clip, half of watermark
        "watermark_dwt_dct": 224 + 91,  # the other half, and wmforger
    },
}
# The private test adds three transformations, assumed to be as frequent as the most similar ones.
_PRIVATE_TEST = {
    "official": _PUBLIC_TEST["official"],
    "evaluation": _PUBLIC_TEST["evaluation"] | {"jpeg_jpeg2000": 104, "glassblur": 87},
}
# Of val and val_hard only the 19 transformations are known. Downscale is assumed to be as frequent as in the
# public test, and the other 18 to be equally frequent.
_EACH = (sum(length * count for length, count in enumerate(_LENGTHS, start=1)) - _DOWNSCALE) / 18
_VAL_NEW = ("motionblur", "multnoise", "pixelate", "rgbshift", "randomcrop", "randomaspectcrop")
_VAL = {
    "official": dict.fromkeys(LIBRARIES["official"], _EACH),
    "evaluation": dict.fromkeys(_VAL_NEW, _EACH) | {"downscale": _DOWNSCALE},
}
_VAL_HARD_OFFICIAL = ("gausblur", "lensblur", "jpeg", "whitenoise", "impulsenoise", "quantization")
_VAL_HARD_NEW = ("multnoise", "rgbshift", "randomcrop", "randomaspectcrop", "randomtonecurve", "clahe")
_VAL_HARD_NEW += ("isonoise", "perspective", "avif", "jpeg_avif", "watermark_spread_spectrum")
_RECOMPRESSIONS = ("jpeg_recompression_1", "jpeg_recompression_2")
_VAL_HARD = {
    "official": dict.fromkeys(_VAL_HARD_OFFICIAL, _EACH),
    "evaluation": dict.fromkeys(_VAL_HARD_NEW, _EACH)
    | dict.fromkeys(_RECOMPRESSIONS, _EACH / 2)
    | {"downscale": _DOWNSCALE},
}
_TIERS_FORMAT = "WEIGHT:OPERATIONS:MEAN:STD or WEIGHT:0, joined by +"
_REPLACED_BY_TIERS = {"min_operations", "max_operations", "lengths", "level_mean", "level_std"}


def _like_split(counts: Mapping[str, Mapping[str, float]]) -> DistortionPolicy:
    # The official operations keep their published levels; of the others only ranges are known.
    return DistortionPolicy(counts=counts, lengths=_LENGTHS, uniform_levels=("evaluation",))


# "official": the organizers' released training pipeline (1 to 3 operations, levels from N(1, 2.5)).
# "released_featdistill": FeatDistill's released code distorts an image with probability 0.8, with the
# official or the extended library with equal probability, and draws the extended library's levels uniformly
# (mean 3), the official one's from N(1, 2.5). JPEG 2000, which takes thirty times as long as the
# others and is switched off there, is drawn a quarter as often as the others of its group.
# "moderate": probability 0.8, levels around 3 as by team TeleAI-TeleGuard (NTIRE 2026, arXiv 2604.11487).
# "strong": every image, levels from N(2.5, 2), as the stronger teams report there.
# "heavy": levels from N(3.5, 1), as team Ant International reports there, in chains as long as the splits'.
# "ant_international": the four tiers of team Ant International there: clean; 1 to 3 operations with levels
# from N(0, 2.5); 3 to 6 from N(2.5, 2); exactly 6 from N(3.5, 1). Theirs: the numbers of operations, and the
# levels, taken to count from 0 as in the organizers' code, whose N(0, 2.5) is our N(1, 2.5). Ours: tiers of
# equal weight, the official library alone, and a new draw in every epoch (theirs were made before training).
# The next four imitate the distorted half of the challenge's splits.
# "redelivery": what the web does to a picture, in chains of 1 to 3, all levels equally often; ours.
PRESETS: dict[str, DistortionPolicy] = {
    "none": DistortionPolicy(probability=0.0),
    "official": DistortionPolicy(),
    "released_featdistill": DistortionPolicy(
        probability=0.8,
        libraries={"official": 1.0, "extended": 1.0},
        uniform_levels=("extended",),
        weights={"jpeg2000": 0.25},
    ),
    "moderate": DistortionPolicy(probability=0.8, level_mean=3.0),
    "strong": DistortionPolicy(max_operations=5, level_mean=2.5, level_std=2.0),
    "heavy": DistortionPolicy(max_operations=5, level_mean=3.5, level_std=1.0),
    "ant_international": DistortionPolicy(
        tiers=(Tier(1, 0, 0), Tier(1, 1, 3, 1.0, 2.5), Tier(1, 3, 6, 3.5, 2.0), Tier(1, 6, 6, 4.5, 1.0))
    ),
    "val": _like_split(_VAL),
    "val_hard": _like_split(_VAL_HARD),
    "test_public": _like_split(_PUBLIC_TEST),
    "test_private": _like_split(_PRIVATE_TEST),
    "redelivery": DistortionPolicy(libraries={"redelivery": 1.0}, uniform_levels=("redelivery",)),
}


def parse_policy(text: str) -> DistortionPolicy:
    """Read `PRESET` or `PRESET,key=value,key=value`.

    Lists are joined by `+` (`exclude=jitter+jpeg`), weights follow a colon
    (`libraries=official:1+evaluation:2`, `weights=compression:0.5`). A tier is `WEIGHT:OPERATIONS:MEAN:STD`
    with the mean and standard deviation of its levels, or `WEIGHT:0` for images that are not distorted:
    `tiers=1:0+2:1-3:1:2.5+1:6:4.5:1`.

    Raises:
        UserError: the preset or key is unknown (the nearest is named), or the value is invalid.
    """
    name, *changes = (part.strip() for part in text.split(","))
    policy = PRESETS[one_of("distortion preset", name, PRESETS)]
    kinds = typing.get_type_hints(DistortionPolicy)
    del kinds["counts"]
    values = {}
    for change in changes:
        key, _, value = (part.strip() for part in change.partition("="))
        if key not in kinds:
            raise UserError(f"distortions '{text}': unknown key '{key}'{nearest(key, kinds)}")
        try:
            values[key] = _convert(value, kinds[key])
        except ValueError as error:
            message = f"distortions '{text}': '{value}' is not a valid value of {key}"
            raise UserError(f"{message}; write {_TIERS_FORMAT}" if key == "tiers" else message) from error
    policy = dataclasses.replace(policy, **values)
    if policy.tiers and (unused := _REPLACED_BY_TIERS.intersection(values)):
        raise UserError(
            f"distortions '{text}': each of the tiers has its own operations and levels; leave out "
            f"{', '.join(sorted(unused))}, or write tiers="
        )
    return policy


def _convert(text: str, kind: Any) -> Any:
    origin, parts = typing.get_origin(kind), [part for part in text.split("+") if part]
    if origin is Mapping:
        pairs = (part.rpartition(":") for part in parts)
        return {name: _number(weight) for name, _, weight in pairs}
    if kind == tuple[Tier, ...]:
        return tuple(map(_tier, parts))
    if origin is tuple:
        return tuple(map(_number, parts)) if typing.get_args(kind)[0] is float else tuple(parts)
    if isinstance(kind, types.UnionType):
        return None if text == "none" else int(text)
    if kind is bool:
        return ("false", "true").index(text.lower()) == 1
    return _number(text) if kind is float else kind(text)


def _tier(text: str) -> Tier:
    weight, operations, *levels = text.split(":")
    smallest, _, largest = operations.partition("-")
    tier = Tier(_number(weight), int(smallest), int(largest or smallest), *map(_number, levels))
    if len(levels) != (2 if tier.max_operations else 0):
        raise ValueError(f"not {_TIERS_FORMAT}")
    return tier


def _number(text: str) -> float:
    value = float(text)
    if math.isnan(value):
        raise ValueError("not a number")
    return value
