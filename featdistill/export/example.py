"""P(AI-generated) of the image that is named on the command line, from the exported graph next to this file.

Needs NumPy, Pillow and ONNX Runtime (or OpenVINO, for an export to its format); no PyTorch.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

HERE = Path(__file__).parent


def pixels(image: Image.Image, size: int, resize: str, max_side_px: int | None = None, **_) -> np.ndarray:
    """Return an image as (1, 3, S, S) uint8; export.json says in words what happens here."""
    image = ImageOps.exif_transpose(image).convert("RGB")
    if max_side_px and max(image.size) > max_side_px:
        factor = max_side_px / max(image.size)
        image = image.resize([max(round(side * factor), min(side, 16)) for side in image.size], Image.BOX)
    how, _, shorter = resize.partition(":")
    if how in ("shorter", "bilinear", "bicubic"):
        limit = 16 * min(image.size)
        image = middle(image, min(image.width, limit), min(image.height, limit))
        side = int(shorter or size)
        image = image.resize(
            [side * length // min(image.size) for length in image.size],
            Image.BILINEAR if how == "bilinear" else Image.BICUBIC,
        )
    elif how == "squash":
        image = image.resize((size, size), Image.BICUBIC)
    elif how == "pad":
        width, height = (max(0, size - side) for side in image.size)
        border = (width // 2, height // 2, width - width // 2, height - height // 2)
        image = ImageOps.expand(image, border)
    array = np.asarray(image)
    array = np.tile(array, (*(-(-size // side) if side < size else 1 for side in array.shape[:2]), 1))
    image = middle(Image.fromarray(array), size, size)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)[None])


def middle(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def logit(images: np.ndarray, graph_format: str, settings: dict) -> float:
    if graph_format == "openvino":
        import openvino

        return float(openvino.Core().compile_model(HERE / "model.xml", "CPU", settings)(images)[0][0])
    import onnxruntime

    session = onnxruntime.InferenceSession(HERE / "model.onnx", providers=["CPUExecutionProvider"])
    return float(session.run(None, {"images": images})[0][0])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: example.py IMAGE")
    card = json.loads((HERE / "export.json").read_text(encoding="utf-8"))
    try:
        images = pixels(Image.open(sys.argv[1]), **card["preprocessing"])
    except Exception as error:  # decoders raise many types
        sys.exit(f"{sys.argv[1]} could not be read: {error}")
    value = logit(images, card["graph_format"], card["settings"])
    print(f"P(AI) {1 / (1 + np.exp(-value)):.4f}, logit {value:.4f}")
