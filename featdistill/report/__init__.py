"""The HTML report: one file with tables, charts and pictures of the figures in `evaluation`."""
