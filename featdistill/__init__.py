"""Robust detection of AI-generated images: from the official archives to a checked submission."""

import importlib

__version__ = "0.2.0"

# What others build on, imported when first used: `import featdistill` alone costs nothing.
_LAZY = {
    "Detector": "inference.detector",
    "load_expert": "models.expert",
    "load_ensemble": "inference.predictor",
    "DistortionPolicy": "distortions.policy",
    "parse_policy": "distortions.presets",
    "LIBRARIES": "distortions.libraries",
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'featdistill' has no attribute {name!r}")
    return getattr(importlib.import_module(f"featdistill.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
