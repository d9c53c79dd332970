"""Data preparation: one module per source, each run as `python -m data_prep.<name>`."""
