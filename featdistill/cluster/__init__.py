"""Scoring on a cluster that has an engine of its own: Ray Data."""
