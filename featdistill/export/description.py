"""How an image becomes the input of a graph, in words, for programs that do not have this toolkit."""

from featdistill.data.preprocessing import Preprocessing, shorter_side

_CROP = "Of the result, the middle {size} x {size} px; offsets are (side - {size}) / 2, rounded half to even."
_RESIZED = (
    "An image more than 16 times as long as wide is first cropped to the middle part of that shape. The "
    "shorter side is resized to {shorter} px and the longer one to {shorter} * longer / shorter, rounded "
    "down, with "
)
_BICUBIC = _RESIZED + "antialiased bicubic interpolation (Pillow's BICUBIC). " + _CROP
_HOW = {
    "shorter": _BICUBIC,
    "bicubic": _BICUBIC,
    "bilinear": _RESIZED + "antialiased bilinear interpolation (Pillow's BILINEAR). " + _CROP,
    "squash": "Both sides are resized to {size} px, antialiased and bicubic (Pillow's BICUBIC).",
    "crop": "Nothing is resized. An image smaller than {size} px is repeated to the right and below. "
    + _CROP,
    "pad": "Nothing is resized. An image smaller than {size} px gets a black border, centered. " + _CROP,
}


def describe_input(preprocessing: Preprocessing) -> str:
    """Return how an image becomes (3, S, S) uint8, in plain words."""
    resize, size = preprocessing.resize, preprocessing.size
    text = _HOW[resize.partition(":")[0]].format(size=size, shorter=shorter_side(size, resize))
    if limit := preprocessing.max_side_px:
        text = f"An image whose longer side exceeds {limit} px is reduced to that by area averaging. {text}"
    return f"RGB, upright as its EXIF orientation says. {text} Channels first, values 0 to 255."
