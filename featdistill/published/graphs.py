"""Detectors published as ONNX files: Detectra v3 and Sieve ft44s, Community Forensics trained further.

Both: a ViT-S/16 at 384 px in half precision, code and weights under MIT. They see the middle 384 px of the
image, whose shorter side is brought to 440 px. Their authors call an image AI-generated from a probability of
0.65. Detectra: github.com/ashhart/Detectra at 339a548ce88ccca2e7a58245c02b03ca656f84ac. Sieve:
github.com/Phineas1500/sieve-ai-image-detector at f494e3ff7bc74509aeea4cab6fb6381de2bad7bd; where its
probability is from 0.25 to 0.85, its authors also score the middle of the original image, which is not done
here.
"""

from pathlib import Path

from featdistill.data.preprocessing import Preprocessing
from featdistill.published.entry import PublishedGraph, Source
from featdistill.runtimes.graph import Graph
from featdistill.runtimes.graph_expert import GraphExpert

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_ARCHITECTURE = "vit_small_patch16_384"
_VIT = {"parameters": 21_811_969, "size": 384, "resize": "rounded:440"}

DETECTORS = {
    "detectra": PublishedGraph(
        "Detectra v3, ViT-S/16 at 384 px (ONNX)",
        "MIT",
        Source(
            "huggingface.co", "Vontra/detectra-v1", "d8709d3c39aa69ab862748badce0d4a06e90bf4c", "model.onnx"
        ),
        **_VIT,
        sha256="1414b9aafaa01a644ed706224973f09b53a1388282104409862df9893b1b962b",
        scale=1.121656,
        offset=0.506874,
    ),
    "sieve": PublishedGraph(
        "Sieve ft44s, ViT-S/16 at 384 px (ONNX)",
        "MIT",
        Source(
            "github.com",
            "Phineas1500/sieve-ai-image-detector",
            "v0.10.0",
            "ft44s_best_fp16.onnx",
            is_release=True,
        ),
        **_VIT,
        sha256="513da879ae017cbf1e5c9e03089537f2de6149d4f3549c3e3c480b3ea2204016",
        scale=1.0,
        offset=0.43,
    ),
}


def load(path: Path, entry: PublishedGraph) -> GraphExpert:
    """Return the detector in an ONNX file as an expert.

    Raises:
        UserError: onnxruntime is not installed, or the file has other inputs and outputs.
    """
    preprocessing = Preprocessing(entry.size, entry.resize, _MEAN, _STD)
    return GraphExpert(Graph(path), preprocessing, _ARCHITECTURE, entry.scale, entry.offset)
