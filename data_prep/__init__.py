"""Data preparation: one module a source, each run as `python -m data_prep.<name>`."""
