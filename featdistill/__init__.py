"""Robust detection of AI-generated images: from the official archives to a checked submission."""

__version__ = "0.1.0"
