"""Copies of an image: equal bytes, near duplicates, and which of them is kept."""
